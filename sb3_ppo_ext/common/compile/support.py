"""Check what can be compiled here, and what a compiled program depends on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ext.common.compile.cpu import compiler
from sb3_ppo_ext.common.rollout.actor_critic import ActorCritic, DirectActorCritic
from sb3_ppo_ext.common.rollout.adapters import refusal
from sb3_ppo_ext.common.rollout.purity import BATCH_NORMS, has_hooks, impurity
from sb3_ppo_ext.common.torch_internals import has_gradient_hooks

REFUSED = "torch_compile=True is not allowed"


def check_can_compile(actor_critic: ActorCritic, optimizer: th.optim.Optimizer) -> None:
    """
    :param actor_critic: the policy
    :param optimizer: the optimiser of its parameters
    :raises ValueError: if ``torch_compile=True`` is not possible with these; the message says what to change
    """
    policy = actor_critic.policy
    if not isinstance(actor_critic, DirectActorCritic):
        raise ValueError(
            f"{REFUSED} with policy={type(policy).__name__}: it {refusal(policy)}; use an unchanged "
            "Stable-Baselines3 policy, or torch_compile=False"
        )
    if any(isinstance(module, BATCH_NORMS) for module in policy.modules()):
        raise ValueError(
            f"{REFUSED} with batch normalisation, whose running statistics a compiled step cannot change; use "
            "nn.LayerNorm or nn.GroupNorm, or torch_compile=False"
        )
    if not actor_critic.is_pure:
        raise ValueError(
            f"{REFUSED} with policy={type(policy).__name__}: {impurity(policy)}, and a compiled program would do only "
            "once what the module does at each call. If the module is pure, set its attribute is_pure = True; "
            "otherwise use torch_compile=False"
        )
    if has_gradient_hooks(policy.parameters()):
        raise ValueError(
            f"{REFUSED} with hooks on the gradients of parameters, which a program would not run: remove them, or use "
            "torch_compile=False"
        )
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(in_groups) != len(set(in_groups)) or not {id(p) for p in policy.parameters()} <= set(in_groups):
        raise ValueError(
            f"{REFUSED} with an optimiser that has a parameter of the policy twice or not at all: create it again with "
            "policy.parameters(), or use torch_compile=False"
        )
    plain = type(optimizer) is th.optim.Adam and all(
        not (group["amsgrad"] or group["maximize"] or group["weight_decay"])
        and group["betas"] == optimizer.param_groups[0]["betas"]
        and group["eps"] == optimizer.param_groups[0]["eps"]
        for group in optimizer.param_groups
    )
    if not plain:
        raise ValueError(
            f"{REFUSED} with optimizer_class={type(optimizer).__name__} and its settings: it must be torch.optim.Adam "
            "without amsgrad, maximize and weight_decay, with the same betas and eps for all parameters"
        )


def check_compiler(device: th.device) -> None:
    """
    :param device: of the policy
    :raises ValueError: if nothing can be compiled for this device here; the message says what to change
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{REFUSED} on device={str(device)!r}: use cpu or cuda, or torch_compile=False")
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(f"{REFUSED} without Triton, which compiles for the GPU: pip install triton")
        return
    if not shutil.which(compiler()):
        raise ValueError(
            f"{REFUSED} without a C++ compiler, {compiler()!r} was not found: install it (Debian: apt install g++), or "
            "name another in the environment variable CXX"
        )
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    if " " in folder:
        raise ValueError(
            f"{REFUSED} with a cache in {folder!r}: torch's compiler cannot use a path with a space; set "
            "TORCHINDUCTOR_CACHE_DIR to a path without spaces"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{REFUSED} with a cache in {folder!r} ({error}); set TORCHINDUCTOR_CACHE_DIR") from error


def cache_key(policy: ActorCriticPolicy) -> Hashable:
    """
    Everything that a compiled program of a policy depends on besides the values of its tensors: its modules, those of
    their attributes that are numbers or strings, and which tensors are parameters. Other attributes, such as lists, are
    not compared.

    :param policy: the policy
    :return: a key for the cache of compiled programs
    """
    modules = list(policy.modules())[1:]
    settings = tuple(
        (
            module,
            has_hooks(module),
            tuple((k, v) for k, v in vars(module).items() if type(v) in (bool, int, float, str)),
        )
        for module in modules
    )
    of_policy = policy.normalize_images, policy.share_features_extractor, policy.squash_output
    return policy, of_policy, settings, tuple(map(id, policy.parameters()))

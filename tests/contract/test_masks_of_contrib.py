"""What users of sb3-contrib's MaskablePPO have: its policies, its helpers and the scripts that they wrote for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import MlpExtractor

from sb3_ppo_ext import DualClipPPO
from tests.algorithms import have_moved, parameters
from tests.contract.test_masks import ALGORITHMS, Forbids
from tests.envs import BOX, IMAGE, scripted


def model_of(algorithm: Any, policy: Any, env: Any, **kwargs: Any) -> Any:
    return algorithm(policy, env, **{"seed": 0, "device": "cpu", **ALGORITHMS[algorithm], **kwargs})


# Its policies


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize(
    ("actions", "says"), [("discrete", "info"), ("multi-discrete", "method"), ("multi-binary", "observation")]
)
def test_its_policies_take_what_is_allowed(algorithm: Any, actions: str, says: str, tmp_path: Path) -> None:
    policy = MaskableMultiInputActorCriticPolicy if says == "observation" else MaskableActorCriticPolicy
    env = make_vec_env(lambda: Forbids(actions, says), n_envs=2, seed=0)
    model = model_of(algorithm, policy, env)
    before = parameters(model)
    model.learn(64)
    assert type(model.policy) is policy
    assert have_moved(model, before)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env)
    obs = env.reset()
    for deterministic in (True, False, True, False):
        obs, *_ = env.step(loaded.predict(obs, deterministic=deterministic)[0])
    loaded.learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize("of_its_own", [False, True], ids=["direct", "by its methods"])
def test_its_policies_without_masks(algorithm: Any, of_its_own: bool) -> None:
    policy: Any = WithExtractor if of_its_own else MaskableActorCriticPolicy
    model = model_of(algorithm, policy, scripted(action_space=spaces.MultiBinary(3)))
    before = parameters(model)
    model.learn(64)
    assert have_moved(model, before)
    assert model.predict(BOX.sample())[0].shape == (3,)


class Extractor(MlpExtractor):
    """Not known to be pure."""


class WithExtractor(MaskableActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Extractor(self.features_dim, self.net_arch, self.activation_fn)


def test_a_policy_that_must_be_asked_by_its_methods_is_refused_where_there_are_masks() -> None:
    model = model_of(DualClipPPO, WithExtractor, make_vec_env(Forbids, seed=0))
    with pytest.raises(
        ValueError, match="the environments mask actions, and the policy has an mlp_extractor of its own"
    ):
        model.learn(16)


def test_images() -> None:
    model = model_of(DualClipPPO, MaskableActorCriticCnnPolicy, scripted(IMAGE, spaces.Discrete(3)))
    before = parameters(model)
    model.learn(32)
    assert have_moved(model, before)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_compiled_is_eager(algorithm: Any) -> None:
    models = []
    for torch_compile in (False, True):
        env = make_vec_env(lambda: Forbids("multi-binary"), n_envs=2, seed=0)
        models.append(model_of(algorithm, MaskableActorCriticPolicy, env, torch_compile=torch_compile).learn(64))
    for eager, compiled in zip(*(model.policy.parameters() for model in models), strict=True):
        th.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["forward", "evaluate_actions", "get_distribution", "predict_values"])
def test_a_policy_with_a_method_of_its_own_is_refused(name: str) -> None:
    own = type("Own", (MaskableActorCriticPolicy,), {name: lambda *_, **__: None})
    with pytest.raises(ValueError, match=r"policy=Own is not allowed: .*action_masks.*sb3_contrib.MaskablePPO"):
        model_of(DualClipPPO, own, make_vec_env(Forbids))


def test_actions_of_a_box_are_refused() -> None:
    with pytest.raises(ValueError, match=r"policy=MaskableActorCriticPolicy .* is not allowed"):
        model_of(DualClipPPO, MaskableActorCriticPolicy, scripted())


# Scripts as its users write them

ENVS: dict[str, Any] = {
    "discrete": lambda: InvalidActionEnvDiscrete(dim=10, ep_length=10, n_invalid_actions=8),
    "multi_discrete": lambda: InvalidActionEnvMultiDiscrete(dims=[3, 4], ep_length=10, n_invalid_actions=4),
    "multi_binary": lambda: InvalidActionEnvMultiBinary(dims=3, ep_length=10, n_invalid_actions=2),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize("make", ENVS.values(), ids=ENVS)
def test_a_script_for_maskable_ppo(algorithm: Any, make: Any, tmp_path: Path) -> None:
    env = make()
    assert is_masking_supported(env)
    model = model_of(algorithm, MaskableActorCriticPolicy, env)
    model.learn(32, use_masking=True)
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    model.save(tmp_path / "script")
    del model

    model = algorithm.load(tmp_path / "script")
    obs, _ = env.reset()
    for _ in range(10):
        action_masks = get_action_masks(env)
        action, _states = model.predict(obs, action_masks=action_masks)
        starts = np.cumsum([0, *choices(env.action_space)[:-1]])
        assert np.asarray(action_masks)[starts + action].all()
        obs, *_ = env.step(action)


def choices(space: Any) -> list[int]:
    if isinstance(space, spaces.MultiBinary):
        return [2] * space.shape[0]
    return [int(n) for n in space.nvec] if isinstance(space, spaces.MultiDiscrete) else [int(space.n)]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_its_callback_and_its_wrapper(algorithm: Any, tmp_path: Path) -> None:
    def mask_fn(env: Any) -> Any:
        return env.unwrapped.action_masks()

    def make() -> Any:
        return Monitor(ActionMasker(ENVS["discrete"](), mask_fn))

    env = make_vec_env(make, n_envs=2, seed=0)
    assert is_masking_supported(env)
    callback = MaskableEvalCallback(
        make_vec_env(make, n_envs=1, seed=1),
        eval_freq=16,
        n_eval_episodes=2,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = model_of(algorithm, "MlpPolicy", env)
    model.learn(64, callback=callback, use_masking=True)
    assert np.load(tmp_path / "evaluations.npz")["results"].shape[1] == 2
    best = algorithm.load(tmp_path / "best_model", env=env)
    assert evaluate_policy(best, env, n_eval_episodes=2)[0] >= 0.0


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_masks_can_be_turned_off(algorithm: Any) -> None:
    env = Forbids()
    model = model_of(algorithm, "MlpPolicy", env).learn(32)
    evaluate_policy(model, env, n_eval_episodes=4, warn=False)
    with pytest.raises(AssertionError, match="is not allowed"):
        evaluate_policy(model, env, n_eval_episodes=100, warn=False, use_masking=False)
    with pytest.raises(AssertionError, match="is not allowed"):
        model.learn(1000, use_masking=False)


def test_masks_in_observations_can_be_turned_off_and_are_seen() -> None:
    env = Forbids("discrete", "observation")
    model = model_of(DualClipPPO, "MultiInputPolicy", env).learn(32)
    seen = []
    model.policy.features_extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]["action_mask"]))
    with pytest.raises(AssertionError, match="is not allowed"):
        evaluate_policy(model, env, n_eval_episodes=100, warn=False, use_masking=False)
    assert not th.cat(seen).all()

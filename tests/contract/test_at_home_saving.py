"""Saving, loading, exporting, and the same seed once more."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from tests.algorithms import ALGORITHMS, ROLLOUT, parameters, small
from tests.envs import BOX, DICT, IMAGE, ScriptedEnv

BOX_ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
# Everything that may be a schedule, as one
SCHEDULES: dict[Any, dict[str, Any]] = {
    DualClipPPO: {
        "learning_rate": "lin_1e-3",
        "clip_range": LinearSchedule(0.3, 0.1, 1.0),
        "clip_range_high": "lin_0.3",
        "clip_range_vf": "lin_0.5",
        "dual_clip": LinearSchedule(3.0, 2.0, 1.0),
        "policy_kwargs": {"critic_learning_rate": "lin_1e-3", "log_std_bounds": (-5.0, 2.0)},
    },
    AdaptiveKLPPO: {"learning_rate": "lin_1e-3", "clip_range": "lin_0.3", "target_kl": LinearSchedule(0.1, 0.01, 1.0)},
    TRPO: {"learning_rate": "lin_1e-3", "target_kl": "lin_0.1"},
    REINFORCE: {"learning_rate": "lin_1e-3"},
}


def make(n_envs: int = 2) -> Any:
    return make_vec_env(lambda: ScriptedEnv(BOX, BOX_ACTIONS), n_envs=n_envs, seed=0)


def assert_same(one: Any, other: Any) -> None:
    pairs = list(zip(one.policy.state_dict().items(), other.policy.state_dict().items(), strict=True))
    assert pairs
    for (name, p), (other_name, q) in pairs:
        assert name == other_name
        assert th.equal(p, q)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("into", ["path", "str", "file"])
def test_save_and_load(algorithm: Any, into: str, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", make(), **SCHEDULES[algorithm]).learn(2 * ROLLOUT)
    file: Any = {"path": tmp_path / "model", "str": str(tmp_path / "model.zip"), "file": io.BytesIO()}[into]
    model.save(file)
    if into == "file":
        file.seek(0)
    loaded = algorithm.load(file, env=make(), device="cpu")
    assert_same(loaded, model)
    obs = np.stack([BOX.sample() for _ in range(5)])
    for one, other in zip(model.predict(obs, deterministic=True), loaded.predict(obs, deterministic=True), strict=True):
        np.testing.assert_array_equal(one, other)
    for name, value in vars(model).items():  # what was given is what is there
        if isinstance(value, (int, float, str, bool)) and name not in ("start_time",):
            assert getattr(loaded, name) == value
        elif name in SCHEDULES[algorithm] and name != "policy_kwargs":
            assert getattr(loaded, name)(0.25) == value(0.25)
    assert loaded.lr_schedule(0.5) == model.lr_schedule(0.5)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert loaded.num_timesteps > model.num_timesteps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loaded_without_an_environment(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", make())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="auto")
    assert loaded.get_env() is None
    assert loaded.predict(BOX.sample())[0].shape == (2,)
    loaded.set_env(make())
    loaded.learn(ROLLOUT)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_get_and_set_parameters(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", make()).learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    assert model.get_parameters().keys() == {"policy", "policy.optimizer"}
    for source in (model.get_parameters(), tmp_path / "model"):
        fresh = small(algorithm, "MlpPolicy", make(), seed=1)
        assert not th.equal(parameters(fresh)[1], parameters(model)[1])
        fresh.set_parameters(source)
        assert_same(fresh, model)
        moments, others = (m.policy.optimizer.state_dict()["state"] for m in (fresh, model))
        assert moments.keys() == others.keys() != set()
        assert all(th.equal(moments[key]["exp_avg"], others[key]["exp_avg"]) for key in moments)
    only_weights = small(algorithm, "MlpPolicy", make(), seed=1)
    only_weights.set_parameters({"policy": model.policy.state_dict()}, exact_match=False)
    assert_same(only_weights, model)
    with pytest.raises(ValueError, match="do not match"):
        only_weights.set_parameters({"policy": model.policy.state_dict()})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_custom_objects_and_arguments_of_load(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", make(), **SCHEDULES[algorithm])
    model.save(tmp_path / "model")
    zero = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}
    loaded = algorithm.load(tmp_path / "model", env=make(), device="cpu", custom_objects=zero, gamma=0.5)
    assert loaded.lr_schedule(1.0) == 0.0  # as the RL Zoo loads an agent that is only watched
    assert loaded.gamma == 0.5
    with pytest.raises(ValueError, match="gamma=7"):
        algorithm.load(tmp_path / "model", env=make(), device="cpu", gamma=7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_file_is_small(algorithm: Any, tmp_path: Path) -> None:
    """Parameters and at most two moments of each, and a little: no rollout, no second copy of the policy."""
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    size = {"episodes_per_env": 100} if algorithm is REINFORCE else {"n_steps": 1024, "batch_size": 1024}
    model = small(algorithm, "MlpPolicy", env, policy_kwargs={"net_arch": [64]}, **size).learn(4096)
    model.save(tmp_path / "model")
    n_bytes = sum(p.numel() * p.element_size() for p in model.policy.parameters())
    rollout = sum(array.nbytes for array in vars(model.rollout_buffer).values() if isinstance(array, np.ndarray))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        attributes = json.loads(archive.read("data")).keys()
    assert not attributes & {"policy", "rollout_buffer", "env", "_family", "_compiled"}
    assert sizes.keys() == {
        "data", "pytorch_variables.pth", "policy.pth", "policy.optimizer.pth", "_stable_baselines3_version",
        "system_info.txt",
    }  # fmt: skip
    assert n_bytes < sizes["policy.pth"] < n_bytes + 8_000
    assert sizes["policy.optimizer.pth"] < 2 * n_bytes + 16_000
    assert sizes["data"] < 60_000 < rollout
    assert sizes["pytorch_variables.pth"] < 2_000


def serialized(path: Path) -> Iterator[tuple[str, bytes]]:
    """What the file keeps as pickles, by the name of the attribute."""
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    for name, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value:
            yield name, base64.b64decode(value[":serialized:"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_code_is_saved(algorithm: Any, tmp_path: Path) -> None:
    """
    No lambda, closure or local class among the attributes: cloudpickle would write its bytecode into the file, and
    another Python could not read that.
    """
    model = small(algorithm, "MlpPolicy", "CartPole-v1", verbose=0, **without_bounds(SCHEDULES[algorithm])).learn(64)
    model.save(tmp_path / "model")
    names = dict(serialized(tmp_path / "model.zip"))
    assert {"policy_class", "observation_space", "lr_schedule"} <= names.keys()
    for name, content in names.items():
        assert b"_make_function" not in content, name
        assert b"_make_skeleton_class" not in content, name
        assert b"_function_setstate" not in content, name


def without_bounds(kwargs: dict[str, Any]) -> dict[str, Any]:
    policy_kwargs = {k: v for k, v in kwargs.get("policy_kwargs", {}).items() if k != "log_std_bounds"}
    return {**kwargs, "policy_kwargs": policy_kwargs}


def test_a_lambda_of_the_users_own_would_be_seen(tmp_path: Path) -> None:
    """The test above can fail."""
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", clip_range=lambda _: 0.2)
    model.save(tmp_path / "model")
    assert b"_make_function" in dict(serialized(tmp_path / "model.zip"))["clip_range"]


LOADS = """
import sys
import gymnasium as gym
import sb3_ppo_ext
for name in ("DualClipPPO", "AdaptiveKLPPO", "TRPO", "REINFORCE"):
    model = getattr(sb3_ppo_ext, name).load(f"{sys.argv[1]}/{name}", env=gym.make("CartPole-v1"), device="cpu")
    model.learn(32)
    print(name, model.predict(model.env.reset(), deterministic=True)[0].shape)
assert not any(module.startswith("tests") for module in sys.modules)
"""


def test_another_process_loads_what_this_one_saved(tmp_path: Path) -> None:
    for algorithm in ALGORITHMS:
        kwargs = without_bounds(SCHEDULES[algorithm])
        small(algorithm, "MlpPolicy", "CartPole-v1", **kwargs).learn(32).save(tmp_path / algorithm.__name__)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(1,)") == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_same_seed_gives_the_same_parameters_to_the_bit(algorithm: Any, n_envs: int, use_sde: bool) -> None:
    one, same, other = (
        small(
            algorithm,
            "MlpPolicy",
            make_vec_env(lambda: ScriptedEnv(BOX, BOX_ACTIONS), n_envs=n_envs),
            seed=seed,
            use_sde=use_sde,
        ).learn(3 * ROLLOUT * n_envs)
        for seed in (7, 7, 8)
    )
    assert_same(one, same)
    assert not th.equal(parameters(one)[0], parameters(other)[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning_goes_on_as_it_would_have_where_the_seed_is_set_again(algorithm: Any, tmp_path: Path) -> None:
    """``set_random_seed`` after loading gives a model that is trained on a life of its own, always the same."""
    model = small(algorithm, "MlpPolicy", make()).learn(ROLLOUT)
    model.save(tmp_path / "model")
    copies = []
    for _ in range(2):
        copy = algorithm.load(tmp_path / "model", env=make(), device="cpu")
        copy.set_random_seed(3)
        copies.append(copy.learn(2 * ROLLOUT))
    assert_same(*copies)


class Onnxable(th.nn.Module):
    """Of SB3's documentation, "Exporting models"."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Any) -> Any:
        return self.policy(observation, deterministic=True)


@pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)
@pytest.mark.parametrize(
    ("policy", "obs_space", "action_space", "kwargs"),
    [
        ("MlpPolicy", BOX, BOX_ACTIONS, {}),
        ("MlpPolicy", BOX, spaces.Discrete(3), {}),
        ("MlpPolicy", BOX, spaces.MultiDiscrete([2, 3]), {}),
        ("MlpPolicy", BOX, spaces.MultiBinary(3), {}),
        ("MlpPolicy", BOX, BOX_ACTIONS, {"use_sde": True}),
        ("MlpPolicy", BOX, BOX_ACTIONS, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
        ("CnnPolicy", IMAGE, spaces.Discrete(3), {}),
        ("MultiInputPolicy", DICT, BOX_ACTIONS, {}),
    ],
    ids=["gaussian", "categorical", "multi_categorical", "bernoulli", "gsde", "squashed", "cnn", "dict"],
)
def test_onnx(policy: str, obs_space: Any, action_space: Any, kwargs: dict[str, Any], tmp_path: Path) -> None:
    """By SB3's documented recipe. The four algorithms share their policies, so one of them is enough."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    model = small(DualClipPPO, policy, ScriptedEnv(obs_space, action_space), **kwargs).learn(ROLLOUT)
    observation: Any = model.policy.obs_to_tensor(obs_space.sample())[0]
    inputs = observation if isinstance(observation, dict) else {"input": observation}
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    observation = inputs if isinstance(observation, dict) else inputs["input"]
    path = str(tmp_path / "policy.onnx")
    exported = Onnxable(model.policy.eval())
    # SB3's distributions check their arguments, which the newer exporter cannot follow.
    arguments: tuple[Any, ...] = (observation, {})  # a dict that comes last is taken for keywords
    th.onnx.export(exported, arguments, path, opset_version=17, input_names=list(inputs), dynamo=False)
    onnx.checker.check_model(onnx.load(path))
    results = onnxruntime.InferenceSession(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with th.no_grad():
        expected = exported(observation)
    assert len(results) == 3  # actions, values, log-probabilities
    for result, tensor in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, tensor.numpy(), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("policy", "obs_space", "action_space"),
    [
        ("MlpPolicy", BOX, BOX_ACTIONS),
        ("CnnPolicy", IMAGE, spaces.Discrete(3)),
        ("MultiInputPolicy", DICT, spaces.MultiBinary(2)),
    ],
)
def test_cuda(algorithm: Any, policy: str, obs_space: Any, action_space: Any, tmp_path: Path) -> None:
    env = make_vec_env(lambda: ScriptedEnv(obs_space, action_space), n_envs=2, seed=0)
    model = small(algorithm, policy, env, device="cuda", policy_kwargs={"critic_learning_rate": 1e-3})
    before = parameters(model)
    model.learn(4 * ROLLOUT)
    assert all(p.is_cuda and p.isfinite().all() for p in model.policy.parameters())
    assert not all(map(th.equal, parameters(model), before))
    model.save(tmp_path / "model")
    on_cpu = algorithm.load(tmp_path / "model", env=env, device="cpu")
    obs = env.reset()
    np.testing.assert_allclose(
        on_cpu.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0], atol=1e-4
    )
    on_cpu.learn(ROLLOUT)
    on_cpu.save(tmp_path / "back")
    algorithm.load(tmp_path / "back", env=env, device="cuda").learn(ROLLOUT)


@pytest.mark.gpu
def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert small(DualClipPPO, "MlpPolicy", make(), device="auto").device.type == "cuda"

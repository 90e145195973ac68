"""Saving, loading, exporting, and the same seed once more."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from tests.algorithms import ALGORITHMS, ROLLOUT, assert_same_policy, have_moved, parameters, small
from tests.envs import BOX, BOX_ACTIONS, DICT, IMAGE, ScriptedEnv, scripted
from tests.pairwise import pairwise

# Everything that may be a schedule, as one
SCHEDULES: dict[Any, dict[str, Any]] = {
    DualClipPPO: {
        "learning_rate": "lin_1e-3",
        "clip_range": LinearSchedule(0.3, 0.1, 1.0),
        "clip_range_high": "lin_0.3",
        "clip_range_vf": "lin_0.5",
        "dual_clip": LinearSchedule(3.0, 2.0, 1.0),
        "ent_coef": "lin_0.01",
        "policy_kwargs": {"critic_learning_rate": "lin_1e-3", "log_std_bounds": (-5.0, 2.0)},
    },
    AdaptiveKLPPO: {
        "learning_rate": "lin_1e-3",
        "clip_range": "lin_0.3",
        "target_kl": LinearSchedule(0.1, 0.01, 1.0),
        "ent_coef": "lin_0.01",
    },
    TRPO: {"learning_rate": "lin_1e-3", "target_kl": "lin_0.1", "ent_coef": "lin_0.01"},
    REINFORCE: {"learning_rate": "lin_1e-3", "ent_coef": "lin_0.01"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("into", ["path", "str", "file"])
def test_what_is_loaded_is_what_was_saved(algorithm: Any, into: str, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", scripted(), **SCHEDULES[algorithm]).learn(2 * ROLLOUT)
    file: Any = {"path": tmp_path / "model", "str": str(tmp_path / "model.zip"), "file": io.BytesIO()}[into]
    model.save(file)
    if into == "file":
        file.seek(0)
    loaded = algorithm.load(file, env=scripted(), device="cpu")
    assert_same_policy(loaded, model)
    obs = np.stack([BOX.sample() for _ in range(5)])
    for one, other in zip(model.predict(obs, deterministic=True), loaded.predict(obs, deterministic=True), strict=True):
        np.testing.assert_array_equal(one, other)
    for name, value in vars(model).items():  # what was given is what is there
        if isinstance(value, (int, float, str, bool)) and name not in ("start_time",):
            assert getattr(loaded, name) == value
        elif name in SCHEDULES[algorithm] and name != "policy_kwargs":
            assert getattr(loaded, name)(0.25) == value(0.25)
    # The clip ranges become schedules, as in SB3.
    for name in SCHEDULES[algorithm].keys() - {"clip_range", "clip_range_vf", "policy_kwargs"}:
        assert repr(getattr(loaded, name)) == repr(SCHEDULES[algorithm][name])
    assert loaded.lr_schedule(0.5) == model.lr_schedule(0.5)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert loaded.num_timesteps > model.num_timesteps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_model_is_loaded_without_an_environment(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", scripted())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="auto")
    assert loaded.get_env() is None
    assert loaded.predict(BOX.sample())[0].shape == (2,)
    loaded.set_env(scripted())
    loaded.learn(ROLLOUT)


def test_the_id_of_an_environment_is_one_everywhere(tmp_path: Path) -> None:
    """Stable-Baselines3 takes an id in the constructor alone."""
    small(DualClipPPO, "MlpPolicy", "CartPole-v1").save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    first = loaded.get_env()
    assert loaded.learn(ROLLOUT).num_timesteps == ROLLOUT
    loaded.set_env("CartPole-v1")
    assert loaded.get_env() is not first
    with pytest.raises(ValueError, match="spaces do not match"):
        DualClipPPO.load(tmp_path / "model", env="Pendulum-v1", device="cpu")


def test_a_file_of_sb3(tmp_path: Path) -> None:
    """SB3's PPO is an algorithm of this package with other defaults, so its files are read."""
    theirs = PPO("MlpPolicy", scripted(), n_steps=ROLLOUT, batch_size=8, clip_range=0.3, device="cpu").learn(
        2 * ROLLOUT
    )
    theirs.save(tmp_path / "model")
    ours = DualClipPPO.load(tmp_path / "model", env=scripted(), device="cpu", dual_clip=None)
    assert_same_policy(ours, theirs)
    assert ours.clip_range(1.0) == 0.3
    ours.learn(2 * ROLLOUT)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_that_is_no_model_is_named(algorithm: Any, tmp_path: Path) -> None:
    small(algorithm, "MlpPolicy", scripted()).save(tmp_path / "model")
    whole = (tmp_path / "model.zip").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "no model")
    path = tmp_path / "damaged.zip"
    middle = len(whole) // 2
    for content in (
        b"",
        b"no zip",
        other.getvalue(),
        whole[:-1000],
        whole[:100],
        whole[middle:],
        whole[:-100] + b"?" * 100,
    ):
        path.write_bytes(content)
        for source in (path, str(path), tmp_path / "damaged"):
            with pytest.raises(ValueError, match=r"damaged.* cannot be loaded: it cannot be read, or is truncated or"):
                algorithm.load(source, device="cpu")
        with pytest.raises(ValueError, match=r"BytesIO.* cannot be loaded: it cannot be read, or is truncated or"):
            algorithm.load(io.BytesIO(content), device="cpu")
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match=r"nothing.zip"):
        algorithm.load(tmp_path / "nothing", device="cpu")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        algorithm.load(tmp_path, device="cpu")
    assert (tmp_path / "model.zip").read_bytes() == whole


def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    model = small(DualClipPPO, "MlpPolicy", scripted()).learn(ROLLOUT)
    model.save(tmp_path / "model.zip")
    whole = (tmp_path / "model.zip").read_bytes()
    rng = random.Random(0)
    found = 0
    for position in rng.sample(range(len(whole)), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        (tmp_path / "model.zip").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert_same_policy(DualClipPPO.load(tmp_path / "model.zip", device="cpu"), model)
            continue
        with pytest.raises(ValueError, match=r"model.zip cannot be loaded: it (is damaged \(in|cannot be read)"):
            DualClipPPO.load(tmp_path / "model.zip", device="cpu")
        found += 1
    assert found > 40


def test_a_file_that_was_open_stays_open(tmp_path: Path) -> None:
    file = io.BytesIO(b"no zip")
    with pytest.raises(ValueError, match="cannot be loaded"):
        DualClipPPO.load(file, device="cpu")
    assert not file.closed


def test_what_is_not_the_files_fault_is_said_as_it_is(tmp_path: Path) -> None:
    small(DualClipPPO, "MlpPolicy", scripted()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        DualClipPPO.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), device="cpu")
    with pytest.raises(ValueError, match="device='gpu' is not allowed"):
        DualClipPPO.load(tmp_path / "model", device="gpu")
    with pytest.raises(TypeError, match="invalid type"):
        DualClipPPO.load(3, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "a.zip", "a.b", "new/folder/a", "folder", "folder.zip", "folder.b"])
def test_the_file_is_where_sb3_puts_it(name: str, tmp_path: Path) -> None:
    found = []
    for algorithm in (PPO, DualClipPPO):
        root = tmp_path / algorithm.__name__
        for folder in ("folder", "folder.zip", "folder.b"):
            (root / folder).mkdir(parents=True)
        model = algorithm("MlpPolicy", scripted(), n_steps=ROLLOUT, batch_size=8, device="cpu")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.save(root / name)
        said = sorted(str(warning.message).replace(str(root), "") for warning in caught)
        found.append((sorted(path.relative_to(root) for path in root.rglob("*")), said))
        algorithm.load(next(path for path in root.rglob("*") if path.is_file()), device="cpu")
    assert found[0] == found[1]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "target.zip").touch()
    (tmp_path / "link.zip").symlink_to("target.zip")
    small(DualClipPPO, "MlpPolicy", scripted()).save(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    DualClipPPO.load(tmp_path / "target", device="cpu")


def test_attributes_can_be_included_and_excluded(tmp_path: Path) -> None:
    small(DualClipPPO, "MlpPolicy", scripted()).save(tmp_path / "model", exclude=["gamma"], include=["rollout_buffer"])
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        attributes = json.loads(archive.read("data")).keys()
    assert "gamma" not in attributes
    assert "rollout_buffer" in attributes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parameters_of_one_model_are_set_in_another(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", scripted()).learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    assert model.get_parameters().keys() == {"policy", "policy.optimizer"}
    for source in (model.get_parameters(), tmp_path / "model"):
        fresh = small(algorithm, "MlpPolicy", scripted(), seed=1)
        assert not th.equal(parameters(fresh)[1], parameters(model)[1])
        fresh.set_parameters(source)
        assert_same_policy(fresh, model)
        moments, others = (m.policy.optimizer.state_dict()["state"] for m in (fresh, model))
        assert moments.keys() == others.keys() != set()
        assert all(th.equal(moments[key]["exp_avg"], others[key]["exp_avg"]) for key in moments)
    only_weights = small(algorithm, "MlpPolicy", scripted(), seed=1)
    only_weights.set_parameters({"policy": model.policy.state_dict()}, exact_match=False)
    assert_same_policy(only_weights, model)
    with pytest.raises(ValueError, match="do not match"):
        only_weights.set_parameters({"policy": model.policy.state_dict()})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_load_takes_custom_objects_and_arguments(algorithm: Any, tmp_path: Path) -> None:
    model = small(algorithm, "MlpPolicy", scripted(), **SCHEDULES[algorithm])
    model.save(tmp_path / "model")
    zero = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}
    loaded = algorithm.load(tmp_path / "model", env=scripted(), device="cpu", custom_objects=zero, gamma=0.5)
    assert loaded.lr_schedule(1.0) == 0.0  # as the RL Zoo loads an agent that is only watched
    assert loaded.gamma == 0.5
    with pytest.raises(ValueError, match="gamma=7"):
        algorithm.load(tmp_path / "model", env=scripted(), device="cpu", gamma=7)


@pytest.mark.parametrize("saved", [0.3, None])
def test_a_custom_clip_range_takes_the_place_of_the_files(saved: float | None, tmp_path: Path) -> None:
    small(AdaptiveKLPPO, "MlpPolicy", scripted(), clip_range=saved).save(tmp_path / "model")
    loaded: Any = AdaptiveKLPPO.load(tmp_path / "model", device="cpu", custom_objects={"clip_range": 0.1})
    assert loaded.clip_range(1.0) == 0.1


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
        "system_info.txt", "_algorithm",
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


@pytest.mark.parametrize(("algorithm", "n_envs", "use_sde"), pairwise(ALGORITHMS, [1, 3], [False, True]))
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
    assert_same_policy(one, same)
    assert have_moved(one, parameters(other))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning_goes_on_as_it_would_have_where_the_seed_is_set_again(algorithm: Any, tmp_path: Path) -> None:
    """``set_random_seed`` after loading gives a model that is trained on a life of its own, always the same."""
    model = small(algorithm, "MlpPolicy", scripted()).learn(ROLLOUT)
    model.save(tmp_path / "model")
    copies = []
    for _ in range(2):
        copy = algorithm.load(tmp_path / "model", env=scripted(), device="cpu")
        copy.set_random_seed(3)
        copies.append(copy.learn(2 * ROLLOUT))
    assert_same_policy(*copies)
    assert have_moved(copies[0], parameters(model))


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
def test_a_policy_is_exported_to_onnx(
    policy: str, obs_space: Any, action_space: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
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
def test_models_move_between_gpu_and_cpu(
    algorithm: Any, policy: str, obs_space: Any, action_space: Any, tmp_path: Path
) -> None:
    env = scripted(obs_space, action_space)
    model = small(algorithm, policy, env, device="cuda", policy_kwargs={"critic_learning_rate": 1e-3})
    before = parameters(model)
    model.learn(4 * ROLLOUT)
    assert all(p.is_cuda for p in model.policy.parameters())
    assert have_moved(model, before)
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
    assert small(DualClipPPO, "MlpPolicy", scripted(), device="auto").device.type == "cuda"

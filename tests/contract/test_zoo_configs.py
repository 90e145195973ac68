"""Every entry of every YAML file builds its model through the manager, and the model can take a step."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_ext.zoo import ALGORITHMS, ZooExperimentManager, config_path, register

TASKS = {
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "BipedalWalker-v3",
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "Swimmer-v5",
    "Walker2d-v5",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
    "Reacher-v5",
    "CartPoleNoVel-v1",
    "PendulumNoVel-v1",
    "Taxi-v3",
    "Taxi-v4",
    "atari",
    "default",
}

# A batch of REINFORCE is 1600 steps of this task: it does not learn it in a time that an entry could ask for.
MISSING = {("reinforce", "PendulumNoVel-v1")}

# Short rollouts, each seen once.
SMALL: dict[str, Any] = {"n_envs": 1, "n_steps": 16, "batch_size": 16, "n_epochs": 1}
SMALL_OF: dict[str, dict[str, Any]] = {
    "trpo_ext": {"n_envs": 1, "n_steps": 16, "batch_size": 16, "n_critic_updates": 1},
    "reinforce": {
        "n_envs": 1,
        "episodes_per_env": 2,
        "n_critic_updates": 1,
        "env_wrapper": [{"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 8}}],
    },
}


class StandInForAtariEnv(gym.Env[Any, Any]):
    """rl_zoo3 tells an Atari game by its class's name; the games themselves are no dependency."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._picture(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._picture(), float(action), False, False, {}

    def _picture(self) -> Any:
        return self.np_random.integers(0, 256, (84, 84, 1), np.uint8)


gym.register("StandIn-v0", StandInForAtariEnv)  # type: ignore[arg-type]


@contextlib.contextmanager
def built(algo: str, env_id: str, folder: Path, hyperparams: dict[str, Any]) -> Iterator[BaseAlgorithm]:
    register()
    manager = ZooExperimentManager(
        argparse.Namespace(), algo, env_id, str(folder), eval_freq=-1, hyperparams=hyperparams, verbose=0, device="cpu"
    )
    experiment = manager.setup_experiment()
    assert experiment is not None
    model = experiment[0]
    assert model.env is not None
    with contextlib.closing(model.env):
        yield model


def entries(algo: str) -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(config_path(algo).read_text())
    return loaded


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_all_tasks_have_an_entry_which_says_where_its_values_are_from(algo: str) -> None:
    tasks = {task for task in TASKS if (algo, task) not in MISSING}
    assert set(entries(algo)) == tasks
    lines = config_path(algo).read_text().splitlines()
    for task in tasks:
        first = next(number for number, line in enumerate(lines) if line.startswith(f"{task}:")) - 1
        while lines[first - 1].startswith("#"):
            first -= 1
        assert lines[first].startswith(("# Carried over from ", "# Tuned here", "# Default"))


@pytest.mark.parametrize(
    ("algo", "task"),
    [(algo, task) for algo in ALGORITHMS for task in sorted(TASKS) if (algo, task) not in MISSING],
)
def test_an_entry_builds_its_model_and_takes_an_update(algo: str, task: str, tmp_path: Path) -> None:
    env_id, hyperparams = task, dict(SMALL_OF.get(algo, SMALL))
    if task == "atari":
        # Its wrapper needs a real game; the stand-in is already as that wrapper would leave it.
        env_id, hyperparams["env_wrapper"] = "StandIn-v0", hyperparams.get("env_wrapper")
    elif task == "default":
        env_id = "MountainCarNoVel-v0"
    elif task.startswith("Taxi") and task not in gym.registry:
        pytest.skip(f"gymnasium {gym.__version__} has another version of {task}")
    if "Lstm" in entries(algo)[task]["policy"]:
        hyperparams["sequence_length"] = 8
    with built(algo, env_id, tmp_path, hyperparams) as model:
        assert type(model) is ALGOS[algo]
        for key in {"gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "use_sde"} & set(
            entries(algo)[task]
        ):
            assert getattr(model, key) == entries(algo)[task][key]
        before = [parameter.detach().clone() for parameter in model.policy.parameters()]
        model.learn(32)  # two updates; schedules have reached zero in the second
        after = list(model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not th.equal(old, new) for old, new in zip(before, after, strict=True))

"""Each algorithm learns, with the hyper-parameters and the budget of its YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext.zoo import ZooExperimentManager, register

pytestmark = pytest.mark.learning

GOALS = [
    ("dual_clip_ppo", "CartPole-v1", 475),
    pytest.param("adaptive_kl_ppo", "CartPole-v1", 475, marks=pytest.mark.slow),
    pytest.param("trpo_ext", "CartPole-v1", 475, marks=pytest.mark.slow),
    pytest.param("reinforce", "CartPole-v1", 475, marks=pytest.mark.slow),
    pytest.param("dual_clip_ppo", "Pendulum-v1", -300, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("algo", "env_id", "goal"), GOALS)
def test_it_learns(algo: str, env_id: str, goal: float, tmp_path: Path) -> None:
    """A mean of at least the goal over 20 episodes, by the last policy, with deterministic actions."""
    register()
    seed = 1
    th.manual_seed(seed)
    manager = ZooExperimentManager(
        argparse.Namespace(),
        algo,
        env_id,
        str(tmp_path),
        eval_freq=-1,
        seed=seed,
        log_interval=-2,
        verbose=0,
        device="cpu",
    )
    experiment = manager.setup_experiment()
    assert experiment is not None
    model = experiment[0]
    env = manager.create_envs(1, eval_env=True)
    better = goal + 0.3 * abs(goal) if goal < 0 else goal + 20
    stop = StopTrainingOnRewardThreshold(better, verbose=0)  # it need not use all of its budget
    watch = EvalCallback(env, stop, eval_freq=10_000 // model.n_envs, n_eval_episodes=10, verbose=0, warn=False)
    model.learn(manager.n_timesteps, callback=watch)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=20)
    env.close()
    model.get_env().close()
    assert mean >= goal

"""With a memory, what must be remembered is learnt; `python -m benchmarks.memory` trains longer, and more."""

from __future__ import annotations

from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.memory_tasks import RepeatPrevious
from sb3_ppo_ext import TRPO, DualClipPPO
from sb3_ppo_ext.common.algorithm import OnPolicyAlgorithm

pytestmark = pytest.mark.learning

PPO = {"n_steps": 64, "batch_size": 128, "learning_rate": 3e-3}
TRUST_REGION = {"n_steps": 128, "batch_size": 256, "target_kl": 0.05, "cg_damping": 1e-4, "n_critic_updates": 3}


@pytest.mark.parametrize(("algorithm", "options"), [(DualClipPPO, PPO), (TRPO, TRUST_REGION)])
def test_repeat_previous_is_learnt(algorithm: type[OnPolicyAlgorithm], options: dict[str, Any]) -> None:
    """
    The mean reward of a policy without memory is -0.5: one of four symbols is the right answer, and all are as likely.
    More than 0.6 of the answers of this one are right.
    """
    env = make_vec_env(lambda: RepeatPrevious(delay=2), n_envs=8, seed=0)
    policy_kwargs = {"lstm_hidden_size": 32, "net_arch": [32]}
    model = algorithm("MlpLstmPolicy", env, gamma=0.5, policy_kwargs=policy_kwargs, seed=0, device="cpu", **options)
    model.learn(8_000)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=24)
    env.close()
    assert mean > 0.2

"""
Train, save, load, evaluate: after some 12 seconds it prints the mean return of ten episodes of CartPole.

    python -m examples.first_run
"""

from __future__ import annotations

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ppo_ext import DualClipPPO


def main(path: str = "cartpole") -> None:
    """:param path: where to save the model"""
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0)
    DualClipPPO("MlpPolicy", env, n_steps=128, batch_size=256, seed=0).learn(100_000).save(path)

    model = DualClipPPO.load(path)
    mean, std = evaluate_policy(model, make_vec_env("CartPole-v1", seed=1), n_eval_episodes=10)
    print(f"Mean return of 10 episodes: {mean:.0f} +/- {std:.0f}. The highest possible is 500.")


if __name__ == "__main__":
    main()

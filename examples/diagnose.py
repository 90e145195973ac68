"""
A training that goes wrong, and what the doctor says about it. It takes some 7 seconds.

    python -m examples.diagnose

The learning rate is 300 times the default. The doctor reads the log during training, and prints what it sees, what that
usually means, and what to change first.
"""

from __future__ import annotations

from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import DoctorCallback, DualClipPPO


def main() -> None:
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    model = DualClipPPO("MlpPolicy", env, n_steps=256, learning_rate=0.1, seed=0)
    model.learn(16_384, callback=DoctorCallback(verbose=1))


if __name__ == "__main__":
    main()

"""
A training that continues after it was killed: start it, stop it by any means, start it again.

    python -m examples.resume

It writes a checkpoint every 8 192 steps, completely or not at all, and starts from the newest one. It prints the step
at which it starts. The whole training takes some 20 seconds.
"""

from __future__ import annotations

from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import DualClipPPO, SafeCheckpointCallback, latest_checkpoint, resume

N_ENVS, TOTAL = 8, 200_000


def main(folder: str = "resume_checkpoints", total: int = TOTAL) -> DualClipPPO:
    """
    :param folder: of the checkpoints
    :param total: steps of the whole training, including those before a restart
    """
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0)
    path = latest_checkpoint(folder)
    if path is None:
        model = DualClipPPO("MlpPolicy", env, n_steps=128, batch_size=256, seed=0)
    else:
        model = resume(DualClipPPO, path, env)
    print(f"Beginning after {model.num_timesteps} steps")
    every = SafeCheckpointCallback(8_192 // N_ENVS, folder, keep_last=2)
    return model.learn(total - model.num_timesteps, callback=every, reset_num_timesteps=False)


if __name__ == "__main__":
    main()

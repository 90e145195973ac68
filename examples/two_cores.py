"""
One model, trained by two processes.

    torchrun --nproc-per-node 2 examples/two_cores.py

Each process has eight environments of its own. Gradients are averaged over the processes, so that all have the same
model. Each saves it to the same path, and the first prints how long training took. Started by ``python``, this is an
ordinary training of one process. It took 20 seconds with two processes on two cores, and 27 with one.
"""

from __future__ import annotations

import os
import time

from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ext import DualClipPPO


def main(path: str = "two_cores") -> None:
    """:param path: where to save the model"""
    env = make_vec_env("CartPole-v1", n_envs=8)
    start = time.perf_counter()
    model = DualClipPPO("MlpPolicy", env, n_steps=128, batch_size=128, seed=0).learn(200_000)
    model.save(path)
    if os.environ.get("RANK", "0") == "0":
        seconds = time.perf_counter() - start
        print(f"{model.num_timesteps} steps of {os.environ.get('WORLD_SIZE', '1')} process(es), {seconds:.1f} s")


if __name__ == "__main__":
    main()

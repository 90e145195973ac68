"""
The side of :mod:`benchmarks.throughput` that is SBX's PPO. It is started by that, with the interpreter of ``.venv-sbx``
(``make sbx-env``), as JAX and what SBX needs besides have no place in the environment of the others.
"""

from __future__ import annotations

import jax  # type: ignore[import-not-found]
from sbx import PPO  # type: ignore[import-not-found]

from benchmarks.throughput import Request, Task, Training, make_env, model_arguments, serve


def make_task(request: Request) -> Task:
    """
    :param request: what to train
    :return: the training
    """
    if jax.default_backend() != ("gpu" if request.device == "cuda" else "cpu"):
        raise RuntimeError(f"device={request.device} is asked for, and the JAX of .venv-sbx has {jax.devices()}")
    arguments = model_arguments(request.workload)
    model = PPO(env=make_env(request.workload), n_epochs=request.workload.n_epochs, **arguments)

    def wait() -> None:
        jax.block_until_ready((model.policy.actor_state, model.policy.vf_state))

    return Training(model, request, wait=wait)


if __name__ == "__main__":
    serve(make_task, packages=("sbx-rl", "jax", "jaxlib", "flax", "torch"))

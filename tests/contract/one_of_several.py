"""What one of several processes does that train one model."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_ext import REINFORCE, DualClipPPO
from sb3_ppo_ext.common.checkpoint import SafeCheckpointCallback, latest_checkpoint, resume
from sb3_ppo_ext.common.errors import ProcessError
from sb3_ppo_ext.common.update import process_group
from sb3_ppo_ext.zoo.cli import main as main_of_zoo
from tests.algorithms import parameters, small
from tests.contract.zoo import SCRIPT, SMALL, TRAIN
from tests.envs import scripted


class Watched(VecEnvWrapper):
    """Keeps what the environments have shown."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.seen: list[np.ndarray] = []

    def reset(self) -> Any:
        self.seen.append(self.venv.reset())
        return self.seen[-1]

    def step_wait(self) -> Any:
        obs, *others = self.venv.step_wait()
        self.seen.append(obs)
        return (obs, *others)


class Failing(VecEnvWrapper):
    """Does something at the 20th step."""

    def __init__(self, env: Any, failure: Any) -> None:
        super().__init__(env)
        self._failure = failure
        self._n_steps = 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self._n_steps += 1
        if self._n_steps == 20:
            self._failure()
        return self.venv.step_wait()


class Counting(BaseCallback):
    """Counts, and may end the training."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self._last = last
        self.timesteps_at_end = 0

    def _on_step(self) -> bool:
        return self.n_calls != self._last

    def _on_training_end(self) -> None:
        self.timesteps_at_end = self.model.num_timesteps


def learnt() -> dict[str, Any]:
    """Learn as usual."""
    watched = Watched(scripted())
    env = VecNormalize(watched)
    model = small(DualClipPPO, "MlpPolicy", env, seed=5, verbose=1)
    counting = Counting()
    model.learn(100, callback=counting, progress_bar=False)
    rms = env.obs_rms, env.ret_rms
    return {
        "parameters": parameters(model),
        "num_timesteps": model.num_timesteps,
        "timesteps_at_end": counting.timesteps_at_end,
        "n_calls": counting.n_calls,
        "seen": np.concatenate(watched.seen),
        "statistics": [(some.mean, some.var, some.count) for some in rms],
        "n_episodes": len(model.ep_info_buffer),
    }


def stopped(algorithm: Any) -> dict[str, Any]:
    """A callback of the first process ends the training in the middle of the second rollout; then it goes on."""
    model = small(algorithm, "MlpPolicy", scripted())
    model.learn(10_000, callback=Counting(last=20))
    at_first = model.num_timesteps
    model.learn(100, reset_num_timesteps=False)
    return {"parameters": parameters(model), "num_timesteps": (at_first, model.num_timesteps)}


class Changing(BaseCallback):
    """Changes the policy at the end of the first rollout, as one does that puts back the best one."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.model.num_timesteps < 64:
            th.nn.init.zeros_(self.model.policy.value_net.bias)
            self.model.policy.value_net.bias.data += 3.0


class ChangingGamma(BaseCallback):
    """Changes what the other processes do not know of."""

    def _on_step(self) -> bool:
        self.model.gamma = 0.5
        return True


def changed() -> dict[str, Any]:
    """A callback changes the parameters, and layers keep statistics of what they see."""
    model = small(
        DualClipPPO,
        "MlpPolicy",
        scripted(),
        n_epochs=1,
        policy_kwargs={"features_extractor_class": WithBatchNorm},
    )
    collect, running_means = model._collect, []

    def watched(*args: Any) -> bool:
        running_means.append(model.policy.features_extractor.norm.running_mean.clone())
        is_complete: bool = collect(*args)
        return is_complete

    model._collect = watched
    model.learn(128, callback=Changing())
    return {
        "bias": model.policy.value_net.bias.item(),
        "parameters": parameters(model),
        "running_means": running_means,
    }


class WithBatchNorm(FlattenExtractor):
    """Observations, normalised by what was seen."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        normalized: th.Tensor = self.norm(super().forward(observations))
        return normalized


def checkpointed(folder: Path) -> dict[str, Any]:
    """Checkpoints, and another training that goes on from one."""
    model = small(DualClipPPO, "MlpPolicy", VecNormalize(Watched(scripted())))
    model.learn(200, callback=SafeCheckpointCallback(16, folder / "checkpoints", keep_last=None))
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    watched = Watched(scripted())
    resumed = resume(DualClipPPO, path, VecNormalize(watched))
    before = resumed.num_timesteps, parameters(resumed)
    resumed.learn(100, reset_num_timesteps=False)
    return {"before": before, "parameters": parameters(resumed), "seen": np.concatenate(watched.seen)}


def usual(folder: Path) -> None:
    """What does not fail, one after the other."""
    result = {
        "learnt": learnt(),
        "stopped": stopped(DualClipPPO),
        "stopped REINFORCE": stopped(REINFORCE),
        "changed": changed(),
        "checkpointed": checkpointed(folder),
    }
    th.save(result, folder / f"{os.environ['RANK']}.pt")


def zoo(folder: Path) -> None:
    """The command ``sb3-ppo-ext train``, with all that writes or shows something."""
    (folder / "zoo").mkdir(exist_ok=True)
    os.chdir(folder / "zoo")
    options = "-n 256 --save-freq 64 --eval-freq 128 --eval-episodes 1 --n-eval-envs 1 -tb tensorboard --progress"
    sys.argv = [SCRIPT, *TRAIN, *options.split(), *SMALL, "normalize:True"]
    assert main_of_zoo() == 0


def zoo_refused() -> None:
    """Another algorithm than ours, and a search."""
    sys.argv = [SCRIPT, "train", "--algo", "ppo", "--env", "CartPole-v1"]
    assert main_of_zoo() == 1
    sys.argv = [SCRIPT, *TRAIN, "-optimize"]
    assert main_of_zoo() == 1


def broken() -> None:
    raise OverflowError("the pole has left the cart")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    raise KeyboardInterrupt


def main(scenario: str, folder: Path) -> None:
    """
    :param scenario: by its name
    :param folder: to write into
    """
    rank = int(os.environ["RANK"])
    is_last = rank == int(os.environ["WORLD_SIZE"]) - 1
    if scenario == "usual":
        usual(folder)
    elif scenario == "absent":
        if is_last:
            killed()
        process_group._MEETING = timedelta(seconds=1)
        small(DualClipPPO, "MlpPolicy", scripted()).learn(100)
    elif scenario == "zoo":
        zoo_refused()
        zoo(folder)
    elif scenario == "differing":
        small(DualClipPPO, "MlpPolicy", scripted(), gamma=0.9 + 0.01 * rank).learn(100)
    elif scenario == "gamma changed":
        small(DualClipPPO, "MlpPolicy", scripted()).learn(100, callback=ChangingGamma())
    elif scenario.startswith("killed at"):
        model = small(DualClipPPO, "MlpPolicy", scripted())
        model.learn(1)
        if is_last:  # by a signal that nobody handles, wherever it is by then
            signal.setitimer(signal.ITIMER_REAL, float(scenario.split()[-1]))
        checkpoints = folder / scenario
        model.learn(1_000_000, callback=SafeCheckpointCallback(16, checkpoints), reset_num_timesteps=False)
    elif scenario == "again":
        model = small(DualClipPPO, "MlpPolicy", Failing(scripted(), broken if is_last else lambda: None))
        with contextlib.suppress(OverflowError, ProcessError):
            model.learn(100_000)
        model.learn(100_000)
    elif scenario == "broken in an update":
        model = small(DualClipPPO, "MlpPolicy", scripted())
        if is_last:
            model._after_update = broken
        model.learn(100_000)
    else:
        failure = {"broken": broken, "killed": killed, "interrupted": interrupted}[scenario]
        small(DualClipPPO, "MlpPolicy", Failing(scripted(), failure if is_last else lambda: None)).learn(100_000)

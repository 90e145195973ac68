"""
Environment steps per second of ``learn()``: ours against a peer, side by side in one run.

    python -m benchmarks.throughput --suite goals
    python -m benchmarks.throughput --suite growth
    python -m benchmarks.throughput --algo dual_clip_ppo --env HalfCheetah-v5 --n-envs 8 --steps 256 --torch-compile

Each side is a process of its own that holds its model and waits for its turn; the sides take turns, A B A B, one
iteration of ``learn()`` (a rollout and the update from it) at a time. All are held to the same processor cores and run
the same environment code and hyper-parameters. The first iterations are a warm-up, reported apart. A ratio is of two
turns of the same round: the peer's time for a step by ours. benchmarks/README.md says what the results mean.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecEnv
    from typing_extensions import Self

# What a worker does not need, torch above all, is imported where it is used: it would count as the worker's memory.

ROOT = Path(__file__).resolve().parent.parent
SBX_PYTHON = ROOT / ".venv-sbx" / "bin" / "python"
IMAGES = "synthetic-images"
SEED = 0

OURS = {
    "dual_clip_ppo": "DualClipPPO",
    "adaptive_kl_ppo": "AdaptiveKLPPO",
    "trpo": "TRPO",
    "reinforce": "REINFORCE",
}
PEERS = {"sb3": "SB3 PPO", "sbx": "SBX PPO", "cleanrl": "CleanRL PPO", "contrib": "sb3-contrib TRPO"}
PEERS_OF: dict[str, tuple[str, ...]] = {
    "dual_clip_ppo": ("sb3", "sbx", "cleanrl"),
    "adaptive_kl_ppo": ("sb3", "sbx", "cleanrl"),
    "trpo": ("contrib",),
    "reinforce": (),
}


@dataclass(frozen=True)
class Workload:
    """
    :param env: id of the environment, or :data:`IMAGES`
    :param n_envs: environments side by side
    :param n_steps: steps of each in a rollout; 0: REINFORCE's number of episodes
    :param batch_size: samples in a minibatch
    :param n_epochs: passes over a rollout; of TRPO's critic
    :param width: units in each of the two hidden layers; None: the policy's own architecture
    """

    env: str
    n_envs: int
    n_steps: int
    batch_size: int
    n_epochs: int
    width: int | None = 64

    def __str__(self) -> str:
        width = "NatureCNN" if self.width is None else f"width {self.width}"
        envs = f"{self.env}, {self.n_envs} env{'s' if self.n_envs > 1 else ''}"
        if not self.n_steps:
            return f"{envs} x 8 episodes, {width}"
        return f"{envs} x {self.n_steps} steps, batch {self.batch_size}, {self.n_epochs} epochs, {width}"


@dataclass(frozen=True)
class Side:
    """
    :param who: a key of :data:`OURS` or :data:`PEERS`, or "environment": nothing but the steps of the environment
    :param torch_compile: the switch of ours
    :param fvp_subsampling: of our TRPO
    """

    who: str
    torch_compile: bool = False
    fvp_subsampling: int = 1

    def __str__(self) -> str:
        name = {**OURS, **PEERS}.get(self.who, "environment alone")
        if self.fvp_subsampling != 1:
            name += f", fvp_subsampling={self.fvp_subsampling}"
        return f"{name}, compiled" if self.torch_compile else name


ENVIRONMENT = Side("environment")


@dataclass(frozen=True)
class Request:
    """
    :param side: who is to work
    :param workload: on what
    :param device: "cpu" or "cuda"
    :param threads: of torch
    :param actions: file that the actions of the first iteration are written to, if not empty; for
        :data:`ENVIRONMENT`, read from
    """

    side: Side
    workload: Workload
    device: str
    threads: int
    actions: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        """:param values: what ``asdict`` made of a request"""
        return cls(**{**values, "side": Side(**values["side"]), "workload": Workload(**values["workload"])})


class Turn(NamedTuple):
    """
    :param steps: of the environments, in one iteration
    :param seconds: for all of it
    :param collect: seconds of it in ``collect_rollouts``
    :param train: seconds of it in ``train``
    :param cpu: seconds of processor time
    """

    steps: int
    seconds: float
    collect: float
    train: float
    cpu: float

    @property
    def rest(self) -> float:
        """Seconds of it in neither: logging, and what else ``learn`` does."""
        return self.seconds - self.collect - self.train


# --- In the process of a side -----------------------------------------------------------------------------------------


class SyntheticImages(gym.Env[np.ndarray, np.int64]):
    """Frames of noise, 84x84x4 like the last four of an Atari game, that cost next to nothing; 500 steps an episode."""

    _FRAMES = 32

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.action_space = gym.spaces.Discrete(6)
        self._frames = np.random.default_rng(SEED).integers(0, 256, (self._FRAMES, 84, 84, 4), np.uint8)
        self._n_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._n_steps = 0
        return self._frames[0], {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._n_steps += 1
        reward = float(action == self._n_steps % 6)
        return self._frames[self._n_steps % self._FRAMES], reward, self._n_steps >= 500, False, {}


def make_env(workload: Workload) -> VecEnv:
    """
    :param workload: naming the environment
    :return: as many of it as are asked for, in this process
    """
    from stable_baselines3.common.env_util import make_vec_env

    return make_vec_env(SyntheticImages if workload.env == IMAGES else workload.env, workload.n_envs, seed=SEED)


def model_arguments(workload: Workload) -> dict[str, Any]:
    """
    :param workload: to be done
    :return: the arguments that all algorithms with rollouts of fixed length share; the others stay at their defaults
    """
    return {
        "policy": "CnnPolicy" if workload.env == IMAGES else "MlpPolicy",
        "n_steps": workload.n_steps,
        "batch_size": workload.batch_size,
        "policy_kwargs": {} if workload.width is None else {"net_arch": [workload.width] * 2},
        "seed": SEED,
    }


class Task(Protocol):
    """What a process does again and again."""

    def turn(self) -> Turn:
        """One iteration."""
        ...


class Training:
    """
    Iterations of ``learn()``, ``collect_rollouts`` and ``train`` timed apart.

    :param model: to be trained
    :param request: what it was made from
    :param wait: until the device has done what it was told
    """

    def __init__(self, model: OnPolicyAlgorithm, request: Request, wait: Callable[[], None]) -> None:
        self._model = model
        self._wait = wait
        # REINFORCE ends after one iteration, whatever number of steps is asked for.
        self._n_samples = max(request.workload.n_steps * request.workload.n_envs, 1)
        self._record_to = request.actions
        self._seconds: dict[str, float] = {}
        for name in ("collect_rollouts", "train"):
            setattr(model, name, self._timed(name, getattr(model, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self._wait()
            self._seconds[name] = time.perf_counter() - start
            return result

        return timed

    def turn(self) -> Turn:
        """One iteration, at whose end the device is done."""
        if self._record_to:
            return self._recorded_turn()
        steps = self._model.num_timesteps
        cpu, start = time.process_time(), time.perf_counter()
        self._model.learn(self._n_samples, reset_num_timesteps=False)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        steps = self._model.num_timesteps - steps
        return Turn(steps, seconds, self._seconds["collect_rollouts"], self._seconds["train"], cpu)

    def _recorded_turn(self) -> Turn:
        """One iteration, its actions written to a file, as the environment got them."""
        path, self._record_to = self._record_to, ""
        env = self._model.env
        assert env is not None
        actions: list[np.ndarray] = []
        step = env.step

        def recording_step(action: np.ndarray) -> Any:
            actions.append(np.array(action))
            return step(action)

        vars(env)["step"] = recording_step
        turn = self.turn()
        del vars(env)["step"]
        np.save(path, np.stack(actions))
        return turn


class EnvironmentAlone:
    """
    The limit: the environment steps of a training's first rollout, from the same seed by the same actions.

    :param env: as the training had it
    :param actions: of that rollout, shape ``(steps, n_envs, ...)``
    """

    def __init__(self, env: VecEnv, actions: np.ndarray) -> None:
        self._env = env
        self._actions = actions

    def turn(self) -> Turn:
        """The whole rollout."""
        self._env.seed(SEED)
        self._env.reset()
        cpu, start = time.process_time(), time.perf_counter()
        for action in self._actions:
            self._env.step(action)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Turn(len(self._actions) * self._env.num_envs, seconds, seconds, 0.0, cpu)


def make_task(request: Request) -> Task:
    """
    :param request: for any side but SBX and CleanRL
    :return: ready for its first iteration
    """
    import torch as th

    side, workload = request.side, request.workload
    env = make_env(workload)
    if side == ENVIRONMENT:
        return EnvironmentAlone(env, np.load(request.actions))
    if request.device == "cuda" and not th.cuda.is_available():
        raise RuntimeError("device=cuda is asked for, and torch sees none")

    arguments = model_arguments(workload) | {"env": env, "device": request.device}
    algorithm: Callable[..., OnPolicyAlgorithm]
    if side.who == "sb3":
        from stable_baselines3 import PPO as algorithm  # noqa: N811
    elif side.who == "contrib":
        from sb3_contrib import TRPO as algorithm  # noqa: N811
    else:
        import sb3_ppo_ext

        algorithm = getattr(sb3_ppo_ext, OURS[side.who])
        if side.torch_compile:
            arguments["torch_compile"] = True
        if side.fvp_subsampling != 1:
            arguments["fvp_subsampling"] = side.fvp_subsampling
    if side.who == "reinforce":
        del arguments["n_steps"], arguments["batch_size"]
    else:
        arguments["n_critic_updates" if side.who in ("trpo", "contrib") else "n_epochs"] = workload.n_epochs
    wait = th.cuda.synchronize if request.device == "cuda" else lambda: None
    return Training(algorithm(**arguments), request, wait)


def serve(
    make: Callable[[Request], Task],
    packages: Iterable[str] = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco", "numpy"),
) -> None:
    """
    Do what standard input says, a JSON object a line, and answer each with one on standard output.

    :param make: makes the task that is then repeated
    :param packages: whose versions are told
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no answer
    task: Task | None = None
    for line in sys.stdin:
        message = json.loads(line)
        value: Any
        try:
            if message["do"] == "make":
                task = None  # and its memory is free before the next is made
                request = Request.from_json(message["request"])
                task = make(request)
                value = {"versions": _versions(packages), "device": _check_device(request)}
            elif message["do"] == "turn":
                assert task is not None
                value = task.turn()._asdict()
            else:
                value = _peak_memory()
            answer = {"value": value}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _check_device(request: Request) -> str:
    import torch as th

    if th.get_num_threads() != request.threads:
        raise RuntimeError(f"torch has {th.get_num_threads()} threads and was to have {request.threads}")
    return th.cuda.get_device_name() if request.device == "cuda" and th.cuda.is_available() else "cpu"


def _peak_memory() -> dict[str, float]:
    """The most memory this process has had so far, in MiB; and on the CUDA device, what torch had."""
    peaks = {}
    try:
        # getrusage's maximum begins, on Linux, with the memory that the parent had.
        status = Path("/proc/self/status").read_text()
        peaks["host"] = int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) / 2**10
    except (OSError, IndexError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    th = sys.modules.get("torch")
    if th is not None and th.cuda.is_initialized():
        peaks["device"] = th.cuda.max_memory_allocated() / 2**20
    return peaks


# --- In the process that lets them take turns -------------------------------------------------------------------------


class FailedError(RuntimeError):
    """A side cannot do its work."""


@dataclass(frozen=True)
class Settings:
    """
    :param device: "cpu" or "cuda"
    :param threads: of each side; on the CPU each is also held to as many cores
    :param repeats: turns of each side
    :param n_warm_up: iterations of each before them
    :param cleanrl_script: path of CleanRL's script, if that is a peer
    :param cleanrl_python: interpreter that can run it
    """

    device: str
    threads: int
    repeats: int
    n_warm_up: int
    cleanrl_script: str
    cleanrl_python: str


class Party(ABC):
    """Whoever takes turns."""

    versions: dict[str, str]
    device: str

    @abstractmethod
    def make(self, request: Request) -> None:
        """:param request: what the turns will be about"""

    @abstractmethod
    def warm_up(self, n_turns: int) -> list[Turn]:
        """:param n_turns: to be taken, before any that counts"""

    @abstractmethod
    def turn(self) -> Turn:
        """One turn."""

    @abstractmethod
    def peak_memory(self) -> dict[str, float]:
        """In MiB, of the "host" and, perhaps, of the "device"."""

    @abstractmethod
    def close(self) -> None:
        """End it; a second time does nothing."""


class Worker(Party):
    """
    A process that waits for its turns.

    :param side: that it is for
    :param settings: of the run
    :param folder: for its temporary files, what torch compiles among them
    """

    def __init__(self, side: Side, settings: Settings, folder: Path) -> None:
        self._side = side
        folder.mkdir(exist_ok=True)
        self._errors = (folder / "errors").open("w+")
        if side.who == "sbx":
            command = [str(SBX_PYTHON), "-m", "benchmarks.sbx_worker"]
        else:
            command = [sys.executable, "-c", "from benchmarks import throughput as t; t.serve(t.make_task)"]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment_variables(settings, str(folder), of_our_own=side.who != "sbx"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def _ask(self, do: str, **values: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise FailedError(f"{self._side} ended with status {self._process.wait()}; it said: {_last(self._errors)}")
        message = json.loads(answer)
        if "error" in message:
            raise FailedError(f"{self._side}: {message['error']}")
        return message["value"]

    def make(self, request: Request) -> None:
        told = self._ask("make", request=asdict(request))
        self.versions, self.device = told["versions"], told["device"]

    def warm_up(self, n_turns: int) -> list[Turn]:
        return [self.turn() for _ in range(n_turns)]

    def turn(self) -> Turn:
        return Turn(**self._ask("turn"))

    def peak_memory(self) -> dict[str, float]:
        peaks: dict[str, float] = self._ask("memory")
        return peaks

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


def _last(file: TextIO) -> str:
    """The last words in a file."""
    file.seek(0)
    return "\n".join(file.read().strip().splitlines()[-5:])


class CleanRL(Party):
    """
    CleanRL's script, unmodified. It cannot wait, so a turn is a run of it: three iterations, of which the first is its
    warm-up. The time is from the steps per second that it prints, which it counts from the start of its loop.

    :param settings: of the run
    """

    _ITERATIONS = 3

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peak = math.nan
        self.versions = {}
        self.device = ""

    def make(self, request: Request) -> None:
        workload = request.workload
        self._n_samples = workload.n_envs * workload.n_steps
        if workload.width != 64 or self._n_samples % workload.batch_size:
            raise FailedError("CleanRL has networks of width 64 and minibatches of one size only")
        values: dict[str, Any] = {
            "seed": SEED,
            "env-id": workload.env,
            "total-timesteps": self._ITERATIONS * self._n_samples,
            "learning-rate": 3e-4,
            "num-envs": workload.n_envs,
            "num-steps": workload.n_steps,
            "num-minibatches": self._n_samples // workload.batch_size,
            "update-epochs": workload.n_epochs,
            "gamma": 0.99,
            "gae-lambda": 0.95,
            "clip-coef": 0.2,
            "ent-coef": 0.0,
            "vf-coef": 0.5,
            "max-grad-norm": 0.5,
        }
        switches = {"cuda": request.device == "cuda", "anneal-lr": False, "clip-vloss": False}
        script = Path(self._settings.cleanrl_script).resolve()
        self._command = [self._settings.cleanrl_python, str(script)]
        self._command += [word for name, value in values.items() for word in (f"--{name}", str(value))]
        # Its releases before 2.0 take "--cuda False", later ones "--no-cuda".
        with_words = "import tyro" not in script.read_text()
        for name, on in switches.items():
            self._command += [f"--{name}", str(on)] if with_words else [f"--{name}" if on else f"--no-{name}"]

    def warm_up(self, n_turns: int) -> list[Turn]:
        return []

    def turn(self) -> Turn:
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
            process = subprocess.Popen(
                self._command,
                cwd=folder,
                env=_environment_variables(self._settings, folder, of_our_own=False),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            output = process.stdout.read()
            process.stdout.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            told = _last(errors)
        per_second = [int(number) for number in re.findall(r"^SPS: (\d+)", output, re.MULTILINE)]
        if process.returncode or len(per_second) != self._ITERATIONS or not all(per_second):
            raise FailedError(
                f"CleanRL's script ended with status {process.returncode} and printed {len(per_second)} of "
                f"{self._ITERATIONS} 'SPS:' lines; it said: {told or output[-500:]}"
            )
        self._peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        steps = self._ITERATIONS * self._n_samples
        seconds = steps / per_second[-1] - self._n_samples / per_second[0]
        return Turn(steps - self._n_samples, seconds, math.nan, math.nan, math.nan)

    def peak_memory(self) -> dict[str, float]:
        return {"host": self._peak}

    def close(self) -> None:
        pass


def _environment_variables(settings: Settings, folder: str, *, of_our_own: bool) -> dict[str, str]:
    """
    The environment variables of a side.

    :param settings: of the run
    :param folder: for temporary files: torch keeps there what it has compiled, which the first run must not find
    :param of_our_own: whether it runs in the Python environment of this process
    """
    threads = str(settings.threads)
    variables = dict(os.environ)
    if not of_our_own:
        variables.pop("PYTHONPATH", None)
    if settings.device == "cpu":
        variables["JAX_PLATFORMS"] = "cpu"
    else:
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the others need memory of the device too
    if settings.threads == 1:
        variables["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return variables | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TMPDIR": folder,
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "torchinductor"),
        "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    }


@dataclass
class Measured:
    """
    What was measured of a side.

    :param workload: that it did
    :param side: who it was
    :param first_run: warm-up of a process that found nothing compiled; empty if that was not measured apart
    :param warm_up: of the process that was measured
    :param turns: that count
    :param peaks: memory, in MiB
    :param versions: of what it ran on
    :param device: its name
    """

    workload: Workload
    side: Side
    first_run: list[Turn] = field(default_factory=list)
    warm_up: list[Turn] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def per_step(self, part: str = "seconds") -> float:
        """:param part: of :class:`Turn`; the median of its seconds for one step of an environment"""
        seconds: list[float] = [getattr(turn, part) / turn.steps for turn in self.turns]
        return statistics.median(seconds)

    def per_second(self) -> Spread:
        """Steps a second."""
        return Spread.of(turn.steps / turn.seconds for turn in self.turns)

    def extra(self, warm_up: list[Turn]) -> float:
        """:param warm_up: seconds that it took above what the same iterations take later: of compiling, in the main"""
        return sum(turn.seconds - turn.steps * self.per_step() for turn in warm_up)

    def processor_share(self) -> float:
        """Part of the time in which the process was given a processor: below 1, another one had it."""
        share = statistics.median(turn.cpu / turn.seconds for turn in self.turns)
        return 1.0 if math.isnan(share) else share


class Spread(NamedTuple):
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """:param numbers: at least one"""
        values = list(numbers)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return "-" if math.isnan(self.median) else f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Measured, peer: Measured, part: str = "seconds") -> Spread:
    """
    How many times faster ours is, from the turns of the same round.

    :param ours: measured together with the peer
    :param peer: the other
    :param part: of :class:`Turn`
    """
    pairs = zip(ours.turns, peer.turns, strict=True)
    return Spread.of((getattr(b, part) / b.steps) / (getattr(a, part) / a.steps) for a, b in pairs)


class Crew:
    """
    The processes of the sides, alive until the ``with`` block ends.

    :param settings: of the run
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._parties: dict[Side, Party] = {}

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self, side: Side) -> Party:
        party = (
            CleanRL(self._settings)
            if side.who == "cleanrl"
            else Worker(side, self._settings, self._folder / re.sub(r"\W+", "-", str(side)))
        )
        self._stack.callback(party.close)
        return party

    def measure(self, workload: Workload, sides: Sequence[Side], *, first_run: bool) -> dict[Side, Measured]:
        """
        :param workload: of all sides
        :param sides: in the order of their turns; the environment alone comes last
        :param first_run: whether the compiled ones are first warmed up in a process that finds nothing compiled, to
            tell its compile time from that of later processes, which find what torch has kept
        :return: what was measured
        """
        print(f"\n{workload}", file=sys.stderr)
        recorded = str(self._folder / "actions.npy")
        results = {side: Measured(workload, side) for side in sides}
        for position, side in enumerate(sides):
            print(f"  {side}: warm-up ...", end=" ", file=sys.stderr, flush=True)
            start = time.perf_counter()
            result = results[side]
            actions = recorded if position == 0 or side == ENVIRONMENT else ""
            request = Request(side, workload, self._settings.device, self._settings.threads, actions)
            if first_run and side.torch_compile:
                party = self._start(side)
                party.make(request)
                result.first_run = party.warm_up(self._settings.n_warm_up)
                party.close()
            if side not in self._parties:
                self._parties[side] = self._start(side)
            party = self._parties[side]
            party.make(request)
            result.warm_up = party.warm_up(self._settings.n_warm_up)
            result.versions, result.device = party.versions, party.device
            print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
        _check_same_environment(results.values())
        for repeat in range(self._settings.repeats):
            for side in sides:
                results[side].turns.append(self._parties[side].turn())
            rates = ", ".join(f"{r.turns[-1].steps / r.turns[-1].seconds:.0f}" for r in results.values())
            print(f"  {repeat + 1}/{self._settings.repeats}: {rates} steps/s", file=sys.stderr)
        for side in sides:
            results[side].peaks = self._parties[side].peak_memory()
        return results


def _check_same_environment(results: Iterable[Measured]) -> None:
    """The two Python environments must have the same environment code."""
    for package in ("python", "numpy", "gymnasium", "mujoco", "stable-baselines3", "torch"):
        versions = {r.versions[package] for r in results if package in r.versions}
        if len(versions) > 1:
            raise FailedError(
                f"{package} has different versions for different sides ({', '.join(sorted(versions))}), and the ratio "
                "would be of those too; install constraints.txt here, and remove .venv-sbx and run make sbx-env again"
            )


# --- Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """
    A ratio that is aimed at.

    :param work: what is compared
    :param workload: on what
    :param ours: one side
    :param peer: the other
    :param least: the ratio to be reached; None: no goal
    """

    work: str
    workload: Workload
    ours: Side
    peer: Side
    least: float | None = None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, whose first column is text."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def side_table(results: dict[Side, Measured]) -> list[str]:
    """
    :param results: of the sides that took turns
    :return: a Markdown table with a line for each
    """
    limit = results[ENVIRONMENT].per_step() if ENVIRONMENT in results else math.nan
    rows = []
    for side, result in results.items():
        total, collect, train, rest = (
            _number(result.per_step(part) * 1e6, ".1f") for part in ("seconds", "collect", "train", "rest")
        )
        compile_first = compile_next = pays = ""
        if side.torch_compile:
            warm_ups = [result.first_run, result.warm_up] if result.first_run else [result.warm_up]
            seconds = [result.extra(warm_up) for warm_up in warm_ups]
            compile_first, compile_next = _number(seconds[0], ".1f"), _number(seconds[1], ".1f") if seconds[1:] else "-"
            eager = results.get(replace(side, torch_compile=False))
            saved = math.nan if eager is None else eager.per_step() - result.per_step()
            pays = "-" if math.isnan(saved) else "never" if saved <= 0 else f"{max(seconds[0], 0) / saved:,.0f}"
        memory = _number(result.peaks.get("host"))
        if "device" in result.peaks:
            memory += f" + {_number(result.peaks['device'])} on the device"
        speed = result.per_second()
        rows.append(
            [
                str(side),
                f"{speed.median:,.0f} ({speed.low:,.0f} to {speed.high:,.0f})",
                *([total, "", "", ""] if side == ENVIRONMENT else [total, collect, train, rest]),
                "" if math.isnan(limit) else f"{limit / result.per_step():.0%}",
                memory,
                compile_first,
                compile_next,
                pays,
            ]
        )
    head = ["side", "steps/s", "us a step", "collect", "train", "rest", "environment's share", "peak MiB"]
    return _table([*head, "compile s, first run", "next runs", "pays back after steps"], rows)


def goal_table(goals: Iterable[Goal], results: dict[Workload, dict[Side, Measured]]) -> list[str]:
    """
    :param goals: to be shown; those not measured are passed over
    :param results: of all that was measured
    :return: a Markdown table with a line for each
    """
    rows = []
    for goal in goals:
        sides = results.get(goal.workload, {})
        if goal.ours not in sides or goal.peer not in sides:
            continue
        ours, peer = sides[goal.ours], sides[goal.peer]
        reached = ratio(ours, peer)
        verdict = "" if goal.least is None else "yes" if reached.median >= goal.least else "**no**"
        rows.append(
            [
                goal.work,
                str(goal.workload),
                "torch_compile" if goal.ours.torch_compile else "",
                "" if goal.least is None else f">= {goal.least}",
                str(reached),
                verdict,
                str(ratio(ours, peer, "collect")),
                str(ratio(ours, peer, "train")),
            ]
        )
    return _table(["work", "on", "switch", "goal", "times faster", "held", "collect alone", "train alone"], rows)


@dataclass
class Report:
    """
    Collects what is measured and writes it to files, after each workload: a run that is broken off leaves something.

    :param title: of the page
    :param out: folder
    :param stem: name of the files, without suffix
    :param settings: of the run
    :param notes: to be printed under the tables
    """

    title: str
    out: Path
    stem: str
    settings: Settings
    notes: list[str] = field(default_factory=list)
    results: dict[Workload, dict[Side, Measured]] = field(default_factory=dict)
    machine: list[str] = field(default_factory=lambda: _machine())

    def add(self, results: dict[Side, Measured]) -> None:
        """:param results: of one workload"""
        self.results[next(iter(results.values())).workload] = results

    def write(self, tables: Sequence[Sequence[str]]) -> None:
        """:param tables: of the page, each a list of lines"""
        lines = [f"# {self.title}", "", *self._about(), ""]
        for table in tables:
            lines += [*table, ""]
        lines += [f"- {note}" for note in [*self.notes, *self._warnings()]]
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.stem}.md").write_text("\n".join(lines).rstrip() + "\n")
        self._write_csv()

    def _about(self) -> list[str]:
        measured = [m for sides in self.results.values() for m in sides.values()]
        versions: dict[str, str] = {}
        for m in measured:
            versions |= m.versions
        devices = {m.device for m in measured} - {"", "cpu"}
        settings = self.settings
        held = settings.device == "cpu" and hasattr(os, "sched_setaffinity")
        return [
            "```",
            command_line(),
            "```",
            "",
            *(f"- {line}" for line in self.machine),
            *(f"- {device}" for device in sorted(devices)),
            f"- {', '.join(f'{name} {version}' for name, version in versions.items())}",
            f"- {settings.repeats} turn(s) of each side after {settings.n_warm_up} warm-up iteration(s); "
            f"{settings.threads} thread(s){', held to as many cores' if held else ''}; device {settings.device}",
        ]

    def _warnings(self) -> Iterable[str]:
        """What the reader should know about how well it was measured."""
        shares = [(m.processor_share(), m) for sides in self.results.values() for m in sides.values()]
        if self.settings.device == "cpu" and min(share for share, _ in shares) < 0.97:
            share, worst = min(shares, key=lambda pair: pair[0])
            yield (
                "**Disturbed**: something else ran on the machine; do not trust the numbers. At worst, "
                f"{worst.side} on {worst.workload} had a processor in {share:.0%} of its time"
            )

    def _write_csv(self) -> None:
        with (self.out / f"{self.stem}.csv").open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in [command_line(), *self.machine])
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Workload.__dataclass_fields__, "side", "phase", "turn", *Turn._fields, "peak_mib"])
            for workload, sides in self.results.items():
                for side, m in sides.items():
                    phases = {"first run": m.first_run, "warm-up": m.warm_up, "measured": m.turns}
                    for phase, turns in phases.items():
                        for i, turn in enumerate(turns):
                            numbers = [turn.steps, *(f"{value:.6f}" for value in turn[1:])]
                            peak = _number(m.peaks.get("host"), ".1f")
                            writer.writerow([*asdict(workload).values(), side, phase, i, *numbers, peak])


def command_line() -> str:
    """The command that this process was started with; of absolute paths, only the last part."""
    words = []
    for word in sys.argv[1:]:
        option, is_joined, value = word.rpartition("=")
        words.append(f"{option}{is_joined}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join(["python", "-m", "benchmarks.throughput", *words])


def _machine() -> list[str]:
    """What the run was made on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=, with changes"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    load = f"; load average at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return [
        f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}{load}",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit}",
    ]


# --- Figures ----------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    """matplotlib, or None where there is none; it is not among the requirements."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        print("No plot was drawn: pip install matplotlib", file=sys.stderr)
        return None


def _save(plt: Any, figure: Any, report: Report) -> None:
    figure.text(0.01, 0.01, "\n".join([command_line(), *report.machine]), fontsize=6, color="0.4")
    figure.savefig(report.out / f"{report.stem}.png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def plot_ratios(report: Report, goals: Sequence[Goal]) -> None:
    """
    A bar for each ratio, with its spread and its goal.

    :param report: that the plot belongs to
    :param goals: what is compared
    """
    plt = _pyplot()
    shown = [g for g in goals if {g.ours, g.peer} <= set(report.results.get(g.workload, {}))]
    if plt is None or not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.34 * len(shown)))
    for y, goal in enumerate(reversed(shown)):
        sides = report.results[goal.workload]
        reached = ratio(sides[goal.ours], sides[goal.peer])
        axes.barh(y, reached.median, color="tab:blue" if goal.ours.torch_compile else "tab:cyan", height=0.7)
        axes.plot([reached.low, reached.high], [y, y], color="black", linewidth=1)
        axes.text(reached.high + 0.05, y, f"{reached.median:.2f}", va="center", fontsize=7)
        if goal.least is not None:
            axes.plot([goal.least] * 2, [y - 0.42, y + 0.42], color="tab:red")
    axes.axvline(1.0, color="0.5", linewidth=0.8)
    labels = [f"{g.ours} / {g.peer}\n{g.workload.env}, {g.workload.n_envs} env(s)" for g in reversed(shown)]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.set_xlabel("times as many steps a second; line: least and greatest of the pairs; red: goal")
    axes.margins(y=0.01)
    figure.tight_layout(rect=(0, 0.5 / (1.6 + 0.34 * len(shown)), 1, 1))
    _save(plt, figure, report)


def plot_growth(report: Report, axes_of_growth: dict[str, dict[int, Workload]]) -> None:
    """
    Steps a second against what grows.

    :param report: that the plot belongs to
    :param axes_of_growth: by what grows, the workload of each value
    """
    plt = _pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, len(axes_of_growth), figsize=(12, 4.4), sharey=True)
    for panel, (name, workloads) in zip(panels, axes_of_growth.items(), strict=True):
        measured = {value: report.results[w] for value, w in workloads.items() if w in report.results}
        for side in next(iter(measured.values()), {}):
            speeds = [sides[side].per_second() for sides in measured.values()]
            low, high = ([getattr(speed, end) for speed in speeds] for end in ("low", "high"))
            style = {"color": "0.6", "linestyle": "--"} if side == ENVIRONMENT else {"marker": "o", "markersize": 4}
            panel.plot(list(measured), [speed.median for speed in speeds], label=str(side), **style)
            panel.fill_between(list(measured), low, high, alpha=0.2, color=style.get("color"))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(measured), [str(value) for value in measured])
        panel.set_xlabel(name)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("steps a second")
    panels[0].legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    _save(plt, figure, report)


# --- Suites -----------------------------------------------------------------------------------------------------------

PPO_WORKLOADS = (
    Workload("CartPole-v1", n_envs=8, n_steps=256, batch_size=256, n_epochs=10),
    Workload("HalfCheetah-v5", n_envs=1, n_steps=2048, batch_size=64, n_epochs=10),
    Workload("HalfCheetah-v5", n_envs=8, n_steps=256, batch_size=64, n_epochs=10),
)
TRPO_WORKLOAD = Workload("HalfCheetah-v5", n_envs=1, n_steps=2048, batch_size=128, n_epochs=10)
IMAGE_WORKLOAD = Workload(IMAGES, n_envs=8, n_steps=128, batch_size=256, n_epochs=4, width=None)


def _resized(workload: Workload, n_steps: int | None, n_epochs: int | None) -> Workload:
    """The workload, shorter: for a trial of the benchmark itself."""
    n_steps = n_steps or workload.n_steps
    batch_size = min(workload.batch_size, n_steps * workload.n_envs)
    return replace(workload, n_steps=n_steps, batch_size=batch_size, n_epochs=n_epochs or workload.n_epochs)


def the_goals(resized: Callable[[Workload], Workload]) -> list[Goal]:
    """
    :param resized: may change a workload
    :return: the ratios that are aimed at
    """
    sb3, sbx, contrib = Side("sb3"), Side("sbx"), Side("contrib")
    goals = []
    for who, peer, eager, compiled in (
        ("dual_clip_ppo", sb3, 1.5, 3.0),
        ("dual_clip_ppo", sbx, 1.4, 2.5),
        ("adaptive_kl_ppo", sb3, 1.4, 2.8),
    ):
        for workload in PPO_WORKLOADS:
            for ours, least in ((Side(who), eager), (Side(who, torch_compile=True), compiled)):
                goals.append(Goal(f"{OURS[who]} against {peer}", resized(workload), ours, peer, least))
    for ours, least in (
        (Side("trpo"), 1.6),
        (Side("trpo", torch_compile=True), 2.4),
        (Side("trpo", torch_compile=True, fvp_subsampling=5), 2.8),
    ):
        work = "TRPO" if ours.fvp_subsampling == 1 else f"TRPO with fvp_subsampling={ours.fvp_subsampling}"
        goals.append(Goal(f"{work} against {contrib}", resized(TRPO_WORKLOAD), ours, contrib, least))
    for ours, least in ((Side("dual_clip_ppo"), 1.0), (Side("dual_clip_ppo", torch_compile=True), 1.2)):
        goals.append(Goal(f"DualClipPPO against {sb3}, images", resized(IMAGE_WORKLOAD), ours, sb3, least))
    return goals


def run_goals(args: argparse.Namespace, settings: Settings) -> Report:
    """
    :param args: of the command line
    :param settings: of the run
    :return: what was measured, and written
    """
    report = Report("Goals: steps per second against the peers", args.out, f"goals-{settings.device}", settings)
    goals = the_goals(lambda workload: _resized(workload, args.steps, args.n_epochs))
    if args.steps or args.n_epochs:
        report.notes.append("**A trial**: `--steps` or `--n-epochs` is given, and the goals are not about that")
    if not SBX_PYTHON.exists():
        goals = [goal for goal in goals if goal.peer.who != "sbx"]
        report.notes.append("SBX was not measured: it needs `.venv-sbx`, which `make sbx-env` makes")
    for workload in dict.fromkeys(goal.workload for goal in goals):
        sides = dict.fromkeys(side for g in goals if g.workload == workload for side in (g.ours, g.peer))
        with Crew(settings) as crew:
            report.add(crew.measure(workload, [*sides, ENVIRONMENT], first_run=True))
        tables = [goal_table(goals, report.results)]
        for done, results in report.results.items():
            tables += [[f"## {done}"], side_table(results)]
        report.write(tables)
    plot_ratios(report, goals)
    return report


def run_growth(args: argparse.Namespace, settings: Settings) -> Report:
    """
    :param args: of the command line
    :param settings: of the run
    :return: what was measured, and written
    """
    n_steps = args.steps or 256
    base = Workload(args.env or "HalfCheetah-v5", 8, n_steps, 64, args.n_epochs or 10)
    axes = {
        "environments": {
            n: replace(base, n_envs=n, n_steps=max(8 * n_steps // n, 1)) for n in (1, 2, 4, 8, 16, 32, 64)
        },
        "batch size": {
            n: replace(base, n_steps=2 * n_steps, batch_size=n)
            for n in (64, 128, 256, 512, 1024, 2048, 4096)
            if n <= 16 * n_steps
        },
        "width": {n: replace(base, width=n) for n in (64, 128, 256, 512, 1024)},
    }
    peer = args.peer or PEERS_OF[args.algo][0]
    ours, compiled, other = Side(args.algo), Side(args.algo, torch_compile=True), Side(peer)
    title = f"How cost grows: {ours} and {other}"
    report = Report(title, args.out, f"growth-{args.algo}-{peer}-{settings.device}", settings)
    report.notes.append(
        "A side keeps its process and what torch has compiled from one workload to the next, so compile times and "
        "peak memory are not to be read from this run"
    )
    with Crew(settings) as crew:
        for workload in dict.fromkeys(w for workloads in axes.values() for w in workloads.values()):
            report.add(crew.measure(workload, [ours, other, compiled, ENVIRONMENT], first_run=False))
            report.write(_growth_tables(axes, report.results, ours, compiled, other))
    plot_growth(report, axes)
    return report


def _growth_tables(
    axes: dict[str, dict[int, Workload]],
    results: dict[Workload, dict[Side, Measured]],
    ours: Side,
    compiled: Side,
    other: Side,
) -> list[list[str]]:
    tables = []
    for name, workloads in axes.items():
        rows = []
        for value, workload in workloads.items():
            if workload in results:
                sides = results[workload]
                speeds = [f"{sides[side].per_second().median:,.0f}" for side in (other, ours, compiled, ENVIRONMENT)]
                ratios = [str(ratio(sides[side], sides[other])) for side in (ours, compiled)]
                rows.append([str(value), *speeds, *ratios])
        if rows:
            head = [f"{side}, steps/s" for side in (other, ours, compiled, ENVIRONMENT)]
            like = next(iter(workloads.values()))
            tables += [[f"## Growing: {name}", "", f"The first line: {like}."]]
            tables += [_table([name, *head, "times faster", "times faster, compiled"], rows)]
    return tables


def run_single(args: argparse.Namespace, settings: Settings) -> Report:
    """
    :param args: of the command line
    :param settings: of the run
    :return: what was measured, and written
    """
    env = args.env or "HalfCheetah-v5"
    workload = Workload(
        env,
        n_envs=args.n_envs,
        n_steps=0 if args.algo == "reinforce" else args.steps or max(2048 // args.n_envs, 1),
        batch_size=args.batch_size or (128 if args.algo == "trpo" else 64),
        n_epochs=args.n_epochs or 10,
        width=None if env == IMAGES else args.width,
    )
    sides = [Side(args.algo)]
    if args.fvp_subsampling != 1:
        sides.append(Side(args.algo, fvp_subsampling=args.fvp_subsampling))
    if args.torch_compile:
        sides += [replace(side, torch_compile=True) for side in sides]
    peers = [] if args.peer is None else [Side(args.peer)]
    size = f"{args.n_envs}x{workload.n_steps or 'episodes'}"
    name = "-".join([args.algo, env, size, *(peer.who for peer in peers), settings.device])
    title = f"{OURS[args.algo]} against {peers[0]}" if peers else f"{OURS[args.algo]}, which has no peer"
    report = Report(title, args.out, name, settings)
    with Crew(settings) as crew:
        # Ours first, as its actions are those that the environment alone is stepped with.
        report.add(crew.measure(workload, [sides[0], *peers, *sides[1:], ENVIRONMENT], first_run=True))
    goals = [Goal(f"{side} against {peer}", workload, side, peer) for side in sides for peer in peers]
    tables = [goal_table(goals, report.results)] if goals else []
    report.write([*tables, [f"## {workload}"], side_table(report.results[workload])])
    plot_ratios(report, goals)
    return report


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=("goals", "growth", "single"), default="single", help="what is measured")
    add("--algo", choices=tuple(OURS), default="dual_clip_ppo", help="ours")
    add("--peer", choices=tuple(PEERS), help="the other; SB3 or sb3-contrib if it is not said")
    add("--env", help=f"id of the environment, or {IMAGES}: 84x84x4 noise; HalfCheetah-v5 if it is not said")
    add("--n-envs", type=_positive, default=1, help="environments side by side")
    add("--steps", type=_positive, help="steps of each environment in a rollout; 2048 in all if it is not said")
    add("--batch-size", type=_positive, help="samples in a minibatch; 64, and 128 for TRPO's critic")
    add("--n-epochs", type=_positive, help="passes over a rollout; 10")
    add("--width", type=_positive, default=64, help="of the two hidden layers")
    add("--torch-compile", action="store_true", help="measure ours with the switch too")
    add("--fvp-subsampling", type=_positive, default=1, help="measure TRPO with this too")
    add("--threads", type=_positive, default=1, help="of each side, on as many cores")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--repeats", type=_positive, help="turns of each side; 9, and 3 for growth")
    add("--cleanrl-script", default="", help="path of CleanRL's ppo.py or ppo_continuous_action.py")
    add("--cleanrl-python", default=sys.executable, help="interpreter with what that imports; this one")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args(argv)

    if args.suite != "goals":
        if args.peer is None and PEERS_OF[args.algo]:
            args.peer = PEERS_OF[args.algo][0]
        if args.peer is not None and args.peer not in PEERS_OF[args.algo]:
            allowed = ", ".join(PEERS_OF[args.algo]) or "none: leave it out to measure the algorithm alone"
            parser.error(f"--peer {args.peer} is not allowed with --algo {args.algo}; allowed: {allowed}")
    if args.suite == "growth" and args.peer is None:
        parser.error(f"--suite growth compares with a peer, and --algo {args.algo} has none")
    given = [name for name in ("steps", "batch_size", "n_epochs") if getattr(args, name)]
    if args.algo == "reinforce" and given:
        parser.error(f"--{given[0].replace('_', '-')} is not for REINFORCE: its rollout is 8 episodes, used once")
    if args.fvp_subsampling != 1 and args.algo != "trpo":
        parser.error(f"--fvp-subsampling is for --algo trpo, not {args.algo}")
    if args.peer == "sbx" and not SBX_PYTHON.exists():
        parser.error("--peer sbx needs .venv-sbx: run make sbx-env")
    if args.peer == "cleanrl":
        if not Path(args.cleanrl_script).is_file():
            parser.error(
                "--peer cleanrl needs --cleanrl-script, the path of its ppo.py (Discrete actions) or "
                "ppo_continuous_action.py: CleanRL is not on the registry in a form that can be used"
            )
        if args.suite == "growth" or args.env == IMAGES:
            parser.error("--peer cleanrl has networks of width 64 on vectors only; take --suite single")
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed: it must be at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if args.device == "cpu":
            if args.threads > len(cores):
                sys.exit(f"--threads {args.threads} is not allowed: this process may use {len(cores)} core(s)")
            os.sched_setaffinity(0, cores[-args.threads :])  # all sides inherit it
    settings = Settings(
        device=args.device,
        threads=args.threads,
        repeats=args.repeats or (3 if args.suite == "growth" else 9),
        n_warm_up=1 if args.suite == "growth" else 2,
        cleanrl_script=args.cleanrl_script,
        cleanrl_python=args.cleanrl_python,
    )
    run = {"goals": run_goals, "growth": run_growth, "single": run_single}[args.suite]
    try:
        report = run(args, settings)
    except FailedError as error:
        sys.exit(f"\n{error}")
    print((report.out / f"{report.stem}.md").read_text())


if __name__ == "__main__":
    main()

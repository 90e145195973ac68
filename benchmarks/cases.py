"""What is compared with what, on which work, and which ratios are aimed at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SBX_PYTHON = ROOT / ".venv-sbx" / "bin" / "python"
RSL_PYTHON = ROOT / ".venv-rsl" / "bin" / "python"
IMAGES, MASKED_CART_POLE, INVALID_ACTIONS = "synthetic-images", "masked-CartPole-v1", "InvalidActionEnvDiscrete"
SEED = 0

OURS = {"dual_clip_ppo": "DualClipPPO", "adaptive_kl_ppo": "AdaptiveKLPPO", "trpo": "TRPO", "reinforce": "REINFORCE"}
PARTS = {"collecting": "DualClipPPO, the steps of a rollout alone"}
PEERS = {
    "sb3": "SB3 PPO",
    "sbx": "SBX PPO",
    "cleanrl": "CleanRL PPO",
    "contrib": "sb3-contrib TRPO",
    "maskable": "sb3-contrib MaskablePPO",
    "recurrent": "sb3-contrib RecurrentPPO",
    "rsl": "rsl_rl PPO",
    "before": "the version before",
}
LIMITS = {
    "environment": "environment alone",
    "products": "products of the LSTMs alone",
    "acting": "environment and actor alone",
}
PEERS_OF: dict[str, tuple[str, ...]] = {
    "dual_clip_ppo": ("sb3", "sbx", "cleanrl"),
    "adaptive_kl_ppo": ("sb3", "sbx", "cleanrl"),
    "trpo": ("contrib",),
    "reinforce": (),
}


@dataclass(frozen=True)
class Settings:
    """
    :param device: "cpu" or "cuda"
    :param threads: of each side
    :param cores: that each is held to on the CPU
    :param repeats: turns of each side
    :param n_warm_up: iterations of each before them
    :param cleanrl_script: path of CleanRL's script, if that is a peer
    :param cleanrl_python: interpreter that can run it
    :param before: folder with the package ``sb3_ppo_ext`` of the version before, if that is a peer
    :param n_iterations: of ``learn()`` in a turn
    """

    device: str
    threads: int
    cores: int
    repeats: int
    n_warm_up: int
    cleanrl_script: str
    cleanrl_python: str
    before: str = ""
    n_iterations: int = 1


@dataclass(frozen=True)
class Workload:
    """
    :param env: id of the environment, or :data:`IMAGES`, :data:`MASKED_CART_POLE`, :data:`INVALID_ACTIONS`
    :param n_envs: environments side by side
    :param n_steps: steps of each in a rollout; 0: REINFORCE's number of episodes
    :param batch_size: samples in a minibatch
    :param n_epochs: passes over a rollout; of TRPO's critic
    :param width: units in each of the two hidden layers; None: the policy's own architecture
    :param lstm: units of the LSTM before the actor's layers, and of another before the critic's; None: no memory
    :param vector: "gymnasium" or "envpool": whose vector of environments steps them all at once; "torch": those of
        ``examples/torch_environments.py``; "": each by itself
    """

    env: str
    n_envs: int
    n_steps: int
    batch_size: int
    n_epochs: int
    width: int | None = 64
    lstm: int | None = None
    vector: str = ""

    def __str__(self) -> str:
        networks = "NatureCNN" if self.width is None else f"width {self.width}"
        if self.lstm is not None:
            networks += f", LSTM {self.lstm}"
        envs = (
            f"{f'{self.vector}: ' if self.vector else ''}{self.env}, {self.n_envs} env{'s' if self.n_envs > 1 else ''}"
        )
        if not self.n_steps:
            return f"{envs} x 8 episodes, {networks}"
        return f"{envs} x {self.n_steps} steps, batch {self.batch_size}, {self.n_epochs} epochs, {networks}"


@dataclass(frozen=True)
class Side:
    """
    :param who: a key of :data:`OURS`, :data:`PARTS`, :data:`PEERS` or :data:`LIMITS`
    :param torch_compile: the switch of ours
    :param sub_sampling_factor: of our TRPO
    :param n_processes: that train together, each on the workload for itself; SB3 has as many times the environments, in
        processes of their own, and as many times the batch size
    """

    who: str
    torch_compile: bool = False
    sub_sampling_factor: int = 1
    n_processes: int = 1

    def __str__(self) -> str:
        name = {**OURS, **PARTS, **PEERS, **LIMITS}[self.who]
        if self.sub_sampling_factor != 1:
            name += f", sub_sampling_factor={self.sub_sampling_factor}"
        if self.n_processes > 1:
            name += ", SubprocVecEnv" if self.who in PEERS else f", {self.n_processes} processes"
        return f"{name}, compiled" if self.torch_compile else name


ENVIRONMENT, PRODUCTS, ACTING, COLLECTING = map(Side, ("environment", "products", "acting", "collecting"))


@dataclass(frozen=True)
class Goal:
    """
    A ratio that is asked for.

    :param workload: on what
    :param ours: one side
    :param peer: the other
    :param least: the ratio to be reached; None: no goal
    """

    workload: Workload
    ours: Side
    peer: Side
    least: float | None = None

    def __str__(self) -> str:
        part = self.ours.sub_sampling_factor
        with_what = "" if part == 1 else f" with sub_sampling_factor={part}"
        on_images = ", images" if self.workload.env == IMAGES else ""
        several = "" if self.ours.n_processes == 1 else f", {self.ours.n_processes} processes,"
        return f"{({**OURS, **PARTS})[self.ours.who]}{with_what}{several} against {self.peer}{on_images}"


@dataclass(frozen=True)
class Suite:
    """
    :param title: of the page with the results
    :param stem: name of its files, without suffix
    :param cases: by workload, the sides in the order of their turns
    :param goals: the ratios to be shown
    :param axes: for a suite about growth: by what grows, the workload of each value. Its sides keep their processes,
        and what torch has compiled, from one workload to the next
    :param notes: to be printed under the tables
    :param repeats: turns of each side, if nothing is said about them
    :param cores: that the environments have threads for
    """

    title: str
    stem: str
    cases: dict[Workload, list[Side]]
    goals: Sequence[Goal] = ()
    axes: dict[str, dict[int, Workload]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    repeats: int = 9
    cores: int = 1

    def only(self, text: str) -> Suite:
        """
        :param text: that the description of a workload must hold
        :return: the suite without the other workloads
        """
        cases = {workload: sides for workload, sides in self.cases.items() if text in str(workload)}
        goals = [goal for goal in self.goals if goal.workload in cases]
        notes = [*self.notes, f"**A part**: `--env {text}` leaves the other environments out"]
        return replace(self, cases=cases, goals=goals, notes=notes)


_PPO_WORKLOADS = (
    Workload("CartPole-v1", n_envs=8, n_steps=256, batch_size=256, n_epochs=10),
    Workload("HalfCheetah-v5", n_envs=1, n_steps=2048, batch_size=64, n_epochs=10),
    Workload("HalfCheetah-v5", n_envs=8, n_steps=256, batch_size=64, n_epochs=10),
)
_TRPO_WORKLOADS = (Workload("HalfCheetah-v5", n_envs=1, n_steps=2048, batch_size=128, n_epochs=10),)
_IMAGE_WORKLOADS = (Workload(IMAGES, n_envs=8, n_steps=128, batch_size=256, n_epochs=4, width=None),)

_RECURRENT_WORKLOADS = (
    Workload("CartPole-v1", n_envs=8, n_steps=128, batch_size=256, n_epochs=10, lstm=256),
    Workload("HalfCheetah-v5", n_envs=8, n_steps=128, batch_size=256, n_epochs=10, lstm=64),
)
_MASKED_WORKLOADS = (
    Workload(MASKED_CART_POLE, n_envs=8, n_steps=128, batch_size=256, n_epochs=10),
    Workload(INVALID_ACTIONS, n_envs=8, n_steps=128, batch_size=256, n_epochs=10),
)


class _Aim(NamedTuple):
    """Ratios of ours to a peer that are aimed at on some work: eager, if that is measured, and with torch_compile."""

    ours: Side
    peer: Side
    workloads: tuple[Workload, ...]
    eager: float | None
    compiled: float


_GOALS: tuple[_Aim, ...] = (
    _Aim(Side("dual_clip_ppo"), Side("sb3"), _PPO_WORKLOADS, 1.5, 3.0),
    _Aim(Side("dual_clip_ppo"), Side("sbx"), _PPO_WORKLOADS, 1.4, 2.5),
    _Aim(Side("adaptive_kl_ppo"), Side("sb3"), _PPO_WORKLOADS, 1.4, 2.8),
    _Aim(Side("trpo"), Side("contrib"), _TRPO_WORKLOADS, 1.6, 2.4),
    _Aim(Side("trpo", sub_sampling_factor=5), Side("contrib"), _TRPO_WORKLOADS, None, 2.8),
    _Aim(Side("dual_clip_ppo"), Side("sb3"), _IMAGE_WORKLOADS, 1.0, 1.2),
)
_MASKS_AND_MEMORY: tuple[_Aim, ...] = (
    _Aim(Side("dual_clip_ppo"), Side("recurrent"), _RECURRENT_WORKLOADS, 6.0, 8.0),
    _Aim(Side("dual_clip_ppo"), Side("maskable"), _MASKED_WORKLOADS, 1.7, 3.5),
    _Aim(Side("dual_clip_ppo"), Side("before"), (_PPO_WORKLOADS[0], _PPO_WORKLOADS[2]), 0.98, 0.98),
)


def goals_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: the ratios that are aimed at
    """
    aims, notes = _GOALS, []
    if not SBX_PYTHON.exists():
        aims = tuple(aim for aim in aims if aim.peer.who != "sbx")
        notes.append("SBX was not measured: it needs `.venv-sbx`, which `make sbx-env` makes")
    return _suite_of(aims, args, "Goals: steps per second against the peers", f"goals-{args.device}", notes)


def masks_and_memory_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: the ratios that are aimed at with masks, with LSTMs, and without either against the version before
    """
    aims, notes = _MASKS_AND_MEMORY, []
    if args.before is None:
        aims = tuple(aim for aim in aims if aim.peer.who != "before")
        notes.append("The version before was not measured: `--before` says in which folder it is")
    suite = _suite_of(aims, args, "Masks and memory: steps per second", f"masks-and-memory-{args.device}", notes)
    # The ratio to the version before is near 1, and most turns are short. 16 rollouts of 128 steps are two whole
    # episodes of HalfCheetah: RecurrentPPO takes eight times as long where one begins.
    return replace(suite, repeats=16)


def scale_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: two processes that train one model, against one and against SB3 with as many environments
    """
    cases: dict[Workload, list[Side]] = {}
    goals = []
    for workload in (resized(_PPO_WORKLOADS[i], args) for i in (0, 2)):
        subprocesses = Side("sb3", n_processes=2)
        cases[workload] = []
        for torch_compile in (False, True):
            one = Side("dual_clip_ppo", torch_compile)
            two = replace(one, n_processes=2)
            cases[workload] += [one, two]
            goals.append(Goal(workload, two, one, 1.8))
            goals.append(Goal(workload, two, subprocesses, 6.0 if torch_compile else None))
        cases[workload] += [subprocesses, ENVIRONMENT]
    return Suite("Scale: two processes on two cores", f"scale-{args.device}", cases, goals, cores=2)


def _suite_of(aims: Sequence[_Aim], args: argparse.Namespace, title: str, stem: str, notes: list[str]) -> Suite:
    """The suite in which these ratios are measured, each with the limits of its work."""
    goals = []
    for ours, peer, workloads, eager, compiled in aims:
        compiled_peer = replace(peer, torch_compile=peer.who == "before")  # no other has the switch
        for workload in (resized(workload, args) for workload in workloads):
            if eager is not None:
                goals.append(Goal(workload, ours, peer, eager))
            goals.append(Goal(workload, replace(ours, torch_compile=True), compiled_peer, compiled))
    if args.steps or args.n_epochs:
        notes.append("**A trial**: `--steps` or `--n-epochs` is given, and the goals are not about that")
    cases: dict[Workload, list[Side]] = {}
    for goal in goals:
        sides = cases.setdefault(goal.workload, [])
        sides += [side for side in (goal.ours, goal.peer) if side not in sides]
    for workload, sides in cases.items():
        sides += [ENVIRONMENT] if workload.lstm is None else [PRODUCTS, ENVIRONMENT]
    return Suite(title, stem, cases, goals, notes=notes)


def resized(workload: Workload, args: argparse.Namespace) -> Workload:
    """
    The workload, shorter: for a trial of the benchmark itself.

    :param workload: as it is meant
    :param args: of the command line
    """
    n_steps = args.steps or workload.n_steps
    batch_size = min(workload.batch_size, n_steps * workload.n_envs)
    return replace(workload, n_steps=n_steps, batch_size=batch_size, n_epochs=args.n_epochs or workload.n_epochs)


def growth_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: one algorithm and its peer, as the work grows
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
    ours, peer = Side(args.algo), Side(args.peer)
    sides = [ours, peer, replace(ours, torch_compile=True), ENVIRONMENT]
    note = (
        "A side keeps its process and what torch has compiled from one workload to the next, so compile times and "
        "peak memory are not to be read from this run"
    )
    return Suite(
        f"How cost grows: {ours} and {peer}",
        f"growth-{args.algo}-{args.peer}-{args.device}",
        {workload: sides for workloads in axes.values() for workload in workloads.values()},
        axes=axes,
        notes=[note],
        repeats=3,
    )


def single_suite(args: argparse.Namespace) -> Suite:
    """
    :param args: of the command line
    :return: one workload
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
    ours = [Side(args.algo)]
    if args.sub_sampling_factor != 1:
        ours.append(Side(args.algo, sub_sampling_factor=args.sub_sampling_factor))
    if args.torch_compile:
        ours += [replace(side, torch_compile=True) for side in ours]
    peers = [] if args.peer is None else [Side(args.peer)]
    size = f"{args.n_envs}x{workload.n_steps or 'episodes'}"
    return Suite(
        f"{OURS[args.algo]} against {peers[0]}" if peers else f"{OURS[args.algo]}, which has no peer",
        "-".join([args.algo, env, size, *(peer.who for peer in peers), args.device]),
        {workload: [ours[0], *peers, *ours[1:], ENVIRONMENT]},
        [Goal(workload, side, peer) for side in ours for peer in peers],
    )

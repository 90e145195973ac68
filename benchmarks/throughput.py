"""
Environment steps per second of ``learn()``: ours against a peer, side by side in one run.

    python -m benchmarks.throughput --suite goals
    python -m benchmarks.throughput --suite growth
    python -m benchmarks.throughput --suite arrays
    python -m benchmarks.throughput --suite masks-and-memory --before ../the-version-before
    python -m benchmarks.throughput --suite scale
    python -m benchmarks.throughput --algo dual_clip_ppo --env HalfCheetah-v5 --n-envs 8 --steps 256 --torch-compile

Each side is a process of its own that holds its model and waits for its turn; the sides take turns, A B A B, one
iteration of ``learn()`` (a rollout and the update from it) at a time. All are held to the same processor cores and run
the same environment code and hyper-parameters. The first iterations are a warm-up, reported apart. A ratio is of two
turns of the same round: the peer's time for a step by ours. benchmarks/README.md says what the results mean.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases
from benchmarks.array_cases import arrays_suite
from benchmarks.cases import IMAGES, OURS, PEERS_OF, SBX_PYTHON, Settings
from benchmarks.measuring import measure
from benchmarks.report import Report
from benchmarks.tensor_cases import tensors_suite

_SUITES = {
    "goals": cases.goals_suite,
    "masks-and-memory": cases.masks_and_memory_suite,
    "growth": cases.growth_suite,
    "scale": cases.scale_suite,
    "arrays": arrays_suite,
    "tensors": tensors_suite,
    "single": cases.single_suite,
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=tuple(_SUITES), default="single", help="what is measured")
    add("--algo", choices=tuple(OURS), default="dual_clip_ppo", help="ours")
    peers = sorted({peer for peers in PEERS_OF.values() for peer in peers})
    add("--peer", choices=peers, help="the other; SB3 or sb3-contrib if it is not said")
    add(
        "--env",
        help=f"id of the environment, or {IMAGES}: 84x84x4 noise; HalfCheetah-v5 if not said. For the suites with "
        "environments of their own: measure only those whose description holds this text",
    )
    add("--n-envs", type=_positive, default=1, help="environments side by side")
    add("--steps", type=_positive, help="steps of each environment in a rollout; 2048 in all if it is not said")
    add("--batch-size", type=_positive, help="samples in a minibatch; 64, and 128 for TRPO's critic")
    add("--n-epochs", type=_positive, help="passes over a rollout; 10")
    add("--width", type=_positive, default=64, help="of the two hidden layers")
    add("--torch-compile", action="store_true", help="measure ours with the switch too")
    add("--sub-sampling-factor", type=_positive, default=1, help="measure TRPO with this too")
    add("--threads", type=_positive, default=1, help="of each side, on as many cores")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--repeats", type=_positive, help="turns of each side; 9, for masks-and-memory 16, for growth 3")
    add("--cleanrl-script", default="", help="path of CleanRL's ppo.py or ppo_continuous_action.py")
    add("--cleanrl-python", default=sys.executable, help="interpreter with what that imports; this one")
    add("--before", type=Path, help="masks-and-memory: folder with the package sb3_ppo_ext of the version before")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args(argv)

    if args.suite in ("growth", "single"):
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
    if args.sub_sampling_factor != 1 and args.algo != "trpo":
        parser.error(f"--sub-sampling-factor is for --algo trpo, not {args.algo}")
    if args.peer == "sbx" and not SBX_PYTHON.exists():
        parser.error("--peer sbx needs .venv-sbx: run make sbx-env")
    if args.before is not None:
        if args.suite != "masks-and-memory":
            parser.error(f"--before is for --suite masks-and-memory, not {args.suite}")
        if not (args.before / "sb3_ppo_ext" / "__init__.py").is_file():
            parser.error(f"--before {args.before} is not allowed: there is no package sb3_ppo_ext in it")
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
    suite = _SUITES[args.suite](args)
    if args.env and args.suite not in ("growth", "single"):
        suite = suite.only(args.env)
        if not suite.cases:
            sys.exit(f"--env {args.env} is not allowed: no environment of --suite {args.suite} is described so")
    n_cores = max(args.threads, suite.cores)
    if args.device == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if n_cores > len(cores):
            sys.exit(f"{n_cores} cores are needed (--threads {args.threads}): this process may use {len(cores)}")
        os.sched_setaffinity(0, cores[-n_cores:])  # all sides inherit it
    settings = Settings(
        device=args.device,
        threads=args.threads,
        cores=n_cores,
        repeats=args.repeats or suite.repeats,
        n_warm_up=1 if args.suite == "growth" else 2,
        cleanrl_script=str(Path(args.cleanrl_script).resolve()),
        cleanrl_python=os.path.abspath(shutil.which(args.cleanrl_python) or args.cleanrl_python),
        n_iterations=8 if args.suite == "scale" else 1,  # as `learn` of several processes begins with some messages
        before="" if args.before is None else str(args.before.resolve()),
    )
    report = Report(suite, settings, args.out)
    for workload, results in measure(suite, settings):
        report.add(workload, results)
    report.plot()
    print(f"\n{report.file('md').read_text()}")
    if report.failures():
        sys.exit("\n".join(report.failures()))


if __name__ == "__main__":
    main()

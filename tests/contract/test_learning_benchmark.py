"""`python -m benchmarks.learning`: what it runs in which order, what is kept of a run, and that none is made twice."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3
import yaml
from stable_baselines3.common import callbacks

from benchmarks.learning import run as run_module
from benchmarks.learning import runner
from benchmarks.learning.__main__ import main
from benchmarks.learning.cases import ALGORITHMS, BUDGETS, MUJOCO, SMALL, Run, entry, suite
from benchmarks.learning.run import make_run
from sb3_ppo_ext.zoo import ALGORITHMS as OURS
from sb3_ppo_ext.zoo import config_path

RUN = Run("defaults", "CartPole-v1", "sb3_ppo", 0)
TINY = {"n_timesteps": 200, "n_steps": 50, "batch_size": 50, "n_epochs": 1}


def test_the_first_runs_are_five_seeds_of_ours_beside_the_peers() -> None:
    runs = suite("defaults")
    assert len(set(runs)) == len(runs)
    core = [run for run in runs if run.algo in ("dual_clip_ppo", "sb3_ppo", "trpo", "contrib_trpo")]
    # 11 environments, SB3's PPO on three of them, and five seeds; seed by seed.
    assert runs[: (3 * 11 + 3) * 5] == [run for run in core if run.seed < 5]
    rest = [run for run in runs if run not in core]
    n_core, n_rest = (3 * 11 + 3) * 5, sum(run.seed < 5 for run in rest)
    assert runs[n_core : n_core + n_rest] == [run for run in rest if run.seed < 5]
    seeds = [run.seed for run in runs if run.algo == "trpo"]
    assert seeds == sorted(seeds)
    assert {run.seed for run in runs if run.env == "Humanoid-v5"} == {0, 1, 2}
    assert {run.algo for run in runs if run.env == "Humanoid-v5"} == {"adaptive_kl_ppo", "ppo"}


def test_ppo_is_ours_exactly_where_that_of_sb3_is_not_run() -> None:
    runs = suite("defaults")
    of_sb3 = {run.env for run in runs if run.algo == "sb3_ppo"}
    of_ours = {run.env for run in runs if run.algo == "ppo"}
    assert len(of_sb3) == 3
    assert not of_sb3 & of_ours
    assert of_sb3 | of_ours == set(BUDGETS)
    assert entry(Run("defaults", "Ant-v5", "ppo", 0), {})["dual_clip"] is None


def test_what_is_asked_for_is_run() -> None:
    assert suite("defaults", ["a2c"], ["Ant-v5"], 2) == [Run("defaults", "Ant-v5", "a2c", seed) for seed in (0, 1)]
    assert {run.env for run in suite("defaults", ["reinforce"])} == set(SMALL)
    assert {run.seed for run in suite("tuned")} == set(range(5))


def test_budgets_are_those_of_the_configurations() -> None:
    for env in SMALL:
        entries = [yaml.safe_load(config_path(algo).read_text())[env] for algo in OURS]
        assert BUDGETS[env] in {int(float(values["n_timesteps"])) for values in entries}
    assert set(MUJOCO.values()) == {1_000_000}


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"])
def test_tuned_peers_have_the_zoos_entry_and_ours_the_same(env: str) -> None:
    dimensions = {"HalfCheetah-v5": 6, "Hopper-v5": 3, "Walker2d-v5": 6}[env]
    of = {algo: entry(Run("tuned", env, algo, 0), {}) for algo in ("dual_clip_ppo", "sb3_ppo", "trpo", "contrib_trpo")}
    hyper_parameters = Path(rl_zoo3.__file__).parent / "hyperparams"
    ppo = yaml.safe_load((hyper_parameters / "ppo.yml").read_text())[env.replace("v5", "v4")]
    trpo = yaml.safe_load((hyper_parameters / "trpo.yml").read_text())[env.replace("v5", "v4")]
    assert of["sb3_ppo"] == {**ppo, "n_timesteps": 1_000_000}
    assert of["contrib_trpo"] == {**trpo, "n_envs": 2, "n_timesteps": 1_000_000}
    assert of["dual_clip_ppo"] == {**of["sb3_ppo"], "torch_compile": True}
    ours, contrib = dict(of["trpo"]), {"target_kl": 0.01, "cg_damping": 0.1, **of["contrib_trpo"]}
    # Contrib's KL divergence is a mean over the dimensions of an action; ours, their sum.
    for name in ("target_kl", "cg_damping"):
        assert ours.pop(name) == pytest.approx(dimensions * contrib.pop(name))
    assert ours.pop("torch_compile") is True
    assert ours == contrib


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main`` sets variables for the processes that it starts."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYGAME_HIDE_SUPPORT_PROMPT"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "N_EVALUATIONS", 4)
    monkeypatch.setattr(run_module, "N_EPISODES", 2)


def made(path: Path, algo: str = "sb3_ppo", **overrides: Any) -> dict[str, Any]:
    this = RUN._replace(algo=algo)
    make_run(this, entry(this, {**TINY, **overrides}), path)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.usefixtures("few")
def test_what_is_kept_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(run_module, "processor_seconds", lambda: clock["now"])
    evaluate, seen = callbacks.evaluate_policy, []

    def slow_evaluation(model: Any, env: Any, **kwargs: Any) -> Any:
        clock["now"] += 1000.0
        seen.append((env.training, env.norm_reward, kwargs["deterministic"], env.obs_rms.count))
        return evaluate(model, env, **kwargs)

    monkeypatch.setattr(callbacks, "evaluate_policy", slow_evaluation)
    on_rollout_start = run_module.LearningCurve._on_rollout_start

    def a_second_for_a_rollout(self: run_module.LearningCurve) -> None:
        clock["now"] += 1.0
        on_rollout_start(self)

    monkeypatch.setattr(run_module.LearningCurve, "_on_rollout_start", a_second_for_a_rollout)
    record = made(tmp_path / "run.json")

    evaluation = record["evaluation"]
    assert evaluation["steps"] == [50, 100, 150, 200]
    assert evaluation["mean"] == evaluation["length"]  # a reward of 1 a step
    assert evaluation["seconds"] == 4000.0
    assert record["seconds"]["process"] == [1.0, 2.0, 3.0, 4.0]  # nothing of the evaluations
    assert record["total"] == {"steps": 200, "process_seconds": 5.0, "compile_seconds": 0.0}
    # Deterministic, by raw rewards, with the statistics of the training so far.
    assert [flags[:3] for flags in seen] == [(False, False, True)] * 4
    assert [round(flags[3]) for flags in seen] == [51, 101, 151, 201]
    # Of the episodes that ended between two evaluations, all but the last one's steps are counted.
    training = record["training"]
    steps = sum(n * mean for n, mean in zip(training["episodes"], training["return"], strict=True) if n)
    assert 0 < steps <= 200
    # An update comes after its rollout, so the first interval has none.
    assert record["log"]["approx_kl"][0] is None
    assert all(value is not None for value in record["log"]["approx_kl"][1:])
    assert record["hyper_parameters"] | {"n_steps": 50, "clip_range": 0.2} == record["hyper_parameters"]
    assert {"torch", "stable-baselines3", "gymnasium"} <= record["versions"].keys()
    assert [record[name] for name in Run._fields] == list(RUN)


@pytest.mark.usefixtures("few")
def test_a_seed_gives_the_same_curve_and_targets_are_numbers(tmp_path: Path) -> None:
    overrides = {"n_timesteps": 200, "n_steps": 50, "batch_size": 50, "n_critic_updates": 1, "torch_compile": False}
    this = RUN._replace(algo="trpo")
    records = []
    for path in (tmp_path / "a.json", tmp_path / "b.json"):
        make_run(this, entry(this, overrides), path)
        records.append(json.loads(path.read_text()))
    assert records[0]["evaluation"]["mean"] == records[1]["evaluation"]["mean"]
    assert records[0]["entry"] == {**overrides, "policy": "MlpPolicy", "normalize": True, "n_envs": 1}
    # None is 0.01 for each dimension of an action, of which CartPole has one.
    assert records[0]["hyper_parameters"]["target_kl"] == 0.01
    assert records[0]["hyper_parameters"]["cg_damping"] == 0.1


def test_compiling_is_what_two_iterations_take_above_later_ones() -> None:
    curve = object.__new__(run_module.LearningCurve)
    curve.rollouts = [(0, 0.0), (100, 31.0), (200, 36.0), (300, 37.0), (500, 39.0), (600, 40.0)]
    assert curve.compile_seconds() == pytest.approx(30.0 + 4.0)


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_and_none_is_made_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real processes: SB3's PPO has no ``torch_compile``, and ends with an error."""
    overrides = [
        "n_timesteps=100",
        "n_steps=50",
        "batch_size=50",
        "torch_compile=false",
        "policy_kwargs={net_arch: [2]}",
    ]
    command = ["--envs", "CartPole-v1", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path)]
    command += ["--override", *overrides, "--name", "tiny"]
    with pytest.raises(SystemExit, match="FAILED: defaults, CartPole-v1, SB3 PPO, seed 0"):
        main(["--algos", "sb3_ppo", "dual_clip_ppo", *command])
    folder = tmp_path / "tiny" / "CartPole-v1"
    assert sorted(path.name for path in folder.iterdir()) == ["dual_clip_ppo-0.json", "sb3_ppo-0.log"]
    assert "unknown key 'torch_compile'" in (folder / "sb3_ppo-0.log").read_text()
    assert json.loads((folder / "dual_clip_ppo-0.json").read_text())["evaluation"]["steps"][-1] == 100
    said = capsys.readouterr().out
    assert "0 of 2 runs are there" in said
    assert "2 of 2: " in said

    before = (folder / "dual_clip_ppo-0.json").stat().st_mtime_ns
    main(["--algos", "dual_clip_ppo", *command])
    assert capsys.readouterr().out == "1 of 1 runs are there\n"
    assert (folder / "dual_clip_ppo-0.json").stat().st_mtime_ns == before


def write(folder: Path, run: Run, **values: Any) -> None:
    path = run.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**run._asdict(), **values}))


def test_a_file_of_other_hyper_parameters_is_not_taken_for_the_run(tmp_path: Path) -> None:
    write(tmp_path / "defaults", RUN, entry={"n_timesteps": 1})
    with pytest.raises(SystemExit, match="made with other hyper-parameters"):
        main(["--algos", "sb3_ppo", "--envs", "CartPole-v1", "--seeds", "1", "--out", str(tmp_path)])


def test_the_time_left_is_that_of_runs_like_those_to_come(tmp_path: Path) -> None:
    seconds = {"seconds": {"wall": [1.0, 90.0]}, "evaluation": {"seconds": 10.0}}
    write(tmp_path / "defaults", RUN, **seconds)
    times = runner._Times(tmp_path / "defaults", {})
    assert times.expected([RUN._replace(seed=seed) for seed in (1, 2)]) == pytest.approx(200.0)
    # Of ten times the steps.
    assert times.expected([RUN._replace(env="LunarLander-v3")]) == pytest.approx(1000.0)
    times.add(RUN._replace(env="LunarLander-v3"), 300.0)
    assert times.expected([RUN._replace(env="LunarLander-v3")]) == pytest.approx(300.0)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_do_not_write_to_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(SystemExit, match=r"another benchmarks\.learning")
    with runner.alone_in(tmp_path), refused, runner.alone_in(tmp_path):
        pass
    with runner.alone_in(tmp_path):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs 0 is not allowed"),
        (["--override", "gamma=0.9"], "go together"),
        (["--name", "other"], "go together"),
        (["--override", "gamma=0.9", "--name", "tuned"], "is none of: defaults, tuned"),
        (["--override", "gamma", "--name", "other"], "takes NAME=VALUE"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_each_algorithm_has_a_label_of_its_own() -> None:
    assert len({algorithm.label for algorithm in ALGORITHMS.values()}) == len(ALGORITHMS)

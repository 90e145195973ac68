"""The suite of benchmarks for masks and memory measures what benchmarks/README.md says."""

from __future__ import annotations

import csv
import os
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from torch.utils.flop_counter import FlopCounterMode

import sb3_ppo_ext
from benchmarks import measuring, tensor_cases, throughput
from benchmarks.cases import ENVIRONMENT, PRODUCTS, Settings, Side, Suite, Workload, masks_and_memory_suite, scale_suite
from benchmarks.limits import RecurrentProducts
from benchmarks.measuring import Crew, Measured
from benchmarks.report import Report
from benchmarks.several import model_on_paper
from benchmarks.sides import make_task
from benchmarks.tasks import Task, Turn

ROOT = Path(sb3_ppo_ext.__file__).resolve().parents[1]
SETTINGS = Settings(device="cpu", threads=1, cores=1, repeats=1, n_warm_up=0, cleanrl_script="", cleanrl_python="")
OURS = Side("dual_clip_ppo")


def suite(**options: Any) -> Suite:
    return masks_and_memory_suite(Namespace(**{"steps": 4, "n_epochs": 1, "before": ROOT, "device": "cpu"} | options))


class InThisProcess:
    """In place of the process of a side, which would import all anew; nothing is compiled, as that takes seconds."""

    task: Task

    def __init__(self, *_: object) -> None: ...

    def ask(self, what: str, *arguments: Any) -> Any:
        try:
            if what != "make":
                return getattr(self.task, what)()
            side, *others = arguments
            self.task = make_task(replace(side, torch_compile=False), *others)
            return {}, self.task.device
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None: ...


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "Worker", InThisProcess)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--suite", "masks-and-memory", "--steps", "4", "--n-epochs", "1", "--repeats", "1"]
    throughput.main([*arguments, "--before", str(ROOT), "--out", str(tmp_path)])

    lines = (tmp_path / "masks-and-memory-cpu.csv").read_text().splitlines()
    turns = [turn for turn in csv.DictReader(line for line in lines if line[0] != "#") if turn["phase"] == "measured"]
    expected = [(workload.env, str(side)) for workload, sides in suite().cases.items() for side in sides]
    assert [(turn["env"], turn["side"]) for turn in turns] == expected
    assert {turn["steps"] for turn in turns} == {"32"}
    assert all(float(turn["seconds"]) > 0.0 for turn in turns)
    page = (tmp_path / "masks-and-memory-cpu.md").read_text()
    assert len(re.findall(r"^\| DualClipPPO against .*\| >= ", page, re.MULTILINE)) == 12


def test_what_is_compared_and_aimed_at() -> None:
    full = suite(steps=None, n_epochs=None)
    rows = [(g.workload.env, g.workload.lstm, g.ours, g.peer, g.least) for g in full.goals]
    compiled = Side("dual_clip_ppo", torch_compile=True)
    expected = []
    for env, lstm, who, eager, with_compiler in (
        ("CartPole-v1", 256, "recurrent", 6.0, 8.0),
        ("HalfCheetah-v5", 64, "recurrent", 6.0, 8.0),
        ("masked-CartPole-v1", None, "maskable", 1.7, 3.5),
        ("InvalidActionEnvDiscrete", None, "maskable", 1.7, 3.5),
        ("CartPole-v1", None, "before", 0.98, 0.98),
        ("HalfCheetah-v5", None, "before", 0.98, 0.98),
    ):
        expected.append((env, lstm, OURS, Side(who), eager))
        expected.append((env, lstm, compiled, Side(who, torch_compile=who == "before"), with_compiler))
    assert rows == expected
    assert not full.notes


def test_without_the_version_before_its_rows_are_left_out() -> None:
    without = suite(before=None)
    assert [goal.peer.who for goal in without.goals] == ["recurrent"] * 4 + ["maskable"] * 4
    assert "The version before was not measured" in without.notes[0]


def test_a_part_of_a_suite_has_the_goals_of_that_part_and_says_so() -> None:
    full = suite()
    part = full.only("InvalidAction")
    (workload,) = part.cases
    assert workload.env == "InvalidActionEnvDiscrete"
    assert part.cases[workload] == full.cases[workload]
    assert part.goals == [goal for goal in full.goals if goal.workload == workload]
    assert part.notes[:-1] == full.notes
    assert "`--env InvalidAction`" in part.notes[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "masks-and-memory", "--before", "tests"], "there is no package sb3_ppo_ext in it"),
        (["--suite", "goals", "--before", str(ROOT)], "--before is for --suite masks-and-memory, not goals"),
    ],
)
def test_where_the_version_before_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_version_before_is_that_of_its_folder(tmp_path: Path) -> None:
    package = tmp_path / "before" / "sb3_ppo_ext"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text("def DualClipPPO(**_): raise ValueError('I am the version before')")
    settings = Settings("cpu", 1, 1, 1, 0, "", "", before=str(package.parent))
    sides = [Side("before"), OURS]
    with Crew(settings, first_runs=False) as crew:
        before, ours = crew.measure(Workload("CartPole-v1", 1, 8, 8, 1), sides).values()
    assert before.failure == "ValueError: I am the version before"
    assert not ours.failure
    assert [turn.steps for turn in ours.turns] == [8]


def test_what_scale_is_measured_by() -> None:
    full = scale_suite(Namespace(steps=None, n_epochs=None, device="cpu"))
    assert [(g.workload.env, str(g.ours), str(g.peer), g.least) for g in full.goals] == [
        (env, f"DualClipPPO, 2 processes{switch}", peer, least)
        for env in ("CartPole-v1", "HalfCheetah-v5")
        for switch, least_of_sb3 in (("", None), (", compiled", 6.0))
        for peer, least in ((f"DualClipPPO{switch}", 1.8), ("SB3 PPO, SubprocVecEnv", least_of_sb3))
    ]


def test_more_processes_on_paper() -> None:
    """Half of 1 s is gradient steps' messages; a process adds 1 ms to each, a hop takes 2 ms and the bytes 1 ms."""
    workload = Workload("CartPole-v1", n_envs=1, n_steps=100, batch_size=10, n_epochs=10)  # 100 gradient steps
    one = Measured(turns=[Turn(100, 1.0, 0.5, 0.5, 1.0)])
    messages = {"shared memory number": 0.003, "shared memory gradient": 0.005}
    messages |= {"gloo number": 0.004, "gloo gradient": 0.005}
    two = Measured(turns=[Turn(200, 1.5, 0.5, 1.0, 1.5)], messages=messages)
    side = Side("dual_clip_ppo", n_processes=2)
    rows = list(model_on_paper(side, workload, one, two))
    assert [row[2:] for row in rows] == [
        ["2", "5,000", "1.3", "5,000", "1.3"],  # as measured: 2 / 1.5; 2 hops of 2 ms and 1 ms
        ["8", "11,000", "3.8", "29,750", "2.0"],  # 8 / 2.1; 14 hops and 1.75 ms: 8 / 3.975
        ["64", "67,000", "8.3", "253,969", "2.4"],
        ["512", "515,000", "9.8", "2,045,996", "2.5"],
    ]


@pytest.mark.parametrize("number", range(4))
def test_both_sides_have_the_same_networks_and_hyper_parameters(number: int, tmp_path: Path) -> None:
    workload, sides = list(suite(steps=None, n_epochs=None, before=None).cases.items())[number]
    models = [make_task(side, workload, SETTINGS, tmp_path / "actions.npy").model for side in sides[:3]]
    ours, peer, compiled = models
    assert [ours.torch_compile, compiled.torch_compile] == [False, True]
    networks = [{name: x.shape for name, x in model.policy.state_dict().items()} for model in models]
    assert networks[0] == networks[1] == networks[2]
    if workload.lstm is not None:
        assert networks[0]["lstm_actor.weight_hh_l0"] == networks[0]["lstm_critic.weight_hh_l0"]
        assert networks[0]["lstm_actor.weight_hh_l0"] == (4 * workload.lstm, workload.lstm)
        products = make_task(PRODUCTS, workload, SETTINGS, tmp_path / "actions.npy")
        assert [model.rollout_buffer.sequence_length for model in (ours, compiled)] == [products.sequence_length] * 2
    same = "n_steps batch_size n_epochs learning_rate gamma gae_lambda ent_coef vf_coef max_grad_norm target_kl seed"
    for name in same.split():
        assert getattr(ours, name) == getattr(peer, name), name
    assert ours.clip_range(1.0) == peer.clip_range(1.0)
    for name in ("lr", "eps", "betas"):
        assert ours.policy.optimizer.param_groups[0][name] == peer.policy.optimizer.param_groups[0][name]


@pytest.mark.parametrize("who", ["dual_clip_ppo", "maskable"])
def test_all_sides_ask_for_masks_at_each_step(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    action_masks = InvalidActionEnvDiscrete.action_masks

    def counted(env: InvalidActionEnvDiscrete) -> list[bool]:
        calls.append(env)
        return action_masks(env)

    monkeypatch.setattr(InvalidActionEnvDiscrete, "action_masks", counted)
    workload = Workload("InvalidActionEnvDiscrete", n_envs=2, n_steps=16, batch_size=32, n_epochs=1)
    training = make_task(Side(who), workload, SETTINGS, tmp_path / "actions.npy")
    assert training.turn().steps == 32
    assert len(calls) >= 32
    masks = th.as_tensor(training.model.rollout_buffer.action_masks)
    assert masks.reshape(32, 20).sum(1).tolist() == [10.0] * 32

    environment = make_task(ENVIRONMENT, workload, SETTINGS, tmp_path / "actions.npy")
    calls.clear()
    assert environment.turn().steps == 32
    assert len(calls) == 32


def test_the_products_are_those_of_back_propagation_through_time() -> None:
    workload = Workload("CartPole-v1", n_envs=4, n_steps=32, batch_size=64, n_epochs=3, lstm=8)
    task = RecurrentProducts(4, workload, "cpu", "cpu", lambda: None)
    with FlopCounterMode(display=False) as products:
        turn = task.turn()
    assert turn.steps == 128
    assert turn.train == turn.seconds > 0.0

    cell = th.nn.LSTMCell(4, 8)
    with FlopCounterMode(display=False) as unrolled:
        state = th.randn(4, 8), th.randn(4, 8)
        outputs = []
        for observations in th.randn(16, 4, 4):  # 16 steps of 4 sequences
            state = cell(observations, state)
            outputs.append(state[0])
        th.stack(outputs).sum().backward()
    n_passes = 2 * 3 * 2  # LSTMs, epochs, minibatches
    assert products.get_total_flops() == n_passes * unrolled.get_total_flops()


def test_ratios_and_training_as_a_multiple_of_the_products(tmp_path: Path) -> None:
    measured = suite(before=None)
    workload = next(iter(measured.cases))
    seconds = {OURS: (0.5, 0.3), Side("recurrent"): (4.0, 3.8), Side("dual_clip_ppo", torch_compile=True): (0.25, 0.2)}
    turns = {side: Turn(128, total, total - train, train, total) for side, (total, train) in seconds.items()}
    turns |= {PRODUCTS: Turn(128, 0.1, 0.0, 0.1, 0.1), ENVIRONMENT: Turn(128, 0.01, 0.01, 0.0, 0.01)}
    report = Report(measured, SETTINGS, tmp_path)
    results = {side: Measured(turns=[turns[side]] * 3) for side in measured.cases[workload]}
    results[Side("recurrent")].turns[2] = Turn(128, 12.0, 0.2, 3.8, 12.0)
    report.add(workload, results)
    page = report.file("md").read_text()
    (table,) = re.findall(r"^## .*\n\n((?:\|.*\n?)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][-1] == "train, times the products"
    assert {row[0]: row[-1] for row in rows[2:]} == {
        "DualClipPPO": "3.00 (3.00 to 3.00)",
        "sb3-contrib RecurrentPPO": "38.00 (38.00 to 38.00)",
        "DualClipPPO, compiled": "2.00 (2.00 to 2.00)",
        "products of the LSTMs alone": "",
        "environment alone": "",
    }
    assert ">= 6.0 | 8.00 (8.00 to 24.00) | 13.33 | yes" in page
    assert ">= 8.0 | 16.00 (16.00 to 48.00) | 26.67 | yes" in page


def test_tensors_are_compared_with_rsl_rl_and_sb3_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(steps=4, n_epochs=1, device="cpu")
    monkeypatch.setattr(tensor_cases, "RSL_PYTHON", tmp_path)  # which exists
    full = tensor_cases.tensors_suite(args)
    assert [(g.ours.torch_compile, g.peer.who, g.least) for g in full.goals[:4]] == [
        (False, "rsl", 1.0),
        (True, "rsl", 1.3),
        (False, "sb3", None),
        (True, "sb3", 5.0),
    ]
    monkeypatch.setattr(tensor_cases, "RSL_PYTHON", tmp_path / "nothing")
    without = tensor_cases.tensors_suite(args)
    assert "rsl_rl was not measured" in without.notes[-1]
    workload = replace(next(iter(without.cases)), n_envs=8, batch_size=8)
    ours, theirs = (make_task(side, workload, SETTINGS, tmp_path / "actions.npy") for side in (OURS, Side("sb3")))
    assert str(ours.model.policy) == str(theirs.model.policy)
    assert "ELU" in str(ours.model.policy)
    for name in ("n_steps", "batch_size", "n_epochs", "learning_rate", "vf_coef", "max_grad_norm", "gamma"):
        assert getattr(ours.model, name) == getattr(theirs.model, name)
    assert ours.turn().steps == theirs.turn().steps == 32
    assert make_task(ENVIRONMENT, workload, SETTINGS, tmp_path / "actions.npy").turn().steps == 32

"""What is said while a program is compiled, and only then."""

from pathlib import Path

import pytest
import torch as th
from tqdm import tqdm  # type: ignore[import-untyped]

from sb3_ppo_ext.common.compile import cpu
from sb3_ppo_ext.common.compile.program import Program


def run(*, announce: bool) -> None:
    program = Program(lambda fixed, batch, x: [fixed[0] + 2.0 * x], th.device("cpu"), what="a sum", announce=announce)
    program.bind((th.ones(3),))
    assert th.equal(program(th.ones(3))[0], th.full((3,), 3.0))


@pytest.fixture(autouse=True)
def _nothing_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, into an empty folder; a file is where the program would be kept."""

    def compiled(graph: th.fx.GraphModule, inputs: list[th.Tensor]) -> object:
        place = cpu.cache_path(graph, inputs)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        return lambda inputs: list(graph(*inputs))

    monkeypatch.setattr(cpu, "compiler_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu, "machine_code", compiled)


def test_it_is_said_once_and_not_when_it_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    run(announce=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Compiling a sum, for this run and later ones; this may take up to a minute"
    assert second.startswith("Compiled a sum in ")
    run(announce=True)  # as in a later run: another Program
    assert capsys.readouterr().out == ""


def test_who_watches_a_progress_bar_is_told_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=1):
        run(announce=False)
    assert capsys.readouterr().out.startswith("Compiling a sum")
    next(tmp_path.rglob("*.pt2")).unlink()
    run(announce=False)  # the bar is gone
    assert capsys.readouterr().out == ""


def test_each_compiler_has_its_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of a compiler that does not work is not loaded again with another."""
    other = tmp_path / "g++"
    other.touch(mode=0o755)
    graph, inputs = th.fx.symbolic_trace(th.nn.Identity()), [th.ones(3)]
    place = cpu.cache_path(graph, inputs)
    assert cpu.cache_path(graph, inputs) == place
    monkeypatch.setenv("CXX", str(other))
    assert cpu.cache_path(graph, inputs) != place


def test_programs_of_other_compiler_options_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = th.fx.symbolic_trace(th.nn.Identity()), [th.ones(3)]
    place = cpu.cache_path(graph, inputs)
    monkeypatch.setattr(cpu, "_OPTIONS", {"realize_reads_threshold": 4})
    assert cpu.cache_path(graph, inputs) != place

"""
Doors open downward only: zoo -> algorithms -> common -> losses, numerics, and zoo -> doctor, plots -> common; an
algorithm imports no other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_ppo_ext

PACKAGE = Path(sb3_ppo_ext.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ALGORITHMS = {"dual_clip_ppo", "adaptive_kl_ppo", "trpo", "reinforce"}
# Which rooms of the house a room may enter.
ALLOWED = {
    "losses": {"losses"},
    "numerics": {"numerics"},
    "common": {"common", "losses", "numerics"},
    "algorithms": {"common", "losses", "numerics"},
    "doctor": {"doctor", "common"},
    "plots": {"plots", "common", "losses", "numerics"},
    "package": {"algorithms", "common", "doctor"},
    "zoo": {"zoo", "package", "algorithms", "common", "doctor", "plots"},
}


def room(parts: tuple[str, ...]) -> str:
    """
    :param parts: of a module's name, after the package's
    """
    if not parts:
        return "package"
    return "algorithms" if parts[0] in ALGORITHMS else parts[0]


def imports(path: Path) -> list[str]:
    """All modules that a file imports, wherever in it; `from a import b` counts as a.b where that is a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            inside = PACKAGE.parent.joinpath(*node.module.split("."))
            for alias in node.names:
                is_module = (inside / alias.name).is_dir() or (inside / f"{alias.name}.py").is_file()
                found.append(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_door_opens_upward(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    here = room(parts)
    for name in imports(path):
        if name.split(".")[0] != "sb3_ppo_ext":
            continue
        there = room(tuple(name.split(".")[1:]))
        is_itself = name == ".".join(("sb3_ppo_ext", *parts))
        assert there in ALLOWED[here] or is_itself, f"{here} must not import {name}"


def files() -> dict[str, Path]:
    """All files of the package, by what they are imported as."""
    names = {path: ("sb3_ppo_ext", *path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
    return {".".join(name[:-1] if name[-1] == "__init__" else name): path for path, name in names.items()}


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports in functions count, too."""
    doors = {name: set(imports(path)) & set(files()) - {name} for name, path in files().items()}
    while leaves := {name for name, there in doors.items() if not there}:
        doors = {name: there - leaves for name, there in doors.items() if name not in leaves}
    assert not doors, "these import each other in a circle, or import those that do"


# The floors of common/, from the lowest to the highest: a file imports from its own room and from lower floors. The
# rooms of one floor do not know each other.
FLOORS: list[set[str]] = [
    {"torch_internals", "errors", "schedules"},
    {"validation", "distributions"},
    {"policy_distributions", "spaces"},
    {"rollout"},
    {"update"},
    {"compile", "saving", "policies"},
    {"construction", "recurrent_policies", "processes"},
    {"model"},
    {"algorithm"},
    {"regularized"},
    {"reusing"},
    {"proximal"},
]
# Where the modules were that older files and configurations name.
OLD_NAMES = {"buffers", "checkpoint", "episodes", "optimization"}


def test_the_floors_of_common() -> None:
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for path in (PACKAGE / "common").rglob("*.py"):
        here = path.relative_to(PACKAGE / "common").with_suffix("").parts[0]
        if here in OLD_NAMES | {"__init__"}:
            continue
        for name in imports(path):
            there = name.removeprefix("sb3_ppo_ext.common.").partition(".")[0]
            if name.startswith("sb3_ppo_ext.common.") and there != here:
                assert floor[there] < floor[here], f"{path.relative_to(PACKAGE)} must not import {name}"


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


# From the lowest to the highest; a file imports none that stands beside or above it.
ZOO_LEVELS = """
arguments errors interrupts search_spaces study.processes
entry pretrained registration summary study.storage study.trials study.workers study.parser study.train_arguments
doctor plots
experiment
commands study.task
study.study
study.candidates study.search
study.evaluation study.export study.plots
study.page
study.report
study.commands
cli
"""


def test_the_doors_of_the_zoo_open_downward() -> None:
    start = "sb3_ppo_ext.zoo."
    level = {start + name: number for number, line in enumerate(ZOO_LEVELS.split("\n")) for name in line.split()}
    inside = {name: path for name, path in files().items() if name.startswith(start)}
    assert set(level) == set(inside) - {f"{start}__main__", f"{start}study"}
    for name in level:
        higher = {there for there in imports(inside[name]) if level.get(there, -1) >= level[name]}
        assert not higher, f"{name} must not import {higher}"


def test_the_doctor_needs_no_more_than_sb3_does() -> None:
    """And TensorBoard, to read its logs, where it is asked to."""
    allowed = {"numpy", "torch", "stable_baselines3", "sb3_ppo_ext", *sys.stdlib_module_names}
    for path in (PACKAGE / "doctor").rglob("*.py"):
        others = {name.split(".")[0] for name in imports(path)} - allowed
        assert others == ({"tensorboard"} if path.name == "logs.py" else set()), path.name
        at_import = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert "tensorboard" not in ast.unparse(ast.Module(at_import, []))


@pytest.mark.parametrize("folder", ["losses", "numerics"])
def test_losses_and_numerics_need_torch_alone(folder: str) -> None:
    allowed = {"torch", "sb3_ppo_ext", *sys.stdlib_module_names}
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_importing_losses_loads_no_sb3() -> None:
    """The package's own __init__ imports the algorithms, so this is about what the modules themselves ask for."""
    code = (
        "import sys, types; package = types.ModuleType('sb3_ppo_ext'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['sb3_ppo_ext'] = package; import sb3_ppo_ext.losses, sb3_ppo_ext.numerics; "
        "print([name for name in ('stable_baselines3', 'gymnasium', 'rl_zoo3') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(PACKAGE)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""The built wheel is complete: it trains from an empty folder, with nothing of the source tree in reach."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sb3_ppo_ext import __version__

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    source, dist, site, empty = (tmp_path / name for name in ("source", "dist", "site", "empty"))
    for folder in (source, empty):
        folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "sb3_ppo_ext_cli.py"):
        shutil.copy(ROOT / name, source)
    for name in ("sb3_ppo_ext", "zoo_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)], source)
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    for path in source.rglob("*"):
        if path.suffix == ".py" or path.name == "py.typed":
            assert path.relative_to(source).as_posix() in shipped
        elif path.suffix == ".yml":
            assert f"sb3_ppo_ext/zoo/configs/{path.name}" in shipped

    with zipfile.ZipFile(wheel) as archive:  # that is what installing a wheel of pure Python is
        archive.extractall(site)
    # The installed command is sb3_ppo_ext_cli's main(); `python -m sb3_ppo_ext.zoo` is the same.
    code = (
        "import runpy, sys, sb3_ppo_ext_cli; sys.argv = ['sb3-ppo-ext', '--version']; sb3_ppo_ext_cli.main(); "
        "sys.argv = ['', *sys.orig_argv[3:]]; runpy.run_module('sb3_ppo_ext.zoo', run_name='__main__', alter_sys=True)"
    )
    arguments = ["train", "--algo", "dual_clip_ppo", "-n", "512", "--eval-freq", "-1", "--num-threads", "1"]
    output = run([sys.executable, "-c", code, *arguments], empty, PYTHONPATH=str(site))
    assert output.startswith(f"sb3-ppo-ext {__version__}\n")
    configuration = output.split("Loading hyperparameters from: ")[1].splitlines()[0]
    assert Path(configuration) == site / "sb3_ppo_ext" / "zoo" / "configs" / "dual_clip_ppo.yml"
    assert (empty / "logs" / "dual_clip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()

"""The built wheel is complete: it trains from an empty folder, with nothing of the source tree in reach."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sb3_ppo_ext import __version__

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    script = "import sys, sb3_ppo_ext_cli; sys.exit(sb3_ppo_ext_cli.main())"  # what the installed command is
    assert run([sys.executable, "-c", script, "--version"], empty, PYTHONPATH=str(site)).endswith(f"{__version__}\n")
    code = "import sb3_ppo_ext.zoo as zoo; print(zoo.__file__, zoo.config_path('dual_clip_ppo'))"
    for found in run([sys.executable, "-c", code], empty, PYTHONPATH=str(site)).split():
        assert Path(found).is_relative_to(site)
    arguments = ["-m", "sb3_ppo_ext.zoo", "train", "--algo", "dual_clip_ppo", "-n", "512", "--eval-freq", "-1"]
    output = run([sys.executable, *arguments, "--num-threads", "1"], empty, PYTHONPATH=str(site))
    assert str(site) in output
    assert (empty / "logs" / "dual_clip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()

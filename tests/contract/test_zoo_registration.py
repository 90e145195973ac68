"""rl_zoo3 gets to know our algorithms, and only those who ask for it pay for rl_zoo3."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import rl_zoo3.train
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3 import A2C, PPO

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.zoo import ALGORITHMS, config_path, register


@pytest.fixture(autouse=True)
def _algos_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ALGORITHMS:
        monkeypatch.delitem(ALGOS, key, raising=False)


def test_register_twice_is_the_same_as_once() -> None:
    register()
    once = dict(ALGOS)
    register()
    assert once == ALGOS
    assert ALGOS["dual_clip_ppo"] is DualClipPPO
    assert ALGOS["ppo"] is PPO


def test_register_never_replaces_and_then_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ALGORITHMS:
        monkeypatch.setitem(ALGOS, key, A2C)
        before = dict(ALGOS)
        with pytest.raises(ValueError, match=rf"'{key}': stable_baselines3.a2c.a2c.A2C"):
            register()
        assert before == ALGOS
        monkeypatch.delitem(ALGOS, key)


def test_every_algorithm_has_its_configuration() -> None:
    for key in ALGORITHMS:
        assert config_path(key).name == f"{key}.yml"


def test_rl_zoo3s_own_training_finds_our_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    register()
    monkeypatch.chdir(tmp_path)
    for key in ALGORITHMS:
        manager = ExperimentManager(argparse.Namespace(), key, "CartPole-v1", "logs")
        assert manager.config == str(config_path(key))
    assert (
        ExperimentManager(argparse.Namespace(), "trpo_ext", "CartPole-v1", "logs", config="my.yml").config == "my.yml"
    )
    ppo = Path(ExperimentManager(argparse.Namespace(), "ppo", "CartPole-v1", "logs").config)
    assert ppo.is_file()
    assert "rl_zoo3" in ppo.parts
    made = ExperimentManager.__init__
    register()
    assert ExperimentManager.__init__ is made  # wrapped once

    arguments = ["--algo", "trpo_ext", "-n", "64", "--eval-freq", "-1", "--device", "cpu", "-params", "n_envs:1"]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "n_steps:64", "batch_size:64"])
    rl_zoo3.train.train()
    assert (tmp_path / "logs/trpo_ext/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_a_missing_configuration_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yml"):
        config_path("nothing")


def test_who_has_no_zoo_imports_nothing_of_it_and_is_told_how_to_get_it() -> None:
    code = """
import sys, stable_baselines3
before = set(sys.modules)  # SB3 itself looks for tensorboard
import sb3_ppo_ext
print({"rl_zoo3", "optuna", "tensorboard", "torch.distributed"} & (set(sys.modules) - before))

sys.modules["rl_zoo3"] = None
try:
    import sb3_ppo_ext.zoo
except ImportError as error:
    print(error)

import sb3_ppo_ext_cli
sys.stderr = sys.stdout
for missing, command in (("rl_zoo3", "--help"), ("optuna", "train")):
    sys.modules.pop("rl_zoo3", None)
    sys.modules[missing] = None
    sys.argv = ["sb3-ppo-ext", command]
    print(sb3_ppo_ext_cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "set()",
        'sb3_ppo_ext.zoo needs rl_zoo3, and rl_zoo3 is missing: pip install "sb3-ppo-ext[zoo]"',
        'sb3-ppo-ext: rl_zoo3 is missing: pip install "sb3-ppo-ext[zoo]"',
        "1",
        'sb3-ppo-ext: optuna is missing: pip install "sb3-ppo-ext[zoo]"',
        "1",
    ]

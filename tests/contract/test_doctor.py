"""The doctor beside a training: what it adds to the log, says and keeps; and recorded trainings, healthy and ill."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.logger import configure

import sb3_ppo_ext
from sb3_ppo_ext import TRPO, AdaptiveKLPPO, DoctorCallback, DualClipPPO
from sb3_ppo_ext.doctor.diagnosis import diagnose
from sb3_ppo_ext.doctor.keys import MEANINGS
from sb3_ppo_ext.doctor.logs import read_runs
from sb3_ppo_ext.doctor.run import Run, Series
from tests.algorithms import ALGORITHMS, small

RUNS = Path(__file__).parent / "runs"
HEALTHY = sorted((RUNS / "healthy").glob("*.csv"))
ILL = sorted((RUNS / "ill").glob("*.csv"))

# The first finding in a training that was made ill in one way.
CAUSES = {
    "learning_rate": "learning_rate",  # 0.1
    "reward_scale": "reward_scale",  # 1e5
    "gamma": "gamma",  # 0
    "ent_coef": "ent_coef",  # 10
    "clip_range": "clip_range",  # 0.9
    "constant": "unchanged_returns",  # a reward of 1 at each step
    "frozen": "critic_learns_nothing",  # the critic's parameters have no gradient
}


def recorded(path: Path) -> Run:
    (run,) = read_runs(path)
    return run


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_a_healthy_run_raises_no_alarm(path: Path) -> None:
    assert [finding.seen for finding in diagnose(recorded(path)).findings if finding.level == "alarm"] == []


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_the_beginning_of_a_healthy_run_raises_no_alarm(path: Path) -> None:
    """A training is diagnosed while it runs, too."""
    run = recorded(path)
    steps = np.unique(np.concatenate([series.steps for series in run.series.values()]))
    for last in steps[2:9]:
        rows = {key: series.steps <= last for key, series in run.series.items()}
        begun = {key: Series(*(array[rows[key]] for array in run.series[key])) for key in rows if rows[key].any()}
        assert [finding.seen for finding in diagnose(Run("begun", begun)).findings if finding.level == "alarm"] == []


def test_the_healthy_runs_are_of_all_algorithms_on_five_tasks() -> None:
    ours = {path.stem.partition("-")[0] for path in HEALTHY}
    assert ours >= {"dual_clip_ppo", "adaptive_kl_ppo", "trpo_ext", "reinforce", "ppo", "a2c", "trpo"}
    for algorithm in ("dual_clip_ppo", "adaptive_kl_ppo", "trpo_ext", "reinforce"):
        tasks = {path.stem.partition("-")[2] for path in HEALTHY if path.stem.startswith(f"{algorithm}-")}
        assert len(tasks) == 5


@pytest.mark.parametrize("path", ILL, ids=lambda path: path.stem)
def test_what_made_a_run_ill_is_the_first_finding(path: Path) -> None:
    run = recorded(path)
    cause = CAUSES[path.stem.rpartition("-")[2]]
    first = diagnose(run).findings[0]
    assert (first.rule.name, first.level) == (cause, "alarm")


def test_the_recorded_runs_are_small() -> None:
    assert sum(path.stat().st_size for path in (*HEALTHY, *ILL)) < 300_000


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, PPO, A2C, sb3_contrib.TRPO])
def test_it_watches_every_on_policy_algorithm(algorithm: Any, tmp_path: Path) -> None:
    """What it says live is what its log says afterwards, and each key in that log has a meaning."""
    if algorithm in ALGORITHMS:
        model = small(algorithm, "MlpPolicy", "Pendulum-v1" if algorithm is TRPO else "CartPole-v1")
    else:
        sizes = {"n_steps": 16} if algorithm is A2C else {"n_steps": 16, "batch_size": 8}
        model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs={"net_arch": [8]}, **sizes)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    doctor = DoctorCallback(verbose=0)
    model.learn(160, callback=doctor, log_interval=1)
    model.logger.close()
    live, logged = doctor.diagnosis.run.series, recorded(tmp_path / "progress.csv").series
    assert live.keys() == logged.keys()
    assert set(logged) <= set(MEANINGS)
    assert logged["doctor/gamma"].values[-1] == 0.99
    for key in ("doctor/return_std", "doctor/advantage_mean", "train/learning_rate"):
        n = len(logged[key].values)
        np.testing.assert_allclose(live[key].values[:n], logged[key].values)
    assert len(live["train/learning_rate"].values) == len(logged["train/learning_rate"].values) + 1  # the last update
    assert not [writer for writer in model.logger.output_formats if type(writer).__name__ == "_Rows"]


def test_the_keys_that_arguments_add_have_a_meaning(tmp_path: Path) -> None:
    arguments = {"clip_range_high": 0.3, "clip_range_vf": 0.2, "policy_kwargs": {"critic_learning_rate": 1e-3}}
    model = small(DualClipPPO, "MlpPolicy", "Pendulum-v1", kl_adaptive_lr={}, **arguments)
    doctor = DoctorCallback(verbose=0)
    model.learn(32, callback=doctor)
    keys = doctor.diagnosis.run.series.keys()
    assert keys >= {"train/clip_range_high", "train/clip_range_vf", "train/critic_learning_rate", "train/minibatch_kl"}
    assert keys <= MEANINGS.keys()


def test_what_it_adds_to_the_log() -> None:
    doctor = DoctorCallback(verbose=0)
    model = small(AdaptiveKLPPO, "MlpPolicy", "Pendulum-v1", gamma=0.9, kl_coef_min=0.5, kl_coef_max=2.0)
    model.learn(16, callback=doctor)
    run, advantages = doctor.diagnosis.run, model.rollout_buffer.advantages
    assert run.last("doctor/gamma") == 0.9
    assert run.last("doctor/max_grad_norm") == 0.5
    assert (run.last("doctor/kl_coef_min"), run.last("doctor/kl_coef_max")) == (0.5, 2.0)
    assert run.last("doctor/advantage_mean") == pytest.approx(advantages.mean(), rel=1e-5)
    assert run.last("doctor/advantage_std") == pytest.approx(advantages.std(), rel=1e-5)
    centred = (advantages - advantages.mean()) / advantages.std()
    assert run.last("doctor/advantage_skew") == pytest.approx((centred**3).mean(), rel=1e-4, abs=1e-5)
    assert run.last("doctor/return_mean") == pytest.approx(model.rollout_buffer.returns.mean(), rel=1e-5)
    assert run.last("doctor/return_std") == pytest.approx(model.rollout_buffer.returns.std(), rel=1e-5)


def test_it_says_each_finding_once_while_the_training_runs(capsys: pytest.CaptureFixture[str]) -> None:
    doctor = DoctorCallback()
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", learning_rate=0.1, n_epochs=10)
    model.learn(160, callback=doctor)
    output = capsys.readouterr().out
    assert output.count("ALARM  The learning rate is unusually large") == 1
    assert "seen    `learning_rate` has been above 0.03 since step 32. It is 0.1 now." in output
    assert "change  Lower `learning_rate` (now 0.1), which applies to the actor and the critic; 1e-5 to 2e-3" in output
    assert output.splitlines()[-1] == f"Doctor: {doctor.diagnosis.verdict()}"
    assert doctor.diagnosis.findings[0].rule.name == "learning_rate"

    model.learn(64, callback=doctor, reset_num_timesteps=False)  # goes on: nothing is told again
    assert "unusually large" not in capsys.readouterr().out
    assert doctor.diagnosis.run.n_steps == 224
    model.learn(64, callback=doctor)  # begins anew
    assert doctor.diagnosis.run.n_steps == 64


def test_rewards_that_are_far_too_large_are_what_it_says_first(capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda reward: 1e5 * reward)
    model = small(DualClipPPO, "MlpPolicy", env)
    model.learn(12 * model.n_steps * model.n_envs, callback=DoctorCallback())
    output = capsys.readouterr().out
    titles = re.findall(r"^(?:ALARM|WATCH)  (.*)$", output, re.MULTILINE)
    assert titles[0] == "The rewards are too large for the critic"
    assert {"The critic is wrong in one direction", "Clipping leaves hardly anything of the gradients"} < set(titles)
    assert "vf_coef" not in output


def test_silent_it_keeps_its_findings(capsys: pytest.CaptureFixture[str]) -> None:
    doctor = DoctorCallback(verbose=0)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=8, n_epochs=1, learning_rate=0.1, device="cpu")
    model.learn(96, callback=doctor)
    assert capsys.readouterr().out == ""
    assert "learning_rate" in [finding.rule.name for finding in doctor.diagnosis.findings]


def test_it_refuses_what_is_not_on_policy() -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", policy_kwargs={"net_arch": [8]})
    with pytest.raises(ValueError, match="DoctorCallback is not allowed with SAC: it is for on-policy algorithms"):
        model.learn(10, callback=DoctorCallback())


def test_it_is_among_the_public_names() -> None:
    assert "DoctorCallback" in sb3_ppo_ext.__all__

"""What a trial of a study trains, and what becomes of errors, of what callbacks raise and of unknown trials."""

import argparse
import contextlib
import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import torch as th
from optuna.trial import TrialState
from rl_zoo3.callbacks import TrialEvalCallback
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.zoo import ALGORITHMS, ZooExperimentManager, register
from sb3_ppo_ext.zoo.cli import main
from sb3_ppo_ext.zoo.errors import StudyError
from sb3_ppo_ext.zoo.study.trials import merge_hyperparams


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


class PruneAll(optuna.pruners.BasePruner):
    """Prunes each trial at its first evaluation."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


STUDIES: dict[Path, optuna.Study] = {}  # by the test's folder, also if it ends with an error


def study_of(algo: str, env_id: str, folder: Path, n_timesteps: int, n_trials: int, **entry: Any) -> optuna.Study:
    """A study by rl_zoo3's objective, with small rollouts and a pruner that prunes all."""
    manager = ZooExperimentManager(
        argparse.Namespace(),
        algo,
        env_id,
        str(folder),
        n_timesteps=n_timesteps,
        hyperparams=entry,
        optimize_hyperparameters=True,
        n_evaluations=10,
        n_eval_episodes=1,
        verbose=0,
        device="cpu",
    )
    assert manager.setup_experiment() is None
    study = STUDIES[folder] = optuna.create_study(direction="maximize", pruner=PruneAll())
    for _ in range(n_trials):
        small = {"n_episodes_pow": 2, "batch_size_pow": 7, "n_minibatches_pow": 3}
        study.enqueue_trial(small)
    with contextlib.redirect_stdout(io.StringIO()):
        study.optimize(manager.objective, n_trials=n_trials)
    return study


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_pruned_trial_ends_in_the_middle_of_a_rollout(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(TrialEvalCallback, "_on_training_end", lambda self: steps.append(self.model.num_timesteps))
    study = study_of(algo, "Pendulum-v1", tmp_path, n_timesteps=1000, n_trials=2, n_envs=2)
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED] * 2
    assert steps == [100, 100]  # the first of ten evaluations; an episode has 200 steps of each of two environments


class BreakingEnv(gym.Env[Any, Any]):
    """
    Episodes of ten steps.

    :param breaks: "obs" or "reward" is NaN from the fifth step on
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, breaks: str) -> None:
        self._breaks = breaks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        broken = np.nan if self._steps >= 5 else 0.0
        obs = np.full(2, broken if self._breaks == "obs" else 0.0, np.float32)
        return obs, broken if self._breaks == "reward" else 1.0, self._steps == 10, False, {}


for breaks in ("obs", "reward"):
    gym.register(f"Breaking-{breaks}-v0", BreakingEnv, kwargs={"breaks": breaks})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algo", "what"),
    [*((algo, "obs") for algo in ALGORITHMS), ("dual_clip_ppo", "reward"), ("adaptive_kl_ppo", "reward")],
)
def test_a_trial_that_diverges_is_failed_with_the_reason_and_the_study_goes_on(
    algo: str, what: str, tmp_path: Path
) -> None:
    study = study_of(algo, f"Breaking-{what}-v0", tmp_path, n_timesteps=20_000, n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    assert not study.trials[0].intermediate_values  # no evaluation has come to it: it is the error that ended them
    for trial in study.trials:
        assert trial.user_attrs["reason"].startswith("NonFiniteError: ")


def test_a_study_whose_trials_all_fail_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"10 trials in a row have failed, the last with (NonFinite|Value)Error: "):
        study_of("dual_clip_ppo", "Breaking-obs-v0", tmp_path, n_timesteps=20_000, n_trials=12)
    assert [trial.state for trial in STUDIES[tmp_path].trials] == [TrialState.FAIL] * 10 + [TrialState.WAITING] * 2


class Stopping(BaseCallback):
    """
    Raises an exception.

    :param name: of the exception
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _on_step(self) -> bool:
        try:
            raise AssertionError("this is not the reason")
        except AssertionError as cause:
            known: dict[str, type[BaseException]] = {"Pruned": optuna.TrialPruned, "Ctrl-C": KeyboardInterrupt}
            known |= {"Lookup": LookupError, "Stop": StopIteration, "Value": ValueError}
            raise known[self.name]("it is enough") from cause


@pytest.mark.parametrize(
    ("name", "state", "reason", "raised"),
    [
        ("Pruned", TrialState.PRUNED, "it is enough", None),
        ("Value", TrialState.FAIL, "ValueError: it is enough", None),
        ("Lookup", TrialState.FAIL, "LookupError: it is enough", LookupError),
        ("Stop", TrialState.FAIL, "StopIteration: it is enough", StopIteration),
        ("Ctrl-C", TrialState.FAIL, None, KeyboardInterrupt),
    ],
)
def test_what_a_callback_raises_decides_about_its_trial(
    name: str, state: TrialState, reason: str | None, raised: type[BaseException] | None, tmp_path: Path
) -> None:
    callback = {f"{__name__}.Stopping": {"name": name}}
    options: dict[str, Any] = {"n_timesteps": 100, "n_trials": 1, "callback": callback}
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        study_of("dual_clip_ppo", "CartPole-v1", tmp_path, **options)
    (trial,) = STUDIES[tmp_path].trials
    assert (trial.state, trial.user_attrs.get("reason")) == (state, reason)


def test_a_trial_is_normalised_by_its_own_discount_and_evaluated_where_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs: list[Any] = []
    create_envs = ZooExperimentManager.create_envs

    def noted(*arguments: Any, **options: Any) -> VecEnv:
        envs.append(create_envs(*arguments, **options))
        return envs[-1]

    monkeypatch.setattr(ZooExperimentManager, "create_envs", noted)
    entry = {"n_envs": 1, "normalize": True, "gamma": 0.5, "env_kwargs": {"g": 1.0}}
    study = study_of("dual_clip_ppo", "Pendulum-v1", tmp_path, n_timesteps=200, n_trials=2, **entry)
    _, *envs = envs  # one is made before all trials
    gammas = [1 - trial.params["one_minus_gamma"] for trial in study.trials]
    assert [env.gamma for env in envs] == [gamma for gamma in gammas for _ in ("training", "evaluation")]
    assert [env.get_attr("g") for env in envs] == [[1.0]] * 4  # the default is 10


def test_a_trial_is_merged_into_its_entry() -> None:
    entry = {
        "gamma": 0.5,
        "vf_coef": 0.5,
        "policy_kwargs": "dict(activation_fn=nn.ReLU, net_arch=dict(vf=[4]), optimizer_kwargs=dict(eps=1, fused=1))",
        "env_kwargs": {"g": 1.0},
    }
    drawn = {
        "gamma": 0.75,
        "policy_kwargs": {"net_arch": {"pi": [5]}, "optimizer_kwargs": {"eps": 2}},
        "rollout_buffer_kwargs": {"some": 1},
    }
    before = copy.deepcopy((entry, drawn))
    assert merge_hyperparams(entry, drawn) == {
        "gamma": 0.75,
        "vf_coef": 0.5,
        "policy_kwargs": {
            "activation_fn": th.nn.ReLU,
            "net_arch": {"pi": [5]},
            "optimizer_kwargs": {"eps": 2, "fused": 1},
        },
        "env_kwargs": {"g": 1.0},
        "rollout_buffer_kwargs": {"some": 1},
    }
    assert (entry, drawn) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--storage it.log --study-name other --trial-id 0", "there is no study 'other' in it.log; it has it"),
        (
            "--storage it.log --study-name it --trial-id 7",
            "study 'it' has no trial 7; it has 2 trials, the complete",
        ),
        ("--storage it.log --study-name it --trial-id -1", "study 'it' has no trial -1"),
        ("--storage it.log --study-name it --trial-id 1", "trial 1 of study 'it' is not complete but failed"),
        ("--storage no.log --study-name it --trial-id 0", "storage no.log cannot be used: there is no no.log"),
        ("--storage it.db --study-name it --trial-id 0", "is neither a file that ends in .log nor a URL"),
        ("--trial-id 0", "--trial-id 0 needs --storage and --study-name"),
    ],
)
def test_a_trial_that_is_not_there_is_named_in_a_line(
    flags: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("it.log"))
    study = optuna.create_study(storage=storage, study_name="it", direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    monkeypatch.setattr(sys, "argv", ["sb3-ppo-ext", "train", "--algo", "dual_clip_ppo", *flags.split()])
    assert main() == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not Path("no.log").exists()


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_the_memory_of_the_entrys_policy_is_searched(policy: str, tmp_path: Path) -> None:
    study = study_of("dual_clip_ppo", "CartPole-v1", tmp_path, n_timesteps=1000, n_trials=1, n_envs=2, policy=policy)
    assert study.trials[0].state is TrialState.PRUNED  # by its pruner, at the first evaluation
    assert "reason" not in study.trials[0].user_attrs
    assert ("sequence_length_pow" in study.trials[0].params) == (policy == "MlpLstmPolicy")

"""Optuna studies by rl_zoo3: what is drawn can be built and loaded, what is bad is pruned; schedules from YAML."""

import argparse
import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_ppo_ext.common.validation import value_at
from sb3_ppo_ext.zoo import ALGORITHMS, ZooExperimentManager, register
from sb3_ppo_ext.zoo.cli import main
from sb3_ppo_ext.zoo.search_spaces import CONVERTERS, POLICY, SAMPLERS
from sb3_ppo_ext.zoo.study.trials import merge_hyperparams

ON_ROLLOUTS = [algo for algo in ALGORITHMS if algo != "reinforce"]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


POLICIES = ["MlpPolicy", "MlpLstmPolicy"]


def drawn(
    algo: str, n_trials: int, n_envs: int, policy: str = "MlpPolicy"
) -> Iterator[tuple[optuna.Trial, dict[str, Any]]]:
    """Random trials, and what the sampler made of each."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=n_envs))
    for _ in range(n_trials):
        trial = study.ask()
        trial.set_user_attr(POLICY, policy)
        yield trial, HYPERPARAMS_SAMPLER[algo](trial, 0, n_envs, {})


def test_register_adds_our_spaces_and_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for spaces, ours in ((HYPERPARAMS_SAMPLER, SAMPLERS), (HYPERPARAMS_CONVERTER, CONVERTERS)):
        for key in ALGORITHMS:
            monkeypatch.delitem(spaces, key)
        theirs = dict(spaces)
        register()
        register()
        assert spaces == {**theirs, **ours}
        assert set(ours) == set(ALGORITHMS)
        monkeypatch.setitem(spaces, "trpo_ext", theirs["trpo"])  # a user's own
        register()
        assert spaces["trpo_ext"] is theirs["trpo"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_envs", [1, 6, 8])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_converter_gives_what_the_sampler_gave(algo: str, n_envs: int, policy: str) -> None:
    for trial, sampled in drawn(algo, 100, n_envs, policy):
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled
        noted = {name: value for name, value in trial.user_attrs.items() if name != POLICY}
        assert noted == {name: sampled[name] for name in noted}
        assert set(sampled) <= set(noted) | set(trial.params) | {"policy_kwargs"}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_space_is_small_and_the_same_in_every_trial(algo: str) -> None:
    spaces = [trial.distributions for n_envs in (1, 8) for trial, _ in drawn(algo, 20, n_envs)]
    for space in spaces:
        assert space.pop("n_envs").single()  # given, not searched
    assert 8 <= len(spaces[0]) <= 13
    assert all(space == spaces[0] for space in spaces)


@pytest.mark.parametrize("algo", ["dual_clip_ppo", "adaptive_kl_ppo", "reinforce"])
def test_the_schedule_of_the_learning_rate_is_searched(algo: str) -> None:
    shapes = {"const": (1.0, 1.0, 1.0), "lin": (1.0, 0.5, 0.0), "cos": (1.0, 0.5, 0.0)}
    if algo != "reinforce":
        shapes["kl"] = (1.0, 1.0, 1.0)
    drawn_kinds = set()
    for trial, sampled in drawn(algo, 20, 1):
        kind, start = trial.params["learning_rate_schedule"], trial.params["learning_rate"]
        drawn_kinds.add(kind)
        if algo != "reinforce":
            assert sampled["kl_adaptive_lr"] == ({} if kind == "kl" else None)
        values = [value_at(sampled["learning_rate"], progress) for progress in (1.0, 0.5, 0.0)]
        assert values == pytest.approx([start * share for share in shapes[kind]])
        assert value_at(sampled["learning_rate"], 0.75) / start == pytest.approx(
            {"const": 1.0, "kl": 1.0, "lin": 0.75, "cos": 0.8535534}[kind]
        )
    assert drawn_kinds == set(shapes)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algo", ["dual_clip_ppo", "adaptive_kl_ppo"])
def test_what_an_update_learns_from_is_searched(algo: str, policy: str) -> None:
    kinds = {
        (sampled["recompute_advantages"], sampled["n_reused_rollouts"], (sampled["reuse"] or {}).get("target"))
        for _, sampled in drawn(algo, 20, 1, policy)
    }
    if policy == "MlpPolicy":
        assert kinds == {(False, 0, None), (True, 0, None), (False, 1, "vtrace")}
    else:
        assert kinds == {(False, 0, None), (False, 1, "gae")}


@pytest.mark.parametrize("n_envs", [1, 6, 8, 1000])
@pytest.mark.parametrize("algo", ON_ROLLOUTS)
def test_a_rollout_is_whole_minibatches(algo: str, n_envs: int) -> None:
    for trial, sampled in drawn(algo, 100, n_envs):
        rollout, batch_size = sampled["n_steps"] * n_envs, sampled["batch_size"]
        assert rollout % batch_size == 0
        wanted = batch_size * 2 ** trial.params["n_minibatches_pow"]
        assert wanted <= rollout < wanted + np.lcm(batch_size, n_envs)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_of_a_recurrent_policy_the_memory_is_searched_too(algo: str) -> None:
    without, with_memory = (
        [trial.distributions for trial, _ in drawn(algo, 20, 8, policy)] for policy in ("CnnPolicy", "CnnLstmPolicy")
    )
    memory = {"lstm_hidden_size_pow", "sequence_length_pow", "enable_critic_lstm"}
    assert ("data" in without[0]) == algo.endswith("_ppo")
    for space in (*without, *with_memory):  # a memory allows fewer kinds
        space.pop("data", None)
    for space in with_memory:
        assert {name: space[name] for name in space.keys() - memory} == without[0]
        assert memory <= set(space)
        assert space == with_memory[0]


@pytest.mark.parametrize("n_envs", [1, 6, 8, 1000])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_rollouts_and_minibatches_are_whole_sequences(algo: str, n_envs: int) -> None:
    lengths = set()
    for _, sampled in drawn(algo, 100, n_envs, "MlpLstmPolicy"):
        length = sampled["sequence_length"]
        lengths.add(length)
        if algo != "reinforce":  # whose rollouts are as long as its episodes, and filled up
            assert sampled["n_steps"] % length == 0
            assert sampled["batch_size"] % length == 0
            assert sampled["n_steps"] * n_envs % sampled["batch_size"] == 0
    assert lengths == {8, 16, 32}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_recurrent_samples_are_accepted_by_the_constructor(algo: str) -> None:
    env = make_vec_env("CartPole-v1", 6)
    memories = set()
    entry = {"shared_lstm": True, "enable_critic_lstm": False}  # which a sample would contradict
    for _, sampled in drawn(algo, 10, 6, "MlpLstmPolicy"):
        sampled = merge_hyperparams({"policy_kwargs": entry}, sampled)
        policy = ALGORITHMS[algo]("MlpLstmPolicy", env, device="cpu", **sampled).policy
        assert policy.lstm_actor.hidden_size == sampled["policy_kwargs"]["lstm_hidden_size"]
        memories.add(policy.lstm_critic is not None)
    env.close()
    assert memories == {False, True}


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_sample_is_accepted_by_the_constructor(algo: str, env_id: str, n_envs: int) -> None:
    # Arguments of an entry that a sample might contradict; one that is there takes its place.
    entry: dict[str, Any] = {"bootstrap_timeouts": True} if algo == "reinforce" else {}
    if algo.endswith("_ppo"):
        entry = {"kl_adaptive_lr": {"maximum": 0.5}}
    env = make_vec_env(env_id, n_envs)
    norms = set()
    for _, sampled in drawn(algo, 50, n_envs):
        norms.add(sampled["policy_kwargs"]["layer_norm"])
        model = ALGORITHMS[algo]("MlpPolicy", env, device="cpu", **{**entry, **sampled})
        for name in ("gamma", "n_steps", "batch_size", "episodes_per_env", "baseline"):
            if name in sampled:
                assert getattr(model, name) == sampled[name]
    env.close()
    assert norms == {False, True}


@pytest.mark.parametrize("algo", ["trpo_ext", "reinforce"])
def test_a_critic_that_must_leave_the_actor_alone_has_features_of_its_own(algo: str) -> None:
    for _, sampled in drawn(algo, 3, 1):
        assert sampled["policy_kwargs"]["share_features_extractor"] is False


@pytest.mark.filterwarnings("ignore:Target and region quantiles")  # of rl_zoo3's plot, where both trials are as good
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_study_and_what_is_made_of_its_trials(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        common = ["--algo", algo, "--storage", "logs/study.log", "--study-name", "it", "--seed", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sb3-ppo-ext", "train", *common, *arguments])
        assert main() == 0
        return capsys.readouterr().out

    output = command(
        *("-optimize", "-n", "400", "--n-trials", "2", "--n-startup-trials", "1", "--pruner", "none"),
        *("--n-evaluations", "2", "--eval-episodes", "1", "--n-eval-envs", "2"),
    )
    assert "Number of finished trials:  2" in output
    assert len(list(tmp_path.glob(f"logs/{algo}/report_*.csv"))) == 1
    assert len(list(tmp_path.glob(f"logs/{algo}/report_*.pkl"))) == 1

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("logs/study.log"))
    trials = optuna.load_study(study_name="it", storage=storage).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert all(len(trial.intermediate_values) >= 2 for trial in trials)

    for trial in trials:
        command("-n", "1", "--trial-id", str(trial.number), "--eval-freq", "-1", "-params", "gamma:0.5")
        run = max(tmp_path.glob(f"logs/{algo}/CartPole-v1_*"))
        expected = {**CONVERTERS[algo](trial.params), "gamma": 0.5}  # the command line has the last word
        config = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
        assert {name: config[name] for name in expected} == expected
        model = ALGORITHMS[algo].load(run / "CartPole-v1.zip", device="cpu")
        assert {key: model.policy_kwargs[key] for key in expected["policy_kwargs"]} == expected["policy_kwargs"]


# What may be a schedule, by the constructors' own word.
SCHEDULES = [
    (algo, parameter.name, "None" in parameter.annotation)
    for algo, algorithm in ALGORITHMS.items()
    for parameter in inspect.signature(algorithm).parameters.values()
    if "Schedule" in parameter.annotation
]


class KeepsEnv(ZooExperimentManager):
    """Its environment can be closed when the model is refused."""

    def create_envs(self, *arguments: Any, **options: Any) -> VecEnv:
        self.env: VecEnv = super().create_envs(*arguments, **options)
        return self.env


@contextlib.contextmanager
def from_yaml(algo: str, folder: Path, entry: str) -> Iterator[Any]:
    """The model that is built from an entry of a YAML file."""
    path = folder / "mine.yml"
    path.write_text(f"CartPole-v1: {{n_timesteps: 1, policy: MlpPolicy, {entry}}}")
    manager = KeepsEnv(
        argparse.Namespace(), algo, "CartPole-v1", str(folder), eval_freq=-1, config=str(path), verbose=0, device="cpu"
    )
    try:
        experiment = manager.setup_experiment()
        assert experiment is not None
        yield experiment[0]
    finally:
        manager.env.close()


def test_what_may_be_a_schedule_is_found() -> None:
    assert {"learning_rate", "clip_range", "clip_range_vf", "clip_range_high", "dual_clip"} <= {
        name for algo, name, _ in SCHEDULES if algo == "dual_clip_ppo"
    }
    assert {algo for algo, name, _ in SCHEDULES if name == "learning_rate"} == set(ALGORITHMS)


@pytest.mark.parametrize(("algo", "name", "may_be_none"), SCHEDULES)
def test_a_schedule_from_yaml(algo: str, name: str, may_be_none: bool, tmp_path: Path) -> None:
    needs = "reference_policy: initial, " if name == "reference_kl_coef" else ""
    if name == "dual_clip":  # which must stay above 1 + clip_range
        with (
            pytest.raises(ValueError, match=r"dual_clip=0 .*progress 0"),
            from_yaml(algo, tmp_path, f"{needs}{name}: lin_4"),
        ):
            pass
    else:
        with from_yaml(algo, tmp_path, f"{needs}{name}: lin_0.5") as model:
            assert [value_at(getattr(model, name), progress) for progress in (1.0, 0.5, 0.0)] == [0.5, 0.25, 0.0]
    words = "cos_4_2_warmup_0.5" if name == "dual_clip" else "cos_0.5_0.25_warmup_0.5"
    with contextlib.ExitStack() as stack:
        if name == "dual_clip":
            stack.enter_context(pytest.raises(ValueError, match=r"dual_clip=0 .*progress 1"))
        model = stack.enter_context(from_yaml(algo, tmp_path, f"{needs}{name}: {words}"))
        assert [value_at(getattr(model, name), p) for p in (1.0, 0.75, 0.5, 0.0)] == [0.0, 0.25, 0.5, 0.25]
    number = 4.0 if name == "dual_clip" else 0.75
    with from_yaml(algo, tmp_path, f"{needs}{name}: {number}") as model:
        assert value_at(getattr(model, name), 0.5) == number
    if may_be_none:
        with from_yaml(algo, tmp_path, f"{needs}{name}: null") as model:
            assert getattr(model, name) is None
    with (
        pytest.raises(ValueError, match=rf"{name}='of_4' is not allowed"),
        from_yaml(algo, tmp_path, f"{needs}{name}: of_4"),
    ):
        pass


@pytest.mark.parametrize("command", ["plot_train", "all_plots", "plot_from_file"])
def test_plots_say_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("rl_zoo3.plots")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "seaborn", None)
    monkeypatch.setattr(sys, "argv", ["sb3-ppo-ext", command])
    with pytest.raises(SystemExit, match=r'need seaborn, .*pip install "sb3-ppo-ext\[plots\]"'):
        main()


def test_the_extras_exist_that_messages_name() -> None:
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "\nplots = [" in extras
    assert "\nzoo = [" in extras

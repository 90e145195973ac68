"""What the command line of ``sb3-ppo-ext study`` refuses: in one line, and before anything is begun."""

import os
import re
import shlex
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.contract import held
from tests.contract.zoo import Command, journal

pytestmark = pytest.mark.usefixtures("held_space")


def test_mistakes_are_named_and_change_nothing(command: Command, tmp_path: Path) -> None:
    def mistake(*arguments: str) -> str:
        output = command("study", *arguments, code=2)
        assert output.count("\n") == 1
        return output

    run = held.arguments(tmp_path, 1)[1:]
    assert "there is no study in logs/studies" in mistake("show")
    assert "'study.db' is neither a file that ends in .log nor a URL" in mistake("show", "--storage", "study.db")
    assert "cannot be shared" in mistake("show", "--storage", "sqlite://")
    assert "cannot be shared" in mistake("show", "--storage", "sqlite:///:memory:")
    assert "MySQLdb is missing" in mistake("show", "--storage", "mysql://here/there")
    assert "there is no nowhere.log" in mistake("show", "--storage", "nowhere.log")
    assert "there is no nowhere.db" in mistake("show", "--storage", "sqlite:///nowhere.db")
    assert "SQLAlchemy does not know this database URL" in mistake("show", "--storage", "nonsense://here")
    hidden = mistake("show", "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "refused" in hidden
    assert "secret" not in hidden
    assert not list(tmp_path.glob("*.db"))
    assert "there is no environment 'Hold-v0'" in mistake(*run[:4], "Hold-v0", *run[5:])
    none = mistake(*["none.yml" if word == "held.yml" else word for word in run])
    assert re.search("No such file.*none.yml", none)
    assert "unknown key 'gama'; the nearest is 'gamma'" in mistake(*run, "-params", "gama:0.9")
    assert "study name 'a/b'" in mistake(*run, "--study-name", "a/b")
    for negative in ((*run, "--seed", "-1"), ("evaluate", "--first-seed", "-1")):  # rl_zoo3 would draw one
        assert "'-1' is not allowed: it must be a whole number of at least 0" in mistake(*negative)
    assert not (tmp_path / "logs").exists()

    storage = journal(tmp_path / "other.log")
    for name in ("one", "two"):
        optuna.create_study(storage=storage, study_name=name, direction="maximize")
    other = ("--storage", "other.log")
    assert "--study-name must say which study of other.log is meant: one, two" in mistake("show", *other)
    assert "there is no study 'ones' in other.log; it has one, two" in mistake("show", *other, "--study-name", "ones")
    for name in ("show", "evaluate", "export"):
        assert "study 'one' has no complete trial yet" in mistake(name, *other, "--study-name", "one")
    one = optuna.load_study(storage=storage, study_name="one")
    one.add_trial(optuna.trial.create_trial(value=1.0))
    one.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED))
    assert "was not made by `study run`" in mistake("evaluate", *other, "--study-name", "one")
    assert "study 'one' has no trial 7; it has 2 trials, the complete ones are 0" in mistake(
        "export", *other, "--study-name", "one", "--trial", "7"
    )
    assert "trial 1 of study 'one' is not complete but pruned; the complete ones are 0" in mistake(
        "evaluate", *other, "--study-name", "one", "--trials", "1"
    )
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    assert "study 'down' does not maximize one value" in mistake("show", *other, "--study-name", "down")
    (tmp_path / "empty.log").touch()
    assert "there is no study in empty.log" in mistake("show", "--storage", "empty.log")
    (tmp_path / "broken.log").write_text("not a journal\nat all\n")
    assert "storage broken.log cannot be used" in mistake("show", "--storage", "broken.log")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--bogus 3", "there is no flag --bogus 3, neither here nor of `train`"),
        ("-params n_envs:0", "n_envs=0 is not allowed"),
        ("--vec-env thread", "invalid choice: 'thread'"),
        ("--device none", "--device none: "),
        ("--trial-id 3", "`study run` does not take --trial-id: each trial draws its own hyper-parameters"),
        ("--eval-freq 100", "`study run` does not take --eval-freq: --n-evaluations says how often"),
        ("-i agent.zip", "`study run` does not take --trained-agent: each trial begins with a new agent"),
        ("-params gamma=0.9", "gamma=0.9"),
        ("--n-evaluations 65", "--n-evaluations 65 is not allowed: a trial has 64 steps, and can have at most one"),
        ("-conf ./held", "./held is not allowed: it must be a file that ends in .yml, .yaml or .py, or the name of a"),
        ("-params policy_kwargs:'dict(net_arch=nonsense)'", "policy_kwargs 'dict(net_arch=nonsense)' cannot be read"),
    ],
)
def test_arguments_are_refused_before_there_is_a_study(command: Command, tmp_path: Path, flags: str, said: str) -> None:
    flags = flags.replace("policy_kwargs:'dict(net_arch=nonsense)'", "\"policy_kwargs:'dict(net_arch=nonsense)'\"")
    output = command(*held.arguments(tmp_path, 2), *shlex.split(flags), code=2)
    assert said in output
    assert output.count("\n") == 1
    assert os.listdir(tmp_path) == ["held.yml"]


def test_the_help_of_a_search_names_what_decides_about_a_trial(command: Command) -> None:
    said = " ".join(command("study", "run", "--help").split())
    for flag, default in (
        ("--n-evaluations N_EVALUATIONS", "1 for each 100,000 steps"),
        ("--n-startup-trials N_STARTUP_TRIALS", "10"),
        ("--sampler {tpe,random,auto}", "tpe"),
        ("--pruner {median,halving,none}", "median"),
    ):
        assert f"default: {default}" in said.split(f"{flag} ")[-1].split(" --")[0]


@pytest.mark.parametrize("flag", ["--workers", "--max-total-trials", "-n"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_numbers_are_numbers(command: Command, tmp_path: Path, flag: str, value: str) -> None:
    command(*held.arguments(tmp_path, 1), flag, value, code=2)

"""``sb3-ppo-ext study``: searching, going on after an interruption, and what becomes of the best trials."""

import contextlib
import multiprocessing.forkserver
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.zoo import register, study, study_results, study_run, study_show
from sb3_ppo_ext.zoo.cli import main
from sb3_ppo_ext.zoo.search_spaces import CONVERTERS, SAMPLERS
from sb3_ppo_ext.zoo.study_run import Search
from sb3_ppo_ext.zoo.task import Task
from sb3_ppo_ext.zoo.workers import Workers, is_alive, process_name
from tests.contract import held

SCRIPT = str(Path(sys.executable).with_name("sb3-ppo-ext"))
NAME = f"{held.ALGO}_{held.ENV}"
FOLDER = Path("logs/studies", NAME)


class Command(Protocol):
    def __call__(self, *arguments: str, code: int = 0) -> str: ...


@pytest.fixture(scope="module", autouse=True)
def server_with_imports() -> None:
    """Each process would import torch for itself, if a server that another test has started were used."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``sb3-ppo-ext`` in this process, in an empty folder, and returns what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(HYPERPARAMS_CONVERTER, held.ALGO, held.convert)

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        assert main() == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def loaded(folder: Path = FOLDER, name: str = NAME) -> optuna.Study:
    return optuna.load_study(storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))), study_name=name)


def states() -> dict[str, int]:
    return Counter(trial.state.name for trial in loaded().trials)


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def started(tmp_path: Path, n_trials: int) -> tuple["subprocess.Popen[str]", dict[str, optuna.trial.FrozenTrial]]:
    """A search in a process of its own, held up in its first two trials; and these, by their workers' names."""
    Path("hold").touch()
    process = subprocess.Popen(
        [SCRIPT, *held.arguments(tmp_path, n_trials)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def both() -> Any:
        if not (FOLDER / "worker-2.log").exists():
            return None
        trials = {t.user_attrs.get("worker", ""): t for t in loaded().trials}
        return trials if len(trials) == 2 and "" not in trials else None

    return process, wait_for(both)


def test_an_interrupted_search_goes_on_with_the_command_that_it_prints(command: Command, tmp_path: Path) -> None:
    process, trials = started(tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert states() == {"FAIL": 2}  # nothing is left running
    assert not any(map(is_alive, trials))
    assert f"study {NAME}: 0 of 3 trials (2 failed)" in output

    Path("hold").unlink()
    again = shlex.split(output.splitlines()[-1])
    assert again[0] == SCRIPT
    output = command(*again[1:])
    assert states() == {"FAIL": 2, "COMPLETE": 3}
    assert len({tuple(trial.params.values()) for trial in loaded().trials}) == 5
    assert "trial 4: " in output
    assert "3 of 3 trials (3 complete, 2 failed); best" in output

    output = command(*again[1:-1], "4")  # and on to a higher number
    assert states() == {"FAIL": 2, "COMPLETE": 4}


def test_workers_whose_parent_is_killed_give_back_their_trials(command: Command, tmp_path: Path) -> None:
    process, trials = started(tmp_path, 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, trials)))
    assert states() == {"FAIL": 2}


def test_what_nobody_runs_any_more_is_failed_and_what_somebody_runs_is_left_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_run, "_UNCLAIMED_SECONDS", 0.0)
    FOLDER.mkdir(parents=True)
    storage = JournalStorage(JournalFileBackend(str(FOLDER / "study.log")))
    before = optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
    gone = process_name(os.getpid()).replace(":", ":999999", 1)
    reused = process_name(os.getpid())[:-1] + "x"  # the same number as this process, another start
    for worker in (gone, reused, "elsewhere:1:1", None):
        trial = before.ask()
        if worker is not None:
            trial.set_user_attr("worker", worker)
    output = command(*held.arguments(tmp_path, 3, "--workers", "3"))
    assert [trial.state.name for trial in loaded().trials[:4]] == ["FAIL", "FAIL", "RUNNING", "FAIL"]
    assert "3 of 3 trials (3 complete, 1 running, 3 failed)" in output


def test_trials_that_other_processes_run_count_before_they_end(command: Command, tmp_path: Path) -> None:
    FOLDER.mkdir(parents=True)
    place = study.create(study._parser([held.ALGO]).parse_known_args(held.arguments(tmp_path, 1)[1:])[0])
    trial = place.study.ask()
    trial.set_user_attr("worker", process_name(os.getpid()))
    with closing(Workers(1)) as workers:
        search = Search(place, 1, workers)
        with search.console.capture() as said:
            search.say("failed with tensor([[nan]])")
        assert said.get() == "failed with tensor([[nan]])\n"
        search.look()
        assert search.running_elsewhere() == 1
        threading.Timer(2.0, place.study.tell, (trial, 1.0)).start()
        study_run._keep_busy(search, ["train", "--help"], seed=0)  # waits, and starts none
        assert not (FOLDER / "worker-1.log").exists()
        trial = place.study.ask()
        trial.set_user_attr("worker", process_name(os.getpid()))
        trial.set_user_attr("budget", [100, 2])
        trial.report(3.5, 1)
        search.look()
        console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(search)
        console.file.close()
        assert re.search(r"1 +idle", console.export_text())

        class Stand:
            pid = os.getpid()

        workers.slots[1] = Stand()  # type: ignore[assignment]
        assert search.running_elsewhere() == 0
        with console.capture() as shown:
            console.file = sys.stdout
            console.print(search)
        workers.slots[1] = None
    assert re.search(r"1 +1 +50 of 100 +3\.50 \(1 of 2\) +\d s", shown.get())


def test_the_best_trials_are_shown_as_text_page_and_picture(command: Command, tmp_path: Path) -> None:
    command(*held.arguments(tmp_path, 3, "--sampler", "random", "--seed", "3"))
    output = command("study", "show", "--top", "2")
    best = sorted(loaded().trials, key=lambda trial: -(trial.value or 0.0))[:2]
    for trial in best:
        assert f"trial {trial.number}" in output
        assert f"{trial.params['learning_rate']:.3g}" in output
        assert f"{1 - trial.params['one_minus_gamma']:.5g}" in output
    assert "one_minus_gamma" not in output
    assert "study dual_clip_ppo_Held-v0: 3 complete" in output
    assert f"optuna-dashboard {FOLDER / 'study.log'}" in output
    assert "takes at least 10 complete trials, and there are 3" in output
    assert "explains" not in output

    place = study.find(study._parser([]).parse_args(["show"]))
    for trial in best * 4:
        place.study.add_trial(trial)
    place.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": "It was <tired>"}))
    output = command("study", "show", "--top", "2")
    assert re.search(r"gamma +\d+%", output)
    assert "trial 11: It was <tired>" in output
    page = (FOLDER / "report.html").read_text()
    for heading in ("History", "Importances", "Value by hyper-parameter", "Evaluations of each trial", "All trials"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<tr>") == 13
    assert "<td>failed</td>" in page
    assert "It was &lt;tired&gt;" in page
    assert page.count("Plotly.newPlot(") >= 5
    assert "one_minus" not in page
    assert "plotly.js v" in page  # the library itself: the page needs no network
    with Image.open(FOLDER / "report.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 1600
    thirds = np.array_split(pixels, 3)
    assert min(third.std() for third in thirds) > 10  # something is drawn everywhere


@pytest.mark.parametrize("algo", CONVERTERS)
def test_what_is_shown_is_what_is_meant(algo: str) -> None:
    register()
    found = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    found.set_user_attr("sb3_ppo_ext", vars(Task(algo, "CartPole-v1", 0, "", [], [], [], [])))
    for _ in range(4):
        SAMPLERS[algo](found.ask(), 0, 4, {})
    for trial in found.trials:
        found.tell(trial.number, 1.0)
    place = study.Place("any", "any", Path(), found)
    shown = study_show._with_real_values(place)
    for trial, copied in zip(found.trials, shown.trials, strict=True):
        converted = CONVERTERS[algo](dict(trial.params))
        network = converted.pop("policy_kwargs")["net_arch"]
        meant = dict(place.values(trial).values())
        assert meant.pop("net_arch") == network
        assert converted.items() <= meant.items()
        assert not [name for name in {**meant, **copied.params} if name.endswith("_pow") or "one_minus" in name]
        assert copied.params.pop("net_arch") == str(network["pi"])
        assert {name: str(value) for name, value in copied.params.items()}.items() <= {
            name: str(value) for name, value in meant.items()
        }.items()


def rows() -> list[dict[str, Any]]:
    return list(study_results.results(study.find(study._parser([]).parse_args(["show"]))).values())


def test_the_best_are_trained_again_and_the_winner_is_written(command: Command, tmp_path: Path) -> None:
    command(*held.arguments(tmp_path, 3))
    best = sorted(loaded().trials, key=lambda trial: -(trial.value or 0.0))
    first = str(best[0].number)
    unevaluated = command("study", "export", "-o", "plain.yml")
    assert f"trial {first}: plain.yml" in unevaluated
    assert "Not trained again" in Path("plain.yml").read_text()

    evaluate = ("study", "evaluate", "--top", "2", "--first-seed", "7", "--device", "cpu", "--seeds")
    output = command(*evaluate, "1")
    assert Counter(row["seed"] for row in rows()) == {7: 3}
    output = command(*evaluate, "2")
    assert "3 of 6 trainings were done before" in output
    assert Counter((row["trial"], row["seed"]) for row in rows()) == {
        (label, seed): 1 for label in ("default", first, str(best[1].number)) for seed in (7, 8)
    }
    means = {row["trial"]: [float(r["mean"]) for r in rows() if r["trial"] == row["trial"]] for row in rows()}
    for label, values in means.items():
        name = label if label == "default" else f"trial {label}"
        figures = rf"{name} .* {np.mean(values):.2f} +{np.std(values, ddof=1):.2f} +\d"
        assert re.search(figures, output), output
    labels = ["default", *(str(trial.number) for trial in best[:2])]  # of equals the first wins
    winner = max(labels, key=lambda label: np.mean(means[label]))
    assert ("The winner is the default" if winner == "default" else f"The winner is trial {winner}:") in output

    winner = max(labels[1:], key=lambda label: np.mean(means[label]))
    output = command("study", "export", "-o", "winner.yml")
    assert f"trial {winner}: winner.yml" in output
    text = Path("winner.yml").read_text()
    assert f"{np.mean(means[winner]):.2f} +/- {np.std(means[winner], ddof=1):.2f} across 2 seeds" in text
    assert f"{np.mean(means['default']):.2f} +/- " in text
    params = loaded().trials[int(winner)].params
    assert yaml.safe_load(text)[held.ENV] == {
        **held.ENTRY,
        "learning_rate": params["learning_rate"],
        "gamma": 1 - params["one_minus_gamma"],
        "policy_kwargs": f"dict(net_arch=dict(pi=[{params['hidden']}], vf=[8]), activation_fn=nn.ReLU)",
    }

    train = shlex.split(output.splitlines()[-1])
    assert train[0] == SCRIPT
    command(*train[1:], "--seed", "7", "--eval-freq", "-1", "--device", "cpu")
    model: Any = DualClipPPO.load(f"logs/{held.ALGO}/{held.ENV}_1/{held.ENV}.zip", device="cpu")
    assert model.gamma == 1 - params["one_minus_gamma"]
    assert model.ent_coef == held.ENTRY["ent_coef"]
    assert [type(layer).__name__ for layer in model.policy.mlp_extractor.policy_net] == ["Linear", "ReLU"]
    # What was evaluated is this training.
    (again,) = (FOLDER / "evaluation").glob(f"{winner}_*_7/**/{held.ENV}.zip")
    evaluated: Any = DualClipPPO.load(again, device="cpu")
    for one, other in zip(model.policy.parameters(), evaluated.policy.parameters(), strict=True):
        assert one.tolist() == other.tolist()


def test_a_result_holds_for_the_hyperparameters_and_the_budget_it_was_trained_with(
    command: Command, tmp_path: Path
) -> None:
    command(*held.arguments(tmp_path, 1))
    evaluate = ("study", "evaluate", "--seeds", "1", "--device", "cpu")
    command(*evaluate)
    assert "2 of 2 trainings were done before" in command(*evaluate)
    Path("held.yml").write_text(yaml.safe_dump({held.ENV: held.ENTRY | {"ent_coef": 0.125}}))
    assert "done before" not in command(*evaluate)
    assert "done before" not in command(*evaluate, "-n", "96")
    assert [row["n_timesteps"] for row in rows()] == [64] * 4 + [96] * 2
    command("study", "export", "-o", "longest.yml")
    assert yaml.safe_load(Path("longest.yml").read_text())[held.ENV]["n_timesteps"] == 96


def test_an_interrupted_evaluation_goes_on_with_the_command_that_it_prints(command: Command, tmp_path: Path) -> None:
    command(*held.arguments(tmp_path, 1))
    evaluate = ("study", "evaluate", "--seeds", "2", "--device", "cpu")
    command(*evaluate[:3], "1", *evaluate[4:])
    assert len(rows()) == 2
    Path("hold").touch()

    def interrupt_when_both_are_held() -> None:
        wait_for(lambda: len(list((FOLDER / "evaluation").glob("*/train.log"))) == 4)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_both_are_held, daemon=True)
    thread.start()
    output = command(*evaluate, code=130)
    thread.join()
    assert len(rows()) == 2
    assert "2 of 4 trainings are done and kept." in output
    Path("hold").unlink()
    output = command(*shlex.split(output.splitlines()[-1])[1:])
    assert "2 of 4 trainings were done before" in output
    assert len({(row["trial"], row["seed"]) for row in rows()}) == len(rows()) == 4


def test_a_training_that_fails_is_named_and_no_winner(command: Command, tmp_path: Path) -> None:
    command(*held.arguments(tmp_path, 1))
    output = command("study", "evaluate", "--seeds", "1", "--device", "meta", code=1)
    assert "trial 0, seed 1000: " in output
    assert "meta" in output.lower().split("failed:")[1]
    assert "The winner" not in output
    assert not rows()


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
    assert "no database's URL" in mistake("show", "--storage", "nonsense://here")
    hidden = mistake("show", "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "refused" in hidden
    assert "secret" not in hidden
    assert not list(tmp_path.glob("*.db"))
    assert "there is no environment 'Hold-v0'" in mistake(*run[:4], "Hold-v0", *run[5:])
    none = mistake(*["none.yml" if word == "held.yml" else word for word in run])
    assert re.search("No such file.*none.yml", none)
    assert "unknown key 'gama'; the nearest is 'gamma'" in mistake(*run, "-params", "gama:0.9")
    assert "study name 'a/b'" in mistake(*run, "--study-name", "a/b")
    assert not (tmp_path / "logs").exists()

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "other.log")))
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
        ("-params policy_kwargs:'dict(net_arch=nonsense)'", "policy_kwargs 'dict(net_arch=nonsense)' cannot be read"),
    ],
)
def test_arguments_are_refused_before_there_is_a_study(command: Command, tmp_path: Path, flags: str, said: str) -> None:
    flags = flags.replace("policy_kwargs:'dict(net_arch=nonsense)'", "\"policy_kwargs:'dict(net_arch=nonsense)'\"")
    output = command(*held.arguments(tmp_path, 2), *shlex.split(flags), code=2)
    assert said in output
    assert output.count("\n") == 1
    assert os.listdir(tmp_path) == ["held.yml"]


def test_arguments_of_an_evaluation_are_refused_before_it(command: Command, tmp_path: Path) -> None:
    command(*held.arguments(tmp_path, 1))
    before = sorted(FOLDER.iterdir())
    for flags in (["--bogus", "3"], ["--seed", "3"], ["-params", "gamma:0.9"], ["--env", "CartPole-v0"]):
        assert command("study", "evaluate", *flags, code=2).count("\n") == 1
    assert sorted(FOLDER.iterdir()) == before


def test_the_help_of_a_search_names_what_decides_about_a_trial(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command("study", "run", "--help")
    said = " ".join(capsys.readouterr().out.split())
    for flag, default in (
        ("--n-evaluations N_EVALUATIONS", "1 for each 100,000 steps"),
        ("--n-startup-trials N_STARTUP_TRIALS", "10"),
        ("--sampler {tpe,random,auto}", "tpe"),
        ("--pruner {median,halving,none}", "median"),
    ):
        assert f"default: {default}" in said.split(f"{flag} ")[-1].split(" --")[0]


def test_trials_that_always_fail_end_the_search_with_the_reason(command: Command, tmp_path: Path) -> None:
    output = command(*held.arguments(tmp_path, 2, "-params", "n_epochs:0", "--workers", "1"), code=2)
    reason = next(trial.user_attrs["reason"] for trial in loaded().trials)
    assert reason.startswith("ArgumentError: n_epochs=0 ")
    assert f"trial 0: failed with {reason}" in output
    assert f"the workers fail: {reason}" in output
    assert "worker-1.log" in output
    assert states() == {"FAIL": 4}
    output = command("study", "show", code=2)
    assert f"has no complete trial yet; the last of 4 ended with {reason}" in output


def test_what_an_entry_says_of_its_policy_stays(command: Command, tmp_path: Path) -> None:
    search = held.arguments(tmp_path, 1)
    kept = {"features_extractor_class": held.Marker, "features_extractor_kwargs": {"marker": "marker"}}
    kept |= {"log_std_init": -1.0, "optimizer_kwargs": {"eps": 1e-6, "betas": (0.9, 0.99)}}
    source = "dict(features_extractor_class=__import__('tests.contract.held').contract.held.Marker, log_std_init=-1.0, "
    source += "features_extractor_kwargs=dict(marker='marker'), optimizer_kwargs=dict(eps=1e-6, betas=(0.9, 0.99)), "
    source += "net_arch=[3])"
    Path("held.yml").write_text(yaml.safe_dump({held.ENV: {**held.ENTRY, "policy_kwargs": source}}))

    def processes() -> int:
        numbers = set(Path("marker").read_text().split())
        Path("marker").unlink()
        return len(numbers)

    command(*search)
    assert processes() == 1
    command("study", "evaluate", "--seeds", "1", "--device", "cpu")
    assert processes() == 2  # the trial and the entry
    ((evaluated,),) = [(FOLDER / "evaluation").glob(f"0_*/**/{held.ENV}.zip")]
    output = command("study", "export", "-o", "exported.yml")
    train = [*shlex.split(output.splitlines()[-1])[1:], "--eval-freq", "-1", "--device", "cpu"]
    command(*train)
    assert processes() == 1
    stored = ("--storage", str(FOLDER / "study.log"), "--study-name", NAME, "--trial-id", "0")
    command(*["held.yml" if word == "exported.yml" else word for word in train], *stored)
    assert processes() == 1
    hidden = loaded().trials[0].params["hidden"]
    folder = Path("logs", held.ALGO)
    for file in (evaluated, *(folder / f"{held.ENV}_{run}" / f"{held.ENV}.zip" for run in (1, 2))):
        policy_kwargs = DualClipPPO.load(file, device="cpu").policy_kwargs
        assert policy_kwargs.pop("net_arch") == {"pi": [hidden], "vf": [8]}
        assert policy_kwargs.pop("activation_fn").__name__ == "ReLU"
        assert policy_kwargs == kept


@pytest.mark.parametrize("config", ["pyconf"])
def test_an_entry_may_be_python_that_yaml_cannot_say(
    command: Command, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module as a configuration, with a class of its own and a schedule."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyconf", raising=False)
    source = """
from tests.contract import held

class Local(held.Marker):
    pass

kwargs = dict(features_extractor_class=Local, features_extractor_kwargs=dict(marker="marker"))
hyperparams = {held.ENV: {**held.ENTRY, "clip_range": lambda progress: 0.1, "policy_kwargs": kwargs}}
"""
    Path("pyconf.py").write_text(source)
    command(*[config if word == "held.yml" else word for word in held.arguments(tmp_path, 1)])
    command("study", "evaluate", "--seeds", "1", "--device", "cpu")
    assert len(rows()) == 2
    assert len(set(Path("marker").read_text().split())) == 3
    output = command("study", "export", "-o", "it.yml", code=2)
    assert not Path("it.yml").exists()
    assert "YAML cannot say the entry (" in output
    train = shlex.split(output.split("train with it by ")[1])
    command(*train[1:], "--eval-freq", "-1", "--device", "cpu", "--seed", "1000")
    files = list((FOLDER / "evaluation").glob(f"0_*/**/{held.ENV}.zip"))
    files += [Path(f"logs/{held.ALGO}/{held.ENV}_1/{held.ENV}.zip")]
    evaluated, again = (DualClipPPO.load(file, device="cpu").policy for file in files)
    assert [one.tolist() for one in evaluated.parameters()] == [one.tolist() for one in again.parameters()]


def test_what_was_trained_again_is_in_the_storage(command: Command, tmp_path: Path) -> None:
    where = ("--storage", "sqlite:///study.db")
    command(*held.arguments(tmp_path, 1, *where))
    assert "Train the best again" in command("study", "show", *where)
    output = command("study", "evaluate", "--seeds", "2", "--device", "cpu", *where)
    lines = [line for line in output.splitlines() if line.startswith(("  default ", "  trial 0 "))]
    assert len(lines) == 2
    shutil.rmtree("logs")
    output = command("study", "show", *where, "-f", "elsewhere")
    assert set(lines) <= set(output.splitlines())
    assert "Write the best as YAML" in output
    assert "across 2 seeds" in command("study", "export", *where, "-o", "it.yml") + Path("it.yml").read_text()


def test_another_task_needs_another_study(command: Command, tmp_path: Path) -> None:
    run = held.arguments(tmp_path, 1)
    command(*run)
    output = command(*run, "-n", "128", code=2)
    assert f"study '{NAME}' was begun with n_timesteps=0, not 128; another --study-name" in output
    command(*run, "-n", "128", "--study-name", "longer")
    assert loaded(FOLDER.with_name("longer"), "longer").trials[0].user_attrs["budget"] == [128, 1]
    assert "which study of logs/studies is meant: dual_clip_ppo_Held-v0, longer" in command("study", "show", code=2)
    assert "study longer: 1 complete" in command("study", "show", "--study-name", "longer")


@pytest.mark.parametrize("flag", ["--workers", "--max-total-trials", "-n"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_numbers_are_numbers(command: Command, tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(*held.arguments(tmp_path, 1), flag, value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the signal mask from /proc")
def test_ctrl_c_does_not_reach_the_server_that_processes_are_forked_from(tmp_path: Path) -> None:
    """In its first seconds it imports torch, and would end in a traceback of its own."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]  # one that another test has started
    with contextlib.closing(Workers(1)) as workers:
        workers.start(1, ["--version"], tmp_path / "log")
        server = vars(multiprocessing.forkserver._forkserver)["_forkserver_pid"]  # type: ignore[attr-defined]
        status = Path(f"/proc/{server}/status").read_text()
        while workers.running:
            workers.ended(timeout=60)
    blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    assert blocked >> (signal.SIGINT - 1) & 1

"""``sb3_ppo_ext.plots``: what an update did to the samples of a rollout, the callback, the command, and bad input."""

from __future__ import annotations

import importlib
import importlib.util
import math
import runpy
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_ppo_ext import TRPO, AdaptiveKLPPO, DoctorCallback, DualClipPPO, plots, save_checkpoint
from tests.algorithms import assert_same_policy, small
from tests.contract.zoo import Command, error_line

ROOT = Path(__file__).parents[2]
FIGURES = runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"]
# Steps so large that ratios leave every range, the dual clip's too.
WILD: dict[str, Any] = {"learning_rate": 0.05, "n_steps": 64, "n_epochs": 4, "dual_clip": 1.5, "clip_range_high": 0.3}


def wild(env: str = "CartPole-v1", **kwargs: Any) -> Any:
    return small(DualClipPPO, "MlpPolicy", env, **{**WILD, **kwargs}).learn(64)


def counted(model: Any) -> list[int]:
    """
    How many samples learn, are cut, and are cut by the second clip: by SB3's own evaluation of the rollout, and by
    looking at one sample after the other.
    """
    buffer = model.rollout_buffer
    actions = th.as_tensor(buffer.actions[:, 0])
    if isinstance(model.action_space, spaces.Discrete):
        actions = actions.long().flatten()
    with th.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(th.as_tensor(buffer.observations[:, 0]), actions)
    ratios = np.exp(log_prob.numpy() - buffer.log_probs[:, 0])
    advantages = buffer.advantages[:, 0] - (buffer.advantages.mean() if model.normalize_advantage else 0.0)
    counts = {"learns": 0, "cut": 0, "second clip": 0}
    for ratio, advantage in zip(ratios, advantages, strict=True):
        if (advantage > 0.0 and ratio > 1.3) or (advantage < 0.0 and ratio < 0.8):
            counts["cut"] += 1
        elif advantage < 0.0 and ratio > 1.5:
            counts["second clip"] += 1
        else:
            counts["learns"] += 1
    return list(counts.values())


def drawn(figure: Any) -> list[int]:
    """How many points each kind of sample has in the figure."""
    return [len(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_linestyle() == "None"]


# Pendulum's advantages are below 0 in a first rollout, where they are not normalised.
@pytest.mark.parametrize(
    ("env", "learning_rate", "normalize_advantage"), [("CartPole-v1", 0.05, True), ("Pendulum-v1", 0.01, False)]
)
def test_samples_are_counted_as_an_enumeration_counts_them(
    env: str, learning_rate: float, normalize_advantage: bool
) -> None:
    model = wild(env, learning_rate=learning_rate, normalize_advantage=normalize_advantage)
    samples = plots.updated_samples(model)
    learns, cut, second = counted(model)
    assert min(learns, cut, second) > 0
    assert [int(rows.sum()) for rows in samples[2:]] == [learns, cut, second]
    figure = plots.update_figure(model)
    assert drawn(figure) == [learns, cut, second]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"still learn: {learns} ({learns / 0.64:.1f} %)",
        f"cut: {cut} ({cut / 0.64:.1f} %)",
        f"cut by the second clip: {second} ({second / 0.64:.1f} %)",
    ]


def test_without_clips_all_samples_learn() -> None:
    model = small(AdaptiveKLPPO, "MlpPolicy", "Pendulum-v1", learning_rate=0.05).learn(16)
    assert drawn(plots.update_figure(model)) == [16, 0, 0]


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_a_rollout_is_evaluated_as_the_update_does_it(policy: str) -> None:
    """With several environments, and with a memory: where no step was made, every ratio is 1."""
    for env in ("CartPole-v1", "Pendulum-v1"):
        model = small(DualClipPPO, policy, make_vec_env(env, n_envs=2), learning_rate=1e-30).learn(16)
        samples = plots.updated_samples(model)
        np.testing.assert_allclose(samples.ratio, 1.0, atol=1e-6)
        assert samples.learns.all()


class Keeps(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


def test_the_callback_draws_each_nth_update_with_its_numbers() -> None:
    log = Keeps()
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", **WILD)
    model.set_logger(Logger(None, [log]))
    model.learn(5 * 64, callback=plots.ObjectiveFigureCallback(every=2))
    rows = {step: row for step, row in log.rows if "plots/update" in row}
    assert list(rows) == [192, 320]  # of rollouts 2 and 4, when their numbers are dumped
    for step, row in rows.items():
        until_then = small(DualClipPPO, "MlpPolicy", "CartPole-v1", **WILD).learn(step - 64)
        assert isinstance(row["plots/update"], LoggedFigure)
        assert drawn(row["plots/update"].figure) == counted(until_then)
        assert "train/clip_fraction" in row


def test_the_callback_changes_nothing_and_stands_beside_others(tmp_path: Path) -> None:
    one = small(DualClipPPO, "MlpPolicy", "CartPole-v1", tensorboard_log=str(tmp_path), verbose=1, **WILD)
    one.learn(3 * 64, callback=[plots.ObjectiveFigureCallback(2), DoctorCallback(verbose=0)])
    other = small(DualClipPPO, "MlpPolicy", "CartPole-v1", **WILD).learn(3 * 64)
    assert_same_policy(one, other)
    one.learn(2 * 64, callback=plots.ObjectiveFigureCallback(2), reset_num_timesteps=False)
    events = EventAccumulator(str(tmp_path / "DualClipPPO_1"), size_guidance={"images": 0}).Reload()
    # The second update with the numbers that are dumped after it, the fifth at the end of the training.
    assert [image.step for image in events.Images("plots/update")] == [192, 320]


def test_a_file_is_the_same_each_time_and_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("one.svg", "other.svg", "one.png"):
        plots.save(plots.surrogate_figure("plain"), tmp_path / name)
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width == 1400


def test_pyplot_is_not_needed() -> None:
    for path in (ROOT / "sb3_ppo_ext" / "plots").rglob("*.py"):
        assert "pyplot" not in path.read_text()


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sb3-ppo-ext\[plots\]'"):
        importlib.reload(plots)


def test_labels_of_contours_are_not_cut_off_at_the_edge() -> None:
    panel = plots.trust_region_figure().axes[0]
    labels = [text for text in panel.texts if text.get_text().lstrip("-").isdigit()]
    assert labels
    assert not any(label.get_clip_on() for label in labels)


def test_the_documentation_has_the_figures_that_its_script_draws() -> None:
    assert {path.name for path in (ROOT / "docs/_static").glob("*.svg")} == {f"{name}.svg" for name in FIGURES}
    pages = "".join(path.read_text() for path in (ROOT / "docs/modules").glob("*.md"))
    for name in FIGURES:
        assert f"../_static/{name}.svg" in pages


def untrained() -> Any:
    return small(DualClipPPO, "MlpPolicy", "CartPole-v1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.surrogate_figure("ppo"), "names='ppo' is not allowed: it must be one of 'plain'"),
        (lambda: plots.surrogate_figure(cast(Any, None)), "names=None is not allowed: it must be one of 'plain'"),
        (lambda: plots.surrogate_figure([]), r"names=\[\] is not allowed: it must have at least one of plain"),
        (lambda: plots.surrogate_figure(clip_range=1.0), "clip_range=1.0 is not allowed"),
        (lambda: plots.surrogate_figure(clip_range_high=-0.1), "clip_range_high=-0.1 is not allowed"),
        (lambda: plots.surrogate_figure(dual_clip=1.2), "dual_clip=1.2 is not allowed: .* above 1.2"),
        (lambda: plots.surrogate_figure(kl_coef=math.nan), "kl_coef=nan is not allowed"),
        (lambda: plots.surrogate_figure(epsilon=0.0), "epsilon=0.0 is not allowed"),
        (lambda: plots.cases_figure(clip_range=0.0), "clip_range=0.0 is not allowed"),
        (lambda: plots.cases_figure(clip_range_high=2.0), "dual_clip=3.0 is not allowed: .* above 3"),
        (lambda: plots.trust_region_figure(target_kl=0.0), "target_kl=0.0 is not allowed"),
        (lambda: plots.trust_region_figure(shrinking_factor=1.0), "shrinking_factor=1.0 is not allowed"),
        (lambda: plots.trust_region_figure(accept_ratio=-1.0), "accept_ratio=-1.0 is not allowed"),
        (lambda: plots.trust_region_figure(max_iter=0), "max_iter=0 is not allowed"),
        (lambda: plots.ObjectiveFigureCallback(0), "every=0 is not allowed"),
        (lambda: plots.update_figure(untrained()), "model is not allowed in update_figure before it has learnt"),
        (lambda: plots.update_figure(small(TRPO, "MlpPolicy", "CartPole-v1")), "model=TRPO is not allowed"),
        (
            lambda: small(DualClipPPO, "MlpPolicy", "CartPole-v1", reuse={"proximal": "ewma"}).learn(
                1, callback=plots.ObjectiveFigureCallback()
            ),
            r"reuse=\{'proximal': 'ewma'\} is not allowed in ObjectiveFigureCallback: .* the moving average",
        ),
        (
            lambda: PPO("MlpPolicy", "CartPole-v1").learn(1, callback=plots.ObjectiveFigureCallback()),
            "model=PPO is not allowed in ObjectiveFigureCallback: .* DualClipPPO.load",
        ),
        (lambda: plots.save(plots.cases_figure(), "figure.jpg"), "path='figure.jpg' is not allowed"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_draws_an_update_of_a_saved_model(command: Command, tmp_path: Path) -> None:
    small(DualClipPPO, "MlpPolicy", "CartPole-v1", **WILD).save("model.zip")
    before = Path("model.zip").read_bytes()
    output = command("plots", "model.zip", "--env", "CartPole-v1", "--out", "figure.svg")
    lines = output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "still learn",
        "cut",
        "cut by the second clip",
        "Drawn",
        "  figure.svg",
    ]
    assert sum(int(line.partition(": ")[2].partition(" ")[0]) for line in lines[:3]) == 64
    assert Path("figure.svg").read_text().startswith("<?xml")
    assert Path("model.zip").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip", "figure.svg"}


def test_the_command_takes_models_of_adaptive_kl_ppo_and_of_sb3(command: Command) -> None:
    small(AdaptiveKLPPO, "MlpPolicy", "CartPole-v1").save("adaptive.zip")
    assert "still learn: 16 (100.0 %)\n" in command("plots", "adaptive.zip", "--env", "CartPole-v1")
    PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=8, device="cpu").save("sb3.zip")
    assert "Drawn:\n  update.png\n" in command("plots", "sb3.zip", "--env", "CartPole-v1")


def test_the_command_updates_with_the_schedules_where_they_were(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    train = DualClipPPO.train

    def noted(self: DualClipPPO) -> None:
        train(self)
        rates.append(self.policy.optimizer.param_groups[0]["lr"])

    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", learning_rate="lin_1e-3")
    model.learn(64, callback=lambda values, _: values["self"].num_timesteps < 40)  # 1.0, 0.75, then 0.5 is the last
    model.save("halfway.zip")
    monkeypatch.setattr(DualClipPPO, "train", noted)
    command("plots", "halfway.zip", "--env", "CartPole-v1")
    assert rates == pytest.approx([0.5e-3])


def test_the_command_normalises_as_the_training_did(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the statistics in a checkpoint, and by those in the folder that the RL Zoo puts beside a model."""
    counts: list[float] = []
    train = DualClipPPO.train

    def noted(self: DualClipPPO) -> None:
        train(self)
        normalization = self.get_vec_normalize_env()
        counts.append(0.0 if normalization is None else normalization.obs_rms.count)

    venv = VecNormalize(make_vec_env("CartPole-v1"))
    model = small(DualClipPPO, "MlpPolicy", venv)
    venv.obs_rms.count = 1e6
    monkeypatch.setattr(DualClipPPO, "train", noted)
    save_checkpoint(model, "checkpoint.zip")
    model.save("model.zip")
    for path in ("checkpoint.zip", "model.zip"):
        command("plots", path, "--env", "CartPole-v1")
    Path("CartPole-v1").mkdir()
    venv.save("CartPole-v1/vecnormalize.pkl")
    command("plots", "model.zip", "--env", "CartPole-v1")
    Path("CartPole-v1/vecnormalize.pkl").unlink()
    model.save("of_sb3_64_steps.zip")
    venv.save("of_sb3_vecnormalize_64_steps.pkl")  # as SB3's CheckpointCallback names them
    command("plots", "of_sb3_64_steps.zip", "--env", "CartPole-v1")
    assert [count > 1e6 for count in counts] == [True, False, True, True]


def test_what_the_command_cannot_do_is_said_in_one_line(command: Command) -> None:
    small(TRPO, "MlpPolicy", "CartPole-v1").save("trpo.zip")
    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", learning_rate="lin_1e-3").learn(16)
    model.save("finished.zip")
    for arguments, message in (
        (["trpo.zip", "--env", "CartPole-v1"], "TRPO"),
        (["nowhere.zip", "--env", "CartPole-v1"], "nowhere.zip"),
        (["finished.zip", "--env", "Nothing-v7"], "Nothing"),
        (["finished.zip", "--env", "Pendulum-v1"], "spaces do not match"),
        (["finished.zip", "--env", "CartPole-v1"], "its learning rate has fallen to 0"),
        (["finished.zip", "--env", "CartPole-v1", "--out", "a.jpg"], "it must end in .png, .svg or .pdf"),
        (
            ["finished.zip", "--env", "CartPole-v1", "--seed", "-1"],
            "'-1' is not allowed: it must be a whole number of at",
        ),
        (["finished.zip", "--env", "CartPole-v1", "--seed", str(2**32)], "it must be below 2**32"),
        (["finished.zip"], "--env"),
    ):
        assert message in error_line(command("plots", *arguments, code=2))

"""Every callback of SB3, several calls of ``learn``, and every way to log."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_ppo_ext import REINFORCE, TRPO, AdaptiveKLPPO, DualClipPPO
from tests.algorithms import ALGORITHMS, PROXIMAL, ROLLOUT, parameters, small
from tests.envs import BOX, ScriptedEnv

LOGGED = {
    DualClipPPO: {"train/approx_kl", "train/clip_fraction", "train/dual_clip_fraction", "train/clip_range"},
    AdaptiveKLPPO: {"train/approx_kl", "train/kl", "train/kl_coef"},
    TRPO: {"train/kl", "train/is_line_search_success", "train/cg_steps"},
    REINFORCE: {"train/policy_gradient_loss", "train/entropy_loss"},
}
LOGGED_BY_ALL = {"train/learning_rate", "train/explained_variance", "train/value_loss", "rollout/ep_rew_mean"}


class OneReward(ScriptedEnv):
    """Each step is worth 1, each episode has 3."""

    def __init__(self) -> None:
        super().__init__(BOX, spaces.Discrete(2), script=((3, True, False),))

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 1.0, terminated, truncated, info


def model_of(algorithm: Any, **kwargs: Any) -> Any:
    return small(algorithm, "MlpPolicy", OneReward(), **kwargs)


def evaluation_env() -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(OneReward())])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_best_model_of_an_eval_callback_can_be_loaded(algorithm: Any, tmp_path: Path) -> None:
    callback = EvalCallback(
        evaluation_env(),
        eval_freq=ROLLOUT,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    model = model_of(algorithm).learn(3 * ROLLOUT, callback=callback)
    assert callback.best_mean_reward == 3.0
    assert len(callback.evaluations_results) >= 3
    best = algorithm.load(tmp_path / "best_model", device="cpu")
    action, _ = best.predict(BOX.sample())
    assert model.action_space.contains(int(action))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("threshold", "stops"), [(3.0, True), (4.0, False)])
def test_stop_training_on_reward_threshold(algorithm: Any, threshold: float, stops: bool) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=threshold, verbose=0)
    callback = EvalCallback(evaluation_env(), callback_on_new_best=stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    model = model_of(algorithm).learn(4 * ROLLOUT, callback=callback)
    assert (model.num_timesteps == 10) == stops
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)  # what was stopped in the middle of a rollout goes on
    assert model.num_timesteps >= 10 + 2 * ROLLOUT


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stop_training_on_no_model_improvement(algorithm: Any) -> None:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    callback = EvalCallback(evaluation_env(), callback_after_eval=stop, eval_freq=5, n_eval_episodes=1, verbose=0)
    assert model_of(algorithm).learn(100, callback=callback).num_timesteps == 15


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stop_training_on_max_episodes(algorithm: Any) -> None:
    model = model_of(algorithm).learn(100, callback=StopTrainingOnMaxEpisodes(max_episodes=7))
    assert model.num_timesteps == 21


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_files_of_a_checkpoint_callback_can_be_loaded(algorithm: Any, tmp_path: Path) -> None:
    model = model_of(algorithm).learn(2 * ROLLOUT, callback=CheckpointCallback(10, str(tmp_path)))
    assert {"rl_model_10_steps.zip", "rl_model_20_steps.zip"} <= {path.name for path in tmp_path.iterdir()}
    loaded = algorithm.load(tmp_path / "rl_model_20_steps", env=model.env, device="cpu")
    assert loaded.num_timesteps == 20
    loaded.learn(ROLLOUT)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_n_timesteps_in_a_list_and_a_function(algorithm: Any) -> None:
    counted: list[int] = []

    class Counts(BaseCallback):
        def _on_step(self) -> bool:
            counted.append(self.num_timesteps)
            return True

    def stops_at_40(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        return locals_["self"].num_timesteps < 40

    callbacks = [EveryNTimesteps(10, Counts()), LogEveryNTimesteps(20)]
    model_of(algorithm).learn(30, callback=callbacks)
    assert counted[:3] == [10, 20, 30]
    model = model_of(algorithm).learn(60, callback=CallbackList([*callbacks[:1]]))
    assert model.num_timesteps >= 60
    assert model_of(algorithm).learn(60, callback=stops_at_40).num_timesteps == 40


class Order(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def _on_training_start(self) -> None:
        self.events.append("training_start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout_start")

    def _on_step(self) -> bool:
        if self.events[-1] != "step":
            self.events.append("step")
        return True

    def _on_rollout_end(self) -> None:
        self.events.append("rollout_end")

    def _on_training_end(self) -> None:
        self.events.append("training_end")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_order_of_events(algorithm: Any) -> None:
    callback = Order()
    model_of(algorithm).learn(ROLLOUT + 1, callback=callback)
    rollout = ["rollout_start", "step", "rollout_end"]
    n_rollouts = callback.events.count("rollout_start")
    assert callback.events == ["training_start", *rollout * n_rollouts, "training_end"]


@pytest.mark.filterwarnings("ignore:rich is experimental/alpha")  # of tqdm's, which SB3 asks for
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_progress_bar_counts_every_step(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    close = ProgressBarCallback._on_training_end

    def noted(self: ProgressBarCallback) -> None:
        bars.append(self.pbar)
        close(self)

    monkeypatch.setattr(ProgressBarCallback, "_on_training_end", noted)
    model = model_of(algorithm).learn(ROLLOUT, progress_bar=True)
    assert [(bar.n, bar.total) for bar in bars] == [(model.num_timesteps, ROLLOUT)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learn_goes_on_or_begins_anew(algorithm: Any) -> None:
    model = model_of(algorithm).learn(ROLLOUT)
    first, updates = model.num_timesteps, model._n_updates
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert model.num_timesteps == 2 * first
    assert model._n_updates == 2 * updates
    before = parameters(model)
    model.learn(ROLLOUT)
    assert model.num_timesteps == first
    assert model._n_updates == 3 * updates
    assert not all(map(th.equal, parameters(model), before))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_formats_of_a_logger_hold_the_same(algorithm: Any, tmp_path: Path) -> None:
    """A logger of the user's own: CSV, JSON and TensorBoard hold the same."""
    model = model_of(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv", "json", "tensorboard"]))
    model.learn(3 * ROLLOUT)
    model.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        csv_rows = list(csv.DictReader(file))
    json_rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = LOGGED_BY_ALL | LOGGED[algorithm]
    assert len(csv_rows) == len(json_rows) >= 3
    assert expected <= csv_rows[-1].keys() & json_rows[-1].keys() & set(events.Tags()["scalars"])
    assert float(csv_rows[-1]["rollout/ep_rew_mean"]) == json_rows[-1]["rollout/ep_rew_mean"] == 3.0
    for key in expected - {"rollout/ep_rew_mean"}:
        assert float(csv_rows[-1][key]) == pytest.approx(float(json_rows[-1][key]))
        assert events.Scalars(key)[-1].value == pytest.approx(float(json_rows[-1][key]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensorboard_gets_a_folder_for_each_run(algorithm: Any, tmp_path: Path) -> None:
    model = model_of(algorithm, tensorboard_log=str(tmp_path))
    model.learn(ROLLOUT)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    model.learn(ROLLOUT, tb_log_name="other")
    model.logger.close()
    assert {path.name for path in tmp_path.iterdir()} == {f"{algorithm.__name__}_1", "other_1"}
    assert all(list(folder.iterdir()) for folder in tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_log_is_printed_if_verbose_and_not_otherwise(algorithm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model_of(algorithm, verbose=1).learn(2 * ROLLOUT)
    printed = capsys.readouterr().out
    assert "ep_rew_mean" in printed
    assert "total_timesteps" in printed
    model_of(algorithm).learn(2 * ROLLOUT)
    assert capsys.readouterr().out == ""


class SetsRate(BaseCallback):
    """As users of SB3 do it, in the middle of training."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def _on_rollout_start(self) -> None:
        if self.way == "schedule":
            self.model.lr_schedule = ConstantSchedule(0.0)
        else:
            self.model.learning_rate = 0.0
            self.model._setup_lr_schedule()

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("way", ["schedule", "number"])
def test_a_callback_edits_the_learning_rate(algorithm: Any, way: str) -> None:
    model = model_of(algorithm)
    before = parameters(model)
    model.learn(2 * ROLLOUT, callback=SetsRate(way))
    moved = {
        name
        for (name, p), q in zip(model.policy.named_parameters(), before, strict=True)
        if not th.equal(p.detach(), q) and (algorithm is not TRPO or "value" in name)  # whose actor has no rate
    }
    assert not moved
    assert model.logger.name_to_value["train/learning_rate"] == 0.0


class SetsClipRange(BaseCallback):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def _on_step(self) -> bool:
        self.model.clip_range = self.value
        return True


@pytest.mark.parametrize("algorithm", PROXIMAL)  # the others have no clip range
@pytest.mark.parametrize("value", [1e-6, ConstantSchedule(1e-6), lambda _: 1e-6], ids=["number", "schedule", "λ"])
def test_a_callback_edits_the_clip_range(algorithm: Any, value: Any) -> None:
    model = model_of(algorithm, clip_range=0.2, n_epochs=5, learning_rate=1e-2)
    model.learn(2 * ROLLOUT, callback=SetsClipRange(value))
    assert model.logger.name_to_value["train/clip_range"] == 1e-6
    assert model.logger.name_to_value["train/clip_fraction"] > 0.5  # it was used


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_error_of_a_callback_leaves_the_model_usable(algorithm: Any) -> None:
    class Raises(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                raise KeyboardInterrupt
            return True

    model = small(algorithm, "MlpPolicy", Monitor(gym.make("CartPole-v1")))
    with pytest.raises(KeyboardInterrupt):
        model.learn(ROLLOUT, callback=Raises())
    before = parameters(model)
    model.learn(ROLLOUT)
    assert not all(map(th.equal, parameters(model), before))

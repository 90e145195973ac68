"""`python -m benchmarks.staleness`: rollouts wait or are reused, and what a second clip would cut is measured."""

from __future__ import annotations

import inspect
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from benchmarks.learning.arms import ARMS, SPO, Decoupled, TruncatedWeight, Waiting
from benchmarks.learning.cases import Run, entry
from benchmarks.learning.conditions import CHECKS, Condition
from benchmarks.staleness import __main__ as staleness
from sb3_ppo_ext import DualClipPPO
from tests.algorithms import assert_close_policies, assert_same_policy, have_moved, parameters, small

SIZES: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "dual_clip": None}


def model(algorithm: Any, **kwargs: Any) -> Any:
    return small(algorithm, "MlpPolicy", "Pendulum-v1", **{**SIZES, **kwargs})


def test_without_a_lag_it_is_dual_clip_ppo() -> None:
    assert_same_policy(model(Waiting).learn(96), model(DualClipPPO).learn(96))


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_rollout_waits_until_as_many_newer_ones_are_there(is_compiled: bool) -> None:
    collected, learnt = [], []

    class Watched(Waiting):
        def train(self) -> None:
            collected.append(self.rollout_buffer.observations.copy())
            super().train()

        def _after_update(self) -> None:
            super()._after_update()
            learnt.append(self.rollout_buffer.observations.copy())

    waiting = model(Watched, lag=2, torch_compile=is_compiled)
    waiting.policy.cannot_be_copied = threading.Lock()  # as compiled programs cannot
    waiting.learn(5 * 32)
    assert len(collected) == 5
    assert len(learnt) == 3
    for i, observations in enumerate(learnt):
        np.testing.assert_array_equal(observations, collected[i])
    assert not np.array_equal(collected[0], collected[2])


def test_what_a_second_clip_would_cut_is_measured() -> None:
    trained = model(Waiting).learn(32)
    trained.rollout_buffer.log_probs += np.linspace(-1.0, 1.0, 32, dtype=np.float32)[:, None]
    trained.rollout_buffer.forget_flat()
    trained._after_update()
    logged, rollout = trained.logger.name_to_value, trained.rollout_buffer.flat()
    _, log_prob, _ = trained.policy.evaluate_actions(rollout.observations, rollout.actions)
    ratio = (log_prob - rollout.old_log_prob).exp()
    a = (rollout.advantages - rollout.advantages.mean()) / rollout.advantages.std()
    # PPO's gradient is that of r A where the first clip lets it through.
    goes_through = ((a >= 0) & (ratio < 1.2)) | ((a < 0) & (ratio > 0.8))
    parameters = list(trained.policy.parameters())

    def norm(of: th.Tensor) -> float:
        grads = th.autograd.grad((ratio * a * of).sum(), parameters, retain_graph=True, allow_unused=True)
        return float(sum(g.square().sum() for g in grads if g is not None)) ** 0.5

    cut = (a < 0) & (ratio > 1.5)
    assert 0 < cut.sum() < len(cut)
    assert logged["train/end_cut_share_1.5"] == pytest.approx(cut.float().mean().item())
    assert logged["train/end_cut_gradient_1.5"] == pytest.approx(norm(cut) / norm(goes_through), rel=1e-3)
    assert logged["train/end_ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "ratio", "expected"),
    [(TruncatedWeight, 2.0, 2.0 * 2.0), (TruncatedWeight, 5.0, 3.0 * 2.0), (SPO, 5.0, (2.0 + 2.0 * 4.0 / 0.2) * 5.0)],
)
def test_the_gradient_of_an_arm_is_what_it_says(algorithm: type[Waiting], ratio: float, expected: float) -> None:
    """Of one sample with A = -2: min(r, 3) times -A, and of SPO -(A - |A| (r - 1) / 0.2) r."""
    log_prob = th.tensor([-0.5]).requires_grad_()
    of_step = model(algorithm, dual_clip=3.0).learn(32).rollout_buffer.flat().rows(slice(0, 1))
    old_log_prob = log_prob.detach() - th.tensor([ratio]).log()
    samples = of_step._replace(old_log_prob=old_log_prob, advantages=th.tensor([-2.0]))
    evaluation: Any = type("Evaluation", (), {"log_prob": log_prob})
    coefficients: Any = {"dual_clip": 3.0, "clip_range": 0.2}
    (gradient,) = th.autograd.grad(algorithm.policy_loss(evaluation, samples, coefficients).loss, log_prob)
    assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_measured_is_of_reused_rollouts_too() -> None:
    collected = []

    class Watched(Waiting):
        def train(self) -> None:
            collected.append(self.rollout_buffer.flat())
            super().train()

    trained = model(Watched, n_reused_rollouts=1, learning_rate=1e-2).learn(3 * 32)
    ratios = []
    for rollout in collected[1:]:  # the newest and the one before it
        _, log_prob, _ = trained.policy.evaluate_actions(rollout.observations, rollout.actions)
        ratios.append((log_prob - rollout.old_log_prob).exp())
    assert ratios[0].max() > ratios[1].max()  # or the older one would not show
    assert trained.logger.name_to_value["train/end_ratio_max"] == pytest.approx(ratios[0].max().item(), rel=1e-4)


def test_decoupled_is_ppo_on_fresh_data_and_what_the_package_has_of_reused_rollouts() -> None:
    assert_close_policies(model(Decoupled).learn(64), model(DualClipPPO).learn(64), atol=1e-5)
    reused: Any = {"n_reused_rollouts": 1, "reuse": {"proximal": "newest"}}
    assert_same_policy(model(Decoupled, **reused).learn(96), model(DualClipPPO, **reused).learn(96))


def test_decoupled_clips_around_the_policy_with_which_an_update_begins() -> None:
    seen, weights = [], []

    class Watched(Decoupled):
        @staticmethod
        def policy_loss(evaluation: Any, samples: Any, coefficients: Any) -> Any:
            assert coefficients["max_importance_weight"] == 2.0
            weights.append((samples.proximal_log_prob - samples.old_log_prob).exp())
            return Decoupled.policy_loss(evaluation, samples, coefficients)

        def _before_update(self) -> None:
            super()._before_update()
            samples = self.rollout_buffer.flat()
            _, present, _ = self.policy.evaluate_actions(samples.observations, samples.actions)
            seen.append((samples, present.detach()))

    trained = model(Watched, lag=2, learning_rate=1e-2)
    trained.learn(5 * 32)
    assert len(seen) == 3
    for samples, present in seen:
        th.testing.assert_close(samples.proximal_log_prob, present, rtol=1e-5, atol=1e-5)
    acted, proximal = seen[-1][0].old_log_prob, seen[-1][0].proximal_log_prob
    assert (acted - proximal).abs().max() > 0.01  # that which acted is two updates older
    assert len(weights) == 3 * 2 * 2  # updates, epochs, minibatches
    assert max(float(weight.max()) for weight in weights) > 1.01


def test_all_parameters_of_a_run_are_known() -> None:
    known = set(inspect.signature(Waiting).parameters)
    assert {*inspect.signature(DualClipPPO).parameters, "lag"} == known
    for arm in ARMS:
        of_run = entry(Run("lag-4-epochs-10", "Hopper-v5", arm, 0), {})
        assert (of_run["lag"], of_run["n_epochs"], of_run["n_timesteps"]) == (4, 10, 300_000)
        reused = entry(Run("reuse-3-epochs-10-learning_rate_x3", "Hopper-v5", arm, 0), {})
        assert (reused["n_reused_rollouts"], reused["learning_rate"]) == (3, 9e-4)
        assert reused.get("reuse") == ({"proximal": "newest"} if arm == "decoupled" else None)
        unclipped = entry(Run("lag-16-epochs-10-no_gradient_clipping", "Hopper-v5", arm, 0), {})
        assert {*of_run, *reused, *unclipped} - {"policy", "normalize", "n_envs", "n_timesteps"} <= known
        json.dumps([of_run, reused, unclipped], allow_nan=False)


def test_without_clipping_there_is_none() -> None:
    unclipped = model(Waiting, **CHECKS["no_gradient_clipping"]).learn(64)
    assert_same_policy(unclipped, model(Waiting, max_grad_norm=math.inf).learn(64))
    assert have_moved(unclipped, parameters(model(Waiting).learn(64)))  # which is clipped


@pytest.mark.parametrize("check", [None, *CHECKS])
def test_a_folder_says_what_its_runs_have_in_common(check: str | None) -> None:
    for condition in (
        Condition(check=check),
        Condition(lag=16, n_epochs=40, check=check),
        Condition(reuse=7, check=check),
    ):
        assert Condition.of_set(condition.set) == condition
    assert Condition.of_set("lag-4-epochs-10") == Condition(lag=4)  # of runs that are there
    assert Condition.of_set("defaults") is Condition.of_set("lag-4-epochs-10-other") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0 is not allowed"),
        (["--lags", "1", "--reuse", "1"], "not allowed with argument --lags"),
        (["--arms", "ppo", "decoupled"], "--arms decoupled is not allowed with --lags 0: on fresh data"),
        (["--arms", "decoupled", "--reuse", "1", "0"], "--arms decoupled is not allowed with --reuse 0: on fresh data"),
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(staleness, "alone_in")  # without which no run is begun
    with pytest.raises(SystemExit):
        staleness.main(arguments)
    assert message in capsys.readouterr().err


def test_runs_go_into_the_folder_of_their_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []

    def make_runs(runs: list[Run], overrides: dict[str, Any], folder: Path, jobs: int) -> list[Run]:
        assert {run.set for run in runs} == {folder.name}
        made.extend(runs)
        return []

    monkeypatch.setattr(staleness, "make_runs", make_runs)
    staleness.main(["--reuse", "0", "7", "--envs", "Hopper-v5", "--seeds", "1", "--out", str(tmp_path)])
    staleness.main(["--lags", "16", "--check", "no_gradient_clipping", "--arms", "spo", "--out", str(tmp_path)])
    assert [run.algo for run in made if run.set == "lag-0-epochs-10"] == [arm for arm in ARMS if arm != "decoupled"]
    assert [run.algo for run in made if run.set == "reuse-7-epochs-10"] == list(ARMS)
    assert {run.set for run in made[-40:]} == {"lag-16-epochs-10-no_gradient_clipping"}

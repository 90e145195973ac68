"""`python -m benchmarks.staleness`: rollouts wait, what a second clip would cut is measured, and the page says it."""

from __future__ import annotations

import inspect
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from benchmarks import staleness
from benchmarks.learning import run as run_module
from benchmarks.learning.arms import ARMS, SPO, TruncatedWeight, Waiting
from benchmarks.learning.cases import Run, entry, stale_set
from sb3_ppo_ext import DualClipPPO
from tests.algorithms import assert_same_policy, small

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


def test_all_parameters_of_a_run_are_known() -> None:
    known = set(inspect.signature(Waiting).parameters)
    assert {*inspect.signature(DualClipPPO).parameters, "lag"} == known
    for arm in ARMS:
        of_run = entry(Run(stale_set(4, 10), "Hopper-v5", arm, 0), {})
        assert (of_run["lag"], of_run["n_epochs"], of_run["n_timesteps"]) == (4, 10, 300_000)
        assert set(of_run) - {"policy", "normalize", "n_envs", "n_timesteps"} <= known


def test_the_page_says_what_the_runs_have_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "N_EVALUATIONS", 2)
    monkeypatch.setattr(run_module, "N_EPISODES", 1)
    run = Run(stale_set(1, 2), "LunarLander-v3", "dual_clip_3", 0)
    path = run.path(tmp_path / run.set)
    path.parent.mkdir(parents=True)
    tiny = {"n_timesteps": 200, "n_steps": 40, "batch_size": 20, "torch_compile": False}
    run_module.make_run(run, entry(run, tiny), path)
    record = json.loads(path.read_text())
    assert record["hyper_parameters"]["lag"] == 1
    assert {"end_cut_share_3", "end_ratio_max"} <= set(record["log"])
    for arm, reached in (("ppo", 5.02), ("dual_clip_3", 4.02)):  # the latter is a score of 0.5
        record["evaluation"]["mean"] = [200.0, *[reached] * 5]
        for seed in range(3):
            (path.parent / f"{arm}-{seed}.json").write_text(json.dumps({**record, "algo": arm, "seed": seed}))
    assert said_of(tmp_path, "second clip, c = 3")[2:5] == ["3", "0.50 [0.50, 0.50]", "0.00 [0.00, 0.00]"]
    assert said_of(tmp_path, "second clip, c = 3")[-1] == "4"
    (path.parent / "ppo-2.json").unlink()  # two runs say nothing of who is better
    assert said_of(tmp_path, "second clip, c = 3")[2:5] == ["3", "0.50 [0.50, 0.50]", "-"]


def said_of(folder: Path, label: str) -> list[str]:
    """The cells of an arm in the table of what runs have reached."""
    staleness.write_report(folder, n_resamples=20)
    page = (folder / "report.md").read_text()
    assert "## Lag 1, 2 epochs" in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {label} | LunarLander"))
    return [cell.strip() for cell in row.strip("|").split("|")]

"""``as_schedule`` and ``value_at``: numbers, schedules in words and functions, and what is refused."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR

from sb3_ppo_ext import DualClipPPO
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.validation import as_schedule, value_at
from tests.algorithms import ROLLOUT, small

PROGRESS = (1.0, 0.75, 0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.25, [0.25, 0.25, 0.25, 0.25]),
        (3, [3.0, 3.0, 3.0, 3.0]),
        (np.float32(0.5), [0.5, 0.5, 0.5, 0.5]),
        ("lin_0.2", [0.2, 0.15, 0.1, 0.0]),
        ("lin_4", [4.0, 3.0, 2.0, 0.0]),
        ("lin_1e-3", [1e-3, 7.5e-4, 5e-4, 0.0]),
        ("lin_0.4_0.2", [0.4, 0.35, 0.3, 0.2]),
        ("lin_0.2_0.4", [0.2, 0.25, 0.3, 0.4]),
        ("cos_1", [1.0, 0.8535534, 0.5, 0.0]),
        ("cos_0.4_0.2", [0.4, 0.3707107, 0.3, 0.2]),
        ("exp_1_0.0625", [1.0, 0.5, 0.25, 0.0625]),
        ("const_0.3", [0.3, 0.3, 0.3, 0.3]),
        ("const_3_warmup_0.5", [0.0, 1.5, 3.0, 3.0]),
        ("lin_3_1_warmup_0.5", [0.0, 1.5, 3.0, 1.0]),
        ("cos_1_warmup_0.25", [0.0, 1.0, 0.75, 0.0]),
        (lambda progress: progress**2, [1.0, 0.5625, 0.25, 0.0]),
        (lambda progress: th.tensor(2.0 * progress), [2.0, 1.5, 1.0, 0.0]),
        (lambda progress: np.array(progress), [1.0, 0.75, 0.5, 0.0]),
        (lambda _: 0, [0.0, 0.0, 0.0, 0.0]),
        (ConstantSchedule(0.7), [0.7, 0.7, 0.7, 0.7]),
        (LinearSchedule(0.4, 0.2, 0.5), [0.4, 0.3, 0.2, 0.2]),
        (FloatSchedule(0.125), [0.125, 0.125, 0.125, 0.125]),
    ],
)
def test_what_is_taken(given: Any, expected: list[float]) -> None:
    schedule = as_schedule("rate", given)
    values = [schedule(progress) for progress in PROGRESS]
    assert values == pytest.approx(expected)
    assert all(type(value) is float for value in values)
    assert isinstance(schedule, FloatSchedule)
    assert [value_at(given, progress) for progress in PROGRESS] == pytest.approx(expected)


@pytest.mark.parametrize("number", [0, 0.0, np.float64(0.0)])
def test_zero_is_taken_where_it_may_be(number: Any) -> None:
    assert as_schedule("weight", number, may_be_zero=True)(0.5) == 0.0
    with pytest.raises(ArgumentError, match=r"weight=.*0.* is not allowed: it must be a finite number above 0"):
        as_schedule("weight", number)


def test_a_schedule_of_a_number_or_a_string_can_be_pickled() -> None:
    """So that a saved model holds no code."""
    for given in (0.5, "lin_1", "cos_1", "exp_1_0.25", "const_1_warmup_0.5"):
        schedule = as_schedule("rate", given)
        assert [pickle.loads(pickle.dumps(schedule))(p) for p in PROGRESS] == [schedule(p) for p in PROGRESS]


@pytest.mark.parametrize(
    ("words", "of_torch"),
    [
        ("lin_0.5_0.1", lambda adam: LinearLR(adam, start_factor=1.0, end_factor=0.2, total_iters=10)),
        ("cos_0.5_0.1", lambda adam: CosineAnnealingLR(adam, T_max=10, eta_min=0.1)),
        ("exp_0.5_0.1", lambda adam: ExponentialLR(adam, gamma=0.2**0.1)),
        ("const_0.5_warmup_0.4", lambda adam: LambdaLR(adam, lambda step: min(step / 4, 1.0))),
    ],
)
def test_schedules_in_words_are_those_of_torch(words: str, of_torch: Any) -> None:
    adam = th.optim.Adam([th.nn.Parameter(th.zeros(1))], lr=0.5)
    scheduler, schedule = of_torch(adam), as_schedule("rate", words)
    for step in range(11):
        assert schedule(1.0 - step / 10) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        adam.step()
        scheduler.step()


def test_schedules_in_words_are_trained_by_saved_and_loaded(tmp_path: Path) -> None:
    """The warm-up takes 2 of 4 rollouts: after one the learning rate is half of its first value, then all of it."""
    given = {"learning_rate": "lin_4e-3_2e-3_warmup_0.5", "ent_coef": "cos_0.4_0.2"}
    seen: list[tuple[float, float]] = []

    def note(local_variables: dict[str, Any], _: Any) -> bool:
        model = local_variables["self"]
        if model._n_updates and local_variables["n_steps"] == 0:
            logged = model.logger.name_to_value
            seen.append((logged["train/learning_rate"], logged["train/clip_range"]))
        return True

    model = small(DualClipPPO, "MlpPolicy", "CartPole-v1", clip_range="exp_0.8_0.05", **given)
    model.learn(4 * ROLLOUT, callback=note, log_interval=100)
    assert seen == [pytest.approx(both) for both in [(2e-3, 0.4), (4e-3, 0.2), (3e-3, 0.1)]]
    model.save(tmp_path / "model")
    loaded = DualClipPPO.load(tmp_path / "model", env=model.env, device="cpu")
    assert {name: getattr(loaded, name) for name in given} == given
    assert loaded.lr_schedule(0.0) == pytest.approx(2e-3)
    assert [loaded.clip_range(p) for p in PROGRESS] == pytest.approx([0.8, 0.4, 0.2, 0.05])
    loaded.learn(ROLLOUT, reset_num_timesteps=False)


@pytest.mark.parametrize("may_be_zero", [False, True])
@pytest.mark.parametrize("number", [-1e-3, math.nan, math.inf, -math.inf, True, None, (0.1, 0.2), [0.1], 1j, b"lin_1"])
def test_what_is_no_such_number_is_refused(number: Any, may_be_zero: bool) -> None:
    with pytest.raises(ArgumentError) as error:
        as_schedule("rate", number, may_be_zero=may_be_zero)
    bound = "at least 0" if may_be_zero else "above 0"
    assert str(error.value) == f"rate={number!r} is not allowed: it must be a finite number {bound}"


@pytest.mark.parametrize(
    "string",
    [
        *("", "lin", "lin_", "lin_x", "lin_0", "lin_-1", "lin_nan", "lin_inf", "exp_0.1", "0.1", "LIN_1"),
        *("lin_1_2_3", "lin_1_", "const_1_2", "exp_1_0", "cos_0_1", "cos_1_-1", "cos_1_inf", "lin_1_warmup"),
        *("warmup_0.1", "lin_1_warmup_0", "lin_1_warmup_1", "lin_1_warmup_x", "lin_1_warmup_0.1_2"),
    ],
)
def test_a_string_that_says_no_schedule_is_refused(string: str) -> None:
    with pytest.raises(ArgumentError) as error:
        as_schedule("rate", string, may_be_zero=True)
    assert str(error.value) == (
        f"rate={string!r} is not allowed: it must be a number, a function, or a schedule in words such as 'lin_3e-4', "
        "'cos_3e-4_1e-5', 'exp_3e-4_1e-5' or 'const_3e-4_warmup_0.1'"
    )


def raises(progress: float) -> float:
    raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize(
    ("function", "progress", "what"),
    [
        (lambda _: -0.1, "1", "returns -0.1"),
        (lambda progress: progress - 0.1, "0", "returns -0.1"),
        (lambda progress: math.nan if progress == 0.5 else 1.0, "0.5", "returns nan"),
        (lambda _: math.inf, "1", "returns inf"),
        (lambda _: None, "1", "returns None"),
        (lambda _: "a", "1", "returns 'a'"),
        (lambda _: th.zeros(2), "1", r"returns tensor\(\[0., 0.\]\)"),
        (lambda: 0.1, "1", "raises an error"),
        (raises, "1", "raises an error"),
    ],
)
def test_a_function_that_returns_no_such_number_is_refused(function: Any, progress: str, what: str) -> None:
    with pytest.raises(ArgumentError, match=f"rate=<function .*is not allowed: at progress {progress} it {what}, and"):
        as_schedule("rate", function)

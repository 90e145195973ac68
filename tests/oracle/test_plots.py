"""The figures of the objectives draw what closed forms say: the lines of their axes are compared with literals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_ppo_ext.plots import cases_figure, surrogate_figure, trust_region_figure
from sb3_ppo_ext.plots.trust_region import trust_region_step


def lines(panel: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is drawn, by its label, without lines across the panel."""
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in panel.get_lines()
        if len(np.atleast_1d(line.get_xdata())) > 2
    }


def at(line: tuple[np.ndarray, np.ndarray], ratios: list[float]) -> np.ndarray:
    """The values of a line, between its points."""
    return np.interp(ratios, *line)


def drawn(name: str, **arguments: Any) -> dict[float, tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """Objective and gradient of a figure with one row, by the advantage."""
    left, right = surrogate_figure(name, **arguments).axes
    of_left, of_right = list(lines(left).values()), list(lines(right).values())
    return {1.0: (of_left[0], of_right[0]), -1.0: (of_left[1], of_right[1])}


RATIOS = [0.1, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5, 2.9, 3.1, 3.9]


@pytest.mark.parametrize(
    ("name", "advantage", "objective", "gradient"),
    [
        # Between the points of RATIOS: edges at 0.8, 1.2 and 3.
        ("plain", 1.0, RATIOS, [1.0] * 11),
        ("plain", -1.0, [-r for r in RATIOS], [-1.0] * 11),
        ("clipped", 1.0, [*RATIOS[:6], *[1.2] * 5], [1.0] * 6 + [0.0] * 5),
        ("clipped", -1.0, [*[-0.8] * 3, *[-r for r in RATIOS[3:]]], [0.0] * 3 + [-1.0] * 8),
        ("asymmetric", 1.0, [*RATIOS[:7], *[1.4] * 4], [1.0] * 7 + [0.0] * 4),
        ("asymmetric", -1.0, [*[-0.8] * 3, *[-r for r in RATIOS[3:]]], [0.0] * 3 + [-1.0] * 8),
        ("dual_clip", 1.0, [*RATIOS[:6], *[1.2] * 5], [1.0] * 6 + [0.0] * 5),
        (
            "dual_clip",
            -1.0,
            [*[-0.8] * 3, *[-r for r in RATIOS[3:9]], -3.0, -3.0],
            [0.0] * 3 + [-1.0] * 6 + [0.0] * 2,
        ),
    ],
)
def test_clipped_objectives_are_drawn_as_their_closed_forms(
    name: str, advantage: float, objective: list[float], gradient: list[float]
) -> None:
    of_objective, of_gradient = drawn(name)[advantage]
    np.testing.assert_allclose(at(of_objective, RATIOS), objective, atol=1e-5)
    np.testing.assert_allclose(at(of_gradient, RATIOS), gradient, atol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_penalised_objectives_are_drawn_as_their_closed_forms(advantage: float) -> None:
    # beta 2: r A - 2 (r - 1 - log r), and A - 2 (1 - 1/r). epsilon 0.5: r A - (r - 1)^2, and A - 2 (r - 1).
    (r, objective), (_, gradient) = drawn("kl_penalized", kl_coef=2.0)[advantage]
    np.testing.assert_allclose(objective, advantage * r - 2.0 * (r - 1.0 - np.log(r)), atol=1e-12)
    np.testing.assert_allclose(gradient, advantage - 2.0 + 2.0 / r, rtol=1e-9, atol=1e-12)
    (r, objective), (_, gradient) = drawn("spo", epsilon=0.5)[advantage]
    np.testing.assert_allclose(objective, advantage * r - (r - 1.0) ** 2, atol=1e-12)
    np.testing.assert_allclose(gradient, advantage - 2.0 * (r - 1.0), atol=1e-12)


def test_the_arguments_reach_their_rows() -> None:
    figure = surrogate_figure(
        ["clipped", "asymmetric", "dual_clip"], clip_range=0.1, clip_range_high=0.3, dual_clip=2.0
    )
    tops = [lines(panel)["$A = +1$"][1].max() for panel in figure.axes[::2]]
    assert tops == pytest.approx([1.1, 1.3, 1.1])
    assert lines(figure.axes[4])["$A = -1$"][1].min() == pytest.approx(-2.0)
    titles = [panel.get_title(loc="left") for panel in figure.axes[::2]]
    assert titles == ["PPO: range 0.1", "Asymmetric: 0.1 below, 0.3 above", "Dual clip: range 0.1, c = 2"]


# As in tests/oracle/test_losses_surrogates.py: the objective in units of |A| for the range 0.2, and what the clip does.
CASES = {
    ("below", 1.0): (0.48, "below: not clipped, gradient A"),  # 0.6 * 0.8
    ("inside", 1.0): (1.0, "inside: not clipped, gradient A"),
    ("above", 1.0): (1.2, "above: clipped, no gradient"),
    ("below", -1.0): (-0.8, "below: clipped, no gradient"),
    ("inside", -1.0): (-1.0, "inside: not clipped, gradient A"),
    ("above", -1.0): (-1.7, "above: not clipped, gradient A"),
}


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_six_cases_are_marked_and_named(dual_clip: float | None) -> None:
    figure = cases_figure(dual_clip=dual_clip)
    left, right, *words = figure.axes
    names = [text.get_text() for panel in words for text in panel.texts if not text.get_text().isdigit()]
    expected = [text for _, text in CASES.values()]
    heights = [height for height, _ in CASES.values()]
    ratios = [0.48, 1.0, 1.7] * 2
    if dual_clip is not None:
        expected, heights, ratios = [*expected, "beyond c: clipped, no gradient"], [*heights, -3.0], [*ratios, 3.5]
    assert names == expected
    marks = [line for panel in (left, right) for line in panel.get_lines() if line.get_marker() == "o"]
    points = np.concatenate([line.get_xydata() for line in marks])
    np.testing.assert_allclose(points, np.stack((ratios, heights), axis=1))
    numbers = [text.get_text() for panel in (left, right) for text in panel.texts if text.get_color() == "white"]
    assert numbers == [str(i + 1) for i in range(len(expected))]


def test_the_parts_with_and_without_gradient_make_up_the_objective() -> None:
    above, below, *_ = cases_figure(clip_range=0.1, clip_range_high=0.3, dual_clip=2.0).axes
    for panel, sign, low, high in ((above, 1.0, 0.0, 1.3), (below, -1.0, 0.9, 2.0)):
        of_panel = lines(panel)
        ratio, learns = of_panel["objective with gradient"]
        _, flat = of_panel["objective without gradient"]
        assert (np.isnan(learns) != np.isnan(flat)).all()
        np.testing.assert_array_equal(np.isnan(learns), (ratio < low) | (ratio > high))
        np.testing.assert_allclose(
            np.nan_to_num(flat) + np.nan_to_num(learns), sign * ratio.clip(low, high), atol=1e-12
        )


# The trust region. At mean 0 and sigma 2, the objective -(mean - 2)^2 - sigma^2 has the gradient (4, -8) by
# (mean, log sigma), and F = diag(1 / sigma^2, 2) = diag(1/4, 2), so the natural gradient is (16, -4).


def test_trpos_step_in_closed_form() -> None:
    step = trust_region_step(0.5)
    np.testing.assert_allclose(step.gradient, [4.0, -8.0])
    np.testing.assert_allclose(step.fisher, [[0.25, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(step.natural, [16.0, -4.0])
    full = np.array([16.0, -4.0]) / math.sqrt(96.0)  # sqrt(2 * 0.5 / (4 * 16 + 8 * 4))
    np.testing.assert_allclose(step.full_step, full)
    fractions = np.array([1.0, 0.8, 0.64])
    mean, log_ratio = np.outer(full, fractions)  # log_ratio = log(sigma / 2)
    np.testing.assert_allclose(step.trials, np.stack((mean, math.log(2.0) + log_ratio), axis=1))
    kls = log_ratio + (4.0 + mean**2) / (8.0 * np.exp(2.0 * log_ratio)) - 0.5
    np.testing.assert_allclose(step.kls, kls)
    assert (kls > 0.5).tolist() == [True, True, False]
    assert step.search.accepted
    assert step.search.fraction == pytest.approx(0.64)


def ends(figure: Figure) -> dict[str, np.ndarray]:
    """The last point of each line of the trust region's figure, by its label."""
    found = {}
    for line in figure.axes[0].get_lines():
        points = np.asarray(line.get_xydata())
        if len(points):
            found[str(line.get_label())] = points[-1]
    return found


def test_the_trust_region_is_drawn_as_it_is() -> None:
    figure = trust_region_figure(target_kl=0.5)
    start = np.array([0.0, math.log(2.0)])
    found = ends(figure)
    np.testing.assert_allclose(found["natural gradient: the full step"] - start, [16 / 96**0.5, -4 / 96**0.5])
    # As far as the second-order model allows: 4^2 / 4 + 2 * 8^2 = 132.
    np.testing.assert_allclose(found["plain gradient"] - start, [4 / 132**0.5, -8 / 132**0.5])
    np.testing.assert_allclose(found["trial, accepted"] - start, [0.64 * 16 / 96**0.5, -0.64 * 4 / 96**0.5])
    (limit,) = [line for line in figure.axes[0].collections if getattr(line, "levels", None) is not None][2:3]
    points = np.concatenate([path.vertices for path in limit.get_paths()])
    mean, log_ratio = points[:, 0], points[:, 1] - math.log(2.0)
    kls = log_ratio + (4.0 + mean**2) / (8.0 * np.exp(2.0 * log_ratio)) - 0.5
    np.testing.assert_allclose(kls, 0.5, atol=2e-3)  # between the points of a grid


def test_a_search_that_fails_is_drawn_too() -> None:
    found = ends(trust_region_figure(max_iter=1))
    assert "trial, accepted" not in found
    assert "trial, refused" in found

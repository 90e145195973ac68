"""Advantages and returns against numbers worked by hand, plain loops over episodes, identities, and SB3's buffer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_ppo_ext.losses import generalized_advantages, n_step_returns

BOTH: list[tuple[Callable[..., th.Tensor], dict[str, Any]]] = [
    (generalized_advantages, {"gamma": 0.9, "gae_lambda": 0.7}),
    (n_step_returns, {"gamma": 0.9, "n_steps": 3}),
]
both = pytest.mark.parametrize(("function", "numbers"), BOTH, ids=["gae", "n-step"])


class Rollout(NamedTuple):
    rewards: th.Tensor
    values: th.Tensor
    last_values: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    final_values: th.Tensor

    def at(self, steps: Any) -> Rollout:
        """The same with some of the steps."""
        fields = self._asdict()
        return Rollout(**{name: x if name == "last_values" else x[steps] for name, x in fields.items()})

    def to(self, function: Callable[..., th.Tensor], **kwargs: Any) -> th.Tensor:
        return function(*tuple(self)[:5], **{"final_values": self.final_values, **kwargs})


def random_rollout(
    n_steps: int, n_envs: int = 3, *, seed: int = 0, p_end: float = 0.15, dtype: th.dtype = th.float64
) -> Rollout:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> th.Tensor:
        return th.from_numpy(rng.normal(size=shape)).to(dtype)

    def sometimes() -> th.Tensor:
        return th.from_numpy(rng.random((n_steps, n_envs)) < p_end)

    shape = (n_steps, n_envs)
    return Rollout(normal(*shape), normal(*shape), normal(n_envs), sometimes(), sometimes(), normal(*shape))


def column(*numbers: float) -> th.Tensor:
    return th.tensor(numbers)[:, None]


# Literals


HAND = Rollout(
    rewards=column(1, 5, 3, -1, 2, 7, 4, 6),
    values=column(2, 4, 8, 2, 1, 3, 2, 4),
    last_values=th.tensor([10.0]),
    terminated=column(0, 1, 0, 0, 0, 1, 0, 0),
    truncated=column(0, 0, 0, 1, 0, 1, 0, 0),
    final_values=column(math.nan, math.nan, math.nan, 14, math.nan, 100, math.nan, math.nan),
)


def test_advantages_by_hand() -> None:
    """A step counts gamma lambda = 1/4 of the next."""
    found = HAND.to(generalized_advantages, gamma=0.5, gae_lambda=0.5)
    expected = column(
        1.25,  # 1 + 4/2 - 2 = 1, and 1/4 of 1
        1.00,  # 5 - 4, terminated
        -3.0,  # 3 + 2/2 - 8 = -4, and 1/4 of 4
        4.00,  # -1 + 14/2 - 2, truncated
        3.50,  # 2 + 3/2 - 1 = 2.5, and 1/4 of 4
        4.00,  # 7 - 3, both
        5.75,  # 4 + 4/2 - 2 = 4, and 1/4 of 7
        7.00,  # 6 + 10/2 - 4, where the rollout ends
    )
    assert th.equal(found, expected)


def test_advantages_without_final_values() -> None:
    found = HAND.to(generalized_advantages, gamma=0.5, gae_lambda=0.5, final_values=None)
    assert th.equal(found, column(1.25, 1.0, -4.75, -3.0, 3.5, 4.0, 5.75, 7.0))


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [
        (1, (3.0, 5.0, 4.0, 6.0, 3.5, 7.0, 6.0, 11.0)),  # 1 + 4/2, 5, 3 + 2/2, -1 + 14/2, ...
        (2, (3.5, 5.0, 6.0, 6.0, 5.5, 7.0, 9.5, 11.0)),  # 1 + 5/2, 5, 3 + 6/2, ...
        (3, (3.5, 5.0, 6.0, 6.0, 5.5, 7.0, 9.5, 11.0)),  # no episode is longer
    ],
)
def test_returns_by_hand(n_steps: int, expected: tuple[float, ...]) -> None:
    assert th.equal(HAND.to(n_step_returns, gamma=0.5, n_steps=n_steps), column(*expected))


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [
        (1, (17.0, 34.0, 68.0, 136.0)),
        (2, (18.0, 36.0, 72.0, 136.0)),
        (3, (19.0, 38.0, 72.0, 136.0)),
        (4, (20.0, 38.0, 72.0, 136.0)),
        (99, (20.0, 38.0, 72.0, 136.0)),
    ],
)
def test_returns_within_one_episode(n_steps: int, expected: tuple[float, ...]) -> None:
    """A reward of 2^t halved t times is 1, and so is each of those that follow it; a value of 2^(t+4) is 16."""
    no = th.zeros(4, 1, dtype=th.bool)
    found = n_step_returns(
        column(1, 2, 4, 8), column(16, 32, 64, 128), th.tensor([256.0]), no, no, gamma=0.5, n_steps=n_steps
    )
    assert th.equal(found, column(*expected))


# Closed forms and identities


@pytest.mark.parametrize("n_steps", [1, 2, 7, 64, 100])
def test_monte_carlo_is_a_geometric_series(n_steps: int) -> None:
    """Rewards of 1 up to a terminal state: the return of the last k steps is (1 - gamma^k) / (1 - gamma)."""
    rollout = random_rollout(n_steps, 2, p_end=0.0)._replace(rewards=th.ones(n_steps, 2, dtype=th.float64))
    rollout.terminated[-1] = True
    k = th.arange(n_steps, 0, -1, dtype=th.float64)[:, None]
    expected = ((1 - 0.9**k) / (1 - 0.9)).expand(-1, 2)
    th.testing.assert_close(rollout.to(n_step_returns, gamma=0.9, n_steps=n_steps), expected)
    advantages = rollout.to(generalized_advantages, gamma=0.9, gae_lambda=1.0)
    th.testing.assert_close(advantages + rollout.values, expected)


def test_a_consistent_value_function_has_no_advantage() -> None:
    """A reward of 1 for ever is worth 1 / (1 - gamma), wherever the rollout ends and whatever cuts it."""
    worth = th.full((50, 3), 10.0, dtype=th.float64)
    rollout = random_rollout(50)._replace(
        rewards=th.ones_like(worth), values=worth, last_values=worth[0], final_values=worth
    )
    rollout.terminated[:] = False
    assert rollout.truncated.any()
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages = rollout.to(generalized_advantages, gamma=0.9, gae_lambda=gae_lambda)
        th.testing.assert_close(advantages, th.zeros_like(worth), rtol=0, atol=1e-12)
    for n_steps in (1, 5, 50):
        th.testing.assert_close(rollout.to(n_step_returns, gamma=0.9, n_steps=n_steps), worth)


def test_the_limits_of_lambda() -> None:
    rollout = random_rollout(40)
    for gae_lambda, n_steps in ((0.0, 1), (1.0, 40), (1.0, 10**9)):
        advantages = rollout.to(generalized_advantages, gamma=0.9, gae_lambda=gae_lambda)
        returns = rollout.to(n_step_returns, gamma=0.9, n_steps=n_steps)
        th.testing.assert_close(advantages, returns - rollout.values)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("gae_lambda", [0.3, 0.95])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 16, 33])
def test_advantages_mix_the_returns(n_steps: int, gae_lambda: float, with_mask: bool) -> None:
    """
    Schulman et al. 2016, equation 16: the mean of the returns of n = 1, 2, ... steps with weights
    (1 - lambda) lambda^(n-1), less the value. All returns of T steps or more are
    the same one, which has what is left of the weights.
    """
    rollout = random_rollout(n_steps, 4, seed=n_steps)
    mask = th.from_numpy(np.random.default_rng(1).random((n_steps, 4)) < 0.8) if with_mask else None
    mixed = th.zeros(n_steps, 4, dtype=th.float64)
    for n in range(1, n_steps + 1):
        weight = (1 - gae_lambda) * gae_lambda ** (n - 1) if n < n_steps else gae_lambda ** (n_steps - 1)
        mixed += weight * rollout.to(n_step_returns, gamma=0.9, n_steps=n, mask=mask)
    advantages = rollout.to(generalized_advantages, gamma=0.9, gae_lambda=gae_lambda, mask=mask)
    values = rollout.values if mask is None else rollout.values.where(mask, 0.0)
    th.testing.assert_close(advantages, mixed - values)


@both
def test_without_discount_nothing_follows(function: Any, numbers: dict[str, Any]) -> None:
    rollout = random_rollout(9)
    found = rollout.to(function, **{**numbers, "gamma": 0.0})
    baseline = rollout.values if function is generalized_advantages else 0.0
    assert th.equal(found, rollout.rewards - baseline)


# Plain loops


def looped(rollout: Rollout, mask: th.Tensor, gamma: float, gae_lambda: float) -> th.Tensor:
    """Advantages in Python's floats, one step of one environment at a time, from the last to the first."""
    n_steps, n_envs = rollout.rewards.shape
    rewards, values, last_values, terminated, truncated, final_values = (x.tolist() for x in rollout)
    counts = mask.tolist()
    result = [[0.0] * n_envs for _ in range(n_steps)]
    for env in range(n_envs):
        following = 0.0  # the advantage of the next step
        next_value = last_values[env]
        for t in reversed(range(n_steps)):
            if not counts[t][env]:
                following = 0.0
            else:
                if terminated[t][env]:
                    next_value, following = 0.0, 0.0
                elif truncated[t][env]:
                    next_value, following = final_values[t][env], 0.0
                error = rewards[t][env] + gamma * next_value - values[t][env]
                following = error + gamma * gae_lambda * following
                result[t][env] = following
            next_value = values[t][env]
    return th.tensor(result, dtype=th.float64)


def walked(rollout: Rollout, mask: th.Tensor, gamma: float, n_steps: int) -> th.Tensor:
    """Returns in Python's floats: from each step, walk n steps forward or up to where that ends."""
    total, n_envs = rollout.rewards.shape
    rewards, values, last_values, terminated, truncated, final_values = (x.tolist() for x in rollout)
    counts = mask.tolist()
    result = [[0.0] * n_envs for _ in range(total)]
    for t, env in itertools.product(range(total), range(n_envs)):
        if not counts[t][env]:
            continue
        discount, at = 1.0, t
        while True:
            result[t][env] += discount * rewards[at][env]
            discount *= gamma
            if terminated[at][env]:
                break
            if truncated[at][env]:
                result[t][env] += discount * final_values[at][env]
                break
            at += 1
            if at == total or at == t + n_steps or not counts[at][env]:
                result[t][env] += discount * (last_values[env] if at == total else values[at][env])
                break
    return th.tensor(result, dtype=th.float64)


@pytest.mark.parametrize("seed", range(30))
def test_as_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_steps, n_envs = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    rollout = random_rollout(n_steps, n_envs, seed=seed, p_end=float(rng.choice([0.0, 0.1, 0.5])))
    mask = th.from_numpy(rng.random((n_steps, n_envs)) < rng.choice([0.5, 0.9, 1.0]))
    gamma, gae_lambda, n = float(rng.random()), float(rng.random()), int(rng.integers(1, n_steps + 3))
    advantages = rollout.to(generalized_advantages, gamma=gamma, gae_lambda=gae_lambda, mask=mask)
    th.testing.assert_close(advantages, looped(rollout, mask, gamma, gae_lambda))
    th.testing.assert_close(
        rollout.to(n_step_returns, gamma=gamma, n_steps=n, mask=mask), walked(rollout, mask, gamma, n)
    )
    if mask.all():
        assert th.equal(rollout.to(generalized_advantages, gamma=gamma, gae_lambda=gae_lambda), advantages)


@pytest.mark.parametrize(("n_steps", "n_envs"), [(1, 1), (2, 8), (128, 8), (2048, 1)])
def test_float32_as_a_plain_loop_and_as_sb3(n_steps: int, n_envs: int) -> None:
    rollout = random_rollout(n_steps, n_envs, p_end=0.02, dtype=th.float32)
    found = rollout.to(generalized_advantages, gamma=0.99, gae_lambda=0.95)
    assert found.dtype == th.float32
    everything = th.ones(n_steps, n_envs, dtype=th.bool)
    th.testing.assert_close(found, looped(rollout, everything, 0.99, 0.95).float(), rtol=1e-5, atol=1e-5)

    buffer = RolloutBuffer(n_steps, spaces.Box(-1, 1), spaces.Box(-1, 1), "cpu", 0.95, 0.99, n_envs)
    ends = (rollout.terminated | rollout.truncated).numpy()
    is_cut = (rollout.truncated & ~rollout.terminated).numpy()
    buffer.rewards[:] = rollout.rewards.numpy()
    buffer.rewards[is_cut] += 0.99 * rollout.final_values.numpy()[is_cut]
    buffer.values[:] = rollout.values.numpy()
    buffer.episode_starts[1:] = ends[:-1]
    buffer.compute_returns_and_advantage(rollout.last_values, ends[-1])
    np.testing.assert_allclose(found.numpy(), buffer.advantages, rtol=1e-4, atol=1e-4)


def test_sums_are_taken_in_float64() -> None:
    """In float32, 2^24 + 1 is 2^24."""
    no = th.zeros(3, 1, dtype=th.bool)
    large = th.tensor([2.0**24])
    advantages = generalized_advantages(
        column(2**24, 1, 1), column(2**24, 1, 1), th.ones(1), no, no, gamma=1.0, gae_lambda=1.0
    )
    assert th.equal(advantages, column(3, 2, 1))
    returns = n_step_returns(column(1, 1, -(2**24)), column(0, 0, 0), large, no, no, gamma=1.0, n_steps=3)
    assert th.equal(returns, column(2, 1, 0))


# Masks


@both
@pytest.mark.parametrize("length", [1, 5, 11])
def test_padding_is_cutting_off(function: Any, numbers: dict[str, Any], length: int) -> None:
    """The first step of the padding has the value of the observation there, and nothing else of it is read."""
    rollout = random_rollout(12)
    short = rollout.at(slice(length))._replace(last_values=rollout.values[length])
    for tensor in (rollout.rewards, rollout.final_values, rollout.values[1:]):
        tensor[length:] = math.nan
    mask = th.arange(12)[:, None].expand(-1, 3) < length
    found = rollout._replace(last_values=th.full((3,), math.nan, dtype=th.float64)).to(function, mask=mask, **numbers)
    assert (found[length:] == 0).all()
    th.testing.assert_close(found[:length], short.to(function, **numbers), rtol=1e-14, atol=1e-14)


@both
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_a_step_between_episodes_is_left_out(function: Any, numbers: dict[str, Any], end: str) -> None:
    """A vector environment that resets itself in the step after the end of an episode returns a step that is none."""
    rollout = random_rollout(12, p_end=0.0)
    getattr(rollout, end)[5] = True
    without = [*range(6), *range(7, 12)]
    expected = rollout.at(without).to(function, **numbers)
    for tensor in (rollout.rewards, rollout.values, rollout.final_values):
        tensor[6] = math.nan
    mask = (th.arange(12) != 6)[:, None].expand(-1, 3)
    found = rollout.to(function, mask=mask, **numbers)
    assert (found[6] == 0).all()
    th.testing.assert_close(found[without], expected, rtol=1e-14, atol=1e-14)


@both
def test_the_value_of_a_step_left_out_is_that_of_a_final_observation(function: Any, numbers: dict[str, Any]) -> None:
    """Where such an environment has cut an episode, two ways of telling what followed are the same."""
    rollout = random_rollout(12, p_end=0.0)
    mask = (th.arange(12) != 6)[:, None].expand(-1, 3)
    by_value = rollout.to(function, mask=mask, final_values=None, **numbers)
    rollout.truncated[5] = True
    by_final_value = rollout.to(function, mask=mask, final_values=rollout.values.roll(-1, 0), **numbers)
    assert th.equal(by_value, by_final_value)


@both
def test_what_the_mask_excludes_reaches_nothing(function: Any, numbers: dict[str, Any]) -> None:
    for poison in (math.nan, math.inf, -math.inf):
        rollout = random_rollout(30, p_end=0.3)
        mask = th.from_numpy(np.random.default_rng(5).random((30, 3)) < 0.6)
        clean = rollout.to(function, mask=mask, **numbers)
        # A value under the mask is read only where the step before it counts and has not ended an episode.
        is_end = rollout.terminated | rollout.truncated
        is_read = mask.clone()
        is_read[1:] |= mask[:-1] & ~is_end[:-1]
        assert (is_read & ~mask).any()
        rollout.rewards[~mask] = poison
        rollout.final_values[~mask] = poison
        rollout.values[~is_read] = poison
        rollout.terminated[~mask] = ~rollout.terminated[~mask]
        rollout.truncated[~mask] = ~rollout.truncated[~mask]
        assert th.equal(rollout.to(function, mask=mask, **numbers), clean)
        assert (clean[~mask] == 0).all()


@both
def test_what_is_not_read_reaches_nothing(function: Any, numbers: dict[str, Any]) -> None:
    """Final values where no time limit cut, last values where the last step ended, the value after a terminal state."""
    rollout = random_rollout(20)
    rollout.terminated[-1] = True
    clean = rollout.to(function, **numbers)
    rollout.final_values[~rollout.truncated | rollout.terminated] = math.nan
    rollout.last_values[:] = math.nan
    assert th.equal(rollout.to(function, **numbers), clean)


@both
def test_an_empty_mask_gives_zero(function: Any, numbers: dict[str, Any]) -> None:
    nothing = th.full((4, 2), math.nan)
    found = function(nothing, nothing, nothing[0], nothing, nothing, mask=th.zeros(4, 2), **numbers)
    assert th.equal(found, th.zeros(4, 2))


# What is accepted and what is refused


@both
def test_flags_and_masks_of_any_dtype(function: Any, numbers: dict[str, Any]) -> None:
    rollout = random_rollout(12)
    mask = th.from_numpy(np.random.default_rng(5).random((12, 3)) < 0.6)
    expected = rollout.to(function, mask=mask, **numbers)
    for dtype in (th.float32, th.int64, th.uint8):
        as_numbers = rollout._replace(terminated=rollout.terminated.to(dtype), truncated=rollout.truncated.to(dtype))
        assert th.equal(as_numbers.to(function, mask=mask.to(dtype), **numbers), expected)
    with pytest.raises(ValueError, match="mask must hold nothing but 0 and 1, or be of dtype bool, got 2"):
        rollout.to(function, mask=2 * mask.long(), **numbers)


@both
@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_16_bits_are_computed_with_in_float32(function: Any, numbers: dict[str, Any], dtype: th.dtype) -> None:
    rollout = random_rollout(300, p_end=0.01, dtype=dtype)
    as_float32 = Rollout(*(x.float() if x.is_floating_point() else x for x in rollout))
    found = rollout.to(function, **numbers)
    assert found.dtype == th.float32
    assert th.equal(found, as_float32.to(function, **numbers))


@both
def test_rewards_of_integers_are_not_rounded_to_integers(function: Any, numbers: dict[str, Any]) -> None:
    rollout = random_rollout(12, dtype=th.float32)
    rewards = th.arange(36).reshape(12, 3)
    found = rollout._replace(rewards=rewards).to(function, **numbers)
    assert th.equal(found, rollout._replace(rewards=rewards.float()).to(function, **numbers))


@both
def test_a_number_and_a_tensor_give_the_same(function: Any, numbers: dict[str, Any]) -> None:
    as_tensors = {key: x if key == "n_steps" else th.tensor(x, dtype=th.float64) for key, x in numbers.items()}
    for dtype in (th.float32, th.float64):
        rollout = random_rollout(12, dtype=dtype)
        found = rollout.to(function, **as_tensors)
        assert found.dtype == dtype
        assert th.equal(found, rollout.to(function, **numbers))


@both
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 3)])
def test_few_steps_or_none(function: Any, numbers: dict[str, Any], shape: tuple[int, int]) -> None:
    rollout = random_rollout(*shape)
    found = rollout.to(function, **numbers)
    assert found.shape == shape
    th.testing.assert_close(found, rollout.to(function, mask=th.ones(shape), **numbers))


@both
def test_wrong_shapes_are_refused_by_name(function: Any, numbers: dict[str, Any]) -> None:
    rollout = random_rollout(4)
    for name in ("values", "terminated", "truncated", "final_values", "mask"):
        for wrong in ((1, 3), (4, 1), (4,), ()):
            arguments: dict[str, th.Tensor] = {**rollout._asdict(), name: th.ones(wrong)}
            with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
                function(**arguments, **numbers)
            assert str(error.value) == f"{name} must have the shape of rewards, (4, 3), got {wrong}"
    for wrong in ((1,), (4,), (1, 3), ()):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
            rollout._replace(last_values=th.ones(wrong)).to(function, **numbers)
        assert str(error.value) == f"last_values must have shape (n_envs,) = (3,), got {wrong}"
    flat = th.ones(4)
    with pytest.raises(ValueError, match=r"rewards must have shape \(T, n_envs\), got \(4,\)"):
        function(flat, flat, flat[0], flat, flat, **numbers)


@pytest.mark.parametrize("wrong", [-0.1, 1.01, math.inf, -math.inf, math.nan])
def test_numbers_out_of_range_are_refused(wrong: float) -> None:
    rollout = random_rollout(4)
    for function, numbers in BOTH:
        for name in numbers.keys() - {"n_steps"}:
            with pytest.raises(ValueError, match=f"^{name} must be >= 0.0 and <= 1.0, got {wrong}$"):
                rollout.to(function, **{**numbers, name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None, "3"])
def test_a_number_of_steps_is_an_integer_from_1_on(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^n_steps must be an integer >= 1, got {wrong!r}$"):
        random_rollout(4).to(n_step_returns, gamma=0.9, n_steps=wrong)


@both
def test_no_argument_is_changed_and_none_gets_a_gradient(function: Any, numbers: dict[str, Any]) -> None:
    rollout = random_rollout(12)
    mask = th.ones(12, 3, dtype=th.bool)
    before = [x.clone() for x in rollout]
    for tensor in (rollout.rewards, rollout.values, rollout.last_values, rollout.final_values):
        tensor.requires_grad_()
    assert not rollout.to(function, mask=mask, **numbers).requires_grad
    assert all(th.equal(x, y) for x, y in zip(rollout, before, strict=True))
    assert mask.all()


# Devices and graphs


@both
@pytest.mark.parametrize("with_mask", [False, True])
def test_no_value_is_read_on_the_host(function: Any, numbers: dict[str, Any], with_mask: bool) -> None:
    # On the meta device tensors have no values: an .item(), a bool(tensor) or a branch on data raises.
    rollout = Rollout(*(x.to("meta") for x in random_rollout(12)))
    as_tensors = {key: x if key == "n_steps" else th.zeros((), device="meta") for key, x in numbers.items()}
    mask = th.ones(12, 3, device="meta") if with_mask else None
    assert rollout.to(function, mask=mask, **as_tensors).is_meta


@both
def test_can_be_traced_compiled_and_mapped(function: Any, numbers: dict[str, Any]) -> None:
    rollout, other = random_rollout(12), random_rollout(12, seed=1)
    mask = th.from_numpy(np.random.default_rng(5).random((12, 3)) < 0.6)

    def call(*tensors: th.Tensor) -> th.Tensor:
        result: th.Tensor = function(*tensors[:5], final_values=tensors[5], mask=tensors[6], **numbers)
        return result

    expected = call(*rollout, mask)
    th.testing.assert_close(make_fx(call)(*other, ~mask)(*rollout, mask), expected)
    th.testing.assert_close(th.compile(call, backend="eager", fullgraph=True)(*rollout, mask), expected)
    mapped = th.vmap(call)(*(th.stack(pair) for pair in zip((*rollout, mask), (*other, ~mask), strict=True)))
    th.testing.assert_close(mapped, th.stack((expected, call(*other, ~mask))))

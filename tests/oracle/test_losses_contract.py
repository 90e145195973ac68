"""What every function promises: on masks, shapes, untouched arguments, hyper-parameters as numbers or tensors."""

import ast
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_ppo_ext import losses
from sb3_ppo_ext.losses import SurrogateLoss
from tests.pairwise import pairwise

POLICY = ("log_prob", "old_log_prob", "advantages")
VALUE = ("values", "old_values", "returns")


class Case(NamedTuple):
    name: str
    tensors: tuple[str, ...]
    hyper_parameters: dict[str, float]
    has_mask: bool = True

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(losses, self.name)
        return function

    def __call__(self, *tensors: th.Tensor, **kwargs: Any) -> th.Tensor:
        """The elementwise loss (or, of a reduction, the number)."""
        result = self.function(*tensors, **{**self.hyper_parameters, **kwargs})
        loss: th.Tensor = result.loss if isinstance(result, SurrogateLoss) else result
        return loss


ELEMENTWISE = [
    Case("truncated_importance_weights", POLICY[:2], {"maximum": 1.25, "max_log_ratio": 0.75}, has_mask=False),
    Case("log_ratio", POLICY[:2], {"max_log_ratio": 0.75}, has_mask=False),
    Case("probability_ratio", POLICY[:2], {"max_log_ratio": 0.75}, has_mask=False),
    Case("surrogate_loss", POLICY, {"max_log_ratio": 0.75}),
    Case("clipped_surrogate_loss", POLICY, {"clip_range": 0.125, "clip_range_high": 0.25, "max_log_ratio": 0.75}),
    Case(
        "dual_clip_surrogate_loss",
        POLICY,
        {"dual_clip": 1.5, "clip_range": 0.125, "clip_range_high": 0.25, "max_log_ratio": 0.75},
    ),
    Case(
        "decoupled_surrogate_loss",
        ("log_prob", "proximal_log_prob", "old_log_prob", "advantages"),
        {
            "max_importance_weight": 1.25,
            "dual_clip": 1.5,
            "clip_range": 0.125,
            "clip_range_high": 0.25,
            "max_log_ratio": 0.75,
        },
    ),
    Case("kl_penalized_surrogate_loss", (*POLICY, "kl"), {"kl_coef": 0.5, "max_log_ratio": 0.75}),
    Case("spo_surrogate_loss", POLICY, {"epsilon": 0.25, "max_log_ratio": 0.75}),
    Case("reinforce_loss", ("log_prob", "weights"), {}),
    Case("value_loss", ("values", "returns"), {}),
    Case("prediction_clipped_value_loss", VALUE, {"clip_range_vf": 0.5}),
    Case("pessimistic_clipped_value_loss", VALUE, {"clip_range_vf": 0.5}),
    Case("kl_k1", POLICY[:2], {}),
    Case("kl_k2", POLICY[:2], {}),
    Case("kl_k3", POLICY[:2], {"max_log_ratio": 0.75}),
    Case("kl_abs", POLICY[:2], {}),
]
MASKED = [case for case in ELEMENTWISE if case.has_mask]
REDUCTIONS = [Case("masked_mean", ("x",), {}), Case("aggregate", ("loss",), {"mode": "token-mean"})]  # type: ignore[dict-item]
SHAPE = (3, 8)


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


elementwise = pytest.mark.parametrize("case", ELEMENTWISE, ids=name_of)
masked = pytest.mark.parametrize("case", MASKED, ids=name_of)
masked_or_reduction = pytest.mark.parametrize("case", MASKED + REDUCTIONS, ids=name_of)


def arguments(case: Case, shape: tuple[int, ...] = SHAPE, dtype: th.dtype = th.float64) -> list[th.Tensor]:
    """Multiples of 1/8, which reach every branch, plus an offset for each argument, which keeps them off the kinks."""
    generator = th.Generator().manual_seed(len(case.tensors))
    return [
        (th.randint(-4, 5, shape, generator=generator) / 8 + 0.01 * (index + 1) * (1 + index))
        .to(dtype)
        .requires_grad_()
        for index in range(len(case.tensors))
    ]


def gradients(loss: th.Tensor, tensors: list[th.Tensor]) -> list[th.Tensor]:
    """With a different weight for each element, so that no two can be mistaken for each other."""
    weights = th.arange(1.0, loss.numel() + 1).reshape(loss.shape).to(loss)
    return list(th.autograd.grad((loss * weights).sum(), tensors, allow_unused=True, materialize_grads=True))


def test_every_public_function_is_held_to_the_contract() -> None:
    functions = {name for name in losses.__all__ if not isinstance(getattr(losses, name), type)} - {"AggregationMode"}
    # Not elementwise: test_targets.py and test_losses_token_sequences.py hold them to theirs.
    targets = {"generalized_advantages", "n_step_returns", "vtrace"}
    of_tokens = {"token_rewards", "token_gae", "masked_whiten", "masked_entropy"}
    assert {case.name for case in ELEMENTWISE + REDUCTIONS} == functions - targets - of_tokens


def test_imports_are_torch_the_standard_library_and_siblings() -> None:
    assert losses.__file__ is not None
    for path in Path(losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "."]
            else:
                continue
            for module in modules:
                root = module.partition(".")[0]
                allowed = root == "torch" or root in sys.stdlib_module_names
                assert allowed or module.startswith("sb3_ppo_ext.losses."), f"{path.name} imports {module}"


# Masks


@pytest.mark.parametrize(
    ("case", "poison", "mask_dtype"),
    pairwise(MASKED, [math.nan, math.inf, -math.inf, 1e38], [th.bool, th.int64, th.float32]),
    ids=name_of,
)
def test_what_the_mask_excludes_reaches_nothing(case: Case, poison: float, mask_dtype: th.dtype) -> None:
    keep = th.arange(24).reshape(SHAPE) % 3 != 0
    clean = arguments(case)
    poisoned = [th.where(keep, tensor.detach(), poison).requires_grad_() for tensor in clean]
    loss = case(*poisoned, mask=keep.to(mask_dtype))
    assert (loss[~keep] == 0).all()
    assert th.equal(loss[keep], case(*(tensor[keep] for tensor in clean)))
    for by_masked, by_unmasked in zip(gradients(loss, poisoned), gradients(case(*clean), clean), strict=True):
        assert (by_masked[~keep] == 0).all()
        assert th.equal(by_masked[keep], by_unmasked[keep])


@masked
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_in_one_argument_at_a_time(case: Case, poison: float) -> None:
    keep = th.arange(24).reshape(SHAPE) % 2 == 0
    expected = case(*arguments(case), mask=keep)
    for index in range(len(case.tensors)):
        tensors = arguments(case)
        tensors[index] = th.where(keep, tensors[index].detach(), poison).requires_grad_()
        loss = case(*tensors, mask=keep)
        assert th.equal(loss, expected)
        assert all(gradient.isfinite().all() for gradient in gradients(loss, tensors))


@masked_or_reduction
def test_an_empty_mask_gives_zero_and_no_gradient(case: Case) -> None:
    tensors = [th.full(SHAPE, math.nan, requires_grad=True) for _ in case.tensors]
    loss = case(*tensors, mask=th.zeros(SHAPE))
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(loss, tensors))


@masked_or_reduction
def test_a_full_mask_changes_nothing(case: Case) -> None:
    tensors = arguments(case)
    with_mask, without = case(*tensors, mask=th.ones(SHAPE)), case(*tensors)
    th.testing.assert_close(with_mask, without, rtol=1e-15, atol=0)
    for one, other in zip(gradients(with_mask, tensors), gradients(without, tensors), strict=True):
        th.testing.assert_close(one, other, rtol=1e-15, atol=0)


# Shapes


@elementwise
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (2, 3, 4)])
def test_any_shape(case: Case, shape: tuple[int, ...]) -> None:
    tensors = arguments(case, shape)
    loss = case(*tensors)
    assert loss.shape == shape
    assert th.equal(loss.flatten(), case(*(tensor.flatten() for tensor in tensors)))


@elementwise
def test_a_wrong_shape_is_refused_by_name(case: Case) -> None:
    # Each of these would broadcast.
    for wrong in ((1, 8), (3, 1), (8,), ()):
        for index, name in enumerate(case.tensors[1:], start=1):
            tensors = arguments(case)
            tensors[index] = th.zeros(wrong)
            with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
                case(*tensors)
            assert str(error.value) == f"{name} must have the shape of {case.tensors[0]}, (3, 8), got {wrong}"


@masked_or_reduction
def test_a_mask_of_the_wrong_shape_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"mask must have the shape of {case.tensors[0]}, \(3, 8\), got \(3, 1\)"):
        case(*arguments(case), mask=th.ones(3, 1))


@masked_or_reduction
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.5, th.float32),
        (0.5, th.float16),
        (2.0, th.float64),
        (-1.0, th.float32),
        (math.nan, th.float32),
        (3, th.int64),
    ],
)
def test_a_mask_that_is_neither_0_nor_1_is_refused(case: Case, value: float, dtype: th.dtype) -> None:
    mask = th.ones(SHAPE, dtype=dtype)
    mask[1, 2] = value
    with pytest.raises(ValueError, match=rf"mask must hold nothing but 0 and 1, or be of dtype bool, got {value}"):
        case(*arguments(case), mask=mask)


@elementwise
def test_no_elements_at_all(case: Case) -> None:
    """What has diagnostics needs one, and says so; of nothing, any other loss is nothing."""
    for shape in ((0,), (0, 3), (3, 0)):
        tensors = arguments(case, shape)
        options: list[dict[str, Any]] = [{}, {"mask": th.ones(shape)}] if case.has_mask else [{}]
        for kwargs in options:
            if "surrogate" in case.name:
                with pytest.raises(ValueError, match="log_prob must have at least one element, got a tensor of shape"):
                    case(*tensors, **kwargs)
            else:
                assert case(*tensors, **kwargs).shape == shape


# Arguments are left alone


@masked_or_reduction
def test_no_argument_is_changed(case: Case) -> None:
    tensors = [*arguments(case), th.ones(SHAPE)]
    hyper_parameters = {
        name: th.tensor(value) for name, value in case.hyper_parameters.items() if isinstance(value, float)
    }
    everything = [*tensors, *hyper_parameters.values()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in everything]
    loss = case(*tensors[:-1], mask=tensors[-1], **hyper_parameters)
    gradients(loss, tensors[:-1])
    for tensor, (value, version) in zip(everything, before, strict=True):
        assert th.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is None


# Hyper-parameters


@elementwise
def test_a_number_and_a_tensor_give_the_same(case: Case) -> None:
    by_number = [*(tensors := arguments(case)), case(*tensors)]
    names = list(case.hyper_parameters)
    for chosen in [names, *([name] for name in names)]:  # all as tensors, and one as a tensor among numbers
        as_tensors = {name: th.tensor(case.hyper_parameters[name], dtype=th.float64) for name in chosen}
        loss = case(*tensors, **as_tensors)
        assert th.equal(loss, by_number[-1])
        for one, other in zip(gradients(loss, tensors), gradients(case(*tensors), tensors), strict=True):
            assert th.equal(one, other)


@elementwise
def test_a_tensor_hyper_parameter_does_not_change_the_dtype(case: Case) -> None:
    for name, value in case.hyper_parameters.items():
        assert (
            case(*arguments(case, dtype=th.float32), **{name: th.tensor(value, dtype=th.float64)}).dtype == th.float32
        )


@elementwise
def test_a_tensor_hyper_parameter_has_no_dimension(case: Case) -> None:
    for name in case.hyper_parameters:
        with pytest.raises(ValueError, match=rf"{name} must be a number or a 0-d tensor, got a tensor of shape \(8,\)"):
            case(*arguments(case), **{name: th.ones(8)})


@elementwise
def test_a_hyper_parameter_is_one_number(case: Case) -> None:
    for name in case.hyper_parameters:
        optional = name in ("max_log_ratio", "clip_range_high", "dual_clip")
        for wrong in ((0.1, 0.2), [0.2], "0.2", {}, True, 1j, *(() if optional else (None,))):
            with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
                case(*arguments(case), **{name: wrong})
            assert str(error.value) == f"{name} must be a number or a 0-d tensor, got {wrong!r}"


RANGES: dict[str, list[tuple[float, str]]] = {
    "clip_range": [(-0.1, "must be >= 0.0, got -0.1"), (math.nan, "must be >= 0.0, got nan")],
    "clip_range_high": [(-0.1, "must be >= 0.0, got -0.1"), (math.nan, "must be >= 0.0, got nan")],
    "dual_clip": [
        (1.0, "must be > 1.0, got 1.0"),
        (math.nan, "must be > 1.0, got nan"),
        (1.25, "must be > 1 + clip_range_high = 1.25, got 1.25: a smaller bound would act inside the trust region"),
        (1.1, "must be > 1 + clip_range_high = 1.25, got 1.1: a smaller bound would act inside the trust region"),
    ],
    "max_log_ratio": [
        (0.0, "must be > 0.0, got 0.0"),
        (-1.0, "must be > 0.0, got -1.0"),
        (math.nan, "must be > 0.0, got nan"),
    ],
    "maximum": [(0.0, "must be > 0.0, got 0.0"), (math.nan, "must be > 0.0, got nan")],
    "max_importance_weight": [(0.0, "must be > 0.0, got 0.0"), (math.nan, "must be > 0.0, got nan")],
    "epsilon": [
        (0.0, "must be > 0.0, got 0.0"),
        (-0.2, "must be > 0.0, got -0.2"),
        (math.nan, "must be > 0.0, got nan"),
    ],
    "kl_coef": [
        (-0.5, "must be >= 0.0 and finite, got -0.5"),
        (math.inf, "must be >= 0.0 and finite, got inf"),
        (math.nan, "must be >= 0.0 and finite, got nan"),
    ],
    "clip_range_vf": [(-0.5, "must be >= 0.0, got -0.5"), (math.nan, "must be >= 0.0, got nan")],
}


@elementwise
def test_a_number_out_of_range_is_refused_by_name_and_value(case: Case) -> None:
    for name in case.hyper_parameters:
        for value, message in RANGES[name]:
            with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
                case(*arguments(case), **{name: value})
            assert str(error.value) == f"{name} {message}"


def test_a_dual_clip_is_held_against_the_symmetric_range_too() -> None:
    tensors = arguments(Case("dual_clip_surrogate_loss", POLICY, {}))
    with pytest.raises(ValueError, match=r"dual_clip must be > 1 \+ clip_range_high = 1.5, got 1.4"):
        losses.dual_clip_surrogate_loss(*tensors, clip_range=0.5, dual_clip=1.4)
    with pytest.raises(ValueError, match=r"dual_clip must be > 1 \+ clip_range_high = inf, got 3.0"):
        losses.dual_clip_surrogate_loss(*tensors, clip_range=math.inf, dual_clip=3.0)


# Gradients and graphs


@elementwise
def test_gradients_by_finite_differences(case: Case) -> None:
    tensors = arguments(case)
    if case.name == "reinforce_loss":
        tensors[1].requires_grad_(False)  # not differentiable in its weights, on purpose
    assert th.autograd.gradcheck(case.__call__, tensors)
    keep = th.arange(24).reshape(SHAPE) % 3 != 0
    if case.has_mask:
        assert th.autograd.gradcheck(lambda *args: case(*args, mask=keep), tensors)


@masked_or_reduction
@pytest.mark.parametrize("with_mask", [False, True])
def test_no_value_is_read_on_the_host(case: Case, with_mask: bool) -> None:
    # On the meta device tensors have no values: an .item(), a bool(tensor) or a branch on data raises.
    tensors = [th.zeros(SHAPE, device="meta", requires_grad=True) for _ in case.tensors]
    names = [name for name, value in case.hyper_parameters.items() if isinstance(value, float)]
    for chosen in [names, *([name] for name in names)]:  # all as tensors, and one as a tensor among numbers
        options: dict[str, Any] = {name: th.zeros((), device="meta") for name in chosen}
        if with_mask:
            options["mask"] = th.ones(SHAPE, device="meta")
        loss = case(*tensors, **options)
        assert loss.is_meta
        gradients(loss, tensors)


@pytest.mark.parametrize(
    ("case", "mask_dtype", "tracing_mode"),
    pairwise(MASKED + REDUCTIONS, [th.bool, th.float32], ["real", "symbolic"]),
    ids=name_of,
)
def test_can_be_traced(case: Case, mask_dtype: th.dtype, tracing_mode: str) -> None:
    """And what was traced with one mask is right for another."""
    tensors = [tensor.detach().float() for tensor in arguments(case)]
    keep = th.arange(24).reshape(SHAPE) % 3 != 0

    def masked(*inputs: th.Tensor) -> th.Tensor:
        return case(*inputs[:-1], mask=inputs[-1])

    traced = make_fx(masked, tracing_mode=tracing_mode)(*tensors, th.ones(SHAPE, dtype=mask_dtype))
    mask = keep.to(mask_dtype)
    th.testing.assert_close(traced(*tensors, mask), masked(*tensors, mask))


@masked_or_reduction
@pytest.mark.parametrize("mask_dtype", [th.bool, th.float32])
def test_can_be_mapped_over_a_batch(case: Case, mask_dtype: th.dtype) -> None:
    batches = [th.stack((tensor.detach(), 2.0 * tensor.detach())) for tensor in arguments(case)]
    keep = th.arange(24).reshape(SHAPE) % 3 != 0
    masks = th.stack((keep, ~keep)).to(mask_dtype)

    def masked(*inputs: th.Tensor) -> th.Tensor:
        return case(*inputs[:-1], mask=inputs[-1])

    expected = th.stack([masked(*(batch[i] for batch in batches), masks[i]) for i in range(2)])
    th.testing.assert_close(th.vmap(masked)(*batches, masks), expected)


def test_can_be_compiled_as_one_graph() -> None:
    case = next(case for case in MASKED if case.name == "dual_clip_surrogate_loss")
    numbers = case.hyper_parameters

    def total(*inputs: th.Tensor) -> th.Tensor:
        surrogate = losses.dual_clip_surrogate_loss(*inputs[:-1], mask=inputs[-1], **numbers)
        return losses.masked_mean(surrogate.loss, inputs[-1])

    inputs = [tensor.detach() for tensor in arguments(case)]
    mask = (th.arange(24).reshape(SHAPE) % 3 != 0).double()
    found = th.compile(total, backend="eager", fullgraph=True)(*inputs, mask)
    assert th.equal(found, total(*inputs, mask))

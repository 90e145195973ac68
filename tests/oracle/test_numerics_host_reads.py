"""How often the solvers make the host wait for the device. Counted on the CPU, where it costs nothing."""

import math
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode

from sb3_ppo_ext.numerics import FisherVectorProduct, backtracking_line_search, conjugate_gradient


class HostReads(TorchFunctionMode):
    """Counts what would wait for a GPU: every way in which a number of a tensor gets to Python."""

    READS = frozenset({"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "equal", "allclose"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.__name__ in self.READS
        return func(*args, **(kwargs or {}))


def test_host_reads_counts() -> None:
    one = th.ones(())
    with HostReads() as reads:
        assert [one.tolist(), one.item(), float(one), bool(one), int(one)] == [1] * 5
        assert math.isfinite(one)
        assert one > 0.0
    assert reads.count == 7


def test_conjugate_gradient_reads_once_in_every_step_and_once_before() -> None:
    diagonal, b = th.linspace(1.0, 9.0, 30), th.ones(30)
    for steps in (1, 6):
        with HostReads() as reads:
            assert conjugate_gradient(lambda v: diagonal * v, b, max_steps=steps).steps == steps
        assert reads.count == steps + 1


def test_line_search_reads_once_in_every_trial() -> None:
    theta = th.zeros(1)
    with HostReads() as reads:
        result = backtracking_line_search(
            [theta],
            th.tensor([4.0]),
            lambda: ((theta - theta * theta).sum(), theta.abs().sum()),
            objective_before=0.0,
            expected_improvement=4.0,
            constraint_limit=10.0,
            shrinking_factor=0.5,
        )
    assert result.iterations == 4
    assert reads.count == 4


def test_fisher_vector_product_never_reads() -> None:
    weight = th.ones(3, 2, requires_grad=True)
    with HostReads() as reads:
        product = FisherVectorProduct(th.ones(4, 3) @ weight, [weight], lambda params, tangent: tangent, damping=0.1)
        product(th.ones(6))
    assert reads.count == 0

"""
Matrix products in compiled programs for the CPU.

Torch leaves them to MKL, whose best code is for Intel's processors. Elsewhere it can take twice as long as oneDNN for
large products, and several times as long for a thin one as for its transpose. The sizes below were measured with one
thread on an AMD EPYC with AVX-512 (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

from sb3_ppo_ext.common.compile import cpu
from sb3_ppo_ext.common.torch_internals import linear_by_onednn

# Up to so many multiplications, the compiler's own loops take less time than the call of a library. So do they for any
# product with one row.
_FEW = 4096

# From so many on, oneDNN is faster. It copies matrices that are laid out otherwise, which must be little beside the
# product: then none may have a side that is shorter than this.
_MANY, _LONG_SIDE = 2**21, 64

# MKL computes this many columns at a time, and is slow at the rest of a matrix with few columns.
_COLUMNS, _FEW_COLUMNS = 16, 128

# It is also slow at sums of few terms in wide matrices. The compiler writes out sums of fewer terms than this.
_FEW_TERMS, _WIDE = 8, 512


def cpu_products() -> dict[Any, Callable[..., Any]]:
    """Decompositions of torch's matrix products, by operation."""
    return {th.ops.aten.addmm.default: _addmm, th.ops.aten.mm.default: _mm}


def _addmm(bias: th.Tensor, x: th.Tensor, weight: th.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1 or x.dtype != th.float32:
        return NotImplemented
    if len(x) == 1 or len(x) * weight.numel() <= _FEW:  # as in the actor of a few environments
        return (x.unsqueeze(1) * weight.t()).sum(dim=-1) + bias
    product = _mm(x, weight)
    return product if product is NotImplemented else product + bias


def _mm(x: th.Tensor, weight: th.Tensor) -> Any:
    if x.dtype != th.float32 or not cpu.is_mkl_slow():
        return NotImplemented
    if len(x) * weight.numel() >= _MANY:
        is_as_it_takes = x.is_contiguous() and weight.t().is_contiguous()
        if is_as_it_takes or min(*x.shape, *weight.shape) >= _LONG_SIDE:
            return linear_by_onednn(x, weight.t())
    n_rows, n_terms, n_columns = len(x), *weight.shape
    if n_terms < _FEW_TERMS and n_columns >= _WIDE:
        return (x.unsqueeze(2) * weight.contiguous()).sum(dim=1)
    if n_columns % _COLUMNS and 1 < n_columns < min(n_rows, _FEW_COLUMNS):
        return th.mm(weight.t(), x.t()).t().contiguous()  # the columns here are the rows there
    return NotImplemented

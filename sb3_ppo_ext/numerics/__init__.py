"""
The numerical parts of a natural-gradient step: conjugate gradient, Fisher-vector product, line search.

They work on tensors and functions, and know nothing about policies or Stable-Baselines3.
"""

from sb3_ppo_ext.numerics.conjugate_gradient import CGResult, conjugate_gradient
from sb3_ppo_ext.numerics.fisher import ChunkedFisherVectorProduct, FisherVectorProduct
from sb3_ppo_ext.numerics.flat import assign_flat_, flat_grad, flatten, unflatten_like
from sb3_ppo_ext.numerics.line_search import LineSearchResult, backtracking_line_search

__all__ = [
    "CGResult",
    "ChunkedFisherVectorProduct",
    "FisherVectorProduct",
    "LineSearchResult",
    "assign_flat_",
    "backtracking_line_search",
    "conjugate_gradient",
    "flat_grad",
    "flatten",
    "unflatten_like",
]

"""SB3's extractors without a kink: at a ReLU's, one last bit decides whether there is a gradient."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from torch import nn


def without_kinks(network: nn.Module) -> None:
    """Put Tanh in the place of ReLU."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Tanh())


class SmoothCNN(NatureCNN):
    is_pure = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        without_kinks(self)


class SmoothCombined(CombinedExtractor):
    is_pure = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        without_kinks(self)

"""Low-rank adapters on the attention projections of a Linformer (LoRA: Hu et al. 2021, arXiv 2106.09685).

The weight W of a query, key, value or output projection becomes W + B A, with A [rank, in] and B [out, rank]; W and all
else of the Linformer are frozen. B starts at zero: the model starts as it was. Merged, W + B A is a plain weight again.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from annatac_scale.model.linformer import Linformer

PROJECTIONS = ("query", "key", "value", "output")


class _LowRank(nn.Module):
    """Adds B A to a weight [out, in]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.inner = nn.Parameter(
            torch.randn(rank, n_in, dtype=weight.dtype, device=weight.device) * n_in**-0.5
        )
        self.outer = nn.Parameter(torch.zeros(n_out, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.outer @ self.inner


def add_adapters(linformer: Linformer, rank: int) -> None:
    """Freeze a Linformer and give its attention projections adapters of ``rank``, which alone are trained."""
    linformer.requires_grad_(False)
    for linear in _projections(linformer):
        assert isinstance(linear.weight, Tensor)
        parametrize.register_parametrization(linear, "weight", _LowRank(linear.weight, rank))


def merge_adapters(linformer: Linformer) -> None:
    """Put the adapters into the weights, in place; the Linformer is then as any other. One without any stays."""
    for linear in _projections(linformer):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _projections(linformer: Linformer) -> list[nn.Module]:
    return [getattr(layer.attention, name) for layer in linformer.layers for name in PROJECTIONS]

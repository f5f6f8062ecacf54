"""Small ragged batches for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw_islands(counts: list[int], n_islands: int) -> Tensor:
    """Increasing random islands for each cell, int64 [T]."""
    drawn = [torch.randperm(n_islands)[:count].sort().values for count in counts]
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference against the largest expected entry (or 1, where that is less)."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.numel() == 0:
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest tensor has that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result

"""Batches on a device: pinned, asynchronous copies, and the island codec decoded where the bytes arrive."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from annatac_scale.stream.batch import Batch, EncodedBatch


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """Open islands of ``B`` cells as tensors on one device; cell ``i`` owns ``offsets[i]:offsets[i + 1]``.

    cell_ids: int64 [B]; offsets: int64 [B + 1]; islands: int32 [T]; levels: uint8 [T]; obs: as in Batch, each [B]
    """

    cell_ids: Tensor
    offsets: Tensor
    islands: Tensor
    levels: Tensor
    obs: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cell_ids)


def to_device(batch: Batch | EncodedBatch, device: torch.device | str) -> DeviceBatch:
    """A batch of a stream, on a device. To a GPU the copies are pinned and not waited for.

    An encoded batch crosses as its bytes and is decoded there: 1 byte an open island instead of 5.
    """
    device = torch.device(device)
    cell_ids, offsets = _sent(batch.cell_ids, device), _sent(batch.offsets, device)
    obs = {name: _sent(values, device) for name, values in batch.obs.items()}
    if isinstance(batch, Batch):
        islands, levels = _sent(batch.islands, device), _sent(batch.levels, device)
        return DeviceBatch(cell_ids, offsets, islands, levels, obs)
    islands, levels, offsets = decode(_sent(batch.data, device), offsets)
    if batch.origin.new_of_old is not None:
        new_of_old = _sent(batch.origin.new_of_old, device)
        islands, levels, offsets = _renumbered(islands, levels, offsets, new_of_old)
    return DeviceBatch(cell_ids, offsets, islands.int(), levels, obs)


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def decode(data: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decode rows of the island codec with tensor operations alone: (islands int64 [T], levels uint8 [T], offsets).

    data: uint8 [n], rows that the store's checks let through; offsets: int64 [B + 1], where each row ends

    Where islands begin among the bytes is found by doubling: from the rows' first bytes a jump of one island each, then
    of two, of four, ... as many rounds as the longest row has binary digits.
    """
    n = len(data)
    place = torch.arange(n + 3, device=data.device)
    # Three more bytes, so that what follows the last escape is never looked for outside.
    padded = torch.cat([data, data.new_zeros(3)]).long()
    is_escape = (padded == 255) & (place < n)
    last_byte = _next_small(padded, place)[(place + 1).clamp(max=n + 2)]
    jump = torch.where(is_escape, last_byte + 1, place + 1).clamp(max=n)
    begins = torch.zeros(n + 3, dtype=torch.bool, device=data.device)
    begins[offsets] = True
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    for _ in range(longest.bit_length()):
        begins[jump[begins]] = True
        jump = jump[jump.clamp(max=n)]
    at = begins[:n].nonzero().flatten()
    number = torch.where(is_escape[at], 255 + _leb128(padded, at, last_byte[at]), padded[at])
    gap, level = number // 5, number % 5 + 1
    before = torch.cat([begins.new_zeros(1, dtype=torch.long), begins[:n].long().cumsum(0)])
    rows = before[offsets]
    reached = torch.cat([gap.new_zeros(1), (gap + 1).cumsum(0)])
    row_of = torch.repeat_interleave(torch.arange(len(rows) - 1, device=data.device), rows.diff())
    islands = reached[1:] - reached[rows[:-1]][row_of] - 1
    return islands, level.byte(), rows


def _next_small(padded: Tensor, place: Tensor) -> Tensor:
    """For each byte the next one, itself included, that ends a LEB128 number: whose high bit is not set."""
    ends = torch.where(padded < 128, place, len(place) - 1)
    return ends.flip(0).cummin(0).values.flip(0)


def _leb128(padded: Tensor, at: Tensor, end: Tensor) -> Tensor:
    """The LEB128 numbers between the bytes ``at`` and, included, ``end``; of at most five bytes."""
    number = torch.zeros_like(at)
    for k in range(5):
        byte = (at + 1 + k).clamp(max=len(padded) - 1)
        number += torch.where(at + 1 + k <= end, (padded[byte] & 127) << (7 * k), 0)
    return number


def _renumbered(
    islands: Tensor, levels: Tensor, offsets: Tensor, new_of_old: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    new = new_of_old.long()[islands]
    kept = new >= 0
    before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.long().cumsum(0)])
    return new[kept], levels[kept], before[offsets]

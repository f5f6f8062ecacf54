"""Products over cells of unequal length, kept flat, and rows of a large table.

A ragged batch is a flat tensor of ``T`` rows; ``Cells`` says which rows a cell owns, none for an empty cell. Each
product is one of two, equal but for rounding:

- *looped*, on the CPU: a matrix product a cell, on views of the flat tensors. No padding, no copy.
- *packed*, on GPUs, where a kernel a cell is ruinous: cells of nearly one length share a bucket, padded to its longest,
  and a bucket is one batched product. A token is gathered into its place and gathered back out: nothing is added up
  by atomics, so that the same batch gives the same bits. What the host has to know, lengths alone, it has: nothing
  waits for the GPU.

Shape letters: T tokens, P places of the packed tokens, B cells, N rows of a table, K columns of a table, D and M
channels.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SHORTEST_IN_BUCKET = 0.85
"""Least length of a bucket's cells against its longest: at most 15% of a bucket are padding."""

PACKED_BELOW = 500_000
"""Multiply-adds of a mean cell below which bf16 products on the CPU are packed: oneDNN takes 13 us for the smallest."""


def table_rows(table: Tensor, islands: Tensor) -> Tensor:
    """Rows of a table that the islands of a batch are a small part of: [T, K] from [N, K] and int64 [T].

    Where a backward finds a dense ``table.grad``, the rows' gradient is added into it, without another [N, K]: it is
    handed on as a sparse tensor, which ``torch.autograd.grad`` would then return.
    """
    rows: Tensor = _TableRows.apply(table, islands)
    return rows


class _TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_NK: Tensor, islands_T: Tensor) -> Tensor:
        ctx.save_for_backward(islands_T)
        ctx.table = table_NK
        return functional.embedding(islands_T, table_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_TK: Tensor) -> tuple[Tensor | None, None]:
        (islands_T,) = ctx.saved_tensors
        table: Tensor = ctx.table
        # Known only now: a loop may drop the gradients between forward and backward.
        in_place = table.is_leaf and table.grad is not None and not table.grad.is_sparse
        if in_place:
            return torch.sparse_coo_tensor(
                islands_T[None], drows_TK, table.shape, check_invariants=False
            ), None
        return torch.zeros_like(table).index_add_(0, islands_T, drows_TK), None


class Cells:
    """Which rows of flat tensors belong to which cell: cell ``b`` owns ``offsets[b]:offsets[b + 1]``.

    offsets: int64 [B + 1], from 0; best kept on the CPU, since reading it from a GPU waits for the GPU
    device: of the flat tensors
    packed: whether products are packed; None: on GPUs, and in bf16 on the CPU where cells are small
    """

    def __init__(self, offsets: Tensor, device: torch.device, packed: bool | None = None) -> None:
        self.offsets = offsets.cpu()
        self.device = device
        bounds: list[int] = self.offsets.tolist()
        self.lengths = [stop - start for start, stop in pairwise(bounds)]
        self._packed = packed

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def packing(self) -> "_Packing":
        """Where packed tokens are; worked out once a batch, where it is asked for."""
        return _Packing.of(self.offsets, self.device)

    def are_packed(self, x: Tensor, columns: int) -> bool:
        """Whether the product of the rows ``x`` with ``columns`` columns is packed."""
        if self._packed is not None:
            return self._packed
        small = x.numel() * columns < PACKED_BELOW * len(self)
        return x.is_cuda or (x.dtype == torch.bfloat16 and small)


def project(rows: Tensor, x: Tensor, cells: Cells) -> Tensor:
    """Sum over the tokens ``i`` of each cell of the outer product of ``rows[i]`` and ``x[i]``.

    rows: [T, K]; x: [T, D]. Returns [B, K, D] in the dtype of ``x``, zero for an empty cell.
    Under autocast both are multiplied in its dtype; sums over the tokens of a cell are formed in fp32 within the
    product, and the gradient of ``rows`` is given in their own dtype. Differentiable once.
    """
    (x,) = _autocast(x)
    result: Tensor = _Project.apply(rows, x, cells)
    return result


def segment_matmul(x: Tensor, matrices: Tensor, cells: Cells) -> Tensor:
    """Multiply each row by its cell's matrix: row ``i`` of cell ``b`` becomes ``x[i] @ matrices[b]``.

    x: [T, D]; matrices: [B, D, M]. Returns [T, M].
    Under autocast both operands are cast to its dtype. Differentiable once.
    """
    x, matrices = _autocast(x, matrices)
    result: Tensor = _SegmentMatmul.apply(x, matrices, cells)
    return result


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; autograd casts their gradients back."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, x_TD: Tensor, cells: Cells) -> Tensor:
        ctx.save_for_backward(rows_TK, x_TD)
        ctx.cells = cells
        return _inner(rows_TK.to(x_TD.dtype), x_TD, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_BKD: Tensor) -> tuple[Tensor | None, ...]:
        rows_TK, x_TD = ctx.saved_tensors
        drows_TK = dx_TD = None
        if ctx.needs_input_grad[0]:
            drows_TK = _outer(x_TD, dz_BKD.transpose(1, 2), ctx.cells).to(rows_TK.dtype)
        if ctx.needs_input_grad[1]:
            dx_TD = _outer(rows_TK.to(x_TD.dtype), dz_BKD, ctx.cells)
        return drows_TK, dx_TD, None


class _SegmentMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, matrices_BDM: Tensor, cells: Cells) -> Tensor:
        ctx.save_for_backward(x_TD, matrices_BDM)
        ctx.cells = cells
        return _outer(x_TD, matrices_BDM, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TM: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, matrices_BDM = ctx.saved_tensors
        dx_TD = dmatrices_BDM = None
        if ctx.needs_input_grad[0]:
            dx_TD = _outer(dy_TM, matrices_BDM.transpose(1, 2), ctx.cells)
        if ctx.needs_input_grad[1]:
            dmatrices_BDM = _inner(x_TD, dy_TM, ctx.cells)
        return dx_TD, dmatrices_BDM, None


def _inner(a_TD: Tensor, b_TM: Tensor, cells: Cells) -> Tensor:
    """``a[own].T @ b[own]`` of each cell: [B, D, M]."""
    if cells.are_packed(a_TD, b_TM.shape[1]):
        return cells.packing.inner(a_TD, b_TM, len(cells))
    z_BDM = a_TD.new_empty(len(cells), a_TD.shape[1], b_TM.shape[1])
    parts = zip(a_TD.t().split(cells.lengths, 1), b_TM.split(cells.lengths), z_BDM.unbind(), strict=True)
    for a_DT, b, z_DM in parts:
        torch.mm(a_DT, b, out=z_DM)
    return z_BDM


def _outer(x_TD: Tensor, matrices_BDM: Tensor, cells: Cells) -> Tensor:
    """``x[own] @ matrices[b]`` of each cell: [T, M]."""
    if cells.are_packed(x_TD, matrices_BDM.shape[2]):
        return cells.packing.outer(x_TD, matrices_BDM)
    y_TM = x_TD.new_empty(len(x_TD), matrices_BDM.shape[2])
    parts = zip(x_TD.split(cells.lengths), matrices_BDM.unbind(), y_TM.split(cells.lengths), strict=True)
    for x, matrix, y in parts:
        torch.mm(x, matrix, out=y)
    return y_TM


@dataclass(frozen=True, eq=False)
class _Packing:
    """Buckets of cells of nearly one length; places past a cell's end repeat its last token.

    order: int64, the cells that have tokens, longest first
    buckets: of the cells in that order, how many are in each bucket, and the places that each of them takes
    token: int64 [P], the token at each place; place: int64 [T], the place of each token; padded: bool [P, 1]
    """

    order: Tensor
    buckets: list[tuple[int, int]]
    token: Tensor
    place: Tensor
    padded: Tensor

    @classmethod
    def of(cls, offsets: Tensor, device: torch.device) -> "_Packing":
        """The packing of a batch: worked out on the CPU, then sent in one piece."""
        lengths, order = offsets.diff().sort(descending=True, stable=True)
        lengths = lengths[lengths > 0]
        order = order[: len(lengths)]
        buckets = _buckets(lengths.tolist())
        widths = torch.tensor([width for n, width in buckets for _ in range(n)], dtype=torch.int64)
        cell = torch.repeat_interleave(widths)
        within = torch.arange(len(cell)) - (widths.cumsum(0) - widths)[cell]
        token = offsets[order][cell] + torch.minimum(within, lengths[cell] - 1)
        real = (within < lengths[cell]).nonzero().squeeze(1)
        place = torch.empty(int(offsets[-1]), dtype=torch.int64)
        place[token[real]] = real
        sizes = [len(order), len(token), len(place)]
        order, token, place = torch.cat([order, token, place]).to(device, non_blocking=True).split(sizes)
        padded = place[token] != torch.arange(len(token), device=device)
        return cls(order, buckets, token, place, padded[:, None])

    def inner(self, a_TD: Tensor, b_TM: Tensor, n_cells: int) -> Tensor:
        """As ``_inner``: padding is cleared in ``a``, so that it adds nothing."""
        a_PD = a_TD.index_select(0, self.token).masked_fill_(self.padded, 0)
        b_PM = b_TM.index_select(0, self.token)
        found = [a.transpose(1, 2) @ b for a, b in zip(self._split(a_PD), self._split(b_PM), strict=True)]
        z_BDM = a_TD.new_zeros(n_cells, a_TD.shape[1], b_TM.shape[1])
        return z_BDM.index_copy_(0, self.order, torch.cat(found)) if found else z_BDM

    def outer(self, x_TD: Tensor, matrices_BDM: Tensor) -> Tensor:
        """As ``_outer``: what padding gives is left behind."""
        x_PD = x_TD.index_select(0, self.token)
        matrices = matrices_BDM.index_select(0, self.order).split([n for n, _ in self.buckets])
        found = [(x @ m).flatten(0, 1) for x, m in zip(self._split(x_PD), matrices, strict=True)]
        if not found:
            return x_TD.new_empty(0, matrices_BDM.shape[2])
        return torch.cat(found).index_select(0, self.place)

    def _split(self, x_PD: Tensor) -> list[Tensor]:
        """The packed rows of each bucket, [cells, width, D]."""
        parts = x_PD.split([n * width for n, width in self.buckets])
        return [part.unflatten(0, bucket) for part, bucket in zip(parts, self.buckets, strict=True)]


def _buckets(lengths: list[int]) -> list[tuple[int, int]]:
    """Cells and width of each bucket, from lengths that decrease."""
    buckets: list[tuple[int, int]] = []
    for length in lengths:
        if buckets and length >= SHORTEST_IN_BUCKET * buckets[-1][1]:
            buckets[-1] = (buckets[-1][0] + 1, buckets[-1][1])
        else:
            buckets.append((1, length))
    return buckets

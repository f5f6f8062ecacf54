"""Two products over cells of unequal length, kept flat: no padding, and no [T, K] copy of a table's rows.

A ragged batch is a flat tensor of ``T`` rows and ``offsets`` int64 [B + 1]: cell ``b`` owns the rows
``offsets[b]:offsets[b + 1]``, none for an empty cell. Each product is a loop over the cells with a plain
matrix product inside, on any device. Keep ``offsets`` on the CPU: reading it from a GPU waits for the GPU.

Shape letters: T tokens, B cells, N rows of a table, K columns of a table, D and M channels.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Spans = list[tuple[int, int, int]]


def gather_project(table: Tensor, x: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the tokens ``i`` of each cell of the outer product of ``table[islands[i]]`` and ``x[i]``.

    table: [N, K]; x: [T, D]; islands: int64 [T], strictly increasing within a cell; offsets: int64 [B + 1].
    Returns [B, K, D] in the dtype of ``x``, zero for an empty cell.

    Under autocast ``x`` and the gathered rows are multiplied in its dtype (the product itself sums over the
    tokens in fp32); the gradient of ``table`` accumulates in the table's own dtype, cell after cell, and is
    deterministic on the CPU. Differentiable once.
    """
    (x,) = _autocast(x)
    result: Tensor = _GatherProject.apply(table, x, islands, len(offsets) - 1, _spans(offsets))
    return result


def segment_matmul(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by its cell's matrix: row ``i`` of cell ``b`` becomes ``x[i] @ matrices[b]``.

    x: [T, D]; matrices: [B, D, M]; offsets: int64 [B + 1]. Returns [T, M].
    Under autocast both operands are cast to its dtype. Differentiable once.
    """
    x, matrices = _autocast(x, matrices)
    result: Tensor = _SegmentMatmul.apply(x, matrices, _spans(offsets))
    return result


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; autograd casts their gradients back."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _spans(offsets: Tensor) -> Spans:
    """``(cell, start, stop)`` of every cell that has tokens."""
    bounds = offsets.tolist()
    return [(b, i, j) for b, (i, j) in enumerate(itertools.pairwise(bounds)) if j > i]


def _rows(table_NK: Tensor, islands: Tensor, dtype: torch.dtype) -> Tensor:
    """The table's rows at a cell's islands; the table itself, uncopied, when the cell lists them all."""
    rows = table_NK if len(islands) == len(table_NK) else table_NK.index_select(0, islands)
    return rows.to(dtype)


class _GatherProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table_NK: Tensor, x_TD: Tensor, islands_T: Tensor, n_cells: int, spans: Spans
    ) -> Tensor:
        ctx.save_for_backward(table_NK, x_TD, islands_T)
        ctx.spans = spans
        z_BKD = x_TD.new_zeros(n_cells, table_NK.shape[1], x_TD.shape[1])
        for b, i, j in spans:
            torch.mm(_rows(table_NK, islands_T[i:j], x_TD.dtype).t(), x_TD[i:j], out=z_BKD[b])
        return z_BKD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_BKD: Tensor) -> tuple[Tensor | None, ...]:
        table_NK, x_TD, islands_T = ctx.saved_tensors
        dtable_NK = torch.zeros_like(table_NK) if ctx.needs_input_grad[0] else None
        dx_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[1] else None
        for b, i, j in ctx.spans:
            if dtable_NK is not None:
                _add_rows(dtable_NK, islands_T[i:j], x_TD[i:j] @ dz_BKD[b].t())
            if dx_TD is not None:
                torch.mm(_rows(table_NK, islands_T[i:j], x_TD.dtype), dz_BKD[b], out=dx_TD[i:j])
        return dtable_NK, dx_TD, None, None, None


def _add_rows(table_NK: Tensor, islands: Tensor, rows: Tensor) -> None:
    """Add a cell's rows to the table at its islands; all of them are distinct."""
    if len(islands) == len(table_NK):
        table_NK.add_(rows)
    else:
        table_NK.index_add_(0, islands, rows.to(table_NK.dtype))


class _SegmentMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, matrices_BDM: Tensor, spans: Spans) -> Tensor:
        ctx.save_for_backward(x_TD, matrices_BDM)
        ctx.spans = spans
        y_TM = x_TD.new_empty(len(x_TD), matrices_BDM.shape[2])
        for b, i, j in spans:
            torch.mm(x_TD[i:j], matrices_BDM[b], out=y_TM[i:j])
        return y_TM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TM: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, matrices_BDM = ctx.saved_tensors
        dx_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        dmatrices_BDM = torch.zeros_like(matrices_BDM) if ctx.needs_input_grad[1] else None
        for b, i, j in ctx.spans:
            if dx_TD is not None:
                torch.mm(dy_TM[i:j], matrices_BDM[b].t(), out=dx_TD[i:j])
            if dmatrices_BDM is not None:
                torch.mm(x_TD[i:j].t(), dy_TM[i:j], out=dmatrices_BDM[b])
        return dx_TD, dmatrices_BDM, None

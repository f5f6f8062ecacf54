"""Heads that read no encoder, as one sum over the open islands of each cell: for predicting, many times as fast.

    z = LayerNorm(sum_i idf_i W_i / |idf|),   B's part of the logits = sum_i idf_i B_i / |idf|,
    |idf|^2 = sum_i idf_i^2,   i: the open islands of a cell

Islands are looked at once, in a table with a row [idf_i W_i, idf_i B_i, idf_i^2] for each; no token is listed and
nothing as long as the tokens is made. That gives what the head gives of tokens (model/heads.py), but for rounding.

Shape letters: B cells, N islands, C columns of a table, M channels of z, Y cell types.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from annatac_scale.model.heads import CellTypeHead, LinearHead, PooledHead
from annatac_scale.model.pool import SMALLEST_NORM, at_least_fp32
from annatac_scale.store.open_islands import OpenIslands


def sum_over_islands(table_NC: Tensor, cells: OpenIslands) -> Tensor:
    """The sum of the table's rows at the open islands of each cell, [B, C]; zero for a cell that has none."""
    # Both have to be of one kind; that of the islands, where the offsets fit it, spares a copy of them.
    kind = np.int32 if len(cells.islands) <= np.iinfo(np.int32).max else np.int64
    islands, offsets = (
        torch.from_numpy(values.astype(kind, copy=False)).to(table_NC.device)
        for values in (cells.islands, cells.offsets)
    )
    return functional.embedding_bag(islands, table_NC, offsets, mode="sum", include_last_offset=True)


class SummedHead:
    """A head in evaluation, on its device, whose weights must not change: what has a row for each island is copied, all
    else is read from the head. The copy takes 4 bytes x N x (M + Y + 1).

    Raises ValueError for a head that reads the encoder.
    """

    def __init__(self, head: CellTypeHead) -> None:
        if not self.can_be(head):
            raise ValueError(f"a {type(head).__name__} that reads the encoder is no sum over islands")
        assert isinstance(head, PooledHead)
        self._head = head
        with torch.no_grad():
            idf_N1 = at_least_fp32(head.pool.idf)[:, None]
            tables = [table for table in (head.pool.table, head.beside_table, idf_N1) if table is not None]
            self._table = idf_N1.new_empty(len(idf_N1), sum(table.shape[1] for table in tables))
            for table, own in zip(tables, self._table.split([t.shape[1] for t in tables], 1), strict=True):
                torch.mul(table, idf_N1, out=own)

    @staticmethod
    def can_be(head: CellTypeHead) -> bool:
        """Whether a head is a sum over islands."""
        return type(head) in (PooledHead, LinearHead) and not head.reads_encoder

    @torch.inference_mode()
    def __call__(self, cells: OpenIslands) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits float32 [B, Y], and the embedding [B, M] that they stand on. cells: numbered as the model's islands"""
        head = self._head
        sums_BC = sum_over_islands(self._table, cells)
        sums_BC /= sums_BC[:, -1:].clamp_min(SMALLEST_NORM).sqrt()
        n_channels = head.pool.table.shape[1]
        z_BM = sums_BC[:, :n_channels].to(head.pool.norm.weight.dtype)
        embedding = head.of_pooled(head.pool.norm(z_BM))
        logits = head.classifier(embedding)
        if head.beside_table is not None:
            logits = logits + sums_BC[:, n_channels:-1]
        return logits.float().cpu().numpy(), embedding.float().cpu().numpy()

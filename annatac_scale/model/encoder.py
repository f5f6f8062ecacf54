"""The encoder as users call it: batches in, states of the open islands and one vector a cell out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from annatac_scale.model.linformer import Linformer
from annatac_scale.model.pool import IslandPool, at_least_fp32, cells_of
from annatac_scale.stream.batch import CLOSED_TOKEN, MASK_TOKEN, Batch


class Tokens(NamedTuple):
    """A batch as the Linformer takes it: tokens, islands int64 [T]; offsets int64 [B + 1], on the CPU."""

    tokens: Tensor
    islands: Tensor
    offsets: Tensor


def batch_tokens(batch: Batch, device: torch.device) -> Tokens:
    """The tokens of a batch on ``device``."""
    return Tokens(
        torch.from_numpy(batch.tokens).to(device, torch.int64),
        torch.from_numpy(batch.islands).to(device, torch.int64),
        torch.from_numpy(batch.offsets),
    )


class EncodedCells(NamedTuple):
    """What the encoder says of the cells of a batch.

    hidden: [T, width], a state of each open island, in the order of the batch's open tokens; None where the pooled
        layer was trained without the Linformer
    embedding: [B, channels], a vector of each cell
    """

    hidden: Tensor | None
    embedding: Tensor


class Encoder(nn.Module):
    """Linformer and, where pretraining had one, the pooled layer.

    The embedding of a cell is z of the pooled layer; without one it is the mean state of the cell's open islands,
    zero for a cell that has none.
    """

    def __init__(self, linformer: Linformer, pool: IslandPool | None = None) -> None:
        super().__init__()
        self.linformer = linformer
        self.pool = pool

    def forward(self, batch: Batch) -> EncodedCells:
        """States and embeddings of a batch in the numbers of the model's vocabulary.

        With ``attend`` "all" the batch lists closed tokens for what the cells' sample measures (``TokenLister``).
        Gradients flow, and dropout follows the mode, as in any module.
        """
        tokens = batch_tokens(batch, self.linformer.projection.device)
        is_open = (tokens.tokens > CLOSED_TOKEN) & (tokens.tokens < MASK_TOKEN)
        at = is_open.nonzero().squeeze(-1)
        offsets = torch.searchsorted(at, tokens.offsets.to(at.device))
        if self.pool is None:
            hidden = self.linformer(*tokens, at)
            return EncodedCells(hidden, _means(hidden, offsets))
        hidden = self.linformer(*tokens, at) if self.pool.reads_encoder else None
        return EncodedCells(hidden, self.pool(hidden, tokens.tokens[at], tokens.islands[at], offsets))


def _means(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Mean state of each cell, [B, D]; zero where a cell has none."""
    states = at_least_fp32(hidden)
    sums = states.new_zeros(len(offsets) - 1, states.shape[1]).index_add(0, cells_of(offsets), states)
    return sums / offsets.diff().clamp_min(1)[:, None]

"""The encoder as users call it: batches in, states of the open islands and one vector a cell out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from annatac_scale.errors import ModelError
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

    hidden: [T, width], a state of each open island, in the order of the batch's open tokens; None where the Linformer
        was not trained
    embedding: [B, channels], a vector of each cell
    """

    hidden: Tensor | None
    embedding: Tensor


class Encoder(nn.Module):
    """Linformer and, where pretraining had one, the pooled layer.

    The embedding of a cell is z of the pooled layer; without one it is the mean state of the cell's open islands,
    zero for a cell that has none. Where the Linformer was not trained, ``linformer_trained`` False, it is not run.
    """

    def __init__(
        self, linformer: Linformer, pool: IslandPool | None = None, linformer_trained: bool = True
    ) -> None:
        super().__init__()
        self.linformer = linformer
        self.pool = pool
        self.linformer_trained = linformer_trained

    def forward(self, batch: Batch) -> EncodedCells:
        """States and embeddings of a batch in the numbers of the model's vocabulary.

        With ``attend`` "all" the batch lists closed tokens for what the cells' sample measures: ``Model.lister``.
        Gradients flow, and dropout follows the mode, as in any module. Raises ModelError where none of them is there.
        """
        tokens = batch_tokens(batch, self.linformer.projection.device)
        runs = self.linformer_trained or self.pool is None or self.pool.reads_encoder
        if runs and self.linformer.config.attend == "all" and len(batch) and batch.tokens.all():
            raise ModelError(
                "the model attends to all islands, and the batch lists none that is closed; expected a token for each "
                "island that its sample measures: pass batches through model.lister(store) first"
            )
        is_open = (tokens.tokens > CLOSED_TOKEN) & (tokens.tokens < MASK_TOKEN)
        at = is_open.nonzero().squeeze(-1)
        offsets = torch.searchsorted(at, tokens.offsets.to(at.device))
        hidden = self.linformer(*tokens, at) if runs else None
        if self.pool is None:
            assert hidden is not None
            return EncodedCells(hidden, _means(hidden, offsets))
        return EncodedCells(hidden, self.pool(hidden, tokens.tokens[at], tokens.islands[at], offsets))


def _means(hidden: Tensor, offsets: Tensor) -> Tensor:
    """Mean state of each cell, [B, D]; zero where a cell has none."""
    states = at_least_fp32(hidden)
    sums = states.new_zeros(len(offsets) - 1, states.shape[1]).index_add(0, cells_of(offsets), states)
    return sums / offsets.diff().clamp_min(1)[:, None]

"""The model of pretraining: a masked batch in, what the objectives lose on it out."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from annatac_scale.model.encoder import Encoder, Tokens, batch_tokens
from annatac_scale.model.heads import HiddenVectorHead, LossSum, MaskedCellHead, MaskedIslandHead
from annatac_scale.model.linformer import Linformer
from annatac_scale.model.pool import IslandPool
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import CLOSED_TOKEN, MASK_TOKEN, NOT_COUNTED, Batch
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.vocabulary import Vocabulary
from annatac_scale.train.presets import PretrainConfig

MEAN_CELLS = 50_000
"""Training cells, evenly chosen, that the mean cell is formed over."""


class MaskedIslandModel(nn.Module):
    """Encoder and the heads of the objectives; maps a prepared batch to summed losses.

    Tokens are asked in a pass that sees MASK where they stand. A cell's vector is asked in a pass of its own, in which
    nothing tells the hidden islands from closed ones: they are not listed, or listed as closed where all islands are.
    """

    def __init__(self, config: PretrainConfig, n_islands: int) -> None:
        super().__init__()
        width, pooled, names = config.encoder.width, config.pooled, config.objectives
        pool = IslandPool(n_islands, width, pooled, reads=config.reads) if config.asks_cells else None
        self.encoder = Encoder(Linformer(config.encoder, n_islands), pool)
        self.encoder.linformer.requires_grad_(config.runs_encoder)
        self.token_head = MaskedIslandHead(width, config.objective) if config.asks_tokens else None
        self.cell_head = MaskedCellHead(n_islands, pooled) if "cell" in names else None
        self.vector_head = HiddenVectorHead(n_islands, pooled) if "vector" in names else None

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """Losses by name over the targets of a masked batch."""
        linformer, pool = self.encoder.linformer, self.encoder.pool
        device = linformer.projection.device
        asked = _Questions.of(batch, device)
        tokens = batch_tokens(batch, device)
        losses: dict[str, LossSum] = {}
        if self.token_head is not None:
            hidden = linformer(*tokens, asked.positions)
            losses |= self.token_head.masked_losses(hidden, asked.levels, asked.opened)
        if pool is None:
            return losses
        seen = _nothing_hidden(tokens, linformer.config.attend)
        z = pool(linformer(*seen) if pool.reads_encoder else None, *seen)
        if self.cell_head is not None:
            assert asked.opened is not None
            losses["cell"] = self.cell_head(z, asked.islands, asked.cells, asked.opened)
        if self.vector_head is not None:
            sighted = torch.from_numpy(_n_visible(batch) > 0).to(device)
            losses["vector"] = self.vector_head(z, *asked.hidden(len(batch)), sighted)
        return losses

    @torch.no_grad()
    def start_heads(self, store: IslandStore, vocabulary: Vocabulary, cells: NDArray[np.int64]) -> None:
        """Start what depends on the pooled layer's own start. cells: int64 ids of the training cells, increasing."""
        pool = self.encoder.pool
        if self.vector_head is None or pool is None:
            return
        chosen = cells[:: -(-len(cells) // MEAN_CELLS)]
        total = torch.zeros_like(self.vector_head.mean)
        for ids, rows in sequential(store, chosen):
            batch = Batch.from_open(ids, rows.renumber(vocabulary.new_of_old()))
            total += pool(None, *batch_tokens(batch, total.device)).sum(0)
        self.vector_head.start_from(pool, total / len(chosen))


def n_targets(batch: Batch) -> dict[str, int]:
    """Targets of a masked batch by the name of the objective."""
    assert batch.level_targets is not None
    levels = batch.level_targets != NOT_COUNTED
    opened = 0 if batch.open_targets is None else int(np.count_nonzero(batch.open_targets != NOT_COUNTED))
    hidden = _n_true((batch.tokens == MASK_TOKEN) & levels, batch)
    vectors = int(np.count_nonzero((hidden > 0) & (_n_visible(batch) > 0)))
    return {"level": int(np.count_nonzero(levels)), "open": opened, "cell": opened, "vector": vectors}


def _n_visible(batch: Batch) -> NDArray[np.int64]:
    """Open islands of each cell that are not hidden, [B]."""
    return _n_true((batch.tokens > CLOSED_TOKEN) & (batch.tokens < MASK_TOKEN), batch)


def _n_true(of_token: NDArray[np.bool_], batch: Batch) -> NDArray[np.int64]:
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_token)])
    return np.diff(counts[batch.offsets])


class _Questions(NamedTuple):
    """What a masked batch asks, on the device: at which tokens, of which islands and cells, and the answers.

    positions: int64 [Q], on the CPU; masked: bool [Q], whether the token is MASK; some stay visible
    """

    positions: Tensor
    islands: Tensor
    cells: Tensor
    masked: Tensor
    levels: Tensor
    opened: Tensor | None

    def hidden(self, n_cells: int) -> tuple[Tensor, Tensor]:
        """The hidden open islands, int64 [S], and the offsets of the cells in them, int64 [B + 1]."""
        at = (self.masked & (self.levels != NOT_COUNTED)).nonzero().squeeze(-1)
        bounds = torch.arange(n_cells + 1, device=at.device)
        return self.islands[at], torch.searchsorted(self.cells[at], bounds)

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "_Questions":
        assert batch.level_targets is not None
        asked = batch.level_targets != NOT_COUNTED
        if batch.open_targets is not None:
            asked = asked | (batch.open_targets != NOT_COUNTED)
        at = np.flatnonzero(asked)
        cells = np.searchsorted(batch.offsets, at, side="right") - 1

        def on_device(values: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        opened = None if batch.open_targets is None else on_device(batch.open_targets[at])
        islands, levels = batch.islands[at], batch.level_targets[at]
        masked = torch.from_numpy(batch.tokens[at] == MASK_TOKEN).to(device)
        return cls(
            torch.from_numpy(at), on_device(islands), on_device(cells), masked, on_device(levels), opened
        )


def _nothing_hidden(tokens: Tokens, attend: str) -> Tokens:
    """The cells as if the hidden islands were closed, like those drawn beside them."""
    masked = tokens.tokens == MASK_TOKEN
    if attend == "all":
        return tokens._replace(tokens=tokens.tokens.masked_fill(masked, CLOSED_TOKEN))
    kept = (~masked).nonzero().squeeze(-1)
    offsets = torch.searchsorted(kept.cpu(), tokens.offsets)
    return Tokens(tokens.tokens[kept], tokens.islands[kept], offsets)

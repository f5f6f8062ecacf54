"""Encoder and cell-type head as one module."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from annatac_scale.errors import ConfigError
from annatac_scale.model.encoder import Encoder, batch_tokens
from annatac_scale.model.heads import (
    CNN_HIDDEN,
    SUBTYPE_HIDDEN,
    CellTypeHead,
    CnnHead,
    LinearHead,
    PooledHead,
)
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.pool import READS
from annatac_scale.stream.batch import Batch

HEADS = ("pooled", "linear", "cnn", "subtype")


@dataclass(frozen=True)
class HeadConfig:
    """A cell-type head. Raises ConfigError where a value is out of range."""

    kind: str = "pooled"
    """"pooled"; "linear", fitted on the pooled vector as it is and on the islands; the paper's "cnn", or "subtype", the
    same with more layers."""
    hidden: tuple[int, ...] = ()
    """Fully connected layers of cnn and subtype; empty means the kind's own."""
    pooled: int = 64
    """Channels of the pooled layer (pooled, linear)."""
    island_dropout: float = 0.3
    """Probability that training leaves an open island out (pooled)."""
    reads: str = "gate"
    """What the pooled layer takes from the encoder: a "gate" on each island, "gate+sum", or "none": it is not run."""
    per_island: bool = True
    """Whether the linear head weighs each island too, beside the pooled vector."""

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise ConfigError(f"head kind: found {self.kind!r}, expected {', '.join(HEADS)}")
        if self.reads not in READS:
            raise ConfigError(f"head reads: found {self.reads!r}, expected {', '.join(READS)}")
        if self.pooled < 2 or any(units < 1 for units in self.hidden):
            raise ConfigError(f"head sizes: found {self.pooled}, {self.hidden}, expected at least 2 and 1")

    @property
    def pools(self) -> bool:
        """Whether the head stands on a pooled layer."""
        return self.kind in ("pooled", "linear")


def build_head(config: HeadConfig, encoder: EncoderConfig, n_islands: int, n_types: int) -> CellTypeHead:
    """A new head of the configured kind on top of an encoder."""
    if config.kind == "pooled":
        return PooledHead(
            n_islands, encoder.width, n_types, config.pooled, config.island_dropout, config.reads
        )
    if config.kind == "linear":
        return LinearHead(n_islands, encoder.width, n_types, config.pooled, config.reads, config.per_island)
    hidden = config.hidden or (CNN_HIDDEN if config.kind == "cnn" else SUBTYPE_HIDDEN)
    return CnnHead(n_islands, encoder.width, n_types, hidden, encoder.tokens_per_cell)


class CellTyper(nn.Module):
    """Logits of cell types from the tokens of cells."""

    def __init__(self, linformer: Linformer, head: CellTypeHead) -> None:
        super().__init__()
        self.linformer = linformer
        self.head = head

    def encoder_and_pool(self, linformer_trained: bool) -> Encoder:
        """The encoder that this model's logits stand on; it shares the weights."""
        pool = self.head.pool if isinstance(self.head, PooledHead) else None
        return Encoder(self.linformer, pool, linformer_trained)

    def forward(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """Logits [B, Y]; arguments as in ``Tokens``."""
        logits: Tensor = self.head(self._hidden(tokens, islands, offsets), tokens, islands, offsets)
        return logits

    def _hidden(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor | None:
        """The encoder's states, where the head reads them."""
        return self.linformer(tokens, islands, offsets) if self.head.reads_encoder else None

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [B, Y] of a batch whose tokens are listed, dropout off."""
        return self.predict_with_embedding(batch)[0]

    def predict_with_embedding(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits float32 [B, Y], and the embedding [B, M] that they stand on, dropout off."""
        logits, embedding = self._without_dropout(
            lambda *tokens: self.head.logits_and_embedding(self._hidden(*tokens), *tokens), batch
        )
        return logits, embedding

    def pooled(self, batch: Batch) -> NDArray[np.float32]:
        """z of the pooled layer, float32 [B, channels], of a batch whose tokens are listed, for a head that has one."""
        assert isinstance(self.head, PooledHead)
        pool = self.head.pool
        (z,) = self._without_dropout(lambda *tokens: (pool(self._hidden(*tokens), *tokens),), batch)
        return z

    def unit_rows(self, batch: Batch) -> sparse.csr_array:
        """Binary x idf in rows of length 1, float32 [B, N], of a batch whose tokens are listed, as of ``pooled``."""
        assert isinstance(self.head, PooledHead)
        pool = self.head.pool
        weights, islands, offsets = self._without_dropout(pool.unit_rows, batch)
        shape = len(offsets) - 1, len(pool.idf)
        return sparse.csr_array((weights, islands, offsets), shape=shape)

    @torch.inference_mode()
    def _without_dropout(
        self, function: Callable[..., tuple[Tensor, ...]], batch: Batch
    ) -> tuple[NDArray[np.float32], ...]:
        """What a function of ``Tokens`` gives of a batch, dropout off."""
        training = self.training
        self.eval()
        try:
            found = function(*batch_tokens(batch, self.head.classifier.weight.device))
        finally:
            self.train(training)
        return tuple(
            (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy() for tensor in found
        )

"""The published encoder written as anybody would: dense, with torch's modules, every island of every cell a token.

What it computes is what annatac_scale.model.linformer.Linformer computes with attend "all"; the test holds both to the
same outputs. It is a fair ordinary implementation: batched products, nothing formed that the formula does not ask for.

Shape letters: B cells, N islands, D width, H heads, C channels of a head, K projected rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.model.linformer import N_TOKENS, EncoderConfig
from annatac_scale.store.schema import N_LEVELS


class PlainAttention(nn.Module):
    """Linformer attention; ``project``, one for all layers, maps N islands to K rows."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.head_dim = config.heads, config.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.output = nn.Linear(inner, config.width)

    def forward(self, x_BND: Tensor, project: nn.Linear) -> Tensor:
        query_BHNC = self._split(self.query(x_BND))
        key_BHKC = self._split(_projected(self.key(x_BND), project))
        value_BHKC = self._split(_projected(self.value(x_BND), project))
        weights_BHNK = (query_BHNC @ key_BHKC.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        mixed: Tensor = self.output((weights_BHNK @ value_BHKC).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x_BNI: Tensor) -> Tensor:
        return x_BNI.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)


def _projected(x_BNI: Tensor, project: nn.Linear) -> Tensor:
    """``project`` over the islands: [B, K, I]. As a product of its own, since a Linear would copy the transpose."""
    return torch.einsum("bni,kn->bki", x_BNI, project.weight) + project.bias[:, None]


class PlainLayer(nn.Module):
    """Attention, then feed-forward, each with a residual and LayerNorm after it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = PlainAttention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.ff), nn.GELU(), nn.Linear(config.ff, config.width)
        )
        self.feed_forward_norm = nn.LayerNorm(config.width)

    def forward(self, x_BND: Tensor, project: nn.Linear) -> Tensor:
        x_BND = self.attention_norm(x_BND + self.attention(x_BND, project))
        normed: Tensor = self.feed_forward_norm(x_BND + self.feed_forward(x_BND))
        return normed


class PlainEncoder(nn.Module):
    """Hidden states [B, N, D] of tokens int64 [B, N]."""

    def __init__(self, config: EncoderConfig, n_islands: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(N_TOKENS, config.width)
        self.register_buffer("positions", torch.zeros(n_islands, config.width))
        self.project = nn.Linear(n_islands, config.k)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.layers))

    def forward(self, tokens_BN: Tensor) -> Tensor:
        x_BND = self.token_embedding(tokens_BN) + self.positions
        for layer in self.layers:
            x_BND = layer(x_BND, self.project)
        return x_BND


class PlainPretraining(nn.Module):
    """Levels of masked islands: logits of every position, of which the loss counts those with a target."""

    def __init__(self, config: EncoderConfig, n_islands: int) -> None:
        super().__init__()
        self.encoder = PlainEncoder(config, n_islands)
        self.level = nn.Linear(config.width, N_LEVELS)

    def forward(self, tokens_BN: Tensor, targets_BN: Tensor) -> Tensor:
        """Summed cross-entropy; targets int64 [B, N], -100 does not count."""
        logits = self.level(self.encoder(tokens_BN))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets_BN.flatten(), reduction="sum")


class PlainTyper(nn.Module):
    """The published cell-type head on all hidden states: a scalar an island, then fully connected layers."""

    def __init__(self, config: EncoderConfig, n_islands: int, n_types: int) -> None:
        super().__init__()
        self.encoder = PlainEncoder(config, n_islands)
        self.filter = nn.Linear(config.width, 1)
        self.layers = nn.Sequential(
            nn.Linear(n_islands, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, n_types)
        )

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits [B, types]."""
        logits: Tensor = self.layers(self.filter(self.encoder(tokens_BN)).squeeze(-1).relu())
        return logits


def plain_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of a ``Linformer`` under the names of ``PlainEncoder``."""
    renamed = {"projection": "project.weight", "projection_bias": "project.bias"}
    found = {renamed.get(name, name): value for name, value in weights.items()}
    return {**found, "project.weight": weights["projection"].t()}

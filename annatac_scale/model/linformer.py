"""The encoder: the paper's Linformer over the tokens of each cell, computed collapsed, trimmed and ragged.

With one projection E [N, k] and bias b [k] for keys, values, heads and layers, the published head is

    K' = E^T (x W_k) + b 1^T,   V' = E^T (x W_v) + b 1^T,   softmax(x W_q K'^T / sqrt(d)) V' W_o

where E^T sums over the tokens that the cell lists. Products associate: the same function at half the cost is

    Z = E^T x  once a layer,  A = W_q (Z W_k + b 1^T)^T / sqrt(d),  V = (Z W_v + b 1^T) W_o,  softmax(x A) V

(*collapsed*). In the last layer the softmax and the feed-forward are formed only where a loss or a head looks
(*trimmed*). The cost follows the tokens that a cell lists and not the number of islands (*ragged*): its open
islands alone give the published model called with ``input_mask = token != 0``, all its islands the published
model. Sources: Wang et al., Linformer, arXiv 2006.04768; that one E with bias is shared: annATAC's code.

Shape letters: T tokens, Q tokens asked for, B cells, N islands, D width,
H heads, C channels of a head, K projected rows (k), R = H K rows of all heads.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.ragged import Cells, project, segment_matmul, table_rows
from annatac_scale.stream.batch import CLOSED_TOKEN, MASK_TOKEN

N_TOKENS = MASK_TOKEN + 1
"""Tokens the encoder knows: 0 closed, 1 to 5 a level, 6 MASK."""

CHOICES = {
    "attend": ("all", "open"),
    "norm": ("post", "pre"),
    "positions": ("frozen", "learned"),
    "closed": ("none", "first", "every"),
}


@dataclass(frozen=True)
class EncoderConfig:
    """What makes an encoder besides its islands. Raises ConfigError where a value is out of range."""

    width: int
    """Channels of a token."""
    layers: int
    heads: int
    head_dim: int
    """Channels of a head; heads x head_dim need not be the width."""
    k: int
    """Rows that keys and values are projected to."""
    ff: int
    """Hidden channels of the feed-forward part."""
    attend: str
    """Which tokens a cell lists: "all" its measured islands, or its "open" and masked ones."""
    norm: str
    """LayerNorm "post", after each residual, as published; or "pre", before each part and once at the end."""
    positions: str
    """The table of island positions stays as given, "frozen"; or it is "learned" from there."""
    tokens_per_cell: float = 0.0
    """Tokens expected in a cell, which E's initialisation is scaled by; 0 means all islands."""
    closed: str = "none"
    """Where ``attend`` is "open": closed islands stand in the keys and values of no layer, of the "first", or of
    "every" layer, with the state that they start from; they are never updated. Closed are all islands that a cell
    does not list, those that its sample does not measure among them. Did not pay: docs/accuracy.md."""
    depth: bool = False
    """Add a learned vector, times the log of the cell's visible open islands, to every token. Did not pay either."""
    checkpoint: bool = False
    """Compute the layers' activations again in the backward, instead of keeping them."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "head_dim", "k", "ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"encoder {name}: found {value!r}, expected a whole number of at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"encoder {name}: found {getattr(self, name)!r}, expected {' or '.join(choices)}"
                )
        if not (math.isfinite(self.tokens_per_cell) and self.tokens_per_cell >= 0):
            raise ConfigError(
                f"encoder tokens_per_cell: found {self.tokens_per_cell!r}, expected a number of tokens, "
                "or 0 for all islands"
            )
        if self.closed != "none" and self.attend == "all":
            raise ConfigError('encoder closed: attend "all" lists the closed islands already; expected none')


@dataclass(frozen=True, eq=False)
class _Attended:
    """The ragged batch as every layer attends to it."""

    cells: Cells
    rows: Tensor
    """[T, K], the tokens' rows of E."""
    bias: Tensor
    """[K]"""
    closed: "_Closed | None"


@dataclass(frozen=True, eq=False)
class _Closed:
    """What closed islands add to the keys and values: E^T of all islands' closed states, less the listed tokens'."""

    states: Tensor
    """[N, D], of every island before the first layer, if it is closed."""
    of_tokens: Tensor
    """[T, D], the same of the listed tokens' islands."""
    projection: Tensor
    """[N, K]"""

    def of_all(self, norm: nn.Module) -> Tensor:
        """E^T of the closed states of all islands, [K, D]."""
        summed: Tensor = self.projection.t() @ norm(self.states)
        return summed


@dataclass(frozen=True, eq=False)
class _Asked:
    """The tokens a layer computes: all of them, or those at ``positions``."""

    positions: Tensor | None
    """int64 [Q], increasing, on the tokens' device; None for all."""
    cells: Cells
    """Which of the Q a cell owns."""

    @classmethod
    def at(cls, queries: Tensor, cells: Cells) -> "_Asked":
        """Those at ``queries``, int64 [Q] increasing positions into the T tokens."""
        offsets = torch.searchsorted(queries.cpu().contiguous(), cells.offsets)
        return cls(queries.to(cells.device), Cells(offsets, cells.device))

    def of(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.positions is None else x_TD.index_select(0, self.positions)


def _rounded_up(tokens: Tensor, islands: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch with one more cell, of closed tokens that nobody looks at, up to a round number of tokens.

    Arrays with a row a token leave glibc's heap in pieces where they are of ever other lengths, and a process grew to
    more than twice the memory that this leaves it with. Round is a multiple of a sixteenth of the power of two below,
    of an eighth where gradients are kept, and hundreds of arrays with them: few lengths are left, and at most as much
    is added.
    """
    n_tokens = len(tokens)
    digits = 4 if torch.is_grad_enabled() else 5
    added = -n_tokens % (1 << max(n_tokens.bit_length() - digits, 0))
    if not added:
        return tokens, islands, offsets
    unseen = tokens.new_zeros(added)
    return (
        torch.cat([tokens, unseen + CLOSED_TOKEN]),
        torch.cat([islands, unseen]),
        torch.cat([offsets, offsets.new_tensor([n_tokens + added])]),
    )


class Attention(nn.Module):
    """Linformer attention of one layer, collapsed; its projection E comes with the batch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.output = nn.Linear(inner, config.width)

    def forward(self, x_TD: Tensor, asked: _Asked, attended: _Attended, norm: nn.Module) -> Tensor:
        """What the asked tokens read from their cell, [Q, D]; ``x_TD`` are all its tokens, after ``norm``."""
        if attended.closed is None:
            z_BKD = project(attended.rows, x_TD, attended.cells)
        else:
            beyond_TD = x_TD - norm(attended.closed.of_tokens)
            z_BKD = project(attended.rows, beyond_TD, attended.cells) + attended.closed.of_all(norm)
        bias_K1 = attended.bias[:, None]
        keys_BKHC = self._split(self.key(z_BKD) + bias_K1)
        values_BKHC = self._split(self.value(z_BKD) + bias_K1)
        query_HCD = self._split(self.query.weight.t()).permute(1, 2, 0) * self.head_dim**-0.5
        output_HCD = self._split(self.output.weight).permute(1, 2, 0)
        scores_BRD = torch.einsum("bkhc,hcd->bhkd", keys_BKHC, query_HCD).flatten(1, 2)
        values_BRD = torch.einsum("bkhc,hcd->bhkd", values_BKHC, output_HCD).flatten(1, 2)
        scores_QR = segment_matmul(asked.of(x_TD), scores_BRD.transpose(1, 2), asked.cells)
        weights_QR = scores_QR.unflatten(1, (self.heads, -1)).softmax(dim=-1).flatten(1)
        return segment_matmul(weights_QR, values_BRD, asked.cells) + self.output.bias

    def _split(self, x: Tensor) -> Tensor:
        """The last dimension, heads x channels, as two."""
        return x.unflatten(-1, (self.heads, self.head_dim))


class Layer(nn.Module):
    """Attention and feed-forward with residuals; LayerNorm after each (post) or before each (pre)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.ff), nn.GELU(), nn.Linear(config.ff, config.width)
        )
        self.feed_forward_norm = nn.LayerNorm(config.width)

    def forward(self, x_TD: Tensor, asked: _Asked, attended: _Attended) -> Tensor:
        """The asked tokens after this layer, [Q, D]."""
        x_QD = asked.of(x_TD)
        if self.pre:
            x_QD = x_QD + self.attention(self.attention_norm(x_TD), asked, attended, self.attention_norm)
            return x_QD + self.feed_forward(self.feed_forward_norm(x_QD))
        x_QD = self.attention_norm(x_QD + self.attention(x_TD, asked, attended, nn.Identity()))
        return self.feed_forward_norm(x_QD + self.feed_forward(x_QD))


class Linformer(nn.Module):
    """Hidden states of the tokens of some cells.

    config: sizes and choices
    n_islands: N, islands of the model's vocabulary
    positions: [N, width]; None starts learned positions as random as the tokens, and leaves frozen ones zero,
        to be filled by ``load_state_dict``

    Raises ModelError where ``positions`` has another shape.
    """

    positions: Tensor

    def __init__(self, config: EncoderConfig, n_islands: int, positions: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.n_islands = n_islands
        self.token_embedding = nn.Embedding(N_TOKENS, config.width)
        bound = (config.tokens_per_cell or max(n_islands, 1)) ** -0.5
        self.projection = nn.Parameter(torch.empty(n_islands, config.k).uniform_(-bound, bound))
        self.projection_bias = nn.Parameter(torch.empty(config.k).uniform_(-bound, bound))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.depth = nn.Parameter(torch.zeros(config.width)) if config.depth else None
        self._set_positions(positions)

    def _set_positions(self, given: Tensor | None) -> None:
        shape = (self.n_islands, self.config.width)
        if given is not None and tuple(given.shape) != shape:
            raise ModelError(f"encoder positions: found shape {tuple(given.shape)}, expected {shape}")
        learned = self.config.positions == "learned"
        if given is None:
            table = torch.randn(shape) if learned else torch.zeros(shape)
        else:
            table = given.detach().to(self.projection.dtype, copy=True)
        if learned:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table)

    @property
    def token_rms(self) -> float:
        """Root mean square of the token embedding, which callers scale the positions to."""
        return float(self.token_embedding.weight.detach().square().mean().sqrt())

    def forward(
        self, tokens: Tensor, islands: Tensor, offsets: Tensor, queries: Tensor | None = None
    ) -> Tensor:
        """Hidden states of all tokens, or of those at ``queries``, in their order.

        tokens: int64 [T], 0 to 6; islands: int64 [T], strictly increasing within a cell
        offsets: int64 [B + 1], cell ``b`` owns the tokens ``offsets[b]:offsets[b + 1]``; best kept on the CPU
        queries: int64 [Q], increasing positions into the T tokens, or None for all; as ``offsets``
        Returns [T, width] or [Q, width].
        """
        n_tokens = len(tokens)
        if self.config.attend == "open" and (tokens.device.type == "cpu" or torch.is_grad_enabled()):
            tokens, islands, offsets = _rounded_up(tokens, islands, offsets)
        cells = Cells(offsets, self.projection.device)
        attended = _Attended(cells, table_rows(self.projection, islands), self.projection_bias, None)
        everything = _Asked(None, cells)
        last = everything if queries is None else _Asked.at(queries, cells)
        positions = table_rows(self.positions, islands)
        x = self.token_embedding(tokens) + positions
        if self.depth is not None:
            x = x + self._depths(tokens, cells)[:, None] * self.depth
        if self.config.closed != "none":
            attended = replace(attended, closed=self._closed(positions))
        for layer in self.layers[:-1]:
            x = self._run(layer, x, everything, attended)
            if self.config.closed == "first":
                attended = replace(attended, closed=None)
        x = self._run(self.layers[-1], x, last, attended)
        hidden: Tensor = self.final_norm(x)
        return hidden[:n_tokens]  # of queries there are fewer

    def _run(self, layer: nn.Module, x_TD: Tensor, asked: _Asked, attended: _Attended) -> Tensor:
        if self.config.checkpoint and torch.is_grad_enabled():
            computed: Tensor = checkpoint(layer, x_TD, asked, attended, use_reentrant=False)
            return computed
        result: Tensor = layer(x_TD, asked, attended)
        return result

    def _depths(self, tokens: Tensor, cells: Cells) -> Tensor:
        """Log of the cell's visible open islands over the tokens expected, of each token, [T]."""
        lengths = cells.offsets.diff().to(tokens.device)
        cell_of_token = torch.repeat_interleave(torch.arange(len(cells), device=tokens.device), lengths)
        opened = ((tokens > CLOSED_TOKEN) & (tokens < MASK_TOKEN)).to(self.projection.dtype)
        counts = opened.new_zeros(len(cells)).index_add(0, cell_of_token, opened)
        return (counts.clamp_min(1) / (self.config.tokens_per_cell or 1.0)).log()[cell_of_token]

    def _closed(self, positions_TD: Tensor) -> _Closed:
        state_D = self.token_embedding.weight[CLOSED_TOKEN]
        return _Closed(state_D + self.positions, state_D + positions_TD, self.projection)

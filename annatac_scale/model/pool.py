"""The pooled layer: a cell's open islands, weighted by idf, as one vector, with the encoder as a residual.

    u_i = idf_i (1 + gate . h_i) / |...|,   z = LayerNorm(sum_i u_i (W_i + U h_i))

Gate and U start at zero: the layer starts as a linear model of the open islands, whatever the encoder says. W starts
as SVD components times singular values of binary x idf with rows of length 1, which alone is the best linear start
that we know of (docs/accuracy.md).

Shape letters: T tokens, S tokens that are summed over, B cells, N islands, M columns of W, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.errors import ConfigError
from annatac_scale.model.ragged import table_rows
from annatac_scale.stream.batch import CLOSED_TOKEN, MASK_TOKEN

READS = ("none", "gate", "gate+sum")
"""What the layer takes from the encoder: nothing, a gate on each island, or its states besides."""

SMALLEST_NORM = 1e-12


class IslandPool(nn.Module):
    """z of each cell.

    n_islands: N; width: D, of the encoder's states; pooled: M, channels of z
    island_dropout: in training, the probability that an open island of a cell is left out
    reads: one of READS

    A new layer has idf 1 and random W; ``initialise`` gives it those of the training cells.
    """

    idf: Tensor

    def __init__(
        self, n_islands: int, width: int, pooled: int = 64, island_dropout: float = 0.0, reads: str = "gate"
    ) -> None:
        super().__init__()
        if not 0 <= island_dropout < 1:
            raise ConfigError(f"island_dropout: found {island_dropout!r}, expected at least 0 and under 1")
        if reads not in READS:
            raise ConfigError(f"reads: found {reads!r}, expected {', '.join(READS)}")
        self.island_dropout = island_dropout
        self.reads_encoder = reads != "none"
        self.register_buffer("idf", torch.ones(n_islands))
        self.table = nn.Parameter(torch.randn(n_islands, pooled) * pooled**-0.5)
        self.norm = nn.LayerNorm(pooled)
        self.gate = nn.Linear(width, 1) if self.reads_encoder else None
        self.sum = nn.Linear(width, pooled, bias=False) if reads == "gate+sum" else None
        for parameter in self.reading_parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def initialise(self, idf: Tensor, components: Tensor | None = None) -> None:
        """Start from the training cells: their idf, and W from an SVD of them.

        idf: [N]
        components: SVD components times singular values, [N, C] with C <= M; missing columns become 0.
        Raises ValueError on other shapes.
        """
        n_islands, pooled = self.table.shape
        if tuple(idf.shape) != (n_islands,):
            raise ValueError(f"idf: found shape {tuple(idf.shape)}, expected ({n_islands},)")
        self.idf.copy_(idf)
        if components is None:
            return
        if components.ndim != 2 or len(components) != n_islands or components.shape[1] > pooled:
            raise ValueError(
                f"components: found shape {tuple(components.shape)}, expected ({n_islands}, at most {pooled})"
            )
        self.table.zero_()
        self.table[:, : components.shape[1]] = components.to(self.table.dtype)

    def start_from(self, other: "IslandPool") -> None:
        """Take over the weights of a pretrained layer; what it does not read of the encoder stays as it is.

        Raises ConfigError where its channels are others.
        """
        if self.table.shape != other.table.shape:
            raise ConfigError(
                f"head.pooled: found {self.table.shape[1]}, expected the {other.table.shape[1]} channels of the "
                f"pretrained pooled layer; use --set head.pooled={other.table.shape[1]}"
            )
        own = self.state_dict()
        self.load_state_dict(own | {name: value for name, value in other.state_dict().items() if name in own})

    def forward(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """z, [B, M].

        hidden: [T, D], the encoder's states of all tokens; None leaves the encoder out (a gate of 1)
        tokens, islands: int64 [T], islands strictly increasing within a cell; MASK and closed tokens are left out
        offsets: int64 [B + 1]
        """
        kept, islands_S, offsets_S = self._open(tokens, islands, offsets)
        values_S = self.idf[islands_S]
        hidden_SD = None if hidden is None or self.gate is None else hidden[kept]
        if hidden_SD is not None and self.gate is not None:
            values_S = values_S * (1 + self.gate(hidden_SD).squeeze(-1))
        unit_S = _unit_rows(at_least_fp32(values_S), offsets_S)
        z_BM = sum_rows(self.table, unit_S, islands_S, offsets_S)
        if hidden_SD is not None and self.sum is not None:
            z_BM = z_BM + self.sum(_weighted_sums(hidden_SD, unit_S, offsets_S))
        pooled: Tensor = self.norm(z_BM)
        return pooled

    def unit_rows(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Binary x idf with rows of length 1, whatever the encoder says: weights [S], islands [S], offsets [B + 1].

        Arguments as of ``forward``, and the same islands.
        """
        _, islands_S, offsets_S = self._open(tokens, islands, offsets)
        return _unit_rows(at_least_fp32(self.idf[islands_S]), offsets_S), islands_S, offsets_S

    def _open(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Increasing positions of the open islands, in training less those that are dropped; islands and offsets."""
        kept = (tokens > CLOSED_TOKEN) & (tokens < MASK_TOKEN)
        if self.training and self.island_dropout:
            kept &= torch.rand(len(tokens), device=tokens.device) >= self.island_dropout
        at = kept.nonzero().squeeze(-1)
        return at, islands[at], torch.searchsorted(at, offsets.to(at.device))

    def reading_parameters(self) -> list[nn.Parameter]:
        """Parameters that the encoder's states enter through."""
        return [p for part in (self.gate, self.sum) if part is not None for p in part.parameters()]


def at_least_fp32(x: Tensor) -> Tensor:
    """Losses and sums over many tokens are not taken in bf16 or fp16."""
    return x if x.dtype == torch.float64 else x.float()


def sum_rows(table_NM: Tensor, weights_T: Tensor, islands_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the tokens of each cell of ``weights`` times the table's rows at ``islands``: [B, M].

    Where a gradient is wanted the rows are taken out of the table first, so that theirs are all that there are; else
    not, which is several times as fast.
    """
    if torch.is_grad_enabled():
        table_NM = table_rows(table_NM, islands_T)
        islands_T = torch.arange(len(islands_T), device=islands_T.device)
    return functional.embedding_bag(
        islands_T,
        table_NM,
        offsets.to(islands_T.device),
        mode="sum",
        per_sample_weights=weights_T.to(table_NM.dtype),
        include_last_offset=True,
    )


def cells_of(offsets: Tensor) -> Tensor:
    """The cell of each token, int64 [T]."""
    counts = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _unit_rows(values_S: Tensor, offsets: Tensor) -> Tensor:
    """The values of each cell divided by their L2 norm; a cell of zeros stays zero."""
    cells = cells_of(offsets)
    squares = values_S.new_zeros(len(offsets) - 1).index_add(0, cells, values_S.square())
    return values_S / squares.clamp_min(SMALLEST_NORM).sqrt()[cells]


def _weighted_sums(hidden_SD: Tensor, weights_S: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the tokens of each cell of ``weights`` times its state: [B, D]."""
    weighted = at_least_fp32(hidden_SD) * weights_S[:, None]
    return weighted.new_zeros(len(offsets) - 1, weighted.shape[1]).index_add(0, cells_of(offsets), weighted)

"""What reads the encoder: the masked-island head of pretraining, and the heads that tell the type of a cell.

The type heads take the flat tokens of a ragged batch. Their first layer has a row for each island and is
summed over the tokens that a cell lists, so that its cost follows the tokens and not the islands; a closed
island without a token contributes nothing. They share one interface, ``CellTypeHead``.

Shape letters: T tokens, Q masked tokens, S tokens a head sums over, B cells, N islands, M columns of a table,
D width, Y cell types.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.errors import ConfigError
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.stream.batch import CLOSED_TOKEN, MASK_TOKEN, NOT_COUNTED

CNN_HIDDEN = (512, 128)
"""Fully connected layers of the paper's head."""

SUBTYPE_HIDDEN = (512, 256, 128, 64)
"""Fully connected layers of the paper's head for subtypes."""

FACTORISED_ABOVE = 32_768
"""Islands above which the CNN head's first full layer goes through ``FACTOR_RANK`` channels."""

FACTOR_RANK = 32

OBJECTIVES = ("level", "level+open")

SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class LossSum:
    """A loss as ranks add it up: divide ``sum`` by ``count`` only after both are summed over all of them."""

    sum: Tensor
    """Scalar with gradient, summed over the targets that count."""
    count: Tensor
    """int64 scalar, targets that count."""
    correct: Tensor
    """int64 scalar, those of them predicted right."""


class MaskedIslandHead(nn.Module):
    """Pretraining: the level of a masked island and, in objective "level+open", whether it is open at all."""

    def __init__(self, width: int, objective: str) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ConfigError(f"objective: found {objective!r}, expected {' or '.join(OBJECTIVES)}")
        self.objective = objective
        self.level = nn.Linear(width, N_LEVELS)
        self.open = nn.Linear(width, 1) if objective == "level+open" else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """From [Q, D]: logits of levels 1 to 5 [Q, 5], and the logit of open against closed [Q] or None."""
        return self.level(hidden), None if self.open is None else self.open(hidden).squeeze(-1)

    def masked_losses(
        self, hidden: Tensor, level_targets: Tensor, open_targets: Tensor | None = None
    ) -> dict[str, LossSum]:
        """Summed losses by name: "level" (cross-entropy) and, in objective "level+open", "open" (logistic).

        hidden: [Q, D]; level_targets: integer [Q], 0 to 4, -100 does not count
        open_targets: integer [Q], 1 open, 0 closed, -100 does not count; unused in objective "level"
        """
        levels, opened = self(hidden)
        losses = {"level": _level_loss(_at_least_fp32(levels), level_targets.long())}
        if opened is not None:
            if open_targets is None:
                raise ValueError("objective 'level+open' needs open_targets")
            losses["open"] = _open_loss(_at_least_fp32(opened), open_targets)
        return losses


def _level_loss(logits: Tensor, targets: Tensor) -> LossSum:
    loss = functional.cross_entropy(logits, targets, ignore_index=NOT_COUNTED, reduction="sum")
    return LossSum(loss, (targets != NOT_COUNTED).sum(), (logits.argmax(-1) == targets).sum())


def _open_loss(logits: Tensor, targets: Tensor) -> LossSum:
    counted = targets != NOT_COUNTED
    logits, targets = logits[counted], targets[counted]
    loss = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return LossSum(loss, counted.sum(), ((logits > 0) == (targets > 0)).sum())


def _at_least_fp32(x: Tensor) -> Tensor:
    """Losses and sums over many tokens are not taken in bf16 or fp16."""
    return x if x.dtype == torch.float64 else x.float()


class CellTypeHead(nn.Module):
    """A head that tells the type of each cell from its tokens.

    Subclasses give ``embed``, ``table_parameters`` and ``reading_parameters``, and set ``classifier``, linear in
    the embedding.
    """

    classifier: nn.Linear

    def __init__(self, n_islands: int, n_types: int) -> None:
        super().__init__()
        self.n_islands = n_islands
        self.n_types = n_types

    def forward(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """Logits [B, Y].

        hidden: [T, D], the encoder's states of all tokens; tokens, islands: int64 [T], islands strictly
        increasing within a cell; offsets: int64 [B + 1].
        """
        logits: Tensor = self.classifier(self.embed(hidden, tokens, islands, offsets))
        return logits

    def embed(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """The embedding of each cell that the logits are linear in."""
        raise NotImplementedError

    def table_parameters(self) -> list[nn.Parameter]:
        """Parameters with a row for each island: a cell trains few of them, so they want a higher rate."""
        raise NotImplementedError

    def reading_parameters(self) -> list[nn.Parameter]:
        """Parameters that the encoder's states enter through: they are trained at its rate."""
        raise NotImplementedError


class CnnHead(CellTypeHead):
    """The paper's head: one scalar an island, relu(w . h + b), then fully connected layers with ReLU.

    hidden: units of the fully connected layers, ``CNN_HIDDEN`` or ``SUBTYPE_HIDDEN``
    tokens_per_cell: tokens expected in a cell, which the first layer's initialisation is scaled by;
        0 means all islands, as published
    """

    def __init__(
        self,
        n_islands: int,
        width: int,
        n_types: int,
        hidden: Sequence[int] = CNN_HIDDEN,
        tokens_per_cell: float = 0.0,
    ) -> None:
        super().__init__(n_islands, n_types)
        factorised = n_islands > FACTORISED_ABOVE
        bound = (tokens_per_cell or max(n_islands, 1)) ** -0.5
        columns = FACTOR_RANK if factorised else hidden[0]
        self.filter = nn.Linear(width, 1)
        self.table = nn.Parameter(torch.empty(n_islands, columns).uniform_(-bound, bound))
        self.expand = nn.Linear(FACTOR_RANK, hidden[0], bias=False) if factorised else nn.Identity()
        self.bias = nn.Parameter(torch.empty(hidden[0]).uniform_(-bound, bound))
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(hidden))
        self.classifier = nn.Linear(hidden[-1], n_types)

    def embed(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """Units of the last hidden layer, [B, hidden[-1]]; levels come in through ``hidden`` alone."""
        if hidden is None:
            raise ValueError("the CNN head reads the encoder's states: hidden must not be None")
        scalar_T = self.filter(hidden).squeeze(-1).relu()
        x = (self.expand(_sum_rows(self.table, scalar_T, islands, offsets)) + self.bias).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return x

    def table_parameters(self) -> list[nn.Parameter]:
        """The first full layer, a row for each island."""
        return [self.table]

    def reading_parameters(self) -> list[nn.Parameter]:
        """The filter."""
        return list(self.filter.parameters())


class PooledHead(CellTypeHead):
    """Linear logits on an idf-weighted, L2-normalised sum over open islands, with the encoder as a residual.

        v_i = idf_i (1 + gate . h_i),   z = LayerNorm(sum_i v_i / |v| W_i),   logits = A z + c

    The gate starts at zero: the head starts as a linear model of the open islands, whatever the encoder says.
    A new head has idf 1 and random W; ``initialise`` gives it those of the training cells.

    pooled: channels of z
    island_dropout: in training, the probability that an open island of a cell is left out
    """

    idf: Tensor

    def __init__(
        self, n_islands: int, width: int, n_types: int, pooled: int = 64, island_dropout: float = 0.3
    ) -> None:
        super().__init__(n_islands, n_types)
        if not 0 <= island_dropout < 1:
            raise ConfigError(f"island_dropout: found {island_dropout!r}, expected at least 0 and under 1")
        self.island_dropout = island_dropout
        self.register_buffer("idf", torch.ones(n_islands))
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.table = nn.Parameter(torch.randn(n_islands, pooled) * pooled**-0.5)
        self.norm = nn.LayerNorm(pooled)
        self.classifier = nn.Linear(pooled, n_types)

    @torch.no_grad()
    def initialise(self, idf: Tensor, components: Tensor | None = None) -> None:
        """Start from the training cells: their idf, and W from an SVD of them.

        idf: [N]
        components: SVD components times singular values, [N, C] with C <= pooled; missing columns become 0.
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

    def embed(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """z, [B, pooled]. ``hidden`` None leaves the encoder out (gate 1); MASK tokens are left out too."""
        kept = self._kept(tokens)
        kept_islands = islands[kept]
        values_S = self.idf[kept_islands]
        if hidden is not None:
            values_S = values_S * (1 + self.gate(hidden).squeeze(-1)[kept])
        kept_offsets = torch.searchsorted(kept, offsets.to(kept.device))
        unit_S = _unit_rows(_at_least_fp32(values_S), kept_offsets)
        pooled: Tensor = self.norm(_sum_rows(self.table, unit_S, kept_islands, kept_offsets))
        return pooled

    def _kept(self, tokens: Tensor) -> Tensor:
        """Increasing positions of the open islands, in training less those that are dropped."""
        kept = (tokens > CLOSED_TOKEN) & (tokens < MASK_TOKEN)
        if self.training and self.island_dropout:
            kept &= torch.rand(len(tokens), device=tokens.device) >= self.island_dropout
        return kept.nonzero().squeeze(-1)

    def table_parameters(self) -> list[nn.Parameter]:
        """W, a row for each island."""
        return [self.table]

    def reading_parameters(self) -> list[nn.Parameter]:
        """The gate."""
        return list(self.gate.parameters())


def _unit_rows(values_S: Tensor, offsets: Tensor) -> Tensor:
    """The values of each cell divided by their L2 norm; a cell of zeros stays zero."""
    counts = offsets.diff()
    cells = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    squares = values_S.new_zeros(len(counts)).index_add(0, cells, values_S.square())
    return values_S / squares.clamp_min(SMALLEST_NORM).sqrt()[cells]


def _sum_rows(table_NM: Tensor, weights_T: Tensor, islands_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the tokens of each cell of ``weights`` times the table's rows at ``islands``: [B, M]."""
    return functional.embedding_bag(
        islands_T,
        table_NM,
        offsets.to(islands_T.device),
        mode="sum",
        per_sample_weights=weights_T.to(table_NM.dtype),
        include_last_offset=True,
    )

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
from annatac_scale.model.pool import IslandPool, at_least_fp32, sum_rows
from annatac_scale.model.ragged import table_rows
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.stream.batch import NOT_COUNTED

CNN_HIDDEN = (512, 128)
"""Fully connected layers of the paper's head."""

SUBTYPE_HIDDEN = (512, 256, 128, 64)
"""Fully connected layers of the paper's head for subtypes."""

FACTORISED_ABOVE = 32_768
"""Islands above which the CNN head's first full layer goes through ``FACTOR_RANK`` channels."""

FACTOR_RANK = 32

OBJECTIVES = ("level", "open", "cell", "vector")
"""What pretraining may ask; several are joined by "+"."""


WITHIN = 0.5
"""Cosine from which a predicted vector counts as right: an angle of at most 60 degrees."""


@dataclass(frozen=True, eq=False)
class LossSum:
    """A loss as ranks add it up: divide ``sum`` by ``count`` only after both are summed over all of them."""

    sum: Tensor
    """Scalar with gradient, summed over the targets that count."""
    count: Tensor
    """int64 scalar, targets that count."""
    correct: Tensor
    """int64 scalar, those of them predicted right."""


def objectives_of(text: str) -> tuple[str, ...]:
    """The names in an objective such as "open+cell". Raises ConfigError for others than OBJECTIVES, or one twice."""
    names = tuple(text.split("+"))
    if len(set(names)) < len(names) or not set(names) <= set(OBJECTIVES):
        raise ConfigError(
            f"objective: found {text!r}, expected {', '.join(OBJECTIVES)}, or some of them joined by +"
        )
    return names


class MaskedIslandHead(nn.Module):
    """Pretraining, from a masked token's state: the level of the island, and whether it is open at all.

    objective: which of both, "level", "open" or "level+open"
    """

    def __init__(self, width: int, objective: str) -> None:
        super().__init__()
        names = objectives_of(objective)
        self.objective = objective
        self.level = nn.Linear(width, N_LEVELS) if "level" in names else None
        self.open = nn.Linear(width, 1) if "open" in names else None

    def forward(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """From [Q, D]: logits of levels 1 to 5 [Q, 5], and the logit of open against closed [Q]; None if not asked."""
        levels = None if self.level is None else self.level(hidden)
        return levels, None if self.open is None else self.open(hidden).squeeze(-1)

    def masked_losses(
        self, hidden: Tensor, level_targets: Tensor, open_targets: Tensor | None = None
    ) -> dict[str, LossSum]:
        """Summed losses by name: "level" (cross-entropy) and "open" (logistic).

        hidden: [Q, D]; level_targets: integer [Q], 0 to 4, -100 does not count
        open_targets: integer [Q], 1 open, 0 closed, -100 does not count; needed where "open" is asked
        """
        levels, opened = self(hidden)
        losses = {}
        if levels is not None:
            losses["level"] = _level_loss(at_least_fp32(levels), level_targets.long())
        if opened is not None:
            if open_targets is None:
                raise ValueError(f"objective {self.objective!r} needs open_targets")
            losses["open"] = open_loss(at_least_fp32(opened), open_targets)
        return losses


class MaskedCellHead(nn.Module):
    """Pretraining, from a cell's vector: which islands that were hidden from it are open.

    The logit of island j is g_j . (A z + B gelu(C z)) + b_j; only g and b have a row for each island. It trains
    the pooled layer itself, which a loss on the states of tokens leaves as it was.
    """

    def __init__(self, n_islands: int, pooled: int) -> None:
        super().__init__()
        self.inner = nn.Linear(pooled, pooled)
        self.outer = nn.Linear(2 * pooled, pooled)
        self.table = nn.Parameter(torch.randn(n_islands, pooled) * pooled**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_islands))

    def forward(self, z_BM: Tensor, islands_Q: Tensor, cells_Q: Tensor, open_targets: Tensor) -> LossSum:
        """Summed logistic loss.

        z_BM: [B, M]; islands_Q, cells_Q: int64 [Q], the islands that are asked and the cells they are asked of
        open_targets: integer [Q], 1 open, 0 closed, -100 does not count
        """
        asking = self.outer(torch.cat([z_BM, functional.gelu(self.inner(z_BM))], dim=1))
        rows = table_rows(self.table, islands_Q)
        logits = (at_least_fp32(rows) * at_least_fp32(asking)[cells_Q]).sum(-1) + self.bias[islands_Q]
        return open_loss(logits, open_targets)


def _level_loss(logits: Tensor, targets: Tensor) -> LossSum:
    loss = functional.cross_entropy(logits, targets, ignore_index=NOT_COUNTED, reduction="sum")
    return LossSum(loss, (targets != NOT_COUNTED).sum(), (logits.argmax(-1) == targets).sum())


def open_loss(logits: Tensor, targets: Tensor) -> LossSum:
    """Summed logistic loss of open (1) against closed (0); -100 does not count."""
    counted = targets != NOT_COUNTED
    logits, targets = logits[counted], targets[counted]
    loss = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return LossSum(loss, counted.sum(), ((logits > 0) == (targets > 0)).sum())


class HiddenVectorHead(nn.Module):
    """Pretraining, from a cell's vector: the vector of the islands that were hidden from it.

    That is what the pooled layer gave at the start, when it was an SVD of the training cells, less the mean cell:
    a fixed answer, so that the pooled layer cannot make the question easy. The guess is A z + b + B gelu(C z), which
    starts as z less the mean cell; the loss is 1 - cosine.
    """

    mean: Tensor

    def __init__(self, n_islands: int, pooled: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(pooled))
        self.answer = IslandPool(n_islands, 1, pooled, reads="none").requires_grad_(False)
        self.linear = nn.Linear(pooled, pooled)
        self.inner = nn.Linear(pooled, pooled)
        self.outer = nn.Linear(pooled, pooled, bias=False)

    @torch.no_grad()
    def start_from(self, pool: IslandPool, mean: Tensor) -> None:
        """Answers are those of ``pool`` as it is now. mean: [M], its mean vector of the training cells."""
        self.answer.idf.copy_(pool.idf)
        self.answer.table.copy_(pool.table)
        self.mean.copy_(mean)
        self.linear.weight.copy_(torch.eye(len(mean)))
        self.linear.bias.copy_(-mean)
        self.outer.weight.mul_(0.1)

    def forward(self, z_BM: Tensor, islands_S: Tensor, offsets: Tensor, sighted: Tensor) -> LossSum:
        """The loss summed over the cells that have hidden islands and are ``sighted``.

        z_BM: [B, M]; islands_S: int64 [S], hidden islands, flat; offsets: int64 [B + 1], of the cells in them
        sighted: bool [B], whether the cell has islands that were not hidden
        """
        counted = (sighted & (offsets.diff() > 0)).nonzero().squeeze(-1)
        answer = self.answer(None, torch.ones_like(islands_S), islands_S, offsets)[counted] - self.mean
        z = z_BM[counted]
        guess = at_least_fp32(self.linear(z) + self.outer(functional.gelu(self.inner(z))))
        cosine = functional.cosine_similarity(guess, at_least_fp32(answer), dim=1)
        return LossSum((1 - cosine).sum(), (counted >= 0).sum(), (cosine > WITHIN).sum())


class CellTypeHead(nn.Module):
    """A head that tells the type of each cell from its tokens.

    Subclasses give ``embed``, ``table_parameters`` and ``reading_parameters``, and set ``classifier``, linear in
    the embedding; what else goes into the logits they give as ``beside``.
    """

    classifier: nn.Linear
    reads_encoder = True
    """Whether the head looks at the encoder's states."""

    def __init__(self, n_islands: int, n_types: int) -> None:
        super().__init__()
        self.n_islands = n_islands
        self.n_types = n_types

    def forward(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """Logits [B, Y].

        hidden: [T, D], the encoder's states of all tokens; tokens, islands: int64 [T], islands strictly
        increasing within a cell; offsets: int64 [B + 1].
        """
        return self.logits_and_embedding(hidden, tokens, islands, offsets)[0]

    def logits_and_embedding(
        self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, Y], and the embedding [B, M] that they stand on; arguments as of ``forward``."""
        embedding = self.embed(hidden, tokens, islands, offsets)
        logits: Tensor = self.classifier(embedding)
        beside = self.beside(tokens, islands, offsets)
        return logits if beside is None else logits + beside, embedding

    def embed(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """The embedding of each cell."""
        raise NotImplementedError

    def beside(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor | None:
        """What the islands add to the logits on their own, [B, Y]; None where nothing does."""
        return None

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
        x = (self.expand(sum_rows(self.table, scalar_T, islands, offsets)) + self.bias).relu()
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
    """Linear logits on the pooled layer (``IslandPool``), whose arguments these are."""

    def __init__(
        self,
        n_islands: int,
        width: int,
        n_types: int,
        pooled: int = 64,
        island_dropout: float = 0.3,
        reads: str = "gate",
    ) -> None:
        super().__init__(n_islands, n_types)
        self.pool = IslandPool(n_islands, width, pooled, island_dropout, reads)
        self.reads_encoder = self.pool.reads_encoder
        self.classifier = nn.Linear(pooled, n_types)

    def embed(self, hidden: Tensor | None, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
        """z, [B, pooled]. ``hidden`` None leaves the encoder out; MASK tokens are left out too."""
        return self.of_pooled(self.pool(hidden, tokens, islands, offsets))

    def of_pooled(self, z: Tensor) -> Tensor:
        """The embedding, from z [B, pooled]."""
        return z

    @property
    def beside_table(self) -> Tensor | None:
        """B, [N, Y], whose rows at a cell's islands, weighted as the pooled layer weighs them, add to the logits."""
        return None

    def beside(self, tokens: Tensor, islands: Tensor, offsets: Tensor) -> Tensor | None:
        """What B adds."""
        if self.beside_table is None:
            return None
        weights, open_islands, open_offsets = self.pool.unit_rows(tokens, islands, offsets)
        return sum_rows(self.beside_table, weights, open_islands, open_offsets)

    def table_parameters(self) -> list[nn.Parameter]:
        """W, a row for each island."""
        return [self.pool.table]

    def reading_parameters(self) -> list[nn.Parameter]:
        """Gate and U."""
        return self.pool.reading_parameters()


class LinearHead(PooledHead):
    """Logits that are linear in the cell's vector and in its islands, and fitted in one go (``train.probe``).

    logits = A (z - c) / |z - c| + sum_i u_i B_i + b, with c the mean training cell, u binary x idf in rows of length 1.
    The embedding is the direction of z alone: B has numbers enough to know each training cell by heart.

    per_island: whether there is a B
    """

    centre: Tensor

    def __init__(
        self,
        n_islands: int,
        width: int,
        n_types: int,
        pooled: int = 64,
        reads: str = "gate",
        per_island: bool = True,
    ) -> None:
        super().__init__(n_islands, width, n_types, pooled, reads=reads, island_dropout=0.0)
        self.register_buffer("centre", torch.zeros(pooled))
        self.per_island = nn.Parameter(torch.zeros(n_islands, n_types)) if per_island else None

    def of_pooled(self, z: Tensor) -> Tensor:
        """Directions, [B, pooled]; zero for a cell that is the mean cell."""
        return functional.normalize(z - self.centre, dim=1)

    @property
    def beside_table(self) -> Tensor | None:
        """B."""
        return self.per_island

    @torch.no_grad()
    def take_over(self, centre: Tensor, weight: Tensor, bias: Tensor, per_island: Tensor | None) -> None:
        """Use what was fitted. centre: [pooled]; weight: [Y, pooled]; bias: [Y]; per_island: [N, Y]"""
        self.centre.copy_(centre)
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)
        if self.per_island is not None and per_island is not None:
            self.per_island.copy_(per_island)

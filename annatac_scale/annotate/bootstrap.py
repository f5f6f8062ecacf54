"""How far figures of labels are chance: bootstrap intervals, and a paired test of two sets of labels of the same cells.

All figures depend on the cells through counts alone: of each (truth, label), or (truth, label, other label). To draw n
cells with replacement and count them is to draw the counts from a multinomial, so that is drawn: the distribution is
the same, and a draw costs what there are combinations, not cells.

Cells are drawn whatever their type, as another sample of n cells would hold other numbers of each type; for the macro
F1, which weighs all types alike, within each true type. Else the types that a draw does not hold would leave its mean,
mostly the rarest, so that draws would be of another figure, as a rule a better one, than the one that is told. An
interval speaks of other cells of the same donors, not of other donors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from scipy.stats import binomtest

from annatac_scale.annotate.metrics import HEADLINES, Evaluation, figures_of_counts
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.labels import label_texts

DRAWS = 1000
LEVEL = 0.95
SEED = 0

_AT_ONCE = 4 << 20
"""Counts that are drawn in one go: 32 MiB of them."""

_WITHIN_TYPES = ("macro_f1",)
"""Figures of which cells are drawn within each true type."""

Ints = NDArray[np.int64]
Texts = NDArray[np.object_]
Figures = dict[str, NDArray[np.float64]]


class Interval(NamedTuple):
    """Two ends; both NaN where the figure is not defined."""

    low: float
    high: float

    def to_json(self) -> list[float] | None:
        """[low, high], None where it is not defined."""
        return None if math.isnan(self.low) else [self.low, self.high]


def share_interval(n_hits: int, n: int) -> Interval:
    """Exact 95% interval of a share, n_hits of n (Clopper and Pearson 1934)."""
    ends = binomtest(n_hits, n).proportion_ci(LEVEL, method="exact")
    return Interval(float(ends.low), float(ends.high))


def bootstrap_intervals(
    evaluation: Evaluation, n_draws: int = DRAWS, seed: int = SEED
) -> dict[str, Interval]:
    """95% percentile intervals of the HEADLINES of an evaluation, by name.

    n_draws: samples of its cells, drawn with replacement. Draws in which kappa is not defined count for no kappa.
    Raises ConfigError for less than one draw. A figure without errors gets an interval of no width: see
    ``share_interval`` for what so many cells can show.
    """
    counts = evaluation.confusion.to_numpy()
    n_types = len(counts)
    truth, label = counts.nonzero()
    (drawn,) = _drawn([_Sums(truth, label, n_types)], truth, counts[truth, label], n_draws, seed)
    return {name: percentiles(drawn[name]) for name in HEADLINES}


@dataclass(frozen=True)
class Difference:
    """A figure of two sets of labels: first less second.

    interval: of the difference, 95% percentiles of the paired bootstrap
    p: two-sided: twice the share of draws on the other side of 0, or at it; at least 2 / (draws + 1)
    """

    first: float
    second: float
    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class PairedTest:
    """Two sets of labels of the same cells.

    n_only_first, n_only_second: cells that one alone labels right
    p_mcnemar: McNemar's exact test of these two numbers: whether both sets are right equally often
    """

    n_cells: int
    accuracy: Difference
    macro_f1: Difference
    n_only_first: int
    n_only_second: int
    p_mcnemar: float
    n_draws: int

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        values = asdict(self)
        for name in ("accuracy", "macro_f1"):
            values[name]["interval"] = list(values[name]["interval"])
        return values


def compare_labels(
    truth: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    n_draws: int = DRAWS,
    seed: int = SEED,
    n_cells: Ints | None = None,
) -> PairedTest:
    """Compare two sets of labels of the same cells, each cell drawn together with both its labels.

    Cells are drawn whatever their type for accuracy, within each true type for macro F1.

    truth, first, second: labels [n], as for ``evaluate_labels``; cells without a truth are left out
    n_cells: cells that each row stands for, int64 [n]; None: one each

    Raises InputError if the lengths differ, no cell has a truth or a label is missing, ConfigError for less than one
    draw.
    """
    texts = [label_texts(labels) for labels in (truth, first, second)]
    if len({len(text) for text in texts}) > 1:
        raise InputError(
            f"paired test: found {', '.join(f'{len(text):,}' for text in texts)} true, first and second labels; "
            "expected one of each a cell; join the tables by barcode first"
        )
    known = texts[0] != ""
    n = (np.ones(len(known), np.int64) if n_cells is None else n_cells)[known]
    texts = [text[known] for text in texts]
    n_blank = sum(int(n[text == ""].sum()) for text in texts)
    if n_blank or not len(texts[0]):
        raise InputError(
            f"paired test: found {n_blank:,} missing labels of {n.sum():,} cells with a truth; expected two "
            "labels of each of some cells; leave out cells without one"
        )
    number_of = {name: i for i, name in enumerate(sorted(set(texts[0])))}
    n_types = len(number_of)
    # A label that no cell truly has is never right, whatever it is.
    codes = pd.DataFrame([[number_of.get(label, n_types) for label in text] for text in texts]).T
    combinations = (
        pd.Series(n).groupby([codes[i] for i in codes]).sum()
    )  # sorted, whatever the order of the cells
    truths, *labels = combinations.index.to_frame().to_numpy().T
    return _paired(truths, labels, combinations.to_numpy(), n_types, n_draws, seed)


def _paired(
    truth: Ints, labels: list[Ints], n_cells: Ints, n_types: int, n_draws: int, seed: int
) -> PairedTest:
    """The test, of combinations of truth and both labels, with the cells of each."""
    sums = [_Sums(truth, label, n_types) for label in labels]
    found = [one.figures(n_cells[None]) for one in sums]
    first, second = _drawn(sums, truth, n_cells, n_draws, seed)
    right = [label == truth for label in labels]
    only = [int(n_cells[right[i] & ~right[1 - i]].sum()) for i in (0, 1)]
    differences = {
        name: _difference(float(found[0][name][0]), float(found[1][name][0]), first[name] - second[name])
        for name in ("accuracy", "macro_f1")
    }
    return PairedTest(
        n_cells=int(n_cells.sum()),
        **differences,
        n_only_first=only[0],
        n_only_second=only[1],
        p_mcnemar=float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0,
        n_draws=n_draws,
    )


def _difference(first: float, second: float, drawn: NDArray[np.float64]) -> Difference:
    # One more draw that goes against it: no p of 0 from finitely many (Davison and Hinkley 1997, 4.2).
    tails = [1 + int((drawn <= 0).sum()), 1 + int((drawn >= 0).sum())]
    p = min(1.0, 2 * min(tails) / (len(drawn) + 1))
    return Difference(first, second, first - second, percentiles(drawn), p)


class _Sums:
    """What figures need, as sums over combinations of truth and label; codes from n_types on are no true type's."""

    def __init__(self, truth: Ints, label: Ints, n_types: int) -> None:
        self._of_truth = _indicator(truth, n_types)
        self._of_label = _indicator(label, n_types)
        self._of_right = _indicator(np.where(truth == label, truth, n_types), n_types)

    def figures(self, samples: Ints) -> Figures:
        """Figures of each sample; samples: cells of each combination, [samples, combinations]."""
        n_cells = samples.sum(axis=1)
        right, n_true, n_predicted = (
            samples @ indicator for indicator in (self._of_right, self._of_truth, self._of_label)
        )
        return figures_of_counts(right, n_true, n_predicted, n_cells)


def _indicator(codes: Ints, n_types: int) -> csr_matrix:
    """1 where a combination is of a type, [combinations, types]."""
    rows = np.flatnonzero(codes < n_types)
    ones = np.ones(len(rows), np.int64)
    return csr_matrix((ones, (rows, codes[rows])), shape=(len(codes), n_types))


def _drawn(sums: Sequence[_Sums], truth: Ints, n_cells: Ints, n_draws: int, seed: int) -> list[Figures]:
    """Figures of each set of labels in each draw, float64 [draws], the same draws for all sets.

    truth, n_cells: true type and cells of each combination
    """
    found: list[Figures] = [{} for _ in sums]
    others = tuple(name for name in HEADLINES if name not in _WITHIN_TYPES)
    for names, strata in ((_WITHIN_TYPES, truth), (others, np.zeros_like(truth))):
        parts = [
            [one.figures(samples) for one in sums] for samples in _samples(n_cells, strata, n_draws, seed)
        ]
        for figures, own in zip(found, zip(*parts, strict=True), strict=True):
            figures |= {name: np.concatenate([part[name] for part in own]) for name in names}
    return found


def _samples(n_cells: Ints, strata: Ints, n_draws: int, seed: int) -> Iterator[Ints]:
    """Samples of as many cells as there are in each stratum, [some, combinations] at a time.

    strata: that of each combination; each has random numbers of its own, so that it does not matter how many samples
    are drawn at a time
    """
    if n_draws < 1:
        raise ConfigError(f"bootstrap: found {n_draws} draws; expected at least 1; 1000 are usual")
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    generators = [rng, *rng.spawn(len(members) - 1)]
    at_once = max(1, _AT_ONCE // len(n_cells))
    for start in range(0, n_draws, at_once):
        samples = np.empty((min(at_once, n_draws - start), len(n_cells)), np.int64)
        for own, generator in zip(members, generators, strict=True):
            total = int(n_cells[own].sum())
            samples[:, own] = generator.multinomial(total, n_cells[own] / total, size=len(samples))
        yield samples


def figures_of_drawn_groups(
    groups: Texts,
    truth: Texts,
    labels: Sequence[Texts],
    n_draws: int,
    seed: int = SEED,
    n_cells: Ints | None = None,
) -> list[Figures]:
    """Figures of each set of labels in each draw of whole groups, as many as there are, float64 [draws].

    groups, truth: str [n]; labels: str [n] each; n_cells: cells that each row stands for, int64 [n]; None: one each
    Which groups are drawn together depends on the order in which they first come. Macro F1 is over the types that the
    drawn groups have.
    """
    types = pd.Index(sorted(set(truth)))
    codes = [types.get_indexer(pd.Index(text)) for text in (truth, *labels)]
    codes = [np.where(code < 0, len(types), code) for code in codes]
    table = pd.DataFrame([pd.factorize(groups)[0], *codes]).T
    combinations, place = np.unique(table.to_numpy()[:, 1:], axis=0, return_inverse=True)
    n_groups = int(table[0].max()) + 1
    counts = np.zeros((n_groups, len(combinations)), np.int64)
    np.add.at(counts, (table[0].to_numpy(), place.ravel()), 1 if n_cells is None else n_cells)
    sums = [_Sums(combinations[:, 0], label, len(types)) for label in combinations.T[1:]]
    rng = np.random.default_rng(seed)
    found: list[list[Figures]] = [[] for _ in sums]
    at_once = max(1, _AT_ONCE // len(combinations))
    for start in range(0, n_draws, at_once):
        turns = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), min(at_once, n_draws - start))
        samples = turns @ counts
        for one, parts in zip(sums, found, strict=True):
            parts.append(one.figures(samples))
    return [{name: np.concatenate([part[name] for part in parts]) for name in HEADLINES} for parts in found]


def percentiles(drawn: NDArray[np.float64]) -> Interval:
    """The 95% interval of draws, those that are not defined left out."""
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))

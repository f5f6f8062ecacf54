"""Cells to evaluate, counted: what figures need of any number of cells, of which but novelty scores are kept."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.annotate.given_labels import Ints, Texts
from annatac_scale.annotate.label_sources import Labels
from annatac_scale.annotate.labels import Manifest
from annatac_scale.annotate.reliability import (
    Calibration,
    ConfidenceSums,
    Coverage,
    NoveltyFigures,
    novelty_figures,
)
from annatac_scale.model.labels import label_texts

COLUMNS = ("truth", "label", "best", "lineage", "other", "group")


class CellCounts:
    """Cells by what is said of them, and the sums that confidences and prediction sets are judged by.

    Of a cell that the model can be told to know or not to know, 5 bytes are kept, its novelty score and which it is;
    of all others nothing. A row of the table, a combination of COLUMNS that occurs, takes some 200 bytes.
    """

    def __init__(self, manifest: Manifest | None) -> None:
        """manifest: of the labels that ``predict`` wrote, None for those that it did not."""
        self._n_of: dict[tuple[str, ...], int] = {}
        self._predicted = None if manifest is None else _PredictedCounts(manifest)

    def add(self, labels: Labels, truth: Texts, others: Texts | None, groups: Texts | None) -> None:
        """Add cells. truth, others, groups: object [n]: their true types, other labels and groups"""
        nothing, rows = np.full(len(labels), "", object), labels.rows
        best = nothing if rows is None else label_texts(rows.best)
        lineage = nothing if rows is None or rows.lineage is None else label_texts(rows.lineage)
        others, groups = (nothing if one is None else one for one in (others, groups))
        for texts, n in _combinations([truth, labels.cells.label, best, lineage, others, groups]):
            self._n_of[texts] = self._n_of.get(texts, 0) + n
        if self._predicted is not None:
            self._predicted.add(labels, truth)

    def table(self) -> pd.DataFrame:
        """COLUMNS, text, and n, int64, the cells of each combination; in the order in which they first came."""
        columns = list(zip(*self._n_of, strict=True)) or [()] * len(COLUMNS)
        texts = {name: np.array(column, object) for name, column in zip(COLUMNS, columns, strict=True)}
        return pd.DataFrame({**texts, "n": np.array(list(self._n_of.values()), np.int64)})

    @property
    def calibration(self) -> Calibration | None:
        """Of the cells whose type the model knows; None without any."""
        counts = self._predicted
        return None if counts is None or not len(counts.sums) else counts.sums.calibration()

    @property
    def coverage(self) -> Coverage | None:
        """Of the prediction sets of cells whose type the model knows; None where there are none."""
        return None if self._predicted is None else self._predicted.coverage

    @property
    def novelty(self) -> NoveltyFigures | None:
        """How well the novelty score tells the cells of unknown types; None where all or none are."""
        return None if self._predicted is None else self._predicted.novelty


def _combinations(columns: list[Texts]) -> list[tuple[tuple[str, ...], int]]:
    """The combinations of texts that occur, and how often, in the order in which they first come."""
    key: Ints = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        codes, found = pd.factorize(column)
        key = pd.factorize(key * len(found) + codes)[0]
    first = np.flatnonzero(~pd.Index(key).duplicated())
    texts = zip(*(column[first].tolist() for column in columns), strict=True)
    return list(zip(texts, np.bincount(key).tolist(), strict=True))


class _PredictedCounts:
    """Of what ``predict`` wrote."""

    def __init__(self, manifest: Manifest) -> None:
        self._classes = manifest.classes
        self.sums = ConfidenceSums()
        # Of a cell whose true type lies above types of the model nobody can say whether its own is one of them.
        hierarchy = manifest.hierarchy
        self._above = set() if hierarchy is None else {*hierarchy.nodes} - {*manifest.classes}
        self._sets: NDArray[np.int64] | None = np.zeros(4, np.int64)
        self._scores: list[NDArray[np.float32]] = []
        self._novel: list[NDArray[np.bool_]] = []

    def add(self, labels: Labels, truth: Texts) -> None:
        rows = labels.rows
        assert rows is not None
        types = pd.Index(truth, dtype=object)
        codes = pd.Index(self._classes, dtype=object).get_indexer(types)
        known = codes >= 0
        right = np.asarray(rows.best, object) == truth
        self.sums.add(rows.confidence[known], right[known])
        is_told = (truth != "") & ~types.isin(self._above)
        self._scores.append(rows.novelty_score[is_told])
        self._novel.append(~known[is_told])
        if not known.any():
            return
        if rows.sets is None:  # all or none, as the model has calib cells or not
            self._sets = None
        elif self._sets is not None:
            sets, code = rows.sets[known], codes[known]
            sizes = np.bitwise_count(sets).sum(axis=1)
            covered = (sets[np.arange(len(sets)), code // 8] >> (code % 8)) & 1
            counts = len(sets), covered.sum(), sizes.sum(), (sizes == 0).sum()
            self._sets += np.array(counts, np.int64)

    @property
    def coverage(self) -> Coverage | None:
        if self._sets is None or not self._sets[0]:
            return None
        return Coverage.of_counts(*self._sets.tolist())

    @property
    def novelty(self) -> NoveltyFigures | None:
        scores, novel = np.concatenate(self._scores), np.concatenate(self._novel)
        if not novel.any() or novel.all():
            return None
        return novelty_figures(scores, novel)

"""How good labels are: joined to the true types, on the cells that fine-tuning held out where that is known."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from annatac_scale.annotate.bootstrap import bootstrap_intervals, compare_labels
from annatac_scale.annotate.by_group import ByGroup
from annatac_scale.annotate.cell_counts import CellCounts
from annatac_scale.annotate.evaluation_report import Against, EvaluationReport
from annatac_scale.annotate.given_labels import (
    CellLabels,
    Texts,
    file_labels,
    sample_labels,
    store_labels,
)
from annatac_scale.annotate.hierarchy_metrics import lineage_figures
from annatac_scale.annotate.joined_labels import Meeting, joined_labels
from annatac_scale.annotate.label_sources import NO_SPLIT, LabelSource, opened_labels
from annatac_scale.annotate.labels import Manifest
from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.errors import InputError
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.store.columns import check_columns
from annatac_scale.store.place import Location, location_of
from annatac_scale.store.store import IslandStore
from annatac_scale.train.label_map import LabelMap
from annatac_scale.train.splits import SPLITS

CELLS = ("test", "all")


def evaluate(
    labels: Location,
    store: IslandStore | Location | None,
    truth: str,
    *,
    cells: str | None = None,
    labels_column: str | None = None,
    truth_file: Location | None = None,
    against: Location | None = None,
    against_column: str | None = None,
    label_map: Location | None = None,
    group: str | None = None,
) -> EvaluationReport:
    """Compare labels with the true types of their cells, and, if asked to, with other labels of the same cells.

    labels, against: what ``predict`` wrote, all of it or the parts that are there; a CSV, TSV, Parquet or h5ad file of
        any tool; or a store
    labels_column, against_column: the column with the labels, of obs in an h5ad file or a store; None for ``label`` of
        what ``predict`` wrote
    truth: obs column of the store, or a column of ``truth_file`` in its place
    cells: "test", those that fine-tuning held out, or "all"; None for "test" where ``predict`` wrote any of the
        labels. Other labels beside them are then evaluated on the same cells.
    label_map: a table on a disk that the truth goes through first, as in fine-tuning; labels that it names and no
        evaluated cell has are told, and refused where it names no label of any cell of the truth
    group: a column beside ``truth``, as of the donor: figures of each group, and intervals over groups

    Cells are joined by sample and barcode, or by barcode alone where one side names no samples. Those that one side
    does not have, or has no label of, are left out and counted.

    What ``predict`` wrote is compared with a store sample by sample: memory is that of the largest sample, some 500
    bytes a cell of it, and 5 bytes a cell that is evaluated, about 75 while the figures of novelty scores are made.
    Labels or truths of a file, and other labels of a store, are held as a whole: some 500 bytes a cell.

    Raises InputError where no part of predict's labels is there, no cell was held out, a cell of predict's is not in
    the store, it is not clear which cell is which, no cell is in both, or none has a truth.
    """
    if cells not in (None, *CELLS):
        raise InputError(f"--cells: found {cells!r}, expected {' or '.join(CELLS)}")
    mapping = None if label_map is None else LabelMap.read(label_map)
    true = _Truth.open(store, truth, truth_file, group)
    first = opened_labels(labels, labels_column, "--labels-column")
    second = None if against is None else opened_labels(against, against_column, "--against-column")
    cells = _which(cells, first, second)
    found = _Found(first, second, true, mapping)
    for sample in _samples(first, second, true):
        found.add(sample, cells)
    found.check(cells)
    counts = found.counts.table()
    labelled = counts[counts["label"] != ""]
    return EvaluationReport(
        labels=location_of(first.place) if first.manifest else first.place,
        truth=truth,
        truth_file=None if truth_file is None else str(truth_file),
        cells=cells,
        n_missing=first.n_missing,
        left_out=found.meeting.left_out,
        label_map=mapping,
        unused_labels=() if mapping is None else tuple(mapping.unknown(_array(found.evaluated))),
        n_by_split=found.n_by_split,
        n_trained_on=found.n_trained_on,
        **_figures(labelled),
        **({} if first.manifest is None else _predicted(first.manifest, counts, found.counts)),
        against=None if second is None else _against(second, labelled),
        by_group=None if group is None else _by_group(group, labelled, second is not None),
    )


@dataclass(frozen=True, eq=False)
class _Truth:
    """Where the true types lie: in a store, or in a file, which is read for all samples at once."""

    column: str
    group: str | None
    store: IslandStore | None = None
    file: Location | None = None

    @classmethod
    def open(
        cls, store: IslandStore | Location | None, column: str, file: Location | None, group: str | None
    ) -> "_Truth":
        if (store is None) == (file is None):
            found = "neither a store nor a file" if store is None else f"both a store and {file}"
            raise InputError(
                f"--truth {column}: found {found} to read it from; expected one; give --store or --truth-file"
            )
        if store is None:
            return cls(column, group, file=file)
        store = store if isinstance(store, IslandStore) else IslandStore.open(store)
        check_columns(store, [column] if group is None else [column, group])
        return cls(column, group, store)

    @property
    def place(self) -> str:
        """For messages."""
        return str(self.file if self.store is None else self.store.path)

    def read(self, sample: str | None) -> tuple[CellLabels, Texts | None]:
        """The true types of all cells or of one sample's, and their groups."""
        columns = [self.column] if self.group is None else [self.column, self.group]
        if self.store is None:
            assert self.file is not None
            found = [file_labels(self.file, column) for column in columns]
        elif sample is None:
            found = [store_labels(self.store, column) for column in columns]
        else:
            found = sample_labels(self.store, sample, columns)
        return found[0], None if self.group is None else found[1].label


def _samples(first: LabelSource, second: LabelSource | None, true: _Truth) -> Sequence[str | None]:
    """The samples to join one after the other, in the order of the first labels; [None] for all at once."""
    sources = [source for source in (first, second) if source is not None]
    named = [list(source.manifest.samples) for source in sources if source.manifest is not None]
    if true.store is None or len(named) < len(sources):
        return [None]
    return list(dict.fromkeys([*itertools.chain(*named), *true.store.samples]))


class _Found:
    """What is found of the cells, sample by sample."""

    def __init__(
        self, first: LabelSource, second: LabelSource | None, true: _Truth, mapping: LabelMap | None
    ) -> None:
        self._first, self._second, self._true, self._mapping = first, second, true, mapping
        self.meeting = Meeting(first, second, true.place)
        self.counts = CellCounts(first.manifest)
        self.n_trained_on = 0
        self.evaluated: set[str] = set()
        """True labels of cells that are evaluated, before the label map."""
        self._labels: set[str] = set()
        self._n_by_split: tuple[Counter[str], Counter[str]] = Counter(), Counter()

    def add(self, sample: str | None, cells: str) -> None:
        """Join the cells of a sample, or with None all, and count those to evaluate."""
        given, groups = self._true.read(sample)
        first = self._first.read(sample)
        second = None if self._second is None else self._second.read(sample)
        true = given if self._mapping is None else replace(given, label=self._mapping.applied(given.label))
        for n_of, labels in zip(self._n_by_split, (first, second), strict=True):
            n_of.update({} if labels is None else labels.n_by_split)
        joined = joined_labels(first, second, true, cells)
        self.meeting.add(first, second, true, joined)
        chosen, true_types = first.take(joined.rows), true.label[joined.true]
        labelled = chosen.cells.label != ""
        if self._mapping is not None:
            self._labels.update(given.label)
            self.evaluated.update(given.label[joined.true][labelled])
        other = None if second is None else second.take(joined.other)
        trained = chosen.trained if other is None else chosen.trained | other.trained
        self.n_trained_on += int((trained & labelled & (true_types != "")).sum())
        self.counts.add(
            chosen,
            true_types,
            None if other is None else other.cells.label,
            None if groups is None else groups[joined.true],
        )

    @property
    def n_by_split(self) -> dict[str, int]:
        """All cells, of the labels that say which were held out."""
        sources = [source for source in (self._first, self._second) if source is not None]
        told = [i for i, source in enumerate(sources) if source.manifest is not None]
        n_of = self._n_by_split[(told or [0])[0]]
        return {name: n_of[name] for name in (*SPLITS, NO_SPLIT) if n_of[name]}

    def check(self, cells: str) -> None:
        """Raise InputError where there is nothing to evaluate, or the label map names no label of any cell.

        Cells to evaluate may have none of its labels: fine-tuning holds out no cell whose label the map drops.
        """
        mapping = self._mapping
        if mapping is not None and not self._labels.intersection(mapping.to):
            mapping.check(self._true.column, _array(self._labels))
        n_test = [n_of["test"] for n_of in self._n_by_split]
        self.meeting.check(cells, n_test, self._true.store is not None)


def _array(texts: set[str]) -> Texts:
    return np.array(sorted(texts), object)


def _which(cells: str | None, first: LabelSource, second: LabelSource | None) -> str:
    """Which cells to evaluate. Raises InputError where it cannot be known which were held out."""
    predicted = [one for one in (first, second) if one is not None and one.manifest is not None]
    if cells == "test" and not predicted:
        raise InputError(
            f"--cells test: found labels of {first.place}, which does not say which cells were held out; "
            "expected labels of `annatac predict`, here or as --against; leave --cells out, or give a file of held-out "
            "cells alone"
        )
    return cells or ("test" if predicted else "all")


def _figures(counts: pd.DataFrame) -> dict[str, Any]:
    """The fields of a report that are figures of the first labels. counts: as of CellCounts, of cells with one"""
    true_types, label, n = (counts[name].to_numpy() for name in ("truth", "label", "n"))
    known = true_types != ""
    assigned = label != LOW_DEPTH
    n_low_depth = int(n[known & ~assigned].sum())
    is_some = n_low_depth and (known & assigned).any()
    return {
        "evaluation": evaluate_labels(true_types, label, n),
        "n_novel": int(n[known & (label == NOVEL)].sum()),
        "n_low_depth": n_low_depth,
        "assigned": evaluate_labels(true_types[assigned], label[assigned], n[assigned]) if is_some else None,
    }


def _against(second: LabelSource, counts: pd.DataFrame) -> Against:
    """Figures of the other labels of the same cells, and the paired test."""
    truth, label, other, n = (counts[name].to_numpy() for name in ("truth", "label", "other", "n"))
    found = evaluate_labels(truth, other, n)
    test = compare_labels(truth, label, other, n_cells=n)
    return Against(second.place, found, bootstrap_intervals(found), test, second.n_missing)


def _by_group(column: str, counts: pd.DataFrame, has_others: bool) -> ByGroup:
    """Figures of each group, of the cells with a truth."""
    known = counts[counts["truth"] != ""]
    groups, truth, label, other, n = (
        known[name].to_numpy() for name in ("group", "truth", "label", "other", "n")
    )
    return ByGroup.of(column, groups, truth, label, other if has_others else None, n)


def _predicted(manifest: Manifest, counts: pd.DataFrame, cells: CellCounts) -> dict[str, Any]:
    """The fields that are of what predict wrote, of cells with and without a label in the column that is evaluated."""
    truth, found, lineage, n = (counts[name].to_numpy() for name in ("truth", "best", "lineage", "n"))
    classes, hierarchy = manifest.classes, manifest.hierarchy
    best = evaluate_labels(truth, found, n)
    above = set() if hierarchy is None else {*hierarchy.nodes} - {*classes}
    beyond = {
        str(row.cell_type): int(row.n) for row in best.per_type.itertuples() if row.cell_type not in classes
    }
    return {
        "model": manifest.model,
        "rule": manifest.rule,
        "best": best,
        "calibration": cells.calibration,
        "unknown_types": {name: n for name, n in beyond.items() if name not in above},
        "types_above": {name: n for name, n in beyond.items() if name in above},
        "novelty": cells.novelty,
        "coverage": cells.coverage,
        "lineage": None if hierarchy is None else lineage_figures(hierarchy, truth, found, lineage, n),
    }

"""Labels to evaluate, opened wherever they lie, and read all at once or sample by sample, small in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from annatac_scale.annotate.given_labels import CellLabels, Ints, given_labels
from annatac_scale.annotate.labels import LabelsFolder, Manifest, Part
from annatac_scale.errors import InputError
from annatac_scale.model.labels import label_texts
from annatac_scale.store.place import Location
from annatac_scale.train.splits import SPLITS

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

NO_SPLIT = "none"
"""Stands for the split of a cell that was not in the fine-tuning."""

_READ = ("sample", "barcode", "best", "confidence", "split", "set", "novelty_score")


@dataclass(frozen=True, eq=False)
class PredictedRows:
    """What ``predict`` wrote of some cells: 11 to 24 bytes a cell, and a bit for each type of the model.

    best, split: text, split NO_SPLIT where a cell has none; lineage: the same, None where the model has no hierarchy
    confidence, novelty_score: float32 [n]
    sets: uint8 [n, types / 8], a bit for each type that is in the cell's set; None where cells have no sets
    """

    best: pd.Categorical
    split: pd.Categorical
    confidence: Floats
    novelty_score: Floats
    sets: NDArray[np.uint8] | None
    lineage: pd.Categorical | None

    def take(self, rows: Ints | Bools) -> "PredictedRows":
        """Some of the cells."""
        return PredictedRows(
            self.best[rows],
            self.split[rows],
            self.confidence[rows],
            self.novelty_score[rows],
            None if self.sets is None else self.sets[rows],
            None if self.lineage is None else self.lineage[rows],
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of some cells. rows: what else ``predict`` wrote of them, None for labels that it did not write."""

    cells: CellLabels
    rows: PredictedRows | None = None

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def n_by_split(self) -> dict[str, int]:
        """The cells by split."""
        if self.rows is None:
            return {NO_SPLIT: len(self)}
        n_of = self.rows.split.value_counts()
        return {name: int(n_of.get(name, 0)) for name in (*SPLITS, NO_SPLIT)}

    @property
    def trained(self) -> Bools:
        """Which cells fine-tuning used; none of what predict did not write."""
        if self.rows is None:
            return np.zeros(len(self), np.bool_)
        return self.rows.split.isin(SPLITS[:-1])

    def take(self, rows: Ints | Bools) -> "Labels":
        """Some of the cells."""
        own = None if self.rows is None else self.rows.take(rows)
        return replace(self, cells=self.cells.take(rows), rows=own)


@dataclass(frozen=True, eq=False)
class LabelSource:
    """Labels of a place: those of a file or a store, which are in memory, or a data set of ``predict``.

    parts: of the data set, that are there; n_missing: cells of the others; column: with the labels
    """

    place: str
    given: CellLabels | None = None
    folder: LabelsFolder | None = None
    column: str = "label"
    parts: tuple[Part, ...] = ()
    n_missing: int = 0

    @property
    def manifest(self) -> Manifest | None:
        """Of what ``predict`` wrote."""
        return None if self.folder is None else self.folder.manifest

    def read(self, sample: str | None = None) -> Labels:
        """All labels, or of a data set those of one sample, none where it has no such sample.

        Raises InputError where a part is damaged.
        """
        if self.folder is None:
            assert self.given is not None
            return Labels(self.given)
        parts = [part for part in self.parts if sample in (None, part.sample)]
        return _read(self.folder, parts, self.column)


def opened_labels(location: Location, column: str | None, option: str) -> LabelSource:
    """The labels at a location; parts of a data set that are not there are left out.

    option: what names the column. Raises InputError where there is nothing to read, or no such column.
    """
    given = given_labels(location, column, option)
    if given is not None:
        return LabelSource(given.place, given)
    folder = LabelsFolder.open(location)
    column = column or "label"
    if column not in folder.manifest.columns:
        raise InputError(
            f"{folder.location}: found no column {column!r}; expected {option} to be one of "
            f"{', '.join(folder.manifest.columns)}"
        )
    there, n_missing = folder.there()
    return LabelSource(
        str(folder.location), folder=folder, column=column, parts=tuple(there), n_missing=n_missing
    )


def _read(folder: LabelsFolder, parts: Sequence[Part], column: str) -> Labels:
    """The rows of some parts, of the columns that figures are made of, each text once."""
    classes = folder.manifest.classes
    lineage = [] if folder.manifest.parents is None else ["lineage"]
    columns = list(dict.fromkeys([*_READ, column, *lineage]))
    if not parts:
        return _no_labels(folder, bool(lineage))
    tables: list[pa.Table] = []
    sets: list[NDArray[np.uint8]] = []
    has_sets = True
    for _, found in folder.read_all(parts, columns):
        has_sets = has_sets and not found["set"].null_count
        if has_sets:
            sets.append(_set_bits(found["set"], classes))
        tables.append(_texts_once(found.drop_columns("set")))
    table = pa.concat_tables(tables).unify_dictionaries()
    rows = PredictedRows(
        best=_categorical(table["best"]),
        split=_categorical(table["split"]),
        confidence=table["confidence"].to_numpy(),
        novelty_score=table["novelty_score"].to_numpy(),
        sets=np.concatenate(sets) if has_sets else None,
        lineage=_categorical(table["lineage"]) if lineage else None,
    )
    cells = CellLabels(
        str(folder.location),
        pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in table["barcode"].chunks]),
        label_texts(table[column].to_pandas()),
        np.asarray(_categorical(table["sample"]), object),
    )
    return Labels(cells, rows)


def _no_labels(folder: LabelsFolder, has_lineage: bool) -> Labels:
    nothing, texts, floats = np.empty(0, object), pd.Categorical([]), np.empty(0, np.float32)
    rows = PredictedRows(texts, texts, floats, floats, None, texts if has_lineage else None)
    return Labels(CellLabels(str(folder.location), nothing, nothing, nothing), rows)


def _texts_once(table: pa.Table) -> pa.Table:
    """Text but for barcodes as a code each, over a dictionary."""
    for place, field in enumerate(table.schema):
        if field.type == pa.string() and field.name != "barcode":
            texts = table.column(place)
            if field.name == "split":
                texts = pc.fill_null(texts, NO_SPLIT)
            table = table.set_column(place, field.name, texts.dictionary_encode())
    return table


def _categorical(texts: pa.ChunkedArray) -> pd.Categorical:
    found = texts.to_pandas().array
    assert isinstance(found, pd.Categorical)
    return found


def _set_bits(sets: pa.ChunkedArray, classes: tuple[str, ...]) -> NDArray[np.uint8]:
    """uint8 [n, types / 8]: a bit for each type of a set."""
    members = np.zeros((len(sets), len(classes)), np.bool_)
    sizes = pc.list_value_length(sets).to_numpy()
    codes = pc.index_in(pc.list_flatten(sets), pa.array(list(classes))).fill_null(-1).to_numpy()
    members[np.repeat(np.arange(len(sets)), sizes), codes] = True
    return np.packbits(members, axis=1, bitorder="little")

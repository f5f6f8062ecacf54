"""Labels of cells from wherever they lie, and which cells of two such tables are the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.ingest.label_column import is_label_file, read_label_column
from annatac_scale.model.labels import label_text, label_texts
from annatac_scale.store.columns import sample_columns
from annatac_scale.store.place import Location, is_url, place_of
from annatac_scale.store.store import IslandStore

Texts = NDArray[np.object_]
Ints = NDArray[np.int64]

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class CellLabels:
    """A label of each of some cells, in memory that is small a cell: its barcode and 24 bytes.

    Barcodes are given as texts, object [n], or as Arrow's; each label and each sample is one text, of all cells that
    have it.

    place: where they are from; label: "" where one is missing; sample: None where the place names no samples
    each_once: whether it is known that no cell comes twice, as in a store
    """

    place: str
    barcode: pa.LargeStringArray
    label: Texts
    sample: Texts | None = None
    each_once: bool = False

    def __post_init__(self) -> None:
        # Of Python's texts each takes 50 bytes besides.
        is_text = not isinstance(self.barcode, pa.Array)
        barcode = pa.array(self.barcode, pa.large_string()) if is_text else self.barcode
        object.__setattr__(self, "barcode", barcode.cast(pa.large_string()))

    def __len__(self) -> int:
        return len(self.barcode)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "CellLabels":
        """Some of the cells."""
        sample = None if self.sample is None else self.sample[rows]
        barcode = self.barcode.take(pa.array(np.arange(len(self))[rows]))
        return CellLabels(self.place, barcode, self.label[rows], sample)

    def some(self) -> str:
        """Its first cells, for messages."""
        return ", ".join(self.name_of(row) for row in range(min(_SHOWN, len(self)))) or "none"

    def name_of(self, row: int) -> str:
        """A cell in words."""
        of = "" if self.sample is None else f" of sample {self.sample[row]!r}"
        return f"{self.barcode[row].as_py()!r}{of}"


def is_store(location: Location) -> bool:
    """Whether a location is an island store."""
    return place_of(location).size("zarr.json") is not None


def given_labels(location: Location, column: str | None, option: str) -> CellLabels | None:
    """Labels that are a column of a file or of a store's obs; None for what is neither, as a folder of predict's.

    option: what names the column. Raises InputError where no column is named.
    """
    is_file = is_label_file(location)
    if not is_file and ((is_url(location) and column is None) or not is_store(location)):
        return None
    if column is None:
        what = "file" if is_file else "store"
        raise InputError(
            f"{location}: found a {what} and no column of it; expected {option} COLUMN, which holds the labels; name it"
        )
    return file_labels(location, column) if is_file else store_labels(IslandStore.open(location), column)


def file_labels(location: Location, column: str) -> CellLabels:
    """A column of a file, as ``ingest.label_column`` reads it."""
    table = read_label_column(location, column)
    sample = _one_text_each(table["sample"]) if "sample" in table else None
    return CellLabels(str(location), table["barcode"].to_numpy(object), label_texts(table["label"]), sample)


def store_labels(store: IslandStore, column: str) -> CellLabels:
    """An obs column of a store."""
    obs = store.obs([column])
    barcode, sample = obs["barcode"].to_numpy(object), _one_text_each(obs["sample"])
    return CellLabels(str(store.path), barcode, label_texts(obs[column]), sample)


def sample_labels(store: IslandStore, sample: str, columns: Sequence[str]) -> list[CellLabels]:
    """Obs columns of one sample of a store, without a cell where it has no such sample."""
    if sample not in store.samples:
        nothing = np.empty(0, object)
        return [CellLabels(str(store.path), nothing, nothing, nothing) for _ in columns]
    found = sample_columns(store, store.samples[sample], ["barcode", *columns])
    barcode = found["barcode"]
    assert barcode is not None
    barcodes, samples = barcode.in_arrow(), np.full(len(barcode.values), sample, object)

    def labels(column: str) -> Texts:
        values = found[column]
        if column == "sample" or values is None:
            return np.full(len(samples), label_text(sample) if column == "sample" else "", object)
        return label_texts(values.plain())

    place = str(store.path)
    return [CellLabels(place, barcodes, labels(column), samples, each_once=True) for column in columns]


def _one_text_each(texts: pd.Series) -> Texts:
    """The same texts, object [n], equal ones in one place."""
    codes, found = pd.factorize(texts.to_numpy(object))
    one: Texts = np.asarray(found, object)[codes]
    return one


def rows_in(cells: CellLabels, others: CellLabels) -> Ints:
    """The row of each of ``cells`` among ``others``, -1 where it is not there.

    Cells are the same that have the same sample and barcode, or the same barcode where one of the two names no sample.
    Raises InputError where that does not tell which cell is which: one that both have comes twice in one of them.
    """
    if _are_same(cells, others):
        return np.arange(len(cells))
    by_sample = cells.sample is not None and others.sample is not None
    keys, other_keys = _keys(cells, others, by_sample)
    _check_once(cells, others, keys, other_keys, by_sample)
    _check_once(others, cells, other_keys, keys, by_sample)
    once = ~pd.Index(other_keys).duplicated()
    found = pd.Index(other_keys[once]).get_indexer(keys)
    places = np.append(np.flatnonzero(once), -1)
    rows: Ints = places[found]
    return rows


def _are_same(cells: CellLabels, others: CellLabels) -> bool:
    """Whether all cells are the same in the same order, as where all of a sample was predicted: that takes no table."""
    if not (cells.each_once or others.each_once) or cells.sample is None or others.sample is None:
        return False
    return bool(cells.barcode.equals(others.barcode)) and np.array_equal(cells.sample, others.sample)


def _keys(cells: CellLabels, others: CellLabels, by_sample: bool) -> tuple[Ints, Ints]:
    """A number for each cell, equal for cells that are the same."""
    encoded = pa.chunked_array([cells.barcode, others.barcode]).dictionary_encode().combine_chunks()
    codes = encoded.indices.to_numpy().astype(np.int64)
    if by_sample and cells.sample is not None and others.sample is not None:
        samples = pd.factorize(np.concatenate([cells.sample, others.sample]))[0]
        codes += len(encoded.dictionary) * samples
    return codes[: len(cells)], codes[len(cells) :]


def _check_once(cells: CellLabels, others: CellLabels, keys: Ints, other_keys: Ints, by_sample: bool) -> None:
    twice = np.flatnonzero(pd.Index(keys).duplicated(keep=False) & np.isin(keys, other_keys))
    if not len(twice):
        return
    first, second = twice[0], twice[1:][keys[twice[1:]] == keys[twice[0]]][0]
    n = f"{len(np.unique(keys[twice])):,} cells more than once" if len(twice) > 2 else "a cell twice"
    remedy = "remove all rows but one of each"
    if not by_sample and cells.sample is not None and cells.sample[first] != cells.sample[second]:
        remedy = f"add a column sample to {others.place}, with the names that are used here"
    raise InputError(
        f"{cells.place}: found {n}, as {cells.name_of(first)} and {cells.name_of(second)}, which {others.place} has "
        f"too; expected each cell once; {remedy}"
    )

"""Training and validation cells by hash: fixed for good, in whatever order samples are committed, or added later."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.hashes import Hashes, numbers_of, text_hashes
from annatac_scale.stream.selection import sorted_ids

if TYPE_CHECKING:
    import pyarrow as pa

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PIECE = 2**20
"""Cells that are hashed at a time: 8 MB each array."""


@dataclass(frozen=True)
class Split:
    """One side of a split of cells in two.

    part: which side
    validation: share of the cells that validate, above 0 and below 1; with ``by``, of the values of the column
    by: obs column whose cells of one value (a donor) keep together, "sample" for samples; None splits cell by cell
    seed: another seed, another split

    Raises ConfigError where a value is none of these.
    """

    part: Literal["train", "validation"]
    validation: float = 0.05
    by: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in ("train", "validation"):
            raise ConfigError(f"split part = {self.part!r}: expected train or validation")
        if not 0 < self.validation < 1:
            raise ConfigError(
                f"split validation = {self.validation}: expected a share above 0 and below 1, as 0.05"
            )


def split_cells(store: IslandStore, split: Split, cells: NDArray[np.integer] | None = None) -> Ints:
    """The cells of a side of a split: ids, int64, increasing.

    A cell is put by the hash of (seed, sample, row in the sample), so that the share comes about as with coin tosses;
    with ``split.by`` by the hash of (seed, value): with few values the share of cells may be far from
    ``split.validation``. A value counts as the same as number or as text. Cells without a value train.

    cells: ids to split, each once; None for all

    Raises InputError where a side has no cells, or no sample has the column.
    """
    ids = None if cells is None else sorted_ids(store, cells)
    codes, texts = (None, None) if split.by is None else _groups(store, split.by, ids)
    if codes is None or texts is None:
        validates = _cells_that_validate(store, split, ids)
    else:
        validates = np.append(_below(text_hashes(texts, split.seed), split.validation), False)[codes]
    n_validate = int(np.count_nonzero(validates))
    if n_validate in (0, len(validates)):
        n_groups = None if codes is None else int(np.count_nonzero(np.bincount(codes + 1)[1:]))
        raise _one_sided(store, split, len(validates), n_validate, n_groups)
    chosen = np.flatnonzero(validates if split.part == "validation" else ~validates)
    return chosen if ids is None else ids[chosen]


def _below(hashes: Hashes, share: float) -> Bools:
    return hashes < np.uint64(share * 2**64)


def _cells_that_validate(store: IslandStore, split: Split, ids: Ints | None) -> Bools:
    validates = np.empty(store.n_cells if ids is None else len(ids), np.bool_)
    keys = text_hashes(list(store.samples), split.seed)
    for sample, places, rows in _rows_of_samples(store, ids):
        validates[places] = _below(numbers_of(keys[sample], rows), split.validation)
    return validates


def _rows_of_samples(store: IslandStore, ids: Ints | None) -> Iterator[tuple[int, slice, Ints]]:
    """Pieces of cells of one sample: its number, their places among the ids, their rows in the sample."""
    for number, sample in enumerate(store.samples.values()):
        start, stop = sample.first_cell, sample.first_cell + sample.n_cells
        if ids is not None:
            start, stop = (int(place) for place in np.searchsorted(ids, [start, stop]))
        for first in range(start, stop, _PIECE):
            places = slice(first, min(first + _PIECE, stop))
            found = np.arange(places.start, places.stop) if ids is None else ids[places]
            yield number, places, found - sample.first_cell


def _groups(store: IslandStore, by: str, ids: Ints | None) -> tuple[NDArray[np.int32], "pa.StringArray"]:
    """The code of each cell's value, int32, -1 where it has none, and the values as text."""
    import pyarrow as pa

    from annatac_scale.store.columns import obs_columns, texts_of

    column = obs_columns(store, [by])[by].combine_chunks()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy()
    values = column.dictionary
    if not pa.types.is_string(values.type):
        values = texts_of(values.to_numpy(zero_copy_only=False))
    return codes if ids is None else codes[ids], values


def _one_sided(
    store: IslandStore, split: Split, n_cells: int, n_validate: int, n_groups: int | None
) -> InputError:
    """What to do where one side has no cells."""
    if not n_cells:
        return InputError(f"{store.path}: no cells to split; choose some")
    nobody, share = ("validates", "larger") if not n_validate else ("trains", "smaller")
    what, otherwise = f"{n_cells:,} cells", ""
    if n_groups is not None:
        what = f"{n_groups:,} values of {split.by!r} that the {n_cells:,} cells have"
        otherwise = ", or a column with more values"
    return InputError(
        f"{store.path}: split: of the {what} none {nobody} with validation = {split.validation:g} and seed = "
        f"{split.seed}; choose a {share} share, another seed{otherwise}"
    )

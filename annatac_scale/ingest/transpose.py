"""The entries of a matrix in the order of cells, out of core, for files that keep them by peaks or in any order.

The entries are read once. As many as fit into memory make a *run*: it is sorted by groups of 250 cells and written
down, with the place of each group. Some rows are then one slice of each run. Both ways are linear in the entries:

    reading    memory_bytes, whatever the cells and entries: a run has as many entries as there are 40 bytes in it (12
               as they are read, twice 3 to 8 as they are written, the rest for the piece of the file they come from);
               8 bytes for 250 cells, and 4 bytes a cell where they are put in another order than the file's
    rows       17 bytes for each entry of the rows that are asked for
    disk       for an entry, 1 byte for its row, 1 to 3 for its peak, 1 for its count (2 or 4 in a run with over 255)

A killed run begins anew; what is whole is marked last.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import StoreError
from annatac_scale.store.compiled import compiled
from annatac_scale.store.files import flush
from annatac_scale.store.place import Place, is_url, place_of
from annatac_scale.store.schema import BLOCK_CELLS

MEMORY_BYTES = 256 << 20
"""Memory of a transposition, beside that of the program."""

_BYTES_AN_ENTRY = 40
_VERSION = 1
_DONE = "transposed/done.json"
_PLACES = "transposed/places"


class Entries(NamedTuple):
    """Entries of a matrix, any order: int32 [n], rows, peaks and counts."""

    rows: NDArray[np.int32]
    peaks: NDArray[np.int32]
    counts: NDArray[np.int32]

    def part(self, start: int, stop: int) -> "Entries":
        """A view of some of them."""
        return Entries(self.rows[start:stop], self.peaks[start:stop], self.counts[start:stop])


Fill = Callable[[Entries], Iterator[int]]
"""Writes all entries of a matrix, one bufferful after the other; yields how many each time, all of it but the last."""


@dataclass(frozen=True, eq=False)
class Transposition:
    """A matrix on its way into the order of cells.

    fill: gives the entries, ``n_entries`` at most; source: how the file keeps them, for the user
    place: where they are put down; None: in a folder of the system's for temporary files, until this object is gone
    """

    fill: Fill
    n_cells: int
    n_peaks: int
    n_entries: int
    source: str
    place: Place | None = None
    _temporary: list[Any] = field(default_factory=list)

    @property
    def note(self) -> str:
        """What the user should know."""
        return (
            f"{self.source}: its {self.n_entries:,} entries are put in the order of cells first, "
            f"in about {_size(self.n_bytes)} in {self._folder.location}"
        )

    @property
    def n_bytes(self) -> int:
        """About what the entries take on disk."""
        return self.n_entries * (2 + _width(self.n_peaks - 1))

    @cached_property
    def _folder(self) -> Place:
        if self.place is not None:
            return self.place
        self._temporary.append(tempfile.TemporaryDirectory(prefix="annatac-"))
        return place_of(self._temporary[0].name)

    def make(
        self,
        order: NDArray[np.int64] | None = None,
        advance: Callable[[int], None] = lambda _: None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Put the entries down, unless they are, in the order in which cells will be asked for.

        order: rows of the matrix, each once, and any number of -1, which stand for none; None: all, as they are
        advance: is told of each part of the entries; memory_bytes: what their buffers take
        Raises StoreError where the disk has no room for them.
        """
        if self._done() is not None:
            return
        self._check_room()
        places = _places(order, self.n_cells)
        n_rows = self.n_cells if order is None else int(np.count_nonzero(order >= 0))
        n = max(1, min(memory_bytes // _BYTES_AN_ENTRY, self.n_entries))
        entries = Entries(*(np.empty(n, np.int32) for _ in range(3)))
        widths: list[int] = []
        for n_filled in self.fill(entries):
            n_kept = n_filled if order is None else _keep(places, n_filled, *entries)
            data, width = self._run(entries.part(0, n_kept), n_rows)
            self._write(_name(len(widths)), data)
            widths.append(width)
            advance(n_filled)
        if order is not None:
            self._write(_PLACES, places.tobytes())
        if not is_url(self._folder.location) and widths:
            flush(FilePath(self._folder.location, "transposed"))
        self._write(_DONE, json.dumps(self._says(n_rows, order is not None, widths)).encode())

    def _says(self, n_rows: int, ordered: bool, widths: list[int]) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "n_cells": self.n_cells,
            "n_peaks": self.n_peaks,
            "n_rows": n_rows,
            "ordered": ordered,
            "widths": widths,
        }

    def _done(self) -> dict[str, Any] | None:
        """What was said when all was put down; None where it is not whole."""
        try:
            done: dict[str, Any] = json.loads(self._folder.read(_DONE))
        except (FileNotFoundError, ValueError):
            return None
        same = done == self._says(done.get("n_rows", 0), done.get("ordered", False), done.get("widths", []))
        return done if same else None

    @cached_property
    def _made(self) -> dict[str, Any]:
        self.make()
        return self._done() or {}

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of the matrix were put down; -1 for -1. Makes what is not there."""
        if not self._made["ordered"]:
            return rows
        found = np.where(rows >= 0, self._places[rows], -1)
        if ((found < 0) & (rows >= 0)).any():
            raise ValueError("rows that were left out when its entries were put in order")
        return found

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        return np.frombuffer(self._folder.read(_PLACES), np.int32).astype(np.int64)

    def rows(self, a: int, b: int) -> sparse.csr_matrix:
        """The rows that were put down as a to b, int32 [b - a, n_peaks]."""
        runs = self._made["widths"]
        groups = a // BLOCK_CELLS, -(-b // BLOCK_CELLS)
        parts = [self._groups(_name(i), width, *groups) for i, width in enumerate(runs)]
        indptr = np.zeros(b - a + 1, np.int64)
        sizes = 1, _width(self.n_peaks - 1)
        for (places, packed), width in zip(parts, runs, strict=True):
            _count_rows(places, packed, sum(sizes) + width, groups[0] * BLOCK_CELLS - a, indptr)
        np.cumsum(indptr, out=indptr)
        peaks, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.int32)
        cursor = indptr[:-1].copy()
        for (places, packed), width in zip(parts, runs, strict=True):
            _fill_rows(places, packed, sizes[1], width, groups[0] * BLOCK_CELLS - a, cursor, peaks, counts)
        return sparse.csr_matrix((counts, peaks, indptr), shape=(b - a, self.n_peaks))

    def _groups(self, name: str, width: int, a: int, b: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The entries of groups a to b in a run, and where each group begins among them, and the last ends."""
        places = np.frombuffer(self._folder.read_range(name, 8 * a, 8 * (b - a + 1)), np.int64)
        size = 1 + _width(self.n_peaks - 1) + width
        start, stop = (8 * (_n_groups(self._made["n_rows"]) + 1) + size * int(i) for i in places[[0, -1]])
        packed = np.frombuffer(self._folder.read_range(name, start, stop - start), np.uint8)
        if len(packed) < stop - start:
            raise StoreError(
                f"{self._folder.location}/{name}: found its end too early; expected what was written; remove the folder"
            )
        return places - places[0], packed

    def _run(self, entries: Entries, n_rows: int) -> tuple[bytes, int]:
        """A run: the place of each group and the end of the last, int64; then the entries; and a count's bytes."""
        width = _width(int(entries.counts.max(initial=0)), (1, 2, 4))
        sizes = _width(self.n_peaks - 1), width
        places = np.zeros(_n_groups(n_rows) + 1, np.int64)
        data = np.empty(places.nbytes + len(entries.rows) * (1 + sum(sizes)), np.uint8)
        _sort_by_groups(*entries, *sizes, places, data[places.nbytes :])
        data[: places.nbytes] = places.view(np.uint8)
        return data.tobytes(), width

    def _check_room(self) -> None:
        if is_url(self._folder.location):
            return
        folder = FilePath(self._folder.location).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < self.n_bytes:
            raise self._no_room(f"{_size(free)} free")

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._folder.write(name, data)
        except StoreError as error:
            raise self._no_room(f"a file that cannot be written ({error})") from error

    def _no_room(self, found: str) -> StoreError:
        return StoreError(
            f"{self._folder.location}: found {found}; expected room for about {_size(self.n_bytes)}, in "
            "which the entries are put in the order of cells; free some, or choose another folder for what is put down"
        )


def _places(order: NDArray[np.int64] | None, n_cells: int) -> NDArray[np.int32]:
    """The place of each row in ``order`` without its -1, -1 for rows that it lacks."""
    if order is None:
        return np.empty(0, np.int32)
    places = np.full(n_cells, -1, np.int32)
    present = order[order >= 0]
    places[present] = np.arange(len(present), dtype=np.int32)
    return places


def _n_groups(n_rows: int) -> int:
    return -(-n_rows // BLOCK_CELLS)


def _name(run: int) -> str:
    return f"transposed/{run}"


def _width(largest: int, widths: tuple[int, ...] = (1, 2, 3, 4)) -> int:
    """The bytes that hold a number."""
    return next(width for width in widths if largest < 256**width)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{max(0.1, n_bytes / 1e6):.1f} MB"


@compiled
def _put(number, width, packed, at):  # type: ignore[no-untyped-def]
    for i in range(width):
        packed[at + i] = (number >> (8 * i)) & 255


@compiled
def _get(width, packed, at):  # type: ignore[no-untyped-def]
    number = np.int64(0)
    for i in range(width):
        number |= np.int64(packed[at + i]) << (8 * i)
    return number


@compiled
def _keep(places, n, rows, peaks, counts):  # type: ignore[no-untyped-def]
    """Give the first ``n`` entries the places of their rows, leaving out those without one; returns their number."""
    kept = 0
    for i in range(n):
        place = places[rows[i]]
        if place >= 0:
            rows[kept], peaks[kept], counts[kept] = place, peaks[i], counts[i]
            kept += 1
    return kept


@compiled
def _sort_by_groups(rows, peaks, counts, peak_width, count_width, places, packed):  # type: ignore[no-untyped-def]
    """Pack entries by groups of rows, else in their order; places: zeros, gets where each group begins."""
    size = 1 + peak_width + count_width
    for i in range(len(rows)):
        places[rows[i] // BLOCK_CELLS + 1] += 1
    for group in range(1, len(places)):
        places[group] += places[group - 1]
    for i in range(len(rows)):
        group = rows[i] // BLOCK_CELLS
        at = places[group] * size
        places[group] += 1
        packed[at] = rows[i] - group * BLOCK_CELLS
        _put(peaks[i], peak_width, packed, at + 1)
        _put(counts[i], count_width, packed, at + 1 + peak_width)
    # Each place has moved to where the next group begins.
    for group in range(len(places) - 1, 0, -1):
        places[group] = places[group - 1]
    places[0] = 0


@compiled
def _count_rows(places, packed, size, first_row, n_after):  # type: ignore[no-untyped-def]
    """Add the entries of row i to n_after[i + 1], for the rows that it has; ``first_row`` is the first group's."""
    for group in range(len(places) - 1):
        for i in range(places[group], places[group + 1]):
            row = first_row + group * BLOCK_CELLS + packed[i * size]
            if 0 <= row < len(n_after) - 1:
                n_after[row + 1] += 1


@compiled
def _fill_rows(places, packed, peak_width, count_width, first_row, cursor, peaks, counts):  # type: ignore[no-untyped-def]
    """Put the entries of each row where its cursor is, and move that on."""
    size = 1 + peak_width + count_width
    for group in range(len(places) - 1):
        for i in range(places[group], places[group + 1]):
            at = i * size
            row = first_row + group * BLOCK_CELLS + packed[at]
            if 0 <= row < len(cursor):
                to = cursor[row]
                cursor[row] += 1
                peaks[to] = _get(peak_width, packed, at + 1)
                counts[to] = _get(count_width, packed, at + 1 + peak_width)

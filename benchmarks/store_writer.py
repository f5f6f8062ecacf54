"""Island stores and the same cells as h5ad, of any size: the only generator of stores in the benchmarks.

    python benchmarks/store_writer.py --out FOLDER [--cells 200000] [--islands 16657] [--open 1501] [--h5ad] ...

Writes ``atlas.zarr`` and, with ``--h5ad``, ``cells.h5ad`` (CSR, values uint8, indices uint16) into FOLDER.
The same options give the same cells, whatever the number of samples; what a cell holds follows from its number, its
type and the seed alone. What is modelled:

- depth: open islands of a cell, lognormal;
- islands: lognormal weights, so some are open in most cells and others in hardly any; each cell type has a third of
  them for its own, the others come a fifth as often;
- levels: independent of the island; cell types: equally many cells each, one after the other or shuffled.

Not modelled: neighbouring islands that open together, depth and types that differ between samples.
"""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.create import create_store
from annatac_scale.store.draft import open_draft
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import FORMAT_VERSION, SHARD_CELLS

ORDERS = ("type", "shuffled")
SPEC_FILE = "spec.json"
STORE, H5AD = "atlas.zarr", "cells.h5ad"
GENERATOR_VERSION = 1
LEVELS = (0.78, 0.14, 0.04, 0.02, 0.02)
_DEPTH_SPREAD = 0.447
_WEIGHT_SPREAD = 1.0
_OWN_SHARE, _OTHERS = 1 / 3, 0.2
_MOST_OPEN = 0.6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BYTES_OPEN = {STORE: 1.0, H5AD: 5.0}
"""Room on disk for an open island, at most, before anything is written."""


@dataclass(frozen=True)
class Spec:
    """What to generate. open: median of a cell's open islands; order: of the cell types"""

    cells: int = 200_000
    islands: int = 16_657
    open: int = 1_501
    types: int = 30
    order: str = "type"
    samples: int = 1
    assembly: str = "hg38"
    seed: int = 0

    @classmethod
    def quick(cls) -> "Spec":
        return cls(cells=6_000, islands=2_000, open=150, types=10, samples=2)

    def folder(self) -> str:
        """A name for a folder that no other options have."""
        key = hashlib.sha256(json.dumps([GENERATOR_VERSION, asdict(self)]).encode()).hexdigest()
        return f"{self.cells}_cells_{self.islands}_islands_{self.open}_open_{key[:8]}"


class Alias(NamedTuple):
    """A table to draw islands from by their weights: share: of its own at each place; other: who has the rest"""

    share: NDArray[np.float64]
    other: NDArray[np.int32]


class Cells:
    """The cells of a spec, any run of them at a time."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        weights = np.random.default_rng([spec.seed, 1]).lognormal(0, _WEIGHT_SPREAD, spec.islands)
        self._alias = alias_of(weights)
        self._ends = np.cumsum(LEVELS) / np.sum(LEVELS)

    @cached_property
    def types(self) -> NDArray[np.int32]:
        """The type of each cell, int32 [n_cells]."""
        sorted_types = np.arange(self.spec.cells, dtype=np.int64) * self.spec.types // self.spec.cells
        if self.spec.order == "shuffled":
            np.random.default_rng([self.spec.seed, 2]).shuffle(sorted_types)
        return sorted_types.astype(np.int32)

    def n_open(self, start: int, stop: int) -> NDArray[np.int64]:
        """Open islands of cells ``start`` to ``stop``, int64."""
        drawn = _depths(np.uint64(self.spec.seed), start, stop, math.log(self.spec.open), _DEPTH_SPREAD)
        return np.clip(drawn, 1, max(1, int(_MOST_OPEN * self.spec.islands)))

    def read(self, start: int, stop: int) -> OpenIslands:
        """Cells ``start`` to ``stop``."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.n_open(start, stop))])
        islands, levels = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint8)
        types = self.types[start:stop]
        _draw(np.uint64(self.spec.seed), start, types, *self._alias, self._ends, offsets, islands, levels)
        return OpenIslands(offsets, islands, levels)

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Barcodes as index and the column cell_type."""
        names = [f"type {number:02}" for number in range(self.spec.types)]
        kinds = pd.Categorical.from_codes(self.types[start:stop], categories=names)
        return pd.DataFrame({"cell_type": kinds}, index=pd.Index(_barcodes(start, stop), name="barcode"))

    def space(self) -> IslandSpace:
        """As many bins of the assembly as there are islands, drawn at random."""
        bins = IslandSpace.all(Assembly.builtin(self.spec.assembly))
        if self.spec.islands > len(bins):
            raise SystemExit(f"--islands {self.spec.islands}: expected at most {len(bins)}")
        kept = np.sort(np.random.default_rng([self.spec.seed, 3]).choice(len(bins), self.spec.islands, False))
        return replace(
            bins,
            width_bp=0,
            selection="windows",
            chrom=bins.chrom[kept],
            start=bins.start[kept],
            end=bins.end[kept],
            genes=bins.genes[kept],
        )


def alias_of(weights: NDArray[np.float64]) -> Alias:
    """Vose's table for drawing with the given weights."""
    return Alias(*_alias(weights * (len(weights) / weights.sum())))


@numba.njit(cache=True)
def _alias(scaled):  # type: ignore[no-untyped-def]
    n = len(scaled)
    share, other = scaled.copy(), np.arange(n).astype(np.int32)
    small, large = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    n_small, at = len(small), 0
    waiting = np.empty(n, np.int64)
    waiting[:n_small] = small
    while n_small > 0 and at < len(large):
        giver, n_small = large[at], n_small - 1
        taker = waiting[n_small]
        other[taker] = giver
        share[giver] -= 1 - share[taker]
        if share[giver] < 1:
            waiting[n_small] = giver
            n_small, at = n_small + 1, at + 1
    for left in range(n_small):
        share[waiting[left]] = 1.0
    for left in range(at, len(large)):
        share[large[left]] = 1.0
    return share, other


@numba.njit(cache=True, nogil=True)
def _mix(word):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _uniform(word):  # type: ignore[no-untyped-def]
    return (_mix(word) >> np.uint64(11)) * (1.0 / (1 << 53))


@numba.njit(cache=True, nogil=True)
def _first_word(seed, cell):  # type: ignore[no-untyped-def]
    return _mix(_mix(seed + _GOLDEN) + np.uint64(cell) * _GOLDEN)


@numba.njit(cache=True, nogil=True)
def _depths(seed, start, stop, mean, spread):  # type: ignore[no-untyped-def]
    found = np.empty(stop - start, np.int64)
    for cell in range(start, stop):
        word = _first_word(seed, cell)
        radius = math.sqrt(-2 * math.log(1 - _uniform(word)))
        normal = radius * math.cos(2 * math.pi * _uniform(word + _GOLDEN))
        found[cell - start] = round(math.exp(mean + spread * normal))
    return found


@numba.njit(cache=True, nogil=True)
def _draw(seed, start, types, share, other, ends, offsets, islands, levels):  # type: ignore[no-untyped-def]
    """Draw each cell's islands without replacement: marks in a bitmap, read off in order."""
    n = len(share)
    marks = np.zeros(n, np.uint8)
    for row in range(len(types)):
        word = _first_word(seed, start + row) + np.uint64(2) * _GOLDEN
        type_word = _mix(seed + np.uint64(types[row] + 1) * _GOLDEN)
        left = offsets[row + 1] - offsets[row]
        while left > 0:
            place = _uniform(word) * n
            island = int(place)
            if place - island >= share[island]:
                island = other[island]
            is_own = _uniform(type_word ^ (np.uint64(island) * _GOLDEN)) < _OWN_SHARE
            if marks[island] == 0 and (is_own or _uniform(word + _GOLDEN) < _OTHERS):
                marks[island] = 1
                left -= 1
            word += np.uint64(2) * _GOLDEN
        at = offsets[row]
        for island in range(n):
            if marks[island]:
                marks[island] = 0
                drawn, level = _uniform(word), 1
                while level < len(ends) and drawn >= ends[level - 1]:
                    level += 1
                islands[at], levels[at] = island, level
                at, word = at + 1, word + _GOLDEN


def _barcodes(start: int, stop: int) -> list[str]:
    """Sixteen letters each, as a sequencer's; an odd factor makes them all different."""
    number = np.arange(start, stop, dtype=np.uint64) * np.uint64(2_654_435_761) & np.uint64(0xFFFFFFFF)
    letters = number[:, None] >> np.arange(30, -1, -2, dtype=np.uint64) & np.uint64(3)
    texts = np.frombuffer(b"ACGT", "S1")[letters.astype(np.intp)].view("S16").ravel()
    return [f"{text.decode()}-1" for text in texts.tolist()]


def make_store(folder: Path, spec: Spec, threads: int = 2) -> Path:
    """The store of a spec; made where it is not there already."""
    path = folder / STORE
    if _is_made(folder, STORE, spec):
        return path
    cells = Cells(spec)
    _check_room(folder, spec, cells, STORE)
    shutil.rmtree(path, ignore_errors=True)
    (folder / f"{STORE}.{SPEC_FILE}").unlink(missing_ok=True)
    space = cells.space()
    create_store(path, space, "insertion")
    bounds = np.linspace(0, spec.cells, spec.samples + 1).astype(int).tolist()
    for number in range(spec.samples):
        _write_sample(path, f"sample{number:04}", cells, bounds[number], bounds[number + 1], threads)
    _note(folder, STORE, spec)
    return path


def _write_sample(path: Path, name: str, cells: Cells, start: int, stop: int, threads: int) -> None:
    with open_draft(path, name, {"generated": asdict(cells.spec)}) as draft:

        def write(shard: int) -> Any:
            first = start + shard * SHARD_CELLS
            return draft.write_shard(shard, cells.read(first, min(first + SHARD_CELLS, stop)))

        with ThreadPoolExecutor(threads) as pool:
            records = list(pool.map(write, range(-(-(stop - start) // SHARD_CELLS))))
        measured = np.ones(cells.spec.islands, bool)
        draft.commit(records, cells.obs(start, stop), measured, {"generated": asdict(cells.spec)})


def make_h5ad(folder: Path, spec: Spec) -> Path:
    """The same cells as an AnnData file, CSR, not compressed, written piece by piece."""
    import anndata
    import h5py

    path = folder / H5AD
    if _is_made(folder, H5AD, spec):
        return path
    cells = Cells(spec)
    _check_room(folder, spec, cells, H5AD)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(cells.n_open(0, spec.cells))])
    index = np.uint16 if spec.islands <= 1 << 16 else np.int32
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": np.array([spec.cells, spec.islands]),
            }
        )
        x.create_dataset("indptr", data=offsets)
        data = x.create_dataset("data", (offsets[-1],), np.uint8)
        indices = x.create_dataset("indices", (offsets[-1],), index)
        for start, piece in pieces(cells):
            own = slice(offsets[start], offsets[start] + len(piece.islands))
            data[own], indices[own] = piece.levels, piece.islands.astype(index)
        anndata.io.write_elem(file, "obs", cells.obs(0, spec.cells))
        anndata.io.write_elem(file, "var", pd.DataFrame(index=pd.Index(cells.space().names())))
    _note(folder, H5AD, spec)
    return path


def pieces(cells: Cells) -> Iterator[tuple[int, OpenIslands]]:
    """All cells, 4,000 at a time, each time with the first one's number."""
    for start in range(0, cells.spec.cells, SHARD_CELLS):
        yield start, cells.read(start, min(start + SHARD_CELLS, cells.spec.cells))


def _is_made(folder: Path, name: str, spec: Spec) -> bool:
    try:
        return json.loads((folder / f"{name}.{SPEC_FILE}").read_text()) == _note_of(name, spec)
    except (FileNotFoundError, ValueError):
        return False


def _note(folder: Path, name: str, spec: Spec) -> None:
    (folder / f"{name}.{SPEC_FILE}").write_text(json.dumps(_note_of(name, spec)))


def _note_of(name: str, spec: Spec) -> list[Any]:
    """What a set was made by: a store of another format is made anew."""
    return [GENERATOR_VERSION, FORMAT_VERSION if name == STORE else "", asdict(spec)]


def _check_room(folder: Path, spec: Spec, cells: Cells, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    few = cells.n_open(0, min(spec.cells, 10_000)).mean()
    wanted, free = few * spec.cells * _BYTES_OPEN[name], shutil.disk_usage(folder).free
    if free < wanted + 1e9:
        raise SystemExit(
            f"{folder / name}: {free / 1e9:.1f} GB are free, {wanted / 1e9 + 1:.1f} GB expected; give another folder"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of Spec, and --quick."""
    for entry in fields(Spec):
        choices = ORDERS if entry.name == "order" else None
        parser.add_argument(
            f"--{entry.name}", type=type(entry.default), choices=choices, help=f"default {entry.default}"
        )
    parser.add_argument("--quick", action="store_true", help="a small set, for tests")


def spec_of(options: argparse.Namespace) -> Spec:
    given = {entry.name: getattr(options, entry.name) for entry in fields(Spec)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(Spec.quick() if options.quick else Spec(), **given)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--h5ad", action="store_true", help=f"write {H5AD} too")
    add_options(parser)
    options = parser.parse_args()
    spec = spec_of(options)
    print(make_store(options.out, spec))
    if options.h5ad:
        print(make_h5ad(options.out, spec))


if __name__ == "__main__":
    main()

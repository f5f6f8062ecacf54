"""Matrices larger than memory: bounded memory, the order of cells, kills and full disks, chunks read once."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix_files import (
    anndata_of,
    random_counts,
    some_anndata,
    some_counts,
    write_large_10x_mtx,
)
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest import chunks, h5ad
from annatac_scale.ingest.chunks import read_part
from annatac_scale.ingest.h5ad import open_h5ad
from annatac_scale.ingest.matrices import PeakMatrix, count_islands
from annatac_scale.ingest.open_matrix import n_cells, open_matrix
from annatac_scale.ingest.peaks import PeakSet
from annatac_scale.ingest.transpose import Entries, Fill, Transposition
from annatac_scale.store.place import Folder

COUNTS = random_counts(1234, 700, 30)


def fill_from(rows: NDArray[Any], peaks: NDArray[Any], counts: NDArray[Any]) -> Fill:
    """The entries in their order."""

    def fill(entries: Entries) -> Iterator[int]:
        size = len(entries.rows)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            n = len(rows[part])
            entries.rows[:n], entries.peaks[:n], entries.counts[:n] = rows[part], peaks[part], counts[part]
            yield n

    return fill


def transposition_of(matrix: sparse.csc_matrix, folder: Path | None = None) -> Transposition:
    entries = sparse.csc_matrix(matrix).tocoo()
    place = None if folder is None else Folder(str(folder))
    fill = fill_from(entries.row, entries.col, entries.data)
    return Transposition(fill, *matrix.shape, entries.nnz, "stored by peaks", place)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n_cells=st.integers(1, 900), n_peaks=st.sampled_from([1, 256, 257, 70_000]))
def test_any_rows_of_any_entries_come_back_whatever_the_memory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n_cells: int, n_peaks: int
) -> None:
    most = data.draw(st.sampled_from([1, 255, 256, 65_536, 2**31 - 1]))
    triple = st.tuples(st.integers(0, n_cells - 1), st.integers(0, n_peaks - 1), st.integers(0, most))
    triples = np.array(data.draw(st.lists(triple, max_size=60)), np.int64).reshape(-1, 3)
    place = Folder(str(tmp_path_factory.mktemp("scratch")))
    made = Transposition(fill_from(*triples.T), n_cells, n_peaks, len(triples), "in any order", place)
    made.make(memory_bytes=data.draw(st.sampled_from([1, 40 * 7, 1 << 20])))
    expected = sparse.coo_matrix(
        (triples[:, 2], (triples[:, 0], triples[:, 1])), shape=(n_cells, n_peaks)
    ).tocsr()
    a = data.draw(st.integers(0, n_cells))
    b = data.draw(st.integers(a, n_cells))
    assert (made.rows(a, b).astype(np.int64) != expected[a:b]).nnz == 0


@given(st.permutations(range(20)), st.integers(0, 20), st.integers(0, 3))
def test_rows_may_be_put_down_in_the_order_they_are_asked_for(
    order: list[int], n: int, n_absent: int
) -> None:
    counts = some_counts(20, 9)
    rows = np.array([*order[:n], *[-1] * n_absent, *order[n : n + 3]], np.int64)
    made = transposition_of(counts)
    made.make(rows, memory_bytes=40 * 10)
    stored = rows[rows >= 0]
    assert made.places(rows).tolist() == [list(stored).index(row) if row >= 0 else -1 for row in rows]
    assert made.rows(0, len(stored)).toarray().tolist() == counts[stored].toarray().tolist()
    left_out = sorted(set(range(20)) - set(stored.tolist()))
    if left_out:
        with pytest.raises(ValueError, match="left out"):
            made.places(np.array(left_out[:1]))


def written(
    folder: Path, layout: str, matrix: sparse.csr_matrix = COUNTS, compression: str | None = None
) -> Path:
    if layout == "mtx":
        return write_large_10x_mtx(folder / "mtx", matrix)
    made = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda found: found.toarray()}[
        layout
    ]
    anndata_of(made(matrix)).write_h5ad(folder / "x.h5ad", compression=compression)
    return folder / "x.h5ad"


def opened(path: Path, scratch: Path | None = None) -> PeakMatrix:
    place = None if scratch is None else Folder(str(scratch))
    return open_matrix(path, "10x mtx" if path.is_dir() else "h5ad", scratch=place)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "mtx"])
def test_listed_cells_come_in_their_order_from_every_layout(tmp_path: Path, layout: str) -> None:
    path = written(tmp_path, layout)
    assert n_cells(path, "10x mtx" if layout == "mtx" else "h5ad") == 1234
    rng = np.random.default_rng(1)
    rows = rng.permutation(1234)[:600]
    rows[rng.integers(0, 600, 50)] = -1
    expected = COUNTS.toarray()[rows] * (rows >= 0)[:, None]
    matrix = opened(path, tmp_path / "scratch")
    matrix.prepare(rows, memory_bytes=40 * 5000)
    # Another task, as on another machine, opens it anew.
    again = opened(path, tmp_path / "scratch")
    assert (again.counts(rows).toarray() == expected).all()
    assert (again.counts(rows[100:300]).toarray() == expected[100:300]).all()


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "mtx"])
def test_islands_in_parts_equal_those_of_all_counts(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("annatac_scale.ingest.matrices._ROWS_AT_ONCE", 100)
    matrix = opened(written(tmp_path, layout, compression="gzip"))
    space = IslandSpace.all(Assembly("toy", ("chr1",), (700_000,)), width_bp=5000)
    peaks = PeakSet.of_intervals(matrix.intervals, Assembly("toy", ("chr1",), (700_000,)), space, "x")
    whole = count_islands(COUNTS.astype(np.int64), peaks)
    for rows in (np.arange(1234), np.arange(37, 777), np.array([5, -1, 4, 1233])):
        found = matrix.islands(rows, peaks)
        assert found.n_counts.tolist() == [whole.n_counts[row] if row >= 0 else 0 for row in rows]
        expected = whole.open.to_csr(len(space)).toarray()[rows] * (rows >= 0)[:, None]
        assert (found.open.to_csr(len(space)).toarray() == expected).all()
    assert len(matrix.islands(np.empty(0, np.int64), peaks).n_counts) == 0


def test_tasks_in_threads_share_what_one_put_down(tmp_path: Path) -> None:
    path = written(tmp_path, "csc")
    opened(path, tmp_path / "scratch").prepare()

    def rows_of(part: int) -> NDArray[np.int64]:
        return (
            opened(path, tmp_path / "scratch")
            .counts(np.arange(part * 100, min(1234, part * 100 + 100)))
            .toarray()
        )

    with ThreadPoolExecutor(4) as threads:
        assert (np.concatenate(list(threads.map(rows_of, range(13)))) == COUNTS.toarray()).all()


@pytest.mark.parametrize("place", ["X", "layers/counts", "raw/X"])
def test_csc_may_lie_in_a_layer_or_in_raw(tmp_path: Path, place: str) -> None:
    data = some_anndata(some_counts().tocsc())
    data.layers["counts"] = data.X.copy()
    data.raw = data.copy()
    data.write_h5ad(tmp_path / "x.h5ad")
    layer = "counts" if place == "layers/counts" else None
    matrix = open_matrix(tmp_path / "x.h5ad", "h5ad", layer, place == "raw/X")
    assert matrix.note.startswith(
        f"{place} is stored by peaks (CSC): its 297 entries are put in the order of cells"
    )
    assert matrix.counts(np.arange(30)).toarray().tolist() == some_counts().toarray().tolist()


def shuffled_csc(matrix: sparse.csr_matrix) -> sparse.csc_matrix:
    """Its columns' entries in disorder, and each of an even count as two halves."""
    by_peaks = sparse.csc_matrix(matrix)
    halves = by_peaks.copy()
    even = by_peaks.data % 2 == 0
    by_peaks.data[even] //= 2
    halves.data = np.where(even, by_peaks.data, 0)
    twice = [np.concatenate([a, b]) for a, b in zip(_columns(by_peaks), _columns(halves), strict=True)]
    rng = np.random.default_rng(0)
    mixed = [rng.permutation(column) for column in twice]
    entries = np.concatenate(mixed)
    indptr = np.cumsum([0, *(len(column) for column in mixed)])
    return sparse.csc_matrix((entries[:, 1], entries[:, 0], indptr), shape=matrix.shape)


def _columns(matrix: sparse.csc_matrix) -> list[NDArray[np.int64]]:
    pairs = np.stack([matrix.indices, matrix.data], axis=1).astype(np.int64)
    return np.split(pairs, matrix.indptr[1:-1])


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_indices_in_disorder_are_fine_and_repeated_ones_add_up(tmp_path: Path, layout: str) -> None:
    by_peaks = shuffled_csc(some_counts())
    matrix = by_peaks if layout == "csc" else sparse.csr_matrix(shuffled_csc(some_counts().T.tocsr()).T)
    assert not matrix.has_canonical_format
    some_anndata(some_counts().asformat(layout)).write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "a") as file:
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
            file["X"][name] = getattr(matrix, name)
    found = open_h5ad(tmp_path / "x.h5ad").counts(np.arange(30))
    assert found.toarray().tolist() == some_counts().toarray().tolist()


@pytest.mark.parametrize(("name", "value", "message"), [
    ("indices", 30, r"x\.h5ad: X cannot be read \(a row index outside 0\.\.29\)"),
    ("indices", -1, r"x\.h5ad: X cannot be read \(a row index outside 0\.\.29\)"),
    ("indptr", 10**6, r"x\.h5ad: X cannot be read \(an indptr that does not divide its 297 values into columns\)"),
])  # fmt: skip
def test_csc_that_is_damaged_is_refused(tmp_path: Path, name: str, value: int, message: str) -> None:
    some_anndata(some_counts().tocsc()).write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "a") as file:
        file["X"][name][7] = value
    with pytest.raises(InputError, match=message):
        open_h5ad(tmp_path / "x.h5ad").prepare()


@pytest.mark.parametrize("value", [b"3", 3 + 1j], ids=["text", "complex"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, layout: str, value: Any) -> None:
    made = some_counts().toarray() if layout == "dense" else some_counts().asformat(layout)
    some_anndata(made).write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "a") as file:
        place = "X" if layout == "dense" else "X/data"
        shape = file[place].shape
        del file[place]
        file[place] = np.full(shape, value)
    with pytest.raises(
        InputError, match=r"x\.h5ad: found values of type (\|S1|complex128) in X; expected counts"
    ):
        open_h5ad(tmp_path / "x.h5ad").counts(np.arange(30))


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_killed_transposition_begins_anew_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    made = transposition_of(COUNTS.tocsc(), tmp_path)
    told: list[int] = []

    def kill(n: int) -> None:
        told.append(n)
        if len(told) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        made.make(advance=kill, memory_bytes=40 * 5000)
    assert made._done() is None
    told.clear()
    made.make(advance=told.append, memory_bytes=40 * 7000)
    assert sum(told) == COUNTS.nnz
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = transposition_of(COUNTS.tocsc(), tmp_path)
    again.make(advance=told.append)
    assert sum(told) == COUNTS.nnz
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (again.rows(0, 1234) != COUNTS).nnz == 0
    # What a power cut may leave of the marker counts as nothing.
    (tmp_path / "transposed" / "done.json").write_bytes(b"")
    assert again._done() is None
    (tmp_path / "transposed" / "done.json").write_text(json.dumps({"version": 1, "n_cells": 7}))
    assert again._done() is None


def test_a_run_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    made = transposition_of(COUNTS.tocsc(), tmp_path)
    made.make()
    os.truncate(tmp_path / "transposed" / "0", (tmp_path / "transposed" / "0").stat().st_size - 1)
    with pytest.raises(StoreError, match="transposed/0: found its end too early"):
        made.rows(0, 1234)


def test_too_little_room_is_said_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    made = Transposition(
        fill_from(*np.empty((3, 0))), 10, 70_000, 2_000_000, "stored by peaks", Folder(str(tmp_path))
    )
    with pytest.raises(StoreError, match=f"{tmp_path}: found 5.0 MB free; expected room for about 10.0 MB"):
        made.make()
    assert list(tmp_path.iterdir()) == []
    usage.free = 11_000_000
    made.make()


def test_a_disk_that_fills_on_the_way_is_said_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = written(tmp_path, "csc"), os.write

    def full(handle: int, data: Any) -> int:
        if len(data) > 1000 and os.path.exists(tmp_path / "scratch" / "transposed" / "1"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        StoreError, match=r"scratch: found .*No space left.*; expected room for about 0\.\d MB"
    ):
        opened(path, tmp_path / "scratch").prepare(memory_bytes=40 * 5000)
    monkeypatch.undo()
    matrix = opened(path, tmp_path / "scratch")
    matrix.prepare(memory_bytes=40 * 5000)
    assert (matrix.counts(np.arange(1234)) != COUNTS).nnz == 0


class CountedFile:
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115  (HDF5 closes nothing)
        self.n_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def readinto(self, buffer: Any) -> int:
        n = self.file.readinto(buffer)
        self.n_read += n
        return n


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_each_chunk_is_read_about_once(
    tmp_path: Path, layout: str, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = random_counts(8000, 2000, 200)
    path = written(tmp_path, layout, counts, compression)
    counted = CountedFile(path)
    file = h5py.File(counted, "r", rdcc_nbytes=h5ad._CHUNK_CACHE)
    monkeypatch.setattr(h5ad, "open_hdf5", lambda path: file)
    matrix = open_h5ad(path)
    assembly = Assembly("toy", ("chr1",), (2_000_000,))
    space = IslandSpace.all(assembly, width_bp=5000)
    peaks = PeakSet.of_intervals(matrix.intervals, assembly, space, "x")
    arrays = [file["X"]] if layout == "dense" else [file["X/data"], file["X/indices"], file["X/indptr"]]
    size = sum(array.id.get_storage_size() for array in arrays)
    before = counted.n_read
    found = [matrix.islands(np.arange(first, first + 4000), peaks) for first in (0, 4000)]
    assert counted.n_read - before < 1.15 * size
    assert sum(int(part.n_counts.sum()) for part in found) == counts.sum()
    matrix.close()
    counted.file.close()


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunks": (100,)},
    "gzip": {"chunks": (100,), "compression": "gzip"},
    "shuffle": {"chunks": (100,), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (100,), "compression": "lzf"},
    "checksum": {"chunks": (100,), "compression": "gzip", "fletcher32": True},
    "one chunk": {"chunks": (4950,), "compression": "gzip"},
}


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<f4", "u1", "<i8"])
@pytest.mark.parametrize("how", FILTERS)
def test_a_part_of_an_array_is_the_same_however_it_is_stored(tmp_path: Path, how: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Noise does not shrink: HDF5 stores such a chunk as it is.
    values = np.concatenate([np.arange(2500) % 7, rng.integers(0, 256, 2450)]).astype(dtype)
    values[2600:3000] = np.frombuffer(rng.bytes(400 * values.itemsize), dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, **FILTERS[how])
        for a, b in [(0, 4950), (37, 3141), (100, 1100), (4000, 4950), (7, 9), (5, 5), (0, 0)]:
            found = read_part(dataset, a, b)
            assert found.dtype == dataset.dtype
            assert found.tobytes() == values[a:b].tobytes()


def test_a_damaged_chunk_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "csr", compression="gzip")
    with h5py.File(path, "r") as file:
        info = file["X/indices"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(info.byte_offset + 20)
        raw.write(b"\xff" * 40)
    with pytest.raises(InputError, match=r"x\.h5ad: X cannot be read \(.*\); expected a whole h5ad file"):
        opened(path).counts(np.arange(1234))
    assert chunks._FEW > 1


PEAK_MEMORY = r"""
import re, sys
from pathlib import Path
import numpy as np
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.open_matrix import open_matrix
from annatac_scale.ingest.peaks import PeakSet
from annatac_scale.store.place import Folder

path, kind, scratch, layer = sys.argv[1:]
matrix = open_matrix(path, kind, layer or None, scratch=Folder(scratch))
assembly = Assembly("toy", ("chr1",), (5_000_000,))
space = IslandSpace.all(assembly, width_bp=5000)
peaks = PeakSet.of_intervals(matrix.intervals, assembly, space, "x")
matrix.prepare(memory_bytes=16 << 20)
total = 0
for first in range(0, len(matrix), 4000):
    total += int(matrix.islands(np.arange(first, min(first + 4000, len(matrix))), peaks).n_counts.sum())
# Not ru_maxrss: that of a new process begins at what its parent has.
print(total, re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1] + "000")
"""


def peak_memory(path: Path, kind: str, scratch: Path, layer: str = "") -> tuple[int, int]:
    command = [sys.executable, "-c", PEAK_MEMORY, str(path), kind, str(scratch), layer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total, peak = done.stdout.split()
    return int(total), int(peak)


WRITERS: dict[str, Callable[[Path, sparse.csr_matrix], Path]] = {
    "csr": lambda folder, matrix: written(folder, "csr", matrix),
    "csr gzip": lambda folder, matrix: written(folder, "csr", matrix, "gzip"),
    "csc": lambda folder, matrix: written(folder, "csc", matrix),
    "mtx": lambda folder, matrix: written(folder, "mtx", matrix),
}


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the system does not tell the peak memory"
)
@pytest.mark.parametrize("layout", WRITERS)
def test_memory_does_not_grow_with_cells(tmp_path: Path, layout: str) -> None:
    n = 8000
    matrix = random_counts(8 * n, 5000, 150)
    peaks = {}
    for cells in (n, 8 * n):
        folder = tmp_path / str(cells)
        folder.mkdir()
        path = WRITERS[layout](folder, matrix[:cells])
        total, peaks[cells] = peak_memory(path, "10x mtx" if layout == "mtx" else "h5ad", folder / "scratch")
        assert total == matrix[:cells].sum()
    # Loaded whole it would take 12 bytes an entry more, 100 MB. A barcode of obs takes about 120 bytes.
    assert peaks[8 * n] < 1.1 * peaks[n] + 120 * 7 * n

"""From a store to a standard AnnData, cells x islands as CSR, out of core: ``annatac export``.

X is read, compressed and written block by block. obs is put together column by column. With T threads (a core each, at
most 8) there are at any time at most

    12 * T blocks decoded, 4 * T chunks of 1 MB, for Zarr 3 shards of 40 MB, and about 250 bytes a cell

beside the program: the last are the barcodes, or a column of obs, of all samples. A block of 250 cells with 1,500 open
islands each takes 2 MB.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.columns import obs_columns, obs_names
from annatac_scale.store.create import islands_frame
from annatac_scale.store.csr_targets import CHUNK, H5adFile, Target, ZarrFolder
from annatac_scale.store.files import as_store_error, flush, move, sync
from annatac_scale.store.metadata import read_index
from annatac_scale.store.nodes import ANNDATA, CATEGORICAL, DATAFRAME, DICT
from annatac_scale.store.obs import storable
from annatac_scale.store.place import is_url
from annatac_scale.store.store import IslandStore, Sample
from annatac_scale.store.threads import in_order

ENDINGS = (".h5ad", ".zarr")
_INTEGERS = [f"{sign}{bits}" for sign in ("Int", "UInt") for bits in (8, 16, 32, 64)]
_CSR = ("csr_matrix", "0.1.0")
_NULLABLE = {
    pa.bool_(): pd.BooleanDtype(),
    **{pa.from_numpy_dtype(name.lower()): pd.array([], name).dtype for name in _INTEGERS},
}
"""Types in which pandas keeps numbers exact where some are missing."""

_MOST_THREADS, _THREADS_FOR_OBJECTS = 8, 16


@dataclass(frozen=True)
class ExportReport:
    """What was written. n_bytes: of the file, or of all files of the folder"""

    out: Path
    n_samples: int
    n_cells: int
    n_islands: int
    n_open: int
    n_bytes: int

    def text(self) -> str:
        """For people."""
        return (
            f"{self.out}: {self.n_cells:,} cells of {self.n_samples:,} samples x {self.n_islands:,} islands, "
            f"{self.n_open:,} open, {self.n_bytes:,} bytes"
        )


def export(
    store: IslandStore,
    out: Path | str,
    samples: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the cells of a store as AnnData: ``out`` is an h5ad file, or a folder of Zarr v3, by its ending.

    X: csr_matrix of levels, uint8, with int32 indices and int64 indptr. obs: sample, barcode, and all columns, missing
    where a sample lacks one; its index is the barcode, or sample_barcode if a barcode comes twice. var: the islands,
    ``measured_<sample>`` and ``measured``, in all of the samples. uns: assembly, islands_sha256, store_digest and more.

    samples: names of those to write, in the order of the store; all if there are none
    overwrite: replace an export that is there. What is written lies aside until it is whole

    Raises InputError for an ``out`` that cannot be, or a sample that the store does not have, StoreError for damage.
    """
    cells = _chosen(store, samples)
    final = _checked(store, out, overwrite)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial{final.suffix}")
    threads = _THREADS_FOR_OBJECTS if is_url(store.path) else min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    try:
        with H5adFile(aside, threads) if final.suffix == ".h5ad" else ZarrFolder(aside) as target:
            _write(target, store, cells, threads, progress or Silent())
        _put_in_place(aside, final)
    except OSError as error:
        raise as_store_error(error, error.filename or final, "written") from error
    finally:
        _remove(aside)
    return ExportReport(
        out=final,
        n_samples=len(cells.samples),
        n_cells=cells.n_cells,
        n_islands=store.n_islands,
        n_open=sum(sample.n_open for sample in cells.samples.values()),
        n_bytes=_size(final),
    )


def _chosen(store: IslandStore, names: Sequence[str]) -> IslandStore:
    """The store as if it had no other samples."""
    unknown = [name for name in names if name not in store.samples]
    if unknown:
        raise InputError(
            f"{store.path}: found no sample {unknown[0]!r}; expected some of {', '.join(list(store.samples)[:10])}; "
            "`annatac info` lists them all"
        )
    if not names:
        return store
    return IslandStore(
        store.path, store.attributes, [e for e in read_index(store.path) if e["name"] in names]
    )


def _checked(store: IslandStore, out: Path | str, overwrite: bool) -> Path:
    """The path to write to. Raises InputError where nothing can, or should, be written."""
    if is_url(out):
        raise InputError(f"{out}: found an URL; expected a path on a disk; export to one, then copy it")
    path = Path(out).absolute()
    if path.suffix not in ENDINGS:
        raise InputError(
            f"{out}: found the ending {path.suffix!r}; expected .h5ad or .zarr; choose another --out"
        )
    if not is_url(store.path) and path.resolve().is_relative_to(Path(store.path).resolve()):
        raise InputError(f"{out}: found within the store; expected a place beside it; choose another --out")
    if not path.parent.is_dir():
        raise InputError(
            f"{out}: found no folder {path.parent}; expected one; make it, or choose another --out"
        )
    if os.path.lexists(path):
        if not overwrite:
            raise InputError(
                f"{out}: found it there; expected a new path; choose another --out, or --overwrite"
            )
        if not _is_export(path):
            raise InputError(
                f"{out}: found something that is no AnnData; expected one to overwrite; choose another --out"
            )
    return path


def _is_export(path: Path) -> bool:
    """Whether it is a file where a file is written, or an AnnData in Zarr where a folder is; no link is one."""
    if path.suffix == ".h5ad" or path.is_symlink():
        return path.is_file() and not path.is_symlink()
    try:
        return '"encoding-type": "anndata"' in (path / "zarr.json").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _put_in_place(aside: Path, final: Path) -> None:
    if aside.is_dir():
        flush(aside)
    else:
        sync(aside)
    if not final.is_dir():
        move(aside, final)
        return
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
    os.rename(final, old)
    move(aside, final)
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


# What is written


def _write(target: Target, store: IslandStore, cells: IslandStore, threads: int, progress: Progress) -> None:
    target.group("", ANNDATA)
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        target.group(name, DICT)
    _write_uns(target, store, list(cells.samples.values()))
    var = _var(store, list(cells.samples.values()))
    _frame(target, "var", list(var))
    _write_column(target, "var/_index", var.index.to_series())
    for name, column in var.items():
        _write_column(target, f"var/{name}", column)
    _write_obs(target, cells)
    _write_x(target, cells, threads, progress)


def _write_uns(target: Target, store: IslandStore, samples: Sequence[Sample]) -> None:
    from anndata.io import write_elem

    names = ("assembly", "islands_sha256", "selection", "width_bp", "n_levels", "counting")
    values = {name: store.attributes[name] for name in names} | {"store_digest": store.digest}
    for name, value in values.items():
        write_elem(target.root["uns"], name, value)
    _write_strings(target, "uns/samples", np.array([sample.name for sample in samples], object))
    _write_strings(target, "uns/sample_digests", np.array([sample.digest for sample in samples], object))


def _var(store: IslandStore, samples: Sequence[Sample]) -> pd.DataFrame:
    flags = {f"measured_{sample.name}": sample.measured for sample in samples}
    measured = np.logical_and.reduce([np.ones(store.n_islands, bool), *flags.values()])
    frame = islands_frame(store.space)
    return pd.concat([frame, pd.DataFrame({"measured": measured, **flags}, index=frame.index)], axis=1)


def _write_x(target: Target, cells: IslandStore, threads: int, progress: Progress) -> None:
    samples, n_cells = list(cells.samples.values()), cells.n_cells
    n_open = sum(sample.n_open for sample in samples)
    target.group("X", _CSR, shape=[n_cells, cells.n_islands])
    data = target.numbers("X/data", n_open, np.dtype(np.uint8), encoded=False)
    indices = target.numbers("X/indices", n_open, np.dtype(np.int32), encoded=False)
    indptr = target.numbers("X/indptr", n_cells + 1, np.dtype(np.int64), encoded=False)
    indptr.append(np.zeros(1, np.int64))
    done = 0
    reads = (partial(sample.read_block, number) for sample in samples for number in range(sample.n_blocks))
    with progress.task("export", n_cells, "cells") as advance:
        for block in in_order(reads, threads):
            data.append(block.levels)
            indices.append(block.islands)
            indptr.append(block.offsets[1:] + done)
            done += int(block.offsets[-1])
            advance(len(block))
        for values in (data, indices, indptr):
            values.finish()


def _frame(target: Target, name: str, columns: list[str]) -> None:
    target.group(name, DATAFRAME, **{"_index": "_index", "column-order": columns})


def _write_obs(target: Target, cells: IslandStore) -> None:
    """Column by column: only one is in memory at a time."""
    names = obs_names(cells)
    _frame(target, "obs", ["sample", "barcode", *names])
    _write_names(target, cells)
    for name in names:
        column = obs_columns(cells, [name]).column(0).to_pandas(types_mapper=_NULLABLE.get)
        _write_column(target, f"obs/{name}", storable(pd.DataFrame({name: column}))[name])


def _write_names(target: Target, cells: IslandStore) -> None:
    """The index of obs, sample and barcode."""
    samples = list(cells.samples)
    sizes = [sample.n_cells for sample in cells.samples.values()]
    of_cell = pd.Categorical.from_codes(np.repeat(np.arange(len(samples)), sizes), samples)
    _write_column(target, "obs/sample", pd.Series(of_cell))
    barcode, index = (target.strings(f"obs/{name}", cells.n_cells) for name in ("barcode", "_index"))
    for of_sample, texts, twice in _barcodes(cells, of_cell):
        barcode.append(texts)
        index.append(of_sample.astype(object) + _between(samples) + texts if twice else texts)
    barcode.finish()
    index.finish()


def _barcodes(
    cells: IslandStore, of_cell: pd.Categorical
) -> Iterator[tuple[pd.Categorical, NDArray[Any], bool]]:
    """Chunk by chunk the samples, the barcodes, and whether any of all barcodes comes twice."""
    if not cells.samples:
        return
    column = obs_columns(cells, ["barcode"]).column(0).combine_chunks()
    for first in range(0, cells.n_cells, CHUNK):
        part = slice(first, first + CHUNK)
        texts = column[part].dictionary_decode().to_numpy(zero_copy_only=False).astype(object)
        yield of_cell[part], texts, len(column.dictionary) < cells.n_cells


def _between(samples: Sequence[str]) -> str:
    """What stands between sample and barcode: no name of a sample has a colon in it, but one may begin like another."""
    begins_like = any(two.startswith(f"{one}_") for one in samples for two in samples)
    return ":" if begins_like else "_"


def _write_column(target: Target, name: str, column: pd.Series) -> None:
    values: NDArray[Any] = column.to_numpy()
    if values.dtype == object and not isinstance(column.dtype, pd.CategoricalDtype):
        _write_strings(target, name, values)
        return
    if isinstance(column.dtype, pd.CategoricalDtype):
        target.group(name, CATEGORICAL, ordered=bool(column.cat.ordered))
        _write_strings(target, f"{name}/categories", column.cat.categories.to_numpy(object))
        name, values = f"{name}/codes", column.cat.codes.to_numpy()
    written = target.numbers(name, len(values), values.dtype)
    written.append(values)
    written.finish()


def _write_strings(target: Target, name: str, values: NDArray[Any]) -> None:
    written = target.strings(name, len(values))
    written.append(values)
    written.finish()

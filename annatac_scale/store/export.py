"""From the store's cells to AnnData: new obs columns in a copy of an h5ad file."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError


def write_obs_into_h5ad(
    source: Path | str,
    columns: pd.DataFrame,
    out: Path | str,
    obsm: Mapping[str, NDArray[np.floating]] | None = None,
) -> None:
    """Copy an h5ad file and add columns to its obs, and arrays to its obsm; all else of the file stays as it is.

    columns: indexed by barcode, in any order; numbers stay numbers, all else becomes categorical. Cells of the file
    that have no row get missing values; a column that obs has already is replaced.
    obsm: floating [rows of columns, any], by name, likewise
    out: written aside and renamed

    Raises InputError where the file cannot be read or written, or a barcode of ``columns`` is not in it.
    """
    source, out = Path(source), Path(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, aside)
        with h5py.File(aside, "r+") as file:
            barcodes = _add_columns(source, file, columns)
            for name, rows in (obsm or {}).items():
                _add_array(file, name, rows, columns.index.get_indexer(barcodes))
        os.replace(aside, out)
    except (OSError, KeyError) as error:
        raise InputError(
            f"{out}: cannot be made from {source} ({error}); expected a readable h5ad file and a folder to write to"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _add_array(file: h5py.File, name: str, rows: NDArray[np.floating], place: NDArray[np.intp]) -> None:
    """Add an array to obsm. place: the row of each cell of the file, -1 for none"""
    own = np.full((len(place), rows.shape[1]), np.nan, rows.dtype)
    own[place >= 0] = rows[place[place >= 0]]
    obsm = file.require_group("obsm")
    if "encoding-type" not in obsm.attrs:
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    if name in obsm:
        del obsm[name]
    write_elem(obsm, name, own)


def _add_columns(source: Path, file: h5py.File, columns: pd.DataFrame) -> pd.Index:
    """Returns the barcodes of the file."""
    obs = file["obs"]
    if not isinstance(obs, h5py.Group) or "_index" not in obs.attrs:
        raise InputError(
            f"{source}: found obs in the layout of anndata before 0.7; expected a data frame; open the file with "
            "anndata and write it again"
        )
    barcodes = pd.Index(read_elem(obs[obs.attrs["_index"]])).astype(str)
    _check_barcodes(source, barcodes, columns.index)
    rows = columns.reindex(barcodes)
    for name, column in rows.items():
        if name in obs:
            del obs[name]
        write_elem(obs, str(name), _storable(column))
    order = [*obs.attrs["column-order"], *columns.columns]
    obs.attrs["column-order"] = list(dict.fromkeys(str(name) for name in order))
    return barcodes


def _check_barcodes(source: Path, there: pd.Index, given: pd.Index) -> None:
    if not there.is_unique:
        raise InputError(
            f"{source}: found barcode {there[there.duplicated()][0]!r} twice in obs; expected each once; make them "
            "unique"
        )
    absent = given[~given.isin(there)]
    if len(absent):
        raise InputError(
            f"{source}: found no cell {absent[0]!r} in obs ({len(absent):,} of {len(given):,} are not there); "
            "expected the file that the cells come from; convert it again"
        )


def _storable(column: pd.Series) -> "NDArray[Any] | pd.Categorical":
    if column.dtype.kind in "iufb":
        return column.to_numpy()
    return pd.Categorical(column.astype(object).where(column.notna(), None))

"""From the store's cells to AnnData: new obs columns in a copy of an h5ad file."""

import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError


def write_obs_into_h5ad(source: Path | str, columns: pd.DataFrame, out: Path | str) -> None:
    """Copy an h5ad file and add columns to its obs; all else of the file stays as it is.

    columns: indexed by barcode, in any order; numbers stay numbers, all else becomes categorical. Cells of the file
    that have no row get missing values; a column that obs has already is replaced.
    out: written aside and renamed

    Raises InputError where the file cannot be read or written, or a barcode of ``columns`` is not in it.
    """
    source, out = Path(source), Path(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, aside)
        with h5py.File(aside, "r+") as file:
            _add_columns(source, file, columns)
        os.replace(aside, out)
    except (OSError, KeyError) as error:
        raise InputError(
            f"{out}: cannot be made from {source} ({error}); expected a readable h5ad file and a folder to write to"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _add_columns(source: Path, file: h5py.File, columns: pd.DataFrame) -> None:
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

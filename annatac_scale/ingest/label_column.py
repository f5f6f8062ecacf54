"""A column of labels from a file that any tool may have written: CSV, TSV, Parquet or h5ad; no other column is read."""

import csv
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import complaint, read_lines, shown
from annatac_scale.ingest.h5ad import open_hdf5
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.tables import MISSING, wrong_number_of_fields
from annatac_scale.store.elements import read_elem
from annatac_scale.store.place import Location

_KIND = re.compile(
    r"\.((?P<csv>csv(\.gz)?)|(?P<tsv>(tsv|txt)(\.gz)?)|(?P<parquet>parquet)|(?P<h5ad>h5ad))$", re.I
)
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_SEPARATOR_NAMES = {"csv": "commas", "tsv": "tabs"}
_UNNAMED = "Unnamed: {}"
"""What pandas, and we, call a column of text without a name by its place, from 0."""
_INDEX = (_UNNAMED.format(0), "index", "__index_level_0__")
"""What an index without a name is called: by pandas where it reads text, and where it writes text or Parquet."""
_DAMAGED = (OSError, EOFError, zlib.error, ValueError, pa.ArrowException)
_NAMES_SHOWN = 12


def is_label_file(location: Location) -> bool:
    """Whether the ending of a name says that ``read_label_column`` can read it."""
    return _KIND.search(str(location)) is not None


def read_label_column(location: Location, column: str) -> pd.DataFrame:
    """The columns barcode (str), label, and sample (str) where there is one; a row a cell, in the file's order.

    location: a file, or the URL of one, that ends with .csv, .tsv, .txt (tab-separated; these three also with .gz),
    .parquet or .h5ad (a column of obs; the barcodes are its index)
    A text or Parquet file names the cells in a column barcode, else in the index that pandas or R wrote. Fields of a
    text file may stand in double quotes; blank lines are left out.
    label: values as they are, of a text file texts; what is missing as NaN or None

    Raises InputError for a file that is damaged, has no such column or has it twice, names no barcodes, has no row, or
    a row of another length than the header.
    """
    found = _KIND.search(str(location))
    if found is None:
        raise InputError(
            f"{location}: found the ending {Path(str(location)).suffix!r}; expected .csv, .tsv, .txt, .parquet or "
            ".h5ad; write the labels as one of these"
        )
    kind = next(name for name in ("csv", "tsv", "parquet", "h5ad") if found[name])
    if kind == "h5ad":
        table = _from_h5ad(location, column)
    else:
        with local_copy(location) as path:
            table = _from_parquet(path, column) if kind == "parquet" else _from_text(path, column, kind)
    if not len(table):
        raise _no_row(location)
    n_unnamed = int(table["barcode"].isna().sum())
    if n_unnamed:
        raise InputError(
            f"{location}: found {n_unnamed:,} rows without a barcode; expected one each; remove or mend them"
        )
    for name in ("barcode", "sample"):
        if name in table:
            table[name] = table[name].astype(str).astype(object)
    return table


def _from_text(path: Path, column: str, kind: str) -> pd.DataFrame:
    rows = _rows(path, _SEPARATORS[kind])
    _, header = next(rows, (0, []))
    if not header:
        raise _no_row(path)
    there = [name or _UNNAMED.format(place) for place, name in enumerate(header)]
    places = {ours: there.index(name) for ours, name in _names(path, there, column).items()}
    values: dict[str, list[str]] = {ours: [] for ours in places}
    for number, fields in rows:
        if len(fields) != len(header):
            remedy = _remedy(len(fields), len(header))
            raise wrong_number_of_fields(
                path, number, len(fields), len(header), _SEPARATOR_NAMES[kind], remedy
            )
        for ours, place in places.items():
            values[ours].append(fields[place].strip())
    frame = pd.DataFrame(values, dtype=object)
    frame["label"] = frame["label"].where(~frame["label"].isin(MISSING))
    frame["barcode"] = frame["barcode"].replace("", np.nan)
    return frame


def _rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line, and fields, of each row."""
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=separator, strict=True)
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                yield reader.line_num, fields
    except csv.Error as error:
        raise complaint(
            path, reader.line_num, f"quotes that do not fit ({error})", "pairs of them", "mend the line"
        ) from error


def _remedy(n_fields: int, n_named: int) -> str:
    if n_fields == n_named + 1:
        return (
            "put a field that holds a separator in double quotes, or, where each row begins with its name as R's "
            "write.table has it, begin the header with barcode"
        )
    return "mend the line"


def _from_parquet(path: Path, column: str) -> pd.DataFrame:
    try:
        schema = pq.read_schema(path)
        names = _names(path, schema.names, column, _named_index(schema))
        table = pq.read_table(path, columns=list(dict.fromkeys(names.values())))
        return pd.DataFrame({ours: table[theirs].to_pandas() for ours, theirs in names.items()})
    except InputError:
        raise
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def _named_index(schema: pa.Schema) -> Sequence[str]:
    """The column that was the index of the data frame, where pandas wrote one with a name."""
    metadata = schema.pandas_metadata or {}
    return [name for name in metadata.get("index_columns", ()) if isinstance(name, str)][:1]


def _from_h5ad(location: Location, column: str) -> pd.DataFrame:
    with open_hdf5(location) as file:
        try:
            obs = file["obs"]
            if not isinstance(obs, h5py.Group) or "_index" not in obs.attrs:
                raise InputError(
                    f"{location}: found obs in the layout of anndata before 0.7; expected a data frame; open the file "
                    "with anndata and write it again"
                )
            index = str(obs.attrs["_index"])
            there = [name for name in obs if name != index]
            names = _names(location, ["barcode", *(name for name in there if name != "barcode")], column)
            places = {ours: index if ours == "barcode" else theirs for ours, theirs in names.items()}
            return pd.DataFrame({ours: read_elem(obs[place]) for ours, place in places.items()})
        except InputError:
            raise
        except (*_DAMAGED, KeyError, RuntimeError) as error:
            raise _unreadable(location, error) from error


def _names(place: Location, there: Sequence[str], column: str, index: Sequence[str] = ()) -> dict[str, str]:
    """What barcode, label and sample (if any) are called among the columns that are there."""
    shown_names = ", ".join(there[:_NAMES_SHOWN]) + (", ..." if len(there) > _NAMES_SHOWN else "")
    if column not in there:
        raise InputError(
            f"{place}: found no column {shown(column)}; expected it beside the barcodes; there are {shown_names}; "
            "give one of these"
        )
    barcode = next((name for name in ("barcode", *index, *_INDEX) if name in there), None)
    if barcode is None:
        raise InputError(
            f"{place}: found the columns {shown_names}; expected one called barcode; rename the one that names the "
            "cells"
        )
    names = {"barcode": barcode, "label": column}
    names |= {"sample": "sample"} if "sample" in there and column != "sample" else {}
    twice = [name for name in names.values() if list(there).count(name) > 1]
    if twice:
        raise InputError(
            f"{place}: found two columns {shown(twice[0])}; expected each name once; rename or remove one of them"
        )
    return names


def _no_row(place: Location) -> InputError:
    return InputError(f"{place}: found no row; expected one a cell; check the file")


def _unreadable(place: Location, error: Exception) -> InputError:
    said = " ".join(str(error).split())
    return InputError(
        f"{place}: cannot be read ({said}); expected a whole file of the kind that its name says; check it"
    )

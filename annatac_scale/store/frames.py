"""AnnData's encodings of data frames and arrays as the files of a Zarr v3 group, made in memory.

Written by hand, because zarr and anndata take milliseconds an array, most of the time of a small sample. Each array is
one chunk, ``c.0``, beside its metadata: a folder less than Zarr's usual ``c/0``.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from annatac_scale.store.schema import ZSTD_LEVEL

Files = dict[str, bytes]
"""Contents by name, relative and "/"-separated."""

_ZSTD = Zstd(level=ZSTD_LEVEL)
_ZSTD_CODEC = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}


def group_file(attributes: dict[str, Any]) -> bytes:
    """The ``zarr.json`` of a group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def encoded_group(encoding: str, version: str, **attributes: Any) -> bytes:
    """The ``zarr.json`` of a group in one of AnnData's encodings."""
    return group_file({"encoding-type": encoding, "encoding-version": version, **attributes})


def array_files(name: str, values: NDArray[Any] | Sequence[str]) -> Files:
    """A one-dimensional array: numbers or truth values (little-endian), or else strings."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        serializer: dict[str, Any] = {"name": "bytes"}
        if values.dtype.itemsize > 1:
            serializer["configuration"] = {"endian": "little"}
        return _array(
            name, values.dtype.name, len(values), values.dtype.type(0).item(), serializer, "array", values
        )
    strings = np.array(list(values), object)
    data = VLenUTF8().encode(strings)
    return _array(name, "string", len(strings), "", {"name": "vlen-utf8"}, "string-array", data)


def _array(
    name: str, data_type: str, n: int, fill: Any, serializer: dict[str, Any], encoding: str, data: Any
) -> Files:
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n],
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(n, 1)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": [serializer, _ZSTD_CODEC],
        "attributes": {"encoding-type": encoding, "encoding-version": "0.2.0"},
    }
    files = {f"{name}/zarr.json": json.dumps(metadata).encode()}
    if n:
        files[f"{name}/c.0"] = _ZSTD.encode(np.ascontiguousarray(data))
    return files


def column_files(name: str, column: pd.Series) -> Files:
    """A column of a data frame: numbers, truth values or strings, or a categorical of strings."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return array_files(name, column.to_numpy())
    categories = column.cat.categories
    return {
        f"{name}/zarr.json": encoded_group("categorical", "0.2.0", ordered=bool(column.cat.ordered)),
        **array_files(f"{name}/categories", categories.to_numpy(object)),
        **array_files(f"{name}/codes", column.cat.codes.to_numpy()),
    }


def frame_file(index: str, columns: Sequence[str]) -> bytes:
    """The ``zarr.json`` of a data frame: the names of its index and, in order, its columns."""
    return encoded_group("dataframe", "0.2.0", **{"column-order": list(columns), "_index": index})


def frame_files(name: str, frame: pd.DataFrame) -> Files:
    """A data frame whose index has a name."""
    files = {f"{name}/zarr.json": frame_file(str(frame.index.name), [str(column) for column in frame])}
    files |= array_files(f"{name}/{frame.index.name}", frame.index.to_numpy(object))
    for column, values in frame.items():
        files |= column_files(f"{name}/{column}", values)
    return files

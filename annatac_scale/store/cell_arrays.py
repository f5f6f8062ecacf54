"""Numbers of cells, an array a sample, written part by part: a Zarr v3 group in which each part is one chunk.

The files are made in memory, so that they go the same way to a disk and to object storage. zarr, dask and anndata read
the arrays.
"""

import json
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.frames import Files, group_file
from annatac_scale.store.place import Location, joined, open_group
from annatac_scale.store.schema import ZSTD_LEVEL


def cell_array_files(
    sample: str, shape: tuple[int, int], part_cells: int, unit: int, rows: NDArray[Any]
) -> Files:
    """The files of part ``unit`` of a sample's array, by name within the group; the first part has the metadata too.

    shape: of the array, cells x columns; part_cells: cells of every part but the last
    rows: float16 or float32 [n, columns]
    """
    chunk_cells = max(1, min(part_cells, shape[0]))
    files: Files = {}
    if unit == 0:
        files = {
            "zarr.json": group_file({}),
            f"{sample}/zarr.json": _metadata(shape, chunk_cells, rows.dtype.name),
        }
    if len(rows):
        chunk = np.zeros((chunk_cells, shape[1]), rows.dtype)  # chunks at the end of an array are whole, too
        chunk[: len(rows)] = rows
        files[chunk_file(sample, unit)] = Zstd(level=ZSTD_LEVEL).encode(chunk)
    return files


def chunk_file(sample: str, unit: int) -> str:
    """The name, within the group, of the file that holds part ``unit``."""
    return f"{sample}/c.{unit}.0"


def _metadata(shape: tuple[int, int], chunk_cells: int, dtype: str) -> bytes:
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk_cells, max(shape[1], 1)]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",  # what a chunk that was lost reads as
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},
        ],
        "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
    }
    return json.dumps(metadata).encode()


def read_cell_array(group: Location, sample: str, first: int, n: int) -> NDArray[Any]:
    """Rows ``first`` to ``first + n`` of a sample's array. Raises StoreError where it cannot be read."""
    try:
        array = open_group(group)[sample]
        assert isinstance(array, zarr.Array)
        rows: NDArray[Any] = np.asarray(array[first : first + n])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{joined(group, sample)}: cannot be read at cell {first:,} ({error!r}); expected an array of "
            "`annatac predict --embeddings`; predict again into another folder"
        ) from error
    return rows

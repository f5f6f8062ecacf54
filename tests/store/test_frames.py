"""Data frames and arrays written by hand, read back by zarr and anndata."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_elem
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from annatac_scale.store.frames import Files, array_files, frame_files
from annatac_scale.store.place import place_of

NUMBERS = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]


def group_of(files: Files) -> zarr.Group:
    """The files as a group in memory."""
    store = zarr.storage.MemoryStore(
        {name: zarr.core.buffer.cpu.Buffer.from_bytes(data) for name, data in files.items()}
    )
    return zarr.open_group(store, mode="r")


ROOT = {"zarr.json": b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'}


@given(st.sampled_from(NUMBERS).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 40))))
def test_zarr_reads_arrays_of_numbers(values: Any) -> None:
    read = group_of(ROOT | array_files("a", values))["a"]
    assert read.dtype == values.dtype
    assert read.attrs["encoding-type"] == "array"
    np.testing.assert_array_equal(read[:], values)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=30))
def test_anndata_reads_arrays_of_strings(values: list[str]) -> None:
    read = read_elem(group_of(ROOT | array_files("a/b", values))["a/b"])
    assert list(read) == values


@pytest.mark.parametrize("n", [0, 1, 300])
def test_anndata_reads_the_same_data_frame(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(n)
    columns: dict[str, Any] = {dtype: rng.integers(0, 2, n).astype(dtype) for dtype in NUMBERS}
    columns["missing"] = pd.Categorical.from_codes(rng.integers(-1, 2, n), ["µ 🧠", ""])
    columns["ordered"] = pd.Categorical.from_codes(
        rng.integers(0, 200, n), [f"c{i}" for i in range(200)], ordered=True
    )
    frame = pd.DataFrame(
        columns, index=pd.Index([f"cell {i}" for i in range(n)], name="barcode", dtype=object)
    )
    place_of(tmp_path).write_all(ROOT | frame_files("obs", frame))
    read = read_elem(zarr.open_group(tmp_path, mode="r")["obs"])
    pd.testing.assert_frame_equal(read, frame, check_index_type=False)
    assert read["missing"].cat.categories.tolist() == ["µ 🧠", ""]
    assert read["ordered"].cat.ordered

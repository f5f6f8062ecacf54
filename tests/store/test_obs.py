"""What becomes of obs columns on disk, and obs replaced, with kills in the middle."""

import contextlib
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from random_stores import SPACE, random_cells, random_obs, write_sample

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs

NAN = float("nan")
DAY = datetime.date(2026, 1, 2)


def arrow(values: list[Any], dtype: pa.DataType) -> pd.Series:
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.array(values, dtype)))


NUMBERS = {
    "Int64": (pd.array([1, 2, 3], "Int64"), [1, 2, 3], "int64"),
    "Int64 with gaps": (pd.array([1, None, 3], "Int64"), [1, NAN, 3], "float64"),
    "UInt8": (pd.array([1, 2, 255], "UInt8"), [1, 2, 255], "uint8"),
    "boolean": (pd.array([True, False, True], "boolean"), [True, False, True], "bool"),
    "Float64": (pd.array([0.5, 2, 3], "Float64"), [0.5, 2, 3], "float64"),
    "Float32 with gaps": (pd.array([0.5, None, 3], "Float32"), [0.5, NAN, 3], "float32"),
    "Arrow int32": (arrow([1, 2, 3], pa.int32()), [1, 2, 3], "int32"),
    "Arrow int32 with gaps": (arrow([1, None, 3], pa.int32()), [1, NAN, 3], "float64"),
    "Arrow bool": (arrow([True, False, True], pa.bool_()), [True, False, True], "bool"),
    "Arrow double with gaps": (arrow([0.5, None, 3.0], pa.float64()), [0.5, NAN, 3], "float64"),
    "long double": (np.array([0.5, 2, 3], np.longdouble), [0.5, 2, 3], "float64"),
    "half": (np.array([0.5, 2, 3], np.float16), [0.5, 2, 3], "float16"),
    "big-endian int": (np.array([1, 2, 3], ">i4"), [1, 2, 3], "int32"),
    "big-endian float": (np.array([1, NAN, 3], ">f8"), [1, NAN, 3], "float64"),
    "sparse": (pd.arrays.SparseArray([0, 0, 3]), [0, 0, 3], "int64"),
    "all missing": (np.full(3, NAN), [NAN] * 3, "float64"),
}
TEXT = {
    "boolean with gaps": (pd.array([True, None, False], "boolean"), ["True", None, "False"]),
    "Arrow bool with gaps": (arrow([True, None, False], pa.bool_()), ["True", None, "False"]),
    "big integers with gaps": (pd.array([2**60 + 1, None, -3], "Int64"), [str(2**60 + 1), None, "-3"]),
    "string": (pd.array(["é", None, "b"], "string"), ["é", None, "b"]),
    "Arrow string": (arrow(["é", None, "b"], pa.string()), ["é", None, "b"]),
    "Arrow dictionary": (arrow(["é", None, "b"], pa.dictionary(pa.int8(), pa.string())), ["é", None, "b"]),
    "Arrow decimal": (arrow([1, None, 3], pa.decimal128(5, 1)), ["1.0", None, "3.0"]),
    "dates": ([DAY, None, DAY], ["2026-01-02", None, "2026-01-02"]),
    "mixed": ([1, "a", None], ["1", "a", None]),
    "all None": (np.array([None] * 3, object), [None] * 3),
    "categories": (pd.Categorical(["b", None, "a"], ["c", "b", "a"]), ["b", None, "a"]),
    "numbers as categories": (pd.Categorical([2, None, 1]), ["2", None, "1"]),
    "categories of one text": (pd.Categorical(np.array([1, "1", "2"], object)), ["1", "1", "2"]),
    "complex": (np.array([1j, 2, 3]), ["1j", "(2+0j)", "(3+0j)"]),
    "times": (
        pd.to_datetime(["2026-01-02", None, "2026-01-03"]),
        ["2026-01-02 00:00:00", None, "2026-01-03 00:00:00"],
    ),
}


def stored(path: Path, column: Any) -> pd.Series:
    """The column as it comes back; the digest is that of what came back."""
    digest = write_sample(
        path, "s", random_cells(3, 1), obs=pd.DataFrame({"c": column}).set_axis(["x", "y", "z"])
    )
    obs = IslandStore.open(path).samples["s"].obs()
    assert replace_obs(path, "s", obs) == digest
    return obs["c"]


@pytest.mark.parametrize(("column", "values", "dtype"), NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_any_kind_are_stored_as_plain_numbers(
    path: Path, column: Any, values: list[Any], dtype: str
) -> None:
    found = stored(path, column)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found.to_numpy(), values)


@pytest.mark.parametrize(("column", "values"), TEXT.values(), ids=TEXT.keys())
def test_all_else_is_stored_as_text_and_missing_stays_missing(
    path: Path, column: Any, values: list[str | None]
) -> None:
    found = stored(path, column)
    assert [None if pd.isna(value) else value for value in found] == values


def test_big_endian_numbers_lie_on_disk_in_the_order_of_all_others(path: Path) -> None:
    write_sample(
        path, "s", random_cells(2, 1), obs=pd.DataFrame({"c": np.array([1, 2], ">i4")}, index=["x", "y"])
    )
    metadata = json.loads((path / "samples/s/obs/c/zarr.json").read_text())
    assert metadata["codecs"][0] == {"name": "bytes", "configuration": {"endian": "little"}}


def test_the_digest_does_not_know_how_a_number_was_held(path: Path) -> None:
    plain = pd.DataFrame({"c": [1, 2, 3]}, index=["x", "y", "z"])
    digests = {
        write_sample(path, f"s{i}", random_cells(3, 1), obs=plain.astype(dtype))
        for i, dtype in enumerate(["int64", ">i8", "Int64", "int64[pyarrow]", "Sparse[int64]"])
    }
    assert len(digests) == 1


# Replacing


def test_replacing_obs_leaves_x_alone_and_changes_the_digest(path: Path) -> None:
    write_sample(path, "s", random_cells(20, 1))
    shard = path / "samples/s/X/c/0/0"
    before, inode = IslandStore.open(path).samples["s"].digest, shard.stat().st_ino
    replace_obs(path, "s", random_obs(20, 1))
    after = IslandStore.open(path).samples["s"].digest
    assert after != before
    assert shard.stat().st_ino == inode
    replace_obs(path, "s", random_obs(20, 0))
    assert IslandStore.open(path).samples["s"].digest == before
    assert not (path / ".incoming").exists()


SWAPPED = [1, 0, *range(2, 20)]


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (random_obs(20, 1).iloc[SWAPPED], "obs row 0: found barcode 'BC00001-1', expected 'BC00000-1'"),
        (
            random_obs(20, 1).rename(index={"BC00007-1": "new"}),
            "row 7: found barcode 'new', expected 'BC00007-1'",
        ),
        (random_obs(19, 1), "19 obs rows for 20 cells"),
    ],
    ids=["another order", "another barcode", "too few"],
)
def test_obs_of_other_barcodes_is_refused_and_nothing_changed(
    path: Path, obs: pd.DataFrame, message: str
) -> None:
    digest = write_sample(path, "s", random_cells(20, 1))
    with pytest.raises(StoreError, match=f"sample 's'.*{message}"):
        replace_obs(path, "s", obs)
    sample = IslandStore.open(path).samples["s"]
    assert sample.digest == digest
    assert list(sample.obs()["score"]) == list(random_obs(20, 0)["score"])
    assert not (path / ".incoming").exists()


def test_obs_of_an_unknown_sample_or_with_reserved_columns_is_refused(path: Path) -> None:
    write_sample(path, "s", random_cells(20, 1))
    with pytest.raises(StoreError, match=r"no sample 't'; it holds \['s'\]"):
        replace_obs(path, "t", random_obs(20, 1))
    with pytest.raises(InputError, match="found the obs column 'sample'"):
        replace_obs(path, "s", IslandStore.open(path).obs().set_index("barcode"))


def replace_until_killed(path: Path, renames: int) -> None:
    """Begin to replace the obs of "s"; the process dies after so many renames, at last before the index."""
    done = []

    def move_until_killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        os.rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("annatac_scale.store.obs.move", move_until_killed)
        patch.setattr("annatac_scale.store.obs.change_index", move_until_killed)
        with pytest.raises(KeyboardInterrupt):
            replace_obs(path, "s", random_obs(20, 1))


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_of_obs_killed_between_its_renames_is_settled(path: Path, renames: int) -> None:
    old = write_sample(path, "s", random_cells(20, 1))
    replace_until_killed(path, renames)
    sample = IslandStore.open(path).samples["s"]
    expected = random_obs(20, 1 if renames == 2 else 0)
    assert list(sample.obs()["score"]) == list(expected["score"])
    assert (sample.digest == old) == (renames < 2)
    assert not (path / ".incoming").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_obs_can_be_replaced_at_once_after_a_kill_and_a_refusal_loses_nothing(
    path: Path, renames: int
) -> None:
    write_sample(path, "s", random_cells(20, 1))
    replace_until_killed(path, renames)
    with pytest.raises(StoreError, match="19 obs rows"):
        replace_obs(path, "s", random_obs(19, 2))
    assert len(IslandStore.open(path).obs()) == 20
    replace_until_killed(path, renames)
    digest = replace_obs(path, "s", random_obs(20, 2))
    sample = IslandStore.open(path).samples["s"]
    assert sample.digest == digest
    assert list(sample.obs()["score"]) == list(random_obs(20, 2)["score"])
    assert not (path / ".incoming").exists()


@pytest.fixture
def public() -> Iterator[Path]:
    """A store that all users can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    create_store(folder / "atlas.zarr", SPACE, "insertion")
    yield folder / "atlas.zarr"
    shutil.rmtree(folder)


@contextlib.contextmanager
def as_a_reader(path: Path) -> Iterator[None]:
    """Be somebody who can read the store but not write it."""
    folders = [folder for folder in [path, *path.rglob("*")] if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # modes mean nothing to root
    try:
        yield
    finally:
        os.seteuid(user)
        for folder in folders:
            folder.chmod(0o755)


def test_who_cannot_write_reads_a_store_that_is_settled(public: Path) -> None:
    write_sample(public, "s", random_cells(20, 1))
    with as_a_reader(public):
        assert len(IslandStore.open(public).obs()) == 20


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_who_cannot_write_refuses_a_store_until_its_obs_is_settled(public: Path, renames: int) -> None:
    write_sample(public, "s", random_cells(20, 1))
    replace_until_killed(public, renames)
    with as_a_reader(public), pytest.raises(StoreError, match="cannot be settled from here"):
        IslandStore.open(public)
    IslandStore.open(public)
    with as_a_reader(public):
        assert len(IslandStore.open(public).obs()) == 20


def test_what_is_left_of_a_sample_that_the_index_does_not_name_harms_nobody(path: Path) -> None:
    write_sample(path, "s", random_cells(20, 1))
    replace_until_killed(path, 1)
    (path / ".incoming/.s.obs").rename(path / ".incoming/.gone.obs")
    (path / ".incoming/.gone.obs/old").rename(path / "samples/s/obs")
    assert len(IslandStore.open(path).obs()) == 20


def test_an_obs_that_is_gone_is_a_store_error(path: Path) -> None:
    write_sample(path, "s", random_cells(20, 1))
    shutil.rmtree(path / "samples/s/obs")
    with pytest.raises(StoreError, match="samples/s: found no obs"):
        IslandStore.open(path).samples["s"].obs()

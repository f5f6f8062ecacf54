"""Columns of obs over all samples: what pandas and anndata make of them, and nothing read beside them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from object_storage import ObjectStorage
from random_stores import SPACE, random_cells, random_obs, write_sample

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.columns import obs_columns
from annatac_scale.store.place import Folder
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs

NAN = float("nan")


def write(path: Path | str, **samples: pd.DataFrame) -> IslandStore:
    """A store of samples with these obs; barcodes are numbered."""
    for name, obs in samples.items():
        cells = random_cells(len(obs), 1)
        write_sample(path, name, cells, obs=obs.set_axis([f"{name}{i}" for i in range(len(obs))]))
    return IslandStore.open(path)


def column(store: IslandStore, name: str) -> list[Any]:
    """A column as Python has it."""
    table = obs_columns(store, [name])
    assert table.column_names == [name]
    assert table.num_rows == store.n_cells
    return table[name].to_pylist()


def joined_by_pandas(store: IslandStore, columns: list[str] | None) -> pd.DataFrame:
    """``IslandStore.obs`` by anndata and pandas, of whole data frames."""
    frames = [
        sample.obs().reset_index(names="barcode").assign(sample=name)
        for name, sample in store.samples.items()
    ]
    known = list(dict.fromkeys(name for frame in frames for name in frame))
    wanted = list(dict.fromkeys(["sample", "barcode", *(known if columns is None else columns)]))
    text = [{n: object for n, d in f.dtypes.items() if isinstance(d, pd.CategoricalDtype)} for f in frames]
    plain = [frame.astype(types).reindex(columns=wanted) for frame, types in zip(frames, text, strict=True)]
    return pd.concat(plain, ignore_index=True)


KINDS = {
    "text": st.sampled_from(["a", "b", "é", "", None]),
    "bool": st.booleans(),
    "int8": st.integers(-128, 127),
    "uint8": st.integers(0, 255),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "float16": st.floats(width=16, allow_infinity=False),
    "float32": st.floats(width=32, allow_infinity=False),
    "float64": st.floats(allow_infinity=False),
}


@st.composite
def frames(draw: st.DrawFn) -> dict[str, pd.DataFrame]:
    """obs of one to three samples, the columns a, b, c of any kind, each maybe missing."""
    samples = {}
    for name in draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True)):
        n = draw(st.integers(0, 4))
        columns = {}
        for key in draw(st.lists(st.sampled_from("abc"), unique=True)):
            kind = draw(st.sampled_from(list(KINDS)))
            values = draw(st.lists(KINDS[kind], min_size=n, max_size=n))
            columns[key] = np.array(values, object if kind == "text" else kind)
        samples[name] = pd.DataFrame(columns, index=range(n))
    return samples


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Iterator[Path]]:
    """New empty stores, as many as asked for."""

    def new() -> Iterator[Path]:
        for number in range(10**6):
            folder = tmp_path / f"{number}.zarr"
            create_store(folder, SPACE, "insertion")
            yield folder
            shutil.rmtree(folder)

    return new()


def test_obs_is_what_anndata_and_pandas_make_of_whole_frames(folders: Iterator[Path]) -> None:
    @given(samples=frames(), columns=st.none() | st.lists(st.sampled_from("abc"), unique=True))
    def check(samples: dict[str, pd.DataFrame], columns: list[str] | None) -> None:
        store = write(next(folders), **samples)
        known = {name for frame in samples.values() for name in frame}
        if not set(columns or ()) <= known:
            with pytest.raises(InputError, match="no obs column"):
                store.obs(columns)
            return
        pd.testing.assert_frame_equal(store.obs(columns), joined_by_pandas(store, columns))

    check()


def test_columns_hold_the_values_of_all_samples_and_nulls_elsewhere(folders: Iterator[Path]) -> None:
    @given(samples=frames())
    def check(samples: dict[str, pd.DataFrame]) -> None:
        store = write(next(folders), **samples)
        for name in sorted({name for frame in samples.values() for name in frame}):
            kinds = {frame[name].dtype.kind if name in frame else "missing" for frame in samples.values()} - {
                "missing"
            }
            expected: list[Any] = []
            for frame in samples.values():
                values = frame[name].tolist() if name in frame else [None] * len(frame)
                expected += [plain(value, "O" in kinds) for value in values]
            found = column(store, name)
            if "O" in kinds:
                assert found == expected
            else:
                widest = np.result_type(*(frame[name].dtype for frame in samples.values() if name in frame))
                same = [None if value is None else widest.type(value).item() for value in expected]
                assert found == same

    check()


def plain(value: Any, as_text: bool) -> Any:
    """None where missing; in a column of text, numbers as Python writes them, whole ones without a point."""
    if value is None or value != value:
        return None
    if not as_text or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value)
    return str(int(value)) if value == int(value) and abs(value) < 1e16 else str(float(value))


def test_text_and_sample_are_codes_into_one_dictionary(path: Path) -> None:
    store = write(
        path,
        first=pd.DataFrame({"t": ["b", None, "a"]}),
        none=pd.DataFrame({"u": [1.0]}),
        second=pd.DataFrame({"t": pd.Categorical(["c", "b"], ["z", "b", "c"])}),
    )
    table = obs_columns(store, ["t", "sample", "barcode"])
    text = pa.dictionary(pa.int32(), pa.string())
    assert table.schema.types == [text] * 3
    assert [len(chunked.chunks) for chunked in table.columns] == [1, 1, 1]
    assert table["t"].to_pylist() == ["b", None, "a", None, "c", "b"]
    assert table["t"].null_count == 2
    assert table["sample"].to_pylist() == ["first"] * 3 + ["none"] + ["second"] * 2
    assert table["barcode"].to_pylist() == ["first0", "first1", "first2", "none0", "second0", "second1"]
    assert table["sample"].chunk(0).dictionary.to_pylist() == ["first", "none", "second"]


def test_numbers_have_their_widest_type_and_nulls_where_they_miss(path: Path) -> None:
    store = write(
        path,
        a=pd.DataFrame({"n": np.array([1, 2], "i2"), "h": np.array([1, NAN], "f2"), "flag": [True, False]}),
        b=pd.DataFrame({"n": np.array([3], "u1"), "h": np.array([2.5], "f2")}),
    )
    table = obs_columns(store, ["n", "h", "flag"])
    assert table.schema.types == [pa.int16(), pa.float32(), pa.bool_()]
    assert table.to_pydict() == {"n": [1, 2, 3], "h": [1.0, None, 2.5], "flag": [True, False, None]}


def test_numbers_of_one_sample_become_text_where_another_has_text(path: Path) -> None:
    store = write(
        path,
        a=pd.DataFrame({"donor": [1, 2]}),
        b=pd.DataFrame({"donor": ["1", "D2"]}),
        c=pd.DataFrame({"donor": [2.0, NAN]}),
        d=pd.DataFrame({"donor": [True, False]}),
    )
    assert column(store, "donor") == ["1", "2", "1", "D2", "2", None, "True", "False"]


def test_samples_without_cells_have_their_columns(path: Path) -> None:
    store = write(path, a=random_obs(0, 1), b=random_obs(2, 1), c=random_obs(0, 1))
    assert column(store, "cell_type") == list(random_obs(2, 1)["cell_type"])
    assert column(store, "score") == list(random_obs(2, 1)["score"])
    shutil.rmtree(path / "samples/b")
    index = json.loads((path / "samples/zarr.json").read_text())
    del index["attributes"]["index"][1]
    (path / "samples/zarr.json").write_text(json.dumps(index))
    assert column(IslandStore.open(path), "cell_type") == []
    assert column(IslandStore.open(path), "score") == []


def test_only_the_asked_columns_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(path, a=random_obs(3, 1), b=random_obs(2, 1))
    asked: list[str] = []
    read = Folder.read

    def seen(self: Folder, name: str) -> bytes:
        asked.append(f"{Path(self.location).relative_to(path)}/{name}")
        return read(self, name)

    monkeypatch.setattr(Folder, "read", seen)
    obs_columns(store, ["score", "sample"])
    assert sorted(asked) == [
        f"samples/{sample}/obs/score/{file}" for sample in "ab" for file in ("c.0", "zarr.json")
    ]


@pytest.mark.parametrize("name", ["tisue", "", ".", "..", "cell_type/codes", "../X", "zarr.json", "_index"])
@pytest.mark.parametrize("through", ["table", "frame"])
def test_a_column_that_no_sample_has_is_refused(path: Path, name: str, through: str) -> None:
    store = write(path, a=random_obs(3, 1), b=random_obs(2, 1)[["score"]])
    with pytest.raises(
        InputError,
        match=r"no obs column .*; there are barcode, cell_type, n_fragments, note, sample, score; give one of",
    ):
        obs_columns(store, [name]) if through == "table" else store.obs([name])


def test_a_store_without_samples_has_no_columns(path: Path) -> None:
    store = IslandStore.open(path)
    with pytest.raises(InputError, match=r"holds no sample, so no obs column 'sample'; add one with"):
        obs_columns(store, ["sample"])
    with pytest.raises(InputError, match=r"holds no sample, so no obs column 'a'; add one with"):
        store.obs(["a"])
    assert list(store.obs()) == ["sample", "barcode"]


def test_the_frame_may_be_written_to(path: Path) -> None:
    obs = write(path, a=random_obs(3, 1)).obs()
    obs.loc[0, "score"] = 5.0
    obs.loc[0, "n_fragments"] = 7
    assert obs["score"][0] == 5


# How other writers may put it


def rewritten(path: Path, name: str, **options: Any) -> None:
    """An array put down anew, by zarr."""
    group = zarr.open_group(path / "samples/a/obs", mode="r+")
    array: Any = group[name]
    values, attributes = array[:], dict(array.attrs)
    kind = "string" if values.dtype.kind in "OT" else values.dtype
    del group[name]
    new = group.create_array(name, shape=values.shape, dtype=kind, attributes=attributes, **options)
    new[:] = values


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (3,)},
        {"chunks": (100,)},
        {"chunks": (10,), "compressors": None},
        {"chunks": (10,), "compressors": zarr.codecs.GzipCodec()},
        {"chunks": (2,), "shards": (10,)},
        {"chunks": (10,), "chunk_key_encoding": {"name": "v2", "separator": "."}},
    ],
    ids=["many chunks", "a large chunk", "not compressed", "gzip", "shards", "other keys"],
)
def test_any_chunks_and_codecs_are_read(path: Path, options: dict[str, Any]) -> None:
    expected = random_obs(10, 1)
    write(path, a=expected)
    for name in ("n_fragments", "cell_type/codes"):
        rewritten(path, name, **options)
    if "shards" not in options:
        rewritten(path, "barcode", **options)
    store = IslandStore.open(path)
    assert column(store, "n_fragments") == expected["n_fragments"].tolist()
    assert column(store, "cell_type") == list(expected["cell_type"])
    assert column(store, "barcode") == [f"a{i}" for i in range(10)]
    pd.testing.assert_frame_equal(store.obs(), joined_by_pandas(store, None))


def test_big_endian_numbers_are_read(path: Path) -> None:
    write(path, a=pd.DataFrame({"n": np.array([1, 2, 300], "i4")}))
    rewritten(path, "n", serializer=zarr.codecs.BytesCodec(endian="big"))
    assert column(IslandStore.open(path), "n") == [1, 2, 300]


def test_a_chunk_of_nothing_but_the_fill_value_may_be_left_out(path: Path) -> None:
    write(path, a=pd.DataFrame({"n": [0, 0], "t": ["x", "x"]}))
    (path / "samples/a/obs/n/c.0").unlink()
    (path / "samples/a/obs/t/codes/c.0").unlink()
    store = IslandStore.open(path)
    assert column(store, "n") == [0, 0]
    assert column(store, "t") == ["x", "x"]


# Damage


@pytest.mark.parametrize(
    ("name", "file", "data"),
    [
        pytest.param("score", "score/zarr.json", b"{", id="torn metadata"),
        pytest.param("score", "score/zarr.json", b"[]", id="other metadata"),
        pytest.param("score", "score/zarr.json", b'{"node_type": "array"}', id="metadata that lacks keys"),
        pytest.param("score", "score/c.0", b"", id="an empty chunk"),
        pytest.param("score", "score/c.0", b"(\xb5/\xfd nothing", id="a torn chunk"),
        pytest.param("cell_type", "cell_type/codes/c.0", b"nothing", id="torn codes"),
        pytest.param("cell_type", "cell_type/codes/zarr.json", None, id="codes are gone"),
        pytest.param("cell_type", "cell_type/zarr.json", b'{"node_type": "group"}', id="no encoding"),
        pytest.param("cell_type", "zarr.json", None, id="a column that obs does not know is one"),
        pytest.param("barcode", "barcode/c.0", b"nothing", id="torn barcodes"),
        pytest.param("barcode", "barcode/zarr.json", None, id="barcodes are gone"),
        pytest.param("none", "zarr.json", b"{", id="obs is torn"),
        pytest.param("none", "zarr.json", None, id="obs is gone"),
    ],
)
def test_damage_is_a_store_error_that_names_the_place(
    path: Path, name: str, file: str, data: bytes | None
) -> None:
    store = write(path, a=random_obs(5, 1))
    where = path / "samples/a/obs" / file
    if data is None:
        where.unlink()
    else:
        where.write_bytes(data)
    if name == "cell_type" and file == "zarr.json":
        assert column(store, name) == list(random_obs(5, 1)["cell_type"])
        return
    with pytest.raises(StoreError, match=r"samples/a.*(damaged|found no obs).*again"):
        obs_columns(store, [name])


def test_codes_beyond_the_categories_are_damage(path: Path) -> None:
    store = write(path, a=random_obs(5, 1))
    array: Any = zarr.open_group(path / "samples/a/obs", mode="r+")["cell_type/codes"]
    array[2] = 7
    with pytest.raises(StoreError, match=r"obs/cell_type: found it damaged .codes 0 to 7 for 2 categories"):
        obs_columns(store, ["cell_type"])


def test_a_column_of_another_length_is_damage(path: Path) -> None:
    store = write(path, a=random_obs(5, 1), b=random_obs(4, 1))
    shutil.copytree(path / "samples/b/obs/score", path / "samples/a/obs/score", dirs_exist_ok=True)
    with pytest.raises(StoreError, match=r"a/obs/score: found it damaged .4 values for 5 cells"):
        store.obs(["score"])


# Object storage


def test_a_column_takes_two_requests_a_sample_and_text_five(s3: ObjectStorage) -> None:
    url = f"{s3.bucket()}/atlas.zarr"
    create_store(url, SPACE, "insertion")
    write(url, **{f"s{i}": random_obs(3, i) for i in range(5)})
    replace_obs(url, "s3", random_obs(3, 9)[["score"]].set_axis(["s30", "s31", "s32"]))
    store = IslandStore.open(url)
    s3.requests.clear()
    table = obs_columns(store, ["score", "sample"])
    assert len(s3.requests) == 10
    assert table["score"].to_pylist() == [
        value for i in (0, 1, 2, 9, 4) for value in random_obs(3, i)["score"].tolist()
    ]
    s3.requests.clear()
    found = column(store, "cell_type")
    assert len(s3.requests) == 4 * 5 + 2
    assert found[9:12] == [None] * 3
    assert found[12:] == list(random_obs(3, 4)["cell_type"])
    with pytest.raises(InputError, match="no obs column 'age'; there are"):
        obs_columns(store, ["age"])

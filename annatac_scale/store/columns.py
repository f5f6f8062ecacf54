"""Columns of obs over all samples, of which no other column is read; docs/store-format.md, "obs", says how they lie.

Through zarr an array takes milliseconds, and a store has thousands of them: arrays of one chunk, as annatac_scale
writes them, are read by hand, all others by zarr.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.place import Place, open_group, place_of

if TYPE_CHECKING:
    import pandas as pd

    from annatac_scale.store.store import IslandStore, Sample

_PARALLEL = 64
"""Samples whose columns are read at a time: in object storage what counts is the requests in flight."""

_BESIDE_OBS = ("sample", "barcode")
_NUMBERS = "iufb"
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, FileNotFoundError)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class ObsColumn:
    """A column of one sample.

    values: numbers or truth values, [n_cells]; of text the code of each cell, -1 where it is missing
    texts: what the codes stand for; None for numbers and truth values
    """

    values: NDArray[Any]
    texts: pa.StringArray | None = None

    def plain(self) -> NDArray[Any]:
        """The values as they are, text as objects, NaN where it is missing."""
        if self.texts is None:
            return self.values
        texts = np.append(self.texts.to_numpy(zero_copy_only=False).astype(object), np.nan)
        return texts[self.values]

    def in_arrow(self) -> pa.StringArray:
        """The values as text, null where it is missing: no Python text a cell."""
        column = self.as_text()
        return column.texts.take(pa.array(column.values, mask=column.values < 0))  # type: ignore[union-attr]

    def as_text(self) -> "ObsColumn":
        """The same with numbers and truth values as text, a missing number as missing text."""
        if self.texts is not None:
            return self
        values, codes = np.unique(self.values, return_inverse=True)
        if values.dtype.kind == "f" and len(values) and np.isnan(values[-1]):  # the one NaN, sorted last
            values, codes = values[:-1], np.where(codes == len(values) - 1, -1, codes)
        return ObsColumn(codes.astype(np.int32), texts_of(values))


def texts_of(numbers: NDArray[Any]) -> pa.StringArray:
    """Numbers or truth values as text, one text for equal numbers of all types: 3.0 is "3"; True is "True"."""
    if numbers.dtype.kind == "f":
        numbers = numbers.astype(np.float64) + 0.0  # which makes -0.0 the 0.0 that it equals
    return pa.array([str(number).removesuffix(".0") for number in numbers.tolist()], pa.string())


def obs_columns(store: "IslandStore", names: Sequence[str]) -> pa.Table:
    """Columns of obs, also "sample" and "barcode", over all cells: row i is cell id i. Nothing else is read.

    Text is dictionary<int32, string>, of one dictionary over all samples. Numbers have the widest type that the samples
    have them in (half precision becomes single, which Arrow computes with); where some samples have text, numbers of
    the others become text. Null where a sample lacks the column, where text is missing, and for NaN.

    Raises InputError for a column that no sample has, StoreError for one that is damaged.
    """
    names = list(dict.fromkeys(names))
    refuse_without_samples(store, names)
    arrays = [_sample_column(store) if name == "sample" else _joined(store, name) for name in names]
    return pa.table(dict(zip(names, arrays, strict=True)))


def obs_frame(store: "IslandStore", names: Sequence[str] | None) -> "pd.DataFrame":
    """What ``IslandStore.obs`` says."""
    import pandas as pd

    refuse_without_samples(store, names or ())
    wanted = list(dict.fromkeys([*_BESIDE_OBS, *(obs_names(store) if names is None else names)]))
    columns = {name: _read_all(store, name) for name in wanted if name != "sample"}
    frames = []
    for number, sample in enumerate(store.samples.values()):
        found = {name: column for name, of in columns.items() if (column := of[number]) is not None}
        frame = pd.DataFrame({name: column.plain() for name, column in found.items()}).assign(
            sample=sample.name
        )
        frames.append(frame.reindex(columns=wanted))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=wanted)


def sample_columns(
    store: "IslandStore", sample: "Sample", names: Sequence[str]
) -> dict[str, ObsColumn | None]:
    """Columns of obs of one sample, also "barcode", None for one that it lacks; of other samples no values are read.

    Truth values are 0 and 1 where another sample has numbers in the column and none has text, as in ``obs_columns``.
    ``check_columns`` tells whether any sample has it. Raises StoreError for one that is damaged.
    """
    columns = {name: _read(sample, name) for name in dict.fromkeys(names)}
    for name, column in columns.items():
        if column is not None and column.texts is None and column.values.dtype.kind == "b":
            kinds = set(_in_threads(partial(_kind, name), list(store.samples.values())))
            if "number" in kinds and "text" not in kinds:
                columns[name] = ObsColumn(column.values.astype(np.int8))
    return columns


def _kind(name: str, sample: "Sample") -> str:
    """What a sample has in a column, by its metadata: "truth", "number", "text", or "" for no such column."""
    try:
        metadata = json.loads(place_of(sample.path).below("obs").read(f"{name}/zarr.json"))
        found = metadata["data_type"] if metadata["node_type"] == "array" else "text"
    except FileNotFoundError:
        return ""
    except _DAMAGED as error:
        raise _damaged(sample, name, error) from error
    return {"bool": "truth", "string": "text", "text": "text"}.get(str(found), "number")


def check_columns(store: "IslandStore", names: Sequence[str]) -> None:
    """Raise InputError where no sample has a column of one of these names."""
    refuse_without_samples(store, names)
    wanted = [name for name in names if name not in _BESIDE_OBS]
    there = set(obs_names(store)) if wanted else set()
    for name in wanted:
        if name not in there:
            raise _no_column(store, name)


def obs_names(store: "IslandStore") -> list[str]:
    """Names of the columns that any sample has, without "sample" and "barcode", in order of their first sample."""
    orders = _in_threads(_order, list(store.samples.values()))
    return list(dict.fromkeys(name for order in orders for name in order))


def refuse_without_samples(store: "IslandStore", names: Sequence[str]) -> None:
    """Raise InputError where columns are asked of a store without samples."""
    if names and not store.samples:
        raise InputError(
            f"{store.path}: holds no sample, so no obs column {names[0]!r}; add one with `annatac convert`"
        )


def _sample_column(store: "IslandStore") -> pa.Array:
    sizes = [sample.n_cells for sample in store.samples.values()]
    return pa.DictionaryArray.from_arrays(
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), pa.array(list(store.samples), pa.string())
    )


def _joined(store: "IslandStore", name: str) -> pa.Array:
    columns = _read_all(store, name)
    if any(column is not None and column.texts is not None for column in columns):
        return _joined_texts(store, [column and column.as_text() for column in columns])
    return _joined_numbers(store, columns)


def _joined_texts(store: "IslandStore", columns: Sequence[ObsColumn | None]) -> pa.Array:
    """The codes of all samples, over one dictionary."""
    texts = [column.texts for column in columns if column is not None]
    encoded = pa.concat_arrays(texts).dictionary_encode()
    new, used = encoded.indices.to_numpy(), 0
    codes = np.full(store.n_cells, -1, np.int32)
    for sample, column in zip(store.samples.values(), columns, strict=True):
        if column is not None:
            n_texts = len(column.texts or ())
            new_of_old = np.append(new[used : used + n_texts], np.int32(-1))
            used += n_texts
            codes[sample.first_cell : sample.first_cell + sample.n_cells] = new_of_old[column.values]
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), encoded.dictionary)


def _joined_numbers(store: "IslandStore", columns: Sequence[ObsColumn | None]) -> pa.Array:
    dtype = np.result_type(*{column.values.dtype for column in columns if column is not None})
    values = np.zeros(store.n_cells, np.float32 if dtype == np.float16 else dtype)
    missing = np.zeros(store.n_cells, np.bool_)
    for sample, column in zip(store.samples.values(), columns, strict=True):
        own = slice(sample.first_cell, sample.first_cell + sample.n_cells)
        if column is None:
            missing[own] = True
        else:
            values[own] = column.values
            if column.values.dtype.kind == "f":
                missing[own] = np.isnan(column.values)
    return pa.array(values, mask=missing) if missing.any() else pa.array(values)


def _read_all(store: "IslandStore", name: str) -> list[ObsColumn | None]:
    """A column of each sample, None where one lacks it. Raises InputError where all do."""
    columns = _in_threads(lambda sample: _read(sample, name), list(store.samples.values()))
    if columns and not any(columns):
        raise _no_column(store, name)
    return columns


def _no_column(store: "IslandStore", name: str) -> InputError:
    known = sorted([*obs_names(store), *_BESIDE_OBS])
    return InputError(
        f"{store.path}: no obs column {name!r}; there are {', '.join(known)}; give one of these, or "
        "join a table that has it with `annatac convert --obs`"
    )


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_PARALLEL, len(items)), "obs") as threads:
        return list(threads.map(work, items))


# One sample


def _order(sample: "Sample") -> list[str]:
    """Names of the columns of a sample's obs, in order."""
    place = place_of(sample.path)
    try:
        order = json.loads(place.read("obs/zarr.json"))["attributes"]["column-order"]
        return [str(name) for name in order]
    except FileNotFoundError as error:
        raise StoreError(
            f"{sample.path}: found no obs; open the store again, or convert the sample again"
        ) from error
    except _DAMAGED as error:
        raise _damaged(sample, "", error) from error


def _read(sample: "Sample", name: str) -> ObsColumn | None:
    """A column of a sample; None where it has no such column. Raises StoreError where it is damaged, or obs is gone."""
    if "/" in name or name in ("", ".", "..", "sample"):
        return None
    obs = place_of(sample.path).below("obs")
    try:
        metadata = json.loads(obs.read(f"{name}/zarr.json"))
    except FileNotFoundError:
        if name in ("barcode", *_order(sample)):
            raise _damaged(sample, name, "it is not there") from None
        return None
    except ValueError as error:
        raise _damaged(sample, name, error) from error
    try:
        column = _decoded(obs, name, metadata)
    except _DAMAGED as error:
        raise _damaged(sample, name, error) from error
    if len(column.values) != sample.n_cells:
        raise _damaged(sample, name, f"{len(column.values):,} values for {sample.n_cells:,} cells")
    return column


def _damaged(sample: "Sample", name: str, found: object) -> StoreError:
    return StoreError(
        f"{sample.path}/obs/{name}: found it damaged ({found}); expected a column as docs/store-format.md says; "
        "copy the sample again, or convert it again"
    )


def _decoded(obs: Place, name: str, metadata: dict[str, Any]) -> ObsColumn:
    if metadata["node_type"] == "array":
        values = _array(obs, name, metadata)
        if isinstance(values, np.ndarray):
            return ObsColumn(values)
        return ObsColumn(np.arange(len(values), dtype=np.int32), values)
    encoding = metadata["attributes"]["encoding-type"]
    if encoding != "categorical":
        raise ValueError(f"encoding {encoding!r}")
    texts = _array(obs, f"{name}/categories")
    codes = _array(obs, f"{name}/codes")
    if isinstance(texts, np.ndarray) or not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        raise ValueError("categories that are no text, or codes that are no whole numbers")
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(texts):
        raise ValueError(f"codes {codes.min()} to {codes.max()} for {len(texts)} categories")
    return ObsColumn(codes, texts)


def _array(obs: Place, name: str, metadata: dict[str, Any] | None = None) -> NDArray[Any] | pa.StringArray:
    """Numbers or truth values, or else strings."""
    values = _values(obs, name, metadata or json.loads(obs.read(f"{name}/zarr.json")))
    return values if values.dtype.kind in _NUMBERS else pa.array(values.astype(object), pa.string())


def _values(obs: Place, name: str, metadata: dict[str, Any]) -> NDArray[Any]:
    if not metadata["shape"][0]:
        return np.empty(0, object if metadata["data_type"] == "string" else metadata["data_type"])
    if _is_one_chunk(metadata):
        with suppress(FileNotFoundError):  # Zarr leaves out what is nothing but the fill value
            return _chunk(obs.read(f"{name}/c{_separator(metadata)}0"), metadata)
    array: Any = open_group(obs.location)[name]
    return np.asarray(array[:])


def _separator(metadata: dict[str, Any]) -> str:
    return str(metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/"))


def _is_one_chunk(metadata: dict[str, Any]) -> bool:
    """Whether all of an array is one chunk, encoded as annatac_scale and AnnData do it."""
    serializer, *codecs = metadata["codecs"]
    endian = serializer.get("configuration", {}).get("endian", "little")
    return bool(
        metadata["chunk_grid"]["name"] == "regular"
        and metadata["chunk_grid"]["configuration"]["chunk_shape"][0] >= metadata["shape"][0]
        and metadata["chunk_key_encoding"]["name"] == "default"
        and (serializer["name"], endian) in (("bytes", "little"), ("vlen-utf8", "little"))
        and [codec["name"] for codec in codecs] in ([], ["zstd"])
    )


def _chunk(data: bytes, metadata: dict[str, Any]) -> NDArray[Any]:
    n = metadata["shape"][0]
    if len(metadata["codecs"]) > 1:
        data = Zstd().decode(data)
    if metadata["data_type"] == "string":
        return np.asarray(VLenUTF8().decode(data), object)[:n]
    return np.frombuffer(data, np.dtype(metadata["data_type"]).newbyteorder("<"))[:n]

"""The Zarr nodes of a store, read without trust: whatever is wrong with one comes as a DamageError that says what.

Shapes, types and encodings are held against what a store must have before values are read, so that damaged metadata
cannot ask for memory.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import zarr
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from annatac_scale.errors import StoreError
from annatac_scale.store.findings import SAMPLE_AGAIN, DamageError, Finding
from annatac_scale.store.place import Location, joined, open_group, place_of
from annatac_scale.store.zstd import content_size

Encoding = tuple[str, str]

ANNDATA, DATAFRAME, DICT = ("anndata", "0.1.0"), ("dataframe", "0.2.0"), ("dict", "0.1.0")
CATEGORICAL, ARRAY, STRINGS = ("categorical", "0.2.0"), ("array", "0.2.0"), ("string-array", "0.2.0")

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS = ("bool", *INTEGERS, "float16", "float32", "float64")
CODES = ("int8", "int16", "int32")
STRING = ("string",)

_ZSTD, _TEXT = Zstd(), VLenUTF8()
_MOST_IDLE_CATEGORIES = 1 << 20
_METADATA: dict[str, Any] = {"group": GroupMetadata, "array": ArrayV3Metadata}


class Nodes:
    """The nodes of a store, by their path in it. May be used by any number of threads."""

    def __init__(self, path: Location) -> None:
        self.path = path
        self.place = place_of(path)

    def at(self, name: str) -> str:
        """Where a node or file lies, for messages."""
        return str(joined(self.path, name))

    def damage(self, name: str, found: str, expected: str, advice: str = SAMPLE_AGAIN) -> DamageError:
        """An error to raise about a file."""
        return DamageError(Finding(self.at(name), found, expected, advice))

    def read(self, name: str) -> bytes:
        """A file."""
        try:
            return self.place.read(name)
        except FileNotFoundError as error:
            raise self.damage(name, "no such file", "one") from error
        except StoreError as error:
            raise self.damage(name, f"what cannot be read ({error})", "a readable file") from error

    def metadata(self, name: str, node_type: str) -> dict[str, Any]:
        """The ``zarr.json`` of a node, with attributes."""
        file = f"{name}/zarr.json".lstrip("/")
        try:
            found = json.loads(self.read(file))
        except (ValueError, RecursionError) as error:
            raise self.damage(file, f"no JSON ({error})", "the metadata of a Zarr node") from error
        if not isinstance(found, dict) or not isinstance(found.setdefault("attributes", {}), dict):
            raise self.damage(file, "no object with attributes", "the metadata of a Zarr node")
        for key, expected in {"zarr_format": 3, "node_type": node_type}.items():
            self.compare(file, key, found.get(key), expected)
        with self.readable(file, "the metadata of a Zarr node"):
            _METADATA[node_type].from_dict(
                deepcopy(found)
            )  # zarr refuses more than is held against anything here
        return found

    def attributes(self, name: str, encoding: Encoding | None = None) -> dict[str, Any]:
        """The attributes of a group."""
        attributes: dict[str, Any] = self.metadata(name, "group")["attributes"]
        self.check_encoding(name, attributes, encoding)
        return attributes

    def array(self, name: str, n: int, data_types: Sequence[str], encoding: Encoding = ARRAY) -> NDArray[Any]:
        """The values of a one-dimensional array of ``n`` numbers, or of ``n`` strings as objects."""
        metadata, file = self.metadata(name, "array"), f"{name}/zarr.json"
        self.check_encoding(name, metadata["attributes"], encoding)
        self.compare(file, "shape", metadata.get("shape"), [n])
        if metadata.get("data_type") not in data_types:
            raise self.damage(file, f"data_type {_short(metadata.get('data_type'))}", " or ".join(data_types))
        with self.readable(name):
            values = self._one_chunk(name, metadata, n)
            if values is None:
                values = np.asarray(zarr.open_array(open_group(self.path).store, path=name, mode="r")[:])
                values = values.astype(object) if data_types == STRING else values
            if values.shape != (n,):
                raise ValueError(f"{values.shape} values")
        if values.dtype == np.bool_ and (values.view(np.uint8) > 1).any():
            raise self.damage(name, "a truth value that is neither 0 nor 1", "truth values")
        return values

    def _one_chunk(self, name: str, metadata: dict[str, Any], n: int) -> NDArray[Any] | None:
        """The values of an array laid out as annatac_scale does, in one chunk; None where it is laid out otherwise.

        Read without zarr, which takes a damaged number of strings at its word and makes room for them.
        """
        grid, keys = metadata.get("chunk_grid"), metadata.get("chunk_key_encoding")
        if grid != {"name": "regular", "configuration": {"chunk_shape": [n]}} or n == 0:
            return None
        data_type, codecs = metadata["data_type"], metadata["codecs"]
        names = [codec["name"] for codec in codecs]
        if keys != {"name": "default", "configuration": {"separator": "."}} or names[1:] != ["zstd"]:
            return None
        if codecs[0].get("configuration", {"endian": "little"}) != {"endian": "little"}:
            return None
        file = f"{name}/c.0"
        if self.place.size(file) is None:
            return None
        frame = self.read(file)
        if data_type == "string" and names[0] == "vlen-utf8":
            data = _ZSTD.decode(frame)
            if int.from_bytes(data[:4], "little") != n:
                raise ValueError(f"{int.from_bytes(data[:4], 'little')} strings")
            return _TEXT.decode(data)
        if data_type == "string" or names[0] != "bytes":
            return None
        dtype = np.dtype(data_type).newbyteorder("<")
        if content_size(frame) != n * dtype.itemsize:
            raise ValueError(f"{content_size(frame)} bytes")
        return np.frombuffer(_ZSTD.decode(frame), dtype)

    def categorical(self, name: str, n: int) -> tuple[NDArray[Any], list[str]]:
        """The codes of ``n`` values, -1 where missing, and what they stand for."""
        self.attributes(name, CATEGORICAL)
        shape = self.metadata(f"{name}/categories", "array").get("shape")
        if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] >= 0):
            raise self.damage(f"{name}/categories/zarr.json", f"shape {_short(shape)}", "one dimension")
        if shape[0] > n + _MOST_IDLE_CATEGORIES:
            raise self.damage(
                f"{name}/categories/zarr.json", f"{shape[0]:,} categories", f"about {n:,} at most"
            )
        codes = self.array(f"{name}/codes", n, CODES)
        if n and not -1 <= int(codes.min()) <= int(codes.max()) < shape[0]:
            raise self.damage(
                f"{name}/codes", f"codes from {codes.min()} to {codes.max()}", f"-1..{shape[0] - 1}"
            )
        categories = self.array(f"{name}/categories", shape[0], STRING, STRINGS).tolist()
        if len(set(categories)) < len(categories):
            raise self.damage(f"{name}/categories", "a category twice", "each once")
        return codes, categories

    def columns(self, name: str, index: str) -> list[str]:
        """The columns of a data frame, in order."""
        attributes, file = self.attributes(name, DATAFRAME), f"{name}/zarr.json"
        self.compare(file, "_index", attributes.get("_index"), index)
        columns = attributes.get("column-order")
        if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
            raise self.damage(file, f"column-order {_short(columns)}", "a list of names")
        if len(set(columns)) < len(columns):
            raise self.damage(file, "a column twice in column-order", "each once")
        return columns

    def compare(self, name: str, what: str, found: Any, expected: Any, advice: str = SAMPLE_AGAIN) -> None:
        """Raise DamageError where two values, as JSON has them, differ."""
        if not same(found, expected):
            raise self.damage(name, f"{what} {_short(found)}", _short(expected), advice)

    def check_encoding(self, name: str, attributes: dict[str, Any], encoding: Encoding | None) -> None:
        """Raise DamageError where a node is not in one of AnnData's encodings."""
        for key, expected in zip(("encoding-type", "encoding-version"), encoding or (), strict=False):
            self.compare(f"{name}/zarr.json", key, attributes.get(key), expected)

    @contextmanager
    def readable(self, name: str, expected: str = "an array") -> Iterator[None]:
        """Turn whatever reading damaged bytes raises into a DamageError."""
        try:
            yield
        except DamageError:
            raise
        except (
            Exception
        ) as error:  # what zarr, its codecs and numpy raise of damaged bytes has no common base
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise self.damage(name, f"what cannot be read ({reason})", expected) from error


def same(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, and of one type: 1, 1.0 and true are three."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

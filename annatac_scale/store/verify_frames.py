"""What is said beside X, looked at: the islands of a store; obs, var and the conversion of a sample."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.findings import CONVERT_AGAIN, DamageError, Finding
from annatac_scale.store.nodes import ANNDATA, ARRAY, DICT, INTEGERS, NUMBERS, STRING, STRINGS, Nodes
from annatac_scale.store.shards import shard_name, x_metadata

_COLUMNS = ["chrom", "start", "end", "genes"]


@contextmanager
def collected(findings: list[Finding]) -> Iterator[None]:
    """Add what damage ends the block to the findings."""
    try:
        yield
    except DamageError as error:
        findings.append(error.finding)


@dataclass(frozen=True)
class Islands:
    """The islands as they lie in a store.

    files: sha256 of each file but the frame's own, relative to the frame; columns: values by path in the frame
    """

    n: int
    files: Mapping[str, bytes]
    columns: Mapping[str, Any]


def check_islands(nodes: Nodes, root: Mapping[str, Any], findings: list[Finding]) -> Islands | None:
    """The store's islands; None where they cannot be read."""
    with collected(findings):
        n = root["n_islands"]
        nodes.compare(
            f"{schema.ISLANDS}/zarr.json", "column-order", nodes.columns(schema.ISLANDS, "island"), _COLUMNS
        )
        columns = _columns(nodes, schema.ISLANDS, n)
        _check_space(nodes, root, columns)
        return Islands(n, _digests(nodes, schema.ISLANDS), columns)
    return None


def _columns(nodes: Nodes, frame: str, n: int) -> dict[str, Any]:
    codes, chromosomes = nodes.categorical(f"{frame}/chrom", n)
    return {
        "chrom": [codes.astype(np.int32), chromosomes],
        "start": nodes.array(f"{frame}/start", n, ("int64",)),
        "end": nodes.array(f"{frame}/end", n, ("int64",)),
        "genes": nodes.array(f"{frame}/genes", n, STRING, STRINGS),
        "island": nodes.array(f"{frame}/island", n, STRING, STRINGS),
    }


def _check_space(nodes: Nodes, root: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    codes, chromosomes = columns["chrom"]
    nodes.compare(
        f"{schema.ISLANDS}/chrom/categories", "chromosomes", chromosomes, root["chromosomes"], CONVERT_AGAIN
    )
    names = (root["assembly"], tuple(chromosomes), root["width_bp"], root["selection"])
    try:
        space = IslandSpace(*names, codes, columns["start"], columns["end"], columns["genes"])
    except InputError as error:
        raise nodes.damage(
            schema.ISLANDS, f"no islands ({error})", "sorted islands", CONVERT_AGAIN
        ) from error
    nodes.compare(schema.ISLANDS, "sha256", space.sha256, root["islands_sha256"], CONVERT_AGAIN)
    wrong = np.flatnonzero(np.asarray(space.names(), object) != columns["island"])
    if len(wrong):
        row = wrong[0]
        found, expected = repr(columns["island"][row]), repr(space.names()[row])
        raise nodes.damage(f"{schema.ISLANDS}/island, row {row}", found, expected, CONVERT_AGAIN)


def _digests(nodes: Nodes, frame: str) -> dict[str, bytes]:
    """sha256 of the files of a frame but its own and those of ``measured``."""
    names = [name.removeprefix(f"{frame}/") for name in nodes.place.names(frame)]
    ours = [name for name in names if name != "zarr.json" and not name.startswith("measured/")]
    return {name: hashlib.sha256(nodes.read(f"{frame}/{name}")).digest() for name in ours}


@dataclass
class SampleSays:
    """What a sample says beside its X.

    measured: bool [n_islands]; n_open: of each cell, where obs has such a column of integers
    without_counts: cells without an open island, as the conversion counted them
    """

    measured: NDArray[np.bool_] | None = None
    n_open: NDArray[Any] | None = None
    without_counts: int | None = None
    findings: list[Finding] = field(default_factory=list)


def check_measured(nodes: Nodes, name: str, islands: Islands | None, n_islands: int) -> SampleSays:
    """Look at the var of a sample: its open islands are held against what it measured."""
    says = SampleSays()
    with collected(says.findings):
        says.measured = _check_var(nodes, f"{schema.SAMPLES}/{name}/var", islands, n_islands)
    return says


def check_frames(nodes: Nodes, entry: Mapping[str, Any], root: Mapping[str, Any], says: SampleSays) -> None:
    """Look at all else of a sample but the shards of its X. entry: of the index"""
    sample = f"{schema.SAMPLES}/{entry['name']}"
    with collected(says.findings):
        nodes.attributes(sample, ANNDATA)
    with collected(says.findings):
        nodes.attributes(f"{sample}/uns", DICT)
    with collected(says.findings):
        _check_x_metadata(nodes, f"{sample}/X", entry["n_cells"], root["n_islands"])
    with collected(says.findings):
        _check_shard_files(nodes, f"{sample}/X", entry["n_cells"], says)
    with collected(says.findings):
        _check_conversion(nodes, sample, entry, root, says)
    with collected(says.findings):
        _check_obs(nodes, sample, entry, root["islands_sha256"], says)


def _check_shard_files(nodes: Nodes, x: str, n_cells: int, says: SampleSays) -> None:
    """Shards that are needed are missed where they are read; here are those that nobody needs."""
    needed = {f"{x}/{shard_name(shard)}" for shard in range(-(-n_cells // schema.SHARD_CELLS))}
    with nodes.readable(x, "a folder"):
        names = nodes.place.names(x)
    for name in names:
        if name not in needed and name != f"{x}/zarr.json":
            says.findings.append(
                Finding(nodes.at(name), "a file that no cell of the sample needs", "none", "remove it")
            )


def _check_x_metadata(nodes: Nodes, x: str, n_cells: int, n_islands: int) -> None:
    found, file = nodes.metadata(x, "array"), f"{x}/zarr.json"
    expected = x_metadata(n_cells, n_islands)
    for metadata in (found, expected):
        metadata.pop("dimension_names", None)
    with suppress(KeyError, IndexError, TypeError, AttributeError):
        # level and checksum of zstd are the writer's choice
        ours, theirs = (one["codecs"][0]["configuration"]["codecs"][1] for one in (expected, found))
        choice = theirs["configuration"]
        if set(choice) == {"level", "checksum"} and type(choice["level"]) is int:
            ours["configuration"] = {"level": choice["level"], "checksum": bool(choice["checksum"])}
    for key in dict.fromkeys([*expected, *found]):
        if key == "attributes":
            nodes.check_encoding(x, found[key], ARRAY)
        elif key != "storage_transformers":  # an empty list in what zarr-python writes
            nodes.compare(file, key, found.get(key), expected.get(key))


def _check_var(nodes: Nodes, var: str, islands: Islands | None, n: int) -> NDArray[np.bool_]:
    order = nodes.columns(var, "island")
    nodes.compare(f"{var}/zarr.json", "column-order", order, [*_COLUMNS, "measured"])
    # Files as those of the islands hold what they do: only others are decoded.
    if islands is not None and _digests(nodes, var) != islands.files:
        columns = _columns(nodes, var, n)
        for name, column in columns.items():
            parts = (
                zip(column, islands.columns[name], strict=True)
                if name == "chrom"
                else [(column, islands.columns[name])]
            )
            if not all(np.array_equal(a, b) for a, b in parts):
                raise nodes.damage(f"{var}/{name}", "other islands", f"those of {schema.ISLANDS}/{name}")
    return nodes.array(f"{var}/measured", n, ("bool",)).astype(bool)


def _check_conversion(
    nodes: Nodes, sample: str, entry: Mapping[str, Any], root: Mapping[str, Any], says: SampleSays
) -> None:
    name = f"{sample}/{schema.CONVERSION}"
    attributes, file = nodes.attributes(name, DICT), f"{name}/zarr.json"
    nodes.compare(file, "complete", attributes.get("complete"), True)
    for key in ("n_cells", "n_open", "x_sha256"):
        with collected(says.findings):
            nodes.compare(file, key, attributes.get(key), entry[key])
    conversion = attributes.get("conversion")
    if not isinstance(conversion, dict):
        raise nodes.damage(file, "no conversion", "an object")
    measured = None if says.measured is None else int(says.measured.sum())
    for what, found, expected in _accounts(conversion, entry["n_cells"], measured, root):
        with collected(says.findings):
            nodes.compare(file, what, found, expected)
    says.without_counts = _counts(conversion, "cells").get("without_counts")


def _accounts(
    conversion: Mapping[str, Any], n_cells: int, measured: int | None, root: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """What a conversion by annatac_scale says that can be held against something: what, found, expected."""
    lines, invalid = _counts(conversion, "lines"), _counts(conversion, "invalid")
    peaks, cells, contigs = (
        _counts(conversion, "peaks"),
        _counts(conversion, "cells"),
        conversion.get("contigs"),
    )
    if "lines" in lines:
        yield "lines.lines", lines["lines"], sum(n for name, n in lines.items() if name != "lines")
    if "invalid" in conversion and "invalid" in lines:
        yield "lines.invalid", lines["invalid"], sum(invalid.values())
    if isinstance(contigs, dict) and "other_contig" in lines:
        other = _counts(contigs, "other")
        if contigs.get("n_other") == len(other):
            yield "lines.other_contig", lines["other_contig"], sum(other.values())
    if {"peaks", "in_islands", "outside_islands"} <= peaks.keys():
        names = ("in_islands", "outside_islands", "other_contig")
        yield "peaks.peaks", peaks["peaks"], sum(peaks.get(name, 0) for name in names)
    if measured is not None and "measured_islands" in peaks:
        yield "peaks.measured_islands", peaks["measured_islands"], measured
    if "cells" in cells:
        yield "cells.cells", cells["cells"], n_cells
    if "assembly" in conversion:
        yield "assembly", conversion["assembly"], root["assembly"]
    if conversion.get("kind") == "fragments" and "counting" in conversion:
        yield "counting", conversion["counting"], root["counting"]


def _counts(conversion: Mapping[str, Any], key: str) -> dict[str, int]:
    """The whole numbers of an account; none where there is no such account."""
    account = conversion.get(key)
    found = account.items() if isinstance(account, dict) else ()
    return {name: n for name, n in found if type(n) is int}


def _check_obs(
    nodes: Nodes, sample: str, entry: Mapping[str, Any], islands_sha256: str, says: SampleSays
) -> None:
    """Read the columns of obs one after the other: only one is in memory at a time."""
    obs, n = f"{sample}/obs", entry["n_cells"]
    names = nodes.columns(obs, "barcode")
    digest = hashlib.sha256(f"{islands_sha256}\n{entry['x_sha256']}\n".encode())
    whole = says.measured is not None
    if says.measured is not None:
        digest.update(np.packbits(says.measured).tobytes())
    for name in ["barcode", *names]:
        read = _barcodes if name == "barcode" else _column
        found = len(says.findings)
        with collected(says.findings):
            kind, data = read(nodes, f"{obs}/{name}", n, says)
            digest.update(f"\n{json.dumps(name)} {kind} {len(data)}\n".encode() + data)
        whole &= len(says.findings) == found
    if whole:
        nodes.compare(
            sample,
            "a digest over islands, x_sha256, measured and obs of",
            digest.hexdigest(),
            entry["digest"],
        )


def _barcodes(nodes: Nodes, name: str, n: int, says: SampleSays) -> tuple[str, bytes]:
    values = nodes.array(name, n, STRING, STRINGS).tolist()
    again = pd.Index(values).duplicated()
    if again.any():
        row = int(again.argmax())
        raise nodes.damage(f"{name}, row {row}", f"barcode {values[row]!r} again", "each once")
    return "str", _texts(json.dumps(value) for value in values)


def _column(nodes: Nodes, name: str, n: int, says: SampleSays) -> tuple[str, bytes]:
    with nodes.readable(name, "a column"):
        is_text = nodes.place.size(f"{name}/codes/zarr.json") is not None
    if is_text:
        codes, categories = nodes.categorical(name, n)
        texts = [*(json.dumps(category) for category in categories), "null"]
        return "str", _texts(texts[code] for code in codes.tolist())
    values = nodes.array(name, n, NUMBERS)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    if name.endswith("/n_open") and values.dtype.name in INTEGERS:
        says.n_open = values
    return values.dtype.str, values.tobytes()


def _texts(values: Iterable[str]) -> bytes:
    return "\n".join(values).encode()

"""Look at everything that a store says of itself: ``annatac info STORE --verify``.

Nothing is trusted and nothing is changed (but an obs whose replacement was stopped, which every reader has to settle).
What is looked at: the root and the index; ``islands_sha256``; of each sample all Zarr metadata, its shard files (each
that is needed, and no other), the CRC-32C of each shard index and block, zstd frames, every byte of the island codec,
rows after the last cell, open islands that were not measured, ``n_open`` of each cell, shard and sample, ``x_sha256``,
barcodes, ``digest``, var against the islands, and the accounts of the conversion. No checksum covers ``genes``,
``selection``, ``counting`` and what else a conversion says: these are read, but a change that makes sense is not seen.

Memory: shards are looked at by ``workers`` threads, block by block, and the rest of a sample by one of them, column by
column. At any time there are at most

    workers * (12 * E + 300 * C) + 12 * W bytes

beside the program: E bytes of the largest block in the island codec (at most 1,004 + 250 * n_islands), C cells of the
largest sample (a barcode and its text in the digest, the widest thing in most obs), W = min(workers, samples) * C.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store import schema
from annatac_scale.store.files import INCOMING
from annatac_scale.store.findings import CONVERT_AGAIN, Finding, Found, VerifyReport
from annatac_scale.store.nodes import Nodes
from annatac_scale.store.obs import finish_obs
from annatac_scale.store.place import Location, is_url
from annatac_scale.store.threads import in_order
from annatac_scale.store.verify_frames import (
    Islands,
    SampleSays,
    check_frames,
    check_islands,
    check_measured,
    collected,
)
from annatac_scale.store.verify_x import SampleX, ShardFound, check_shard

_INDEX_FILE = f"{schema.SAMPLES}/zarr.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_WORKERS, _WORKERS_FOR_OBJECTS = 8, 32


def default_workers(path: Location) -> int:
    """Threads that a verification takes: one a core, but many where each request waits for a server."""
    return _WORKERS_FOR_OBJECTS if is_url(path) else min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def verify(path: Location, workers: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Look at everything that the store at ``path``, a folder or URL, says of itself; see this module.

    workers: threads; None: ``default_workers``
    Raises StoreError where there is no store at all; whatever is wrong with one is a finding of the report.
    """
    nodes, found = Nodes(path), Found()
    findings: list[Finding] = []
    root = _root(nodes, findings)
    _settle(nodes, findings)
    index = _index(nodes, root, findings) if root is not None else []
    digest = None if findings or root is None else _store_digest(root, index)
    notes: list[str] = []
    with collected(findings), nodes.readable("", "a folder that can be listed"):
        notes = _left_over(nodes, index)
    found.add(findings, notes)
    run = _Run(nodes, root or {}, found)
    if root is not None:
        run.look(index, workers or default_workers(path), progress or Silent())
    return VerifyReport(
        path=str(path),
        digest=digest,
        n_samples=len(index),
        n_cells=sum(entry["n_cells"] for entry in index),
        n_shards=run.n_shards,
        n_open=run.n_open,
        findings=found.findings,
        n_findings=found.n_findings,
        notes=found.notes,
        n_notes=found.n_notes,
    )


def _store_digest(root: Mapping[str, Any], index: Iterable[Mapping[str, Any]]) -> str:
    lines = [root["islands_sha256"], *(f"{entry['name']} {entry['digest']}" for entry in index)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


# The root and the index


def _root(nodes: Nodes, findings: list[Finding]) -> dict[str, Any] | None:
    """The attributes of the root; None where something is wrong that all else hangs on."""
    was_one = any(nodes.place.size(name) is not None for name in (_INDEX_FILE, f"{schema.ISLANDS}/zarr.json"))
    if nodes.place.size("zarr.json") is None and not was_one:
        raise StoreError(f"{nodes.path}: no island store here; make one with `annatac convert`")
    with collected(findings):
        root = nodes.attributes("")
        if root.get("format") != schema.FORMAT and not was_one:
            raise StoreError(f"{nodes.path}: a Zarr group, but not an island store; give another path")
        wrong = [key for key, (fits, _) in _ROOT.items() if not fits(root.get(key))]
        for key in wrong:
            advice = "upgrade annatac_scale, or " + CONVERT_AGAIN if key == "version" else CONVERT_AGAIN
            found, expected = f"{key} {root.get(key)!r}"[:100], _ROOT[key][1]
            findings.append(Finding(nodes.at("zarr.json"), found, expected, advice))
        return None if set(wrong) - {"selection", "counting"} else root
    return None


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_major(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(f"{_MAJOR}[.][0-9]+", value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(value) > 0


_MAJOR = schema.FORMAT_VERSION.split(".")[0]
_SELECTIONS = ("tss", "all", "windows")
_ROOT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: value == schema.FORMAT, schema.FORMAT),
    "version": (_is_major, f"{_MAJOR}.x"),
    "assembly": (lambda value: isinstance(value, str), "a name"),
    "chromosomes": (_are_names, "a list of names"),
    "width_bp": (_is_count, "a width, 0 for windows"),
    "selection": (lambda value: value in _SELECTIONS, " or ".join(_SELECTIONS)),
    "islands_sha256": (_is_sha256, "a sha256"),
    "n_islands": (lambda value: _is_count(value, 1) and value < 2**31, "a number from 1 to 2^31 - 1"),
    "n_levels": (lambda value: type(value) is int and value == schema.N_LEVELS, str(schema.N_LEVELS)),
    "counting": (lambda value: value in schema.COUNTINGS, " or ".join(schema.COUNTINGS)),
}
"""For each root attribute, whether a value is one, and what it should be."""


def _index(nodes: Nodes, root: Mapping[str, Any], findings: list[Finding]) -> list[dict[str, Any]]:
    """The entries of the index that can be followed."""
    usable: dict[str, dict[str, Any]] = {}
    with collected(findings):
        entries = nodes.attributes(schema.SAMPLES).get(schema.INDEX)
        if not isinstance(entries, list):
            raise nodes.damage(_INDEX_FILE, "no index of samples", "a list", CONVERT_AGAIN)
        for number, entry in enumerate(entries):
            with collected(findings):
                _check_entry(nodes, f"{_INDEX_FILE}, entry {number} of the index", entry)
                if entry["name"] in usable:
                    raise nodes.damage(
                        _INDEX_FILE, f"sample {entry['name']!r} twice", "each once", CONVERT_AGAIN
                    )
                usable[entry["name"]] = entry
    return list(usable.values())


def _check_entry(nodes: Nodes, place: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise nodes.damage(place, repr(entry)[:100], "an object", CONVERT_AGAIN)
    for key, (fits, expected) in _ENTRY.items():
        if not fits(entry.get(key)):
            raise nodes.damage(place, f"{key} {entry.get(key)!r}"[:100], expected, CONVERT_AGAIN)
    n_shards, shard_open = -(-entry["n_cells"] // schema.SHARD_CELLS), entry.get("shard_open")
    if not isinstance(shard_open, list) or not all(map(_is_count, shard_open)):
        raise nodes.damage(place, "a shard_open that is no list of counts", "one", CONVERT_AGAIN)
    if (len(shard_open), sum(shard_open)) != (n_shards, entry["n_open"]):
        found = f"shard_open of {len(shard_open):,} shards and {sum(shard_open):,} open islands"
        raise nodes.damage(place, found, f"{n_shards:,} and n_open, {entry['n_open']:,}", CONVERT_AGAIN)


_ENTRY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda value: isinstance(value, str) and re.fullmatch(schema.SAMPLE_NAME, value) is not None,
        "a name",
    ),
    "n_cells": (_is_count, "a number of cells"),
    "n_open": (_is_count, "a number of open islands"),
    "x_sha256": (_is_sha256, "a sha256"),
    "digest": (_is_sha256, "a sha256"),
}


def _settle(nodes: Nodes, findings: list[Finding]) -> None:
    """Every reader brings a stopped replacement of obs to its end."""
    with collected(findings), nodes.readable(INCOMING, "a replacement of obs that can be settled"):
        finish_obs(nodes.path)


def _left_over(nodes: Nodes, index: Iterable[Mapping[str, Any]]) -> list[str]:
    """What lies in the store and is no part of it."""
    committed, notes = {entry["name"] for entry in index}, []
    for name in nodes.place.folders(INCOMING):
        if name.startswith("."):
            notes.append(f"{nodes.at(f'{INCOMING}/{name}')}: obs that is being replaced")
        else:
            what = "is removed by the next `annatac convert`" if name in committed else "convert it again"
            notes.append(f"{nodes.at(f'{INCOMING}/{name}')}: being written, or left by a stopped run; {what}")
    unnamed = sorted(set(nodes.place.folders(schema.SAMPLES)) - committed)
    notes += [
        f"{nodes.at(f'{schema.SAMPLES}/{name}')}: not in the index: no reader looks at it" for name in unnamed
    ]
    foreign = sorted(set(nodes.place.folders()) - {schema.ISLANDS, schema.SAMPLES, INCOMING})
    return notes + [f"{nodes.at(name)}: no part of the store" for name in foreign]


# The samples


class _Run:
    """Samples looked at by threads; what they find is taken in the order of the store."""

    def __init__(self, nodes: Nodes, root: Mapping[str, Any], found: Found) -> None:
        self.nodes = nodes
        self.root = root
        self.found = found
        self.n_shards = self.n_open = 0

    def look(self, index: Sequence[Mapping[str, Any]], workers: int, progress: Progress) -> None:
        """Look at the islands and all samples."""
        findings: list[Finding] = []
        islands = check_islands(self.nodes, self.root, findings)
        self.found.add(findings)
        total = sum(entry["n_cells"] for entry in index)
        with progress.task("verify", total, "cells") as advance:
            runs = (_SampleRun(self.nodes, entry, self.root, islands) for entry in index)
            for sample, shard in in_order((work for run in runs for work in run.works()), workers):
                if shard is not None:
                    advance(shard.n_cells)
                    self.n_shards += shard.n_open is not None
                    self.n_open += 0 if shard.n_open is None else int(shard.n_open.sum(dtype=np.int64))
                self.found.add(*sample.take(shard))


class _SampleRun:
    """A sample being looked at: first all beside X, then the shards, which wait for ``measured`` alone."""

    def __init__(
        self, nodes: Nodes, entry: Mapping[str, Any], root: Mapping[str, Any], islands: Islands | None
    ) -> None:
        self.nodes, self.entry, self.root, self.islands = nodes, entry, root, islands
        self.place = nodes.at(f"{schema.SAMPLES}/{entry['name']}")
        self.says = SampleSays()
        self._measured = Event()
        self._shards: list[ShardFound] = []

    def works(self) -> Iterator[Callable[[], "tuple[_SampleRun, ShardFound | None]"]]:
        """What is to be done, in an order in which nothing waits for what was not begun."""
        yield self._beside_x
        for shard in range(-(-self.entry["n_cells"] // schema.SHARD_CELLS)):
            yield partial(self._shard, shard)

    def _beside_x(self) -> "tuple[_SampleRun, None]":
        try:
            name, n_islands = self.entry["name"], self.root["n_islands"]
            self.says = check_measured(self.nodes, name, self.islands, n_islands)
        finally:
            self._measured.set()
        check_frames(self.nodes, self.entry, self.root, self.says)
        return self, None

    def _shard(self, shard: int) -> "tuple[_SampleRun, ShardFound]":
        self._measured.wait()
        x = self.nodes.place.below(f"{schema.SAMPLES}/{self.entry['name']}/X")
        sample = SampleX(
            x, self.entry["n_cells"], self.root["n_islands"], self.entry["shard_open"], self.says.measured
        )
        return self, check_shard(sample, shard)

    def take(self, shard: ShardFound | None) -> tuple[list[Finding], list[str]]:
        """What to tell of a part, and after the last also of the sample."""
        findings, notes = (self.says.findings, []) if shard is None else (shard.findings, shard.notes)
        if shard is not None:
            self._shards.append(shard)
        if len(self._shards) * schema.SHARD_CELLS >= self.entry["n_cells"]:
            findings = [*findings, *self._sums()]
            self._shards.clear()
        return findings, notes

    def _sums(self) -> Iterator[Finding]:
        """Hold what all shards hold together against what is said of it; nothing where one could not be read."""
        shards = [(shard.n_open, shard.sha256) for shard in self._shards]
        n_open = np.concatenate([np.empty(0, np.int32), *(n for n, _ in shards if n is not None)])
        if len(n_open) != self.entry["n_cells"]:
            return
        total, index = int(n_open.sum(dtype=np.int64)), f"{self.entry['n_open']:,}, the index's n_open"
        if total != self.entry["n_open"]:
            yield Finding(f"{self.place}/X", f"{total:,} open islands", index)
        x_sha256 = hashlib.sha256("".join(sha256 or "" for _, sha256 in shards).encode()).hexdigest()
        if x_sha256 != self.entry["x_sha256"]:
            yield Finding(f"{self.place}/X", f"x_sha256 {x_sha256}", f"{self.entry['x_sha256']}, the index's")
        yield from self._cells(n_open)

    def _cells(self, n_open: NDArray[np.int32]) -> Iterator[Finding]:
        said, without = self.says.n_open, self.says.without_counts
        if said is not None and (said != n_open).any():
            row, n = int((said != n_open).argmax()), int((said != n_open).sum())
            place, found = f"{self.place}/obs/n_open, row {row}", f"{said[row]} ({n:,} cells differ)"
            yield Finding(place, found, f"{n_open[row]}, the open islands of that cell in X")
        empty = int((n_open == 0).sum())
        if without is not None and without != empty:
            place = f"{self.place}/{schema.CONVERSION}/zarr.json"
            yield Finding(
                place, f"cells.without_counts {without:,}", f"{empty:,}, the cells without an open island"
            )

"""A sample being written: shards in any order, from any process, and the commit that makes them visible.

``<store>/.incoming/<name>/`` holds ``plan.json``, what it is made by; ``shards/<i>.json``, a record of each whole
shard; ``sample/``, the future sample; and whatever its writer keeps in ``Draft.place``. A stopped run leaves it, and a
run with the same plan goes on. On object storage, which cannot rename, ``sample/`` is ``samples/<name>/`` of the store:
no reader looks there before the index names it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import schema
from annatac_scale.store.files import INCOMING, as_store_error, flush, move
from annatac_scale.store.frames import Files, array_files, encoded_group, frame_file, frame_files
from annatac_scale.store.locks import lock_sample, remove_incoming_if_empty, store_lock
from annatac_scale.store.metadata import change_index, committed_samples, read_root
from annatac_scale.store.obs import check_obs, sample_digest, storable
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location, Place, is_url, place_of
from annatac_scale.store.shards import encode_shard, shard_name, x_metadata

PLAN = "plan.json"
SAMPLE = "sample"


@dataclass(frozen=True)
class ShardRecord:
    """A shard that was written whole.

    sha256: hex, of its encoded blocks before compression; n_open: open islands of its cells; n_cells: its rows
    """

    shard: int
    sha256: str
    n_open: int
    n_cells: int


@dataclass(frozen=True)
class Draft:
    """A sample being written; may be pickled and used in any process that sees the store.

    plan_sha256: of what it is made by: a process that was left over from a run with another plan writes nothing
    """

    store: str
    name: str
    n_islands: int
    islands_sha256: str
    plan_sha256: str

    @property
    def place(self) -> Place:
        """What a stopped run finds again; whatever is put here goes with the commit."""
        return place_of(self.store).below(f"{INCOMING}/{self.name}")

    @property
    def _sample_name(self) -> str:
        """Where the future sample lies in the store."""
        return f"{schema.SAMPLES}/{self.name}" if is_url(self.store) else f"{INCOMING}/{self.name}/{SAMPLE}"

    @property
    def sample(self) -> Place:
        """The future sample."""
        return place_of(self.store).below(self._sample_name)

    def write_shard(self, shard: int, rows: OpenIslands) -> ShardRecord:
        """Write cells ``shard * 4000`` and on; all but the last shard of a sample hold 4,000.

        Threads and processes may call it at once, one a shard. The record is written after the shard.
        """
        firsts = range(0, len(rows), schema.BLOCK_CELLS)
        return self.write_blocks(shard, (rows[first : first + schema.BLOCK_CELLS] for first in firsts))

    def write_blocks(self, shard: int, blocks: Iterable[OpenIslands]) -> ShardRecord:
        """As ``write_shard``, block by block: 250 cells each but for the last, of which one is in memory at a time."""
        encoded = encode_shard(blocks)
        record = ShardRecord(shard, encoded.sha256, encoded.n_open, encoded.n_cells)
        self._check_plan()
        if encoded.data:
            self._put_shard(shard, encoded.data)
        check = {"bytes": len(encoded.data), "crc32c": google_crc32c.value(encoded.data)}
        self.place.write(_record(shard), json.dumps({**asdict(record), **check}).encode())
        return record

    def _put_shard(self, shard: int, data: bytes) -> None:
        name = f"X/{shard_name(shard)}"
        if not is_url(self.store):
            self.sample.write(name, data)
            return
        from annatac_scale.store.objects import Prefix

        place = Prefix(self.sample.location)
        if place.write_new(name, data) is None:  # it may be a committed one: never overwritten
            raise StoreError(
                f"{place.location}/{name}: found it there with other content; another run is writing the sample; wait "
                "for it or stop it, then run the same command again"
            )

    def _check_plan(self) -> None:
        try:
            plan = self.place.read(PLAN)
        except FileNotFoundError:
            plan = b""
        if hashlib.sha256(plan).hexdigest() != self.plan_sha256:
            raise StoreError(
                f"{self.store}: sample {self.name!r} is not being written by this plan any more; "
                "another run took it over, or it is finished"
            )

    def written(self, shard: int) -> ShardRecord | None:
        """The record of a shard; None where it was not written, or a power cut took it."""
        try:
            record = json.loads(self.place.read(_record(shard)))
            n_bytes, crc32c = record.pop("bytes"), record.pop("crc32c")
            if n_bytes and not self._holds(f"X/{shard_name(shard)}", n_bytes, crc32c):
                return None
            return ShardRecord(**record)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def recorded(self) -> list[int]:
        """The shards that have a record."""
        stems = [name.rpartition("/")[2].removesuffix(".json") for name in self.place.names("shards")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _holds(self, name: str, n_bytes: int, crc32c: int) -> bool:
        if is_url(self.store):
            return self.sample.size(name) == n_bytes  # an object is never torn
        data = self.sample.read(name)
        return len(data) == n_bytes and google_crc32c.value(data) == crc32c

    def commit(
        self,
        shards: Sequence[ShardRecord],
        obs: pd.DataFrame,
        measured: NDArray[np.bool_],
        conversion: dict[str, Any],
    ) -> str:
        """Make the sample visible and remove all else of the draft; returns the sample's digest (hex).

        shards: of all its shards, in any order; obs: one row a cell, indexed by barcode, each once
        measured: bool [n_islands]; conversion: JSON-able
        Raises StoreError when the sample is not whole, InputError for an obs that cannot be stored.
        """
        shards = sorted(shards, key=lambda record: record.shard)
        self._check_whole(shards, len(obs), len(measured))
        check_obs(f"{self.store}, sample {self.name!r}", obs)
        obs = storable(obs)
        x_sha256 = hashlib.sha256("".join(record.sha256 for record in shards).encode()).hexdigest()
        digest = sample_digest(self.islands_sha256, x_sha256, measured, obs)
        shard_open = [record.n_open for record in shards]
        sizes = {"n_cells": len(obs), "n_open": sum(shard_open)}
        entry = {"name": self.name, **sizes, "shard_open": shard_open, "x_sha256": x_sha256, "digest": digest}
        self._check_plan()
        try:
            self._write_all_but_shards(
                obs, measured, {"conversion": conversion, **sizes, "x_sha256": x_sha256}
            )
            self._publish(entry)
        except OSError as error:
            raise as_store_error(error, self.store, "written") from error
        self.place.remove("")
        return digest

    def _check_whole(self, shards: Sequence[ShardRecord], n_cells: int, n_flags: int) -> None:
        expected = {shard: min(schema.SHARD_CELLS, n_cells - first) for shard, first in _shards_of(n_cells)}
        found = {record.shard: record.n_cells for record in shards}
        wrong = [shard for shard in expected | found if found.get(shard) != expected.get(shard)]
        if wrong or len(found) != len(shards) or n_flags != self.n_islands:
            raise StoreError(
                f"sample {self.name!r} is not whole: shards missing or of other cells {wrong[:5]}, {n_cells} obs rows, "
                f"{n_flags} measured flags for {self.n_islands} islands"
            )

    def _write_all_but_shards(
        self, obs: pd.DataFrame, measured: NDArray[np.bool_], attributes: dict[str, Any]
    ) -> None:
        store, sample = place_of(self.store), self.sample
        for name in sample.names():
            if not name.startswith("X/c/"):
                sample.remove(name)  # of a commit that was killed
        # The islands are the same in every sample: their files are shared or copied, only `measured` is made anew.
        islands = [name for name in store.names(schema.ISLANDS) if name != f"{schema.ISLANDS}/zarr.json"]
        var = {f"{self._sample_name}/var/{name.partition('/')[2]}": name for name in islands}
        files = self._files(store, obs, measured)
        files[f"{schema.CONVERSION}/zarr.json"] = encoded_group("dict", "0.1.0", **attributes, complete=True)
        store.write_all({f"{self._sample_name}/{name}": data for name, data in files.items()}, var)
        if not is_url(self.store):
            flush(Path(sample.location, "X", "c"))

    def _files(self, store: Place, obs: pd.DataFrame, measured: NDArray[np.bool_]) -> Files:
        islands = json.loads(store.read(f"{schema.ISLANDS}/zarr.json"))["attributes"]
        return {
            "zarr.json": encoded_group("anndata", "0.1.0"),
            "X/zarr.json": json.dumps(x_metadata(len(obs), self.n_islands)).encode(),
            **frame_files("obs", obs),
            "var/zarr.json": frame_file(islands["_index"], [*islands["column-order"], "measured"]),
            **array_files("var/measured", np.asarray(measured, bool)),
            "uns/zarr.json": encoded_group("dict", "0.1.0"),
        }

    def _publish(self, entry: dict[str, Any]) -> None:
        """Put the sample in its place and name it in the index: the commit."""

        def add(index: list[dict[str, Any]]) -> None:
            if entry in index:  # the answer to a conditional write was lost
                return
            if any(one["name"] == self.name for one in index):
                raise StoreError(
                    f"{self.store}: sample {self.name!r} is there already; choose another --sample"
                )
            if not is_url(self.store):
                target = Path(self.store, schema.SAMPLES, self.name)
                shutil.rmtree(
                    target, ignore_errors=True
                )  # it was renamed, then killed before the index named it
                move(Path(self.sample.location), target)
            index.append(entry)

        with nullcontext() if is_url(self.store) else store_lock(self.store):
            change_index(self.store, add)

    def discard(self) -> None:
        """Remove everything of the draft; nothing of a committed sample."""
        if is_url(self.store) and self.name not in committed_samples(self.store):
            self.sample.remove("")
        self.place.remove("")


def _shards_of(n_cells: int) -> list[tuple[int, int]]:
    """Each shard of a sample with its first cell."""
    return list(enumerate(range(0, n_cells, schema.SHARD_CELLS)))


def _record(shard: int) -> str:
    return f"shards/{shard}.json"


@contextmanager
def open_draft(store: Location, name: str, plan: Mapping[str, Any]) -> Iterator[Draft]:
    """The draft of a sample, locked for this process; leaving it only unlocks.

    What an earlier run left is kept if it had an equal ``plan`` (as JSON), else removed.
    Raises StoreError when another process has the sample, it is committed, or there is no store of our major version.
    """
    check_name(name)
    store = store if is_url(store) else Path(store).absolute()
    read_root(store)  # nothing, not even a lock, is put into what is no store of ours
    try:
        lock = lock_sample(store, name)
    except FileNotFoundError as error:
        raise StoreError(f"{store}: the store was removed meanwhile; run the same command again") from error
    if lock is None:
        raise StoreError(f"{store}: another process is writing sample {name!r}; wait for it or stop it")
    try:
        root = read_root(store)  # it may have given way to another before we had the lock
        if name in committed_samples(store):
            place_of(store).remove(f"{INCOMING}/{name}")
            raise StoreError(f"{store}: sample {name!r} is there already; choose another --sample")
        text = json.dumps(plan, sort_keys=True).encode()
        sha256 = hashlib.sha256(text).hexdigest()
        draft = Draft(str(store), name, root["n_islands"], root["islands_sha256"], sha256)
        _take_up(draft, text)
        yield draft
    finally:
        lock.release()


def sweep(store: Location) -> None:
    """Remove what is left of the drafts of committed samples: a run that is killed while it cleans up leaves some."""
    place = place_of(store)
    left = {name.split("/")[1].removeprefix(".").removesuffix(".lock") for name in place.names(INCOMING)}
    left.update(place.folders(INCOMING))
    for name in left.intersection(committed_samples(store)) if left else ():
        lock = lock_sample(store, name)
        if lock is not None:  # else it is just being removed
            place.remove(f"{INCOMING}/{name}")
            lock.release()
    if not left and not is_url(store) and INCOMING in place.folders():
        with store_lock(store):
            remove_incoming_if_empty(Path(store))


def _take_up(draft: Draft, plan: bytes) -> None:
    """Keep what is there if it was made by ``plan``, else begin anew."""
    renamed = f"{schema.SAMPLES}/{draft.name}"
    try:
        found = draft.place.read(PLAN)
    except FileNotFoundError:
        found = b""
    if found != plan:
        draft.place.remove("")
        place_of(draft.store).remove(renamed)
        draft.place.write(PLAN, plan)
    elif is_url(draft.store):
        recorded = {f"X/{shard_name(shard)}" for shard in draft.recorded()}
        for name in draft.sample.names("X/c"):
            if name not in recorded:
                draft.sample.remove(name)
    elif os.path.isdir(os.path.join(draft.store, renamed)):
        draft.sample.remove("")  # it was killed between the rename and the index
        os.rename(os.path.join(draft.store, renamed), draft.sample.location)


def check_name(name: str) -> None:
    """Raise InputError for what cannot be the name of a sample."""
    if not re.fullmatch(schema.SAMPLE_NAME, name):
        raise InputError(
            f"sample name {name!r}: expected letters, digits, '_', '.' and '-', not starting with "
            "'.', '_' or '-', and not zarr.json; choose one with --sample"
        )

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import schema
from annatac_scale.store.files import (
    INCOMING,
    as_store_error,
    flush,
    lock_sample,
    move,
    store_lock,
    unlock_sample,
)
from annatac_scale.store.metadata import committed_samples, read_index, read_root, write_index
from annatac_scale.store.obs import check_obs, sample_digest, storable, write_frame
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Place, is_url, place_of
from annatac_scale.store.shards import create_x, encode_shard

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
    def sample(self) -> Place:
        """The future sample."""
        return self.place.below(SAMPLE)

    def write_shard(self, shard: int, rows: OpenIslands) -> ShardRecord:
        """Write cells ``shard * 4000`` and on; all but the last shard of a sample hold 4,000.

        Threads and processes may call it at once, one a shard. The record is written after the shard.
        """
        encoded = encode_shard(rows)
        record = ShardRecord(shard, encoded.sha256, len(rows.islands), len(rows))
        self._check_plan()
        if encoded.data:
            self.sample.write(f"X/c/{shard}/0", encoded.data)
        check = {"bytes": len(encoded.data), "crc32c": google_crc32c.value(encoded.data)}
        self.place.write(_record(shard), json.dumps({**asdict(record), **check}).encode())
        return record

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
            data = self.sample.read(f"X/c/{shard}/0") if record["bytes"] else b""
        except (FileNotFoundError, ValueError):
            return None
        if record.pop("bytes") != len(data) or record.pop("crc32c") != google_crc32c.value(data):
            return None
        return ShardRecord(**record)

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
        self._check_plan()
        try:
            self._write_all_but_shards(
                obs, measured, {"conversion": conversion, **sizes, "x_sha256": x_sha256}
            )
            self._publish(
                {"name": self.name, **sizes, "shard_open": shard_open, "x_sha256": x_sha256, "digest": digest}
            )
        except OSError as error:
            raise as_store_error(error, self.store, "written") from error
        self.discard()
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
        folder = Path(self.sample.location)
        for name in ("X/zarr.json", "obs", "var", "uns"):  # of a commit that was killed
            self.sample.remove(name)
        group = zarr.create_group(
            folder, attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"}, overwrite=False
        )
        create_x(group, len(obs), self.n_islands)
        write_frame(group, "obs", obs)
        shutil.copytree(Path(self.store) / schema.ISLANDS, folder / "var")
        var = zarr.open_group(folder / "var", mode="r+")
        write_frame(var, "measured", np.asarray(measured, bool))
        var.attrs["column-order"] = [*var.attrs["column-order"], "measured"]  # type: ignore[misc]
        write_elem(group, "uns", {})
        encoding = {"encoding-type": "dict", "encoding-version": "0.1.0"}
        group.create_group(schema.CONVERSION, attributes={**encoding, **attributes, "complete": True})
        flush(folder)

    def _publish(self, entry: dict[str, Any]) -> None:
        store = Path(self.store)
        target = store / schema.SAMPLES / self.name
        with store_lock(store):
            shutil.rmtree(target, ignore_errors=True)  # it was renamed, then killed before the index named it
            move(Path(self.sample.location), target)
            write_index(store, [*read_index(store), entry])

    def discard(self) -> None:
        """Remove everything of the draft."""
        place_of(self.store).remove(f"{INCOMING}/{self.name}")


def _shards_of(n_cells: int) -> list[tuple[int, int]]:
    """Each shard of a sample with its first cell."""
    return list(enumerate(range(0, n_cells, schema.SHARD_CELLS)))


def _record(shard: int) -> str:
    return f"shards/{shard}.json"


@contextmanager
def open_draft(store: Path | str, name: str, plan: Mapping[str, Any]) -> Iterator[Draft]:
    """The draft of a sample, locked for this process; leaving it only unlocks.

    What an earlier run left is kept if it had an equal ``plan`` (as JSON), else removed.
    Raises StoreError when another process has the sample, it is committed, or there is no store of our major version.
    """
    check_name(name)
    store = store if is_url(store) else Path(store).absolute()
    root = read_root(Path(store))  # nothing, not even a lock, is put into what is no store of ours
    written_plan = json.dumps(plan, sort_keys=True).encode()
    draft = Draft(
        str(store), name, root["n_islands"], root["islands_sha256"], hashlib.sha256(written_plan).hexdigest()
    )
    lock = lock_sample(Path(store), name)
    if lock is None:
        raise StoreError(f"{store}: another process is writing sample {name!r}; wait for it or stop it")
    try:
        if name in committed_samples(Path(store)):
            raise StoreError(f"{store}: sample {name!r} is there already; choose another --sample")
        _take_up(draft, written_plan)
        yield draft
    finally:
        unlock_sample(Path(store), name, lock)


def _take_up(draft: Draft, plan: bytes) -> None:
    """Keep what is there if it was made by ``plan``, else begin anew."""
    renamed = Path(draft.store, schema.SAMPLES, draft.name)
    try:
        found = draft.place.read(PLAN)
    except FileNotFoundError:
        found = b""
    if found != plan:
        draft.discard()
        shutil.rmtree(renamed, ignore_errors=True)
        draft.place.write(PLAN, plan)
    elif renamed.exists():  # killed between the rename and the index
        draft.sample.remove("")
        os.rename(renamed, draft.sample.location)


def check_name(name: str) -> None:
    """Raise InputError for what cannot be the name of a sample."""
    if not re.fullmatch(schema.SAMPLE_NAME, name):
        raise InputError(
            f"sample name {name!r}: expected letters, digits, '_', '.' and '-', not starting with "
            "'.', '_' or '-', and not zarr.json; choose one with --sample"
        )

"""Create a store and add samples to it. A sample is complete or invisible.

A sample is written in ``<store>/.incoming/<name>`` and renamed into ``samples/``; the index in the attributes
of ``samples/`` names it last. Whatever is not in the index was never committed.
"""

import shutil
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.draft import ShardRecord, check_name, open_draft
from annatac_scale.store.files import (
    INCOMING,
    creation_lock,
    flush,
    move,
    store_lock,
)
from annatac_scale.store.metadata import (
    committed_samples,
    read_root,
    root_attributes,
)
from annatac_scale.store.obs import replace_obs, write_frame
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import is_url

__all__ = ["SampleWriter", "committed_samples", "create_store", "replace_obs"]

_SAME = ("assembly", "width_bp", "islands_sha256", "counting")


def create_store(path: Path | str, space: IslandSpace, counting: str) -> None:
    """Create an empty island store, or check that an existing one has the same islands and counting.

    A store without samples gives way to one of other islands. Several processes may create the same store at once.
    Raises StoreError when ``path`` holds something else, or a store of other islands, counting or major version.
    """
    path = Path(path)
    attributes = root_attributes(space, counting)
    if _is_same(path, attributes):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with creation_lock(path):
        if _is_same(path, attributes):
            return  # another process was faster
        _make_way(path, attributes)
        aside = _name_aside(path)
        try:
            root = zarr.create_group(aside, attributes=attributes)
            write_frame(root, schema.ISLANDS, islands_frame(space))
            root.create_group(schema.SAMPLES, attributes={schema.INDEX: []})
            flush(aside)
            move(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _is_same(path: Path, attributes: dict[str, Any]) -> bool:
    """Whether a store of these islands and counting is there."""
    try:
        found = read_root(path)
    except StoreError:
        return False
    return all(found[key] == attributes[key] for key in _SAME)


def _make_way(path: Path, attributes: dict[str, Any]) -> None:
    """Remove a store without samples, left by a conversion that failed. Raises StoreError for anything else."""
    if not (path / "zarr.json").exists():
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StoreError(f"{path}: exists and is not an island store; choose another --out")
        return
    found = read_root(path)
    with store_lock(path):
        if committed_samples(path) or (path / INCOMING).exists():
            key = next(key for key in _SAME if found[key] != attributes[key])
            raise StoreError(
                f"{path}: holds {key} {found[key]!r}, but {attributes[key]!r} was asked for; "
                "use the store's own, or another --out"
            )
        old = _name_aside(path)
        move(path, old)
    shutil.rmtree(old)


def _name_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def islands_frame(space: IslandSpace) -> pd.DataFrame:
    """The islands as a data frame indexed by name, columns chrom (categorical), start, end, genes."""
    return pd.DataFrame(
        {
            "chrom": pd.Categorical.from_codes(space.chrom, categories=list(space.chromosomes)),
            "start": space.start,
            "end": space.end,
            "genes": pd.array(space.genes.astype(str), dtype="str"),
        },
        index=pd.Index(space.names(), name="island"),
    )


class SampleWriter:
    """Writes one sample; a context manager. Leaving it without ``commit`` removes what was written.

    ``write_shard`` may be called from several threads, once for each shard, in any order.
    Raises StoreError on entry when the sample is committed already, another process is writing it, or there is no
    store of our major version.
    """

    def __init__(self, path: Path | str, name: str, n_cells: int) -> None:
        check_name(name)
        self.path = path if is_url(path) else Path(path)
        self.name = name
        self.n_cells = n_cells
        self._shards: dict[int, ShardRecord] = {}
        self._things = ExitStack()

    def __enter__(self) -> "SampleWriter":
        only_once = {"writer": uuid.uuid4().hex}
        self._draft = self._things.enter_context(open_draft(self.path, self.name, only_once))
        self._things.callback(self._draft.discard)
        return self

    def write_shard(self, shard: int, rows: OpenIslands) -> None:
        """Write cells ``shard * 4000`` and on; all but the last shard hold 4,000 cells."""
        expected = min(schema.SHARD_CELLS, self.n_cells - shard * schema.SHARD_CELLS)
        if len(rows) != expected:
            raise StoreError(
                f"sample {self.name!r}, shard {shard}: {len(rows)} cells given, {expected} expected"
            )
        self._shards[shard] = self._draft.write_shard(shard, rows)

    def commit(self, obs: pd.DataFrame, measured: NDArray[np.bool_], conversion: dict[str, Any]) -> str:
        """Make the sample visible; returns its digest (hex).

        obs: n_cells rows indexed by barcode, each once; measured: bool [n_islands]; conversion: JSON-able.
        Raises StoreError when the sample is not whole, InputError for an obs that cannot be stored.
        """
        if len(obs) != self.n_cells:
            raise StoreError(
                f"sample {self.name!r} is not whole: {len(obs)} obs rows for {self.n_cells} cells"
            )
        return self._draft.commit(list(self._shards.values()), obs, measured, conversion)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._things.close()

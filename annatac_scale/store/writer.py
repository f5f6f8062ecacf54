"""Write samples from one process: a thin user of drafts that keeps nothing of a run that stopped.

Creating a store, replacing obs and listing samples can be imported from here too.
"""

import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store import schema
from annatac_scale.store.create import create_store
from annatac_scale.store.draft import ShardRecord, check_name, open_draft
from annatac_scale.store.metadata import committed_samples
from annatac_scale.store.obs import replace_obs
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location, is_url

__all__ = ["SampleWriter", "committed_samples", "create_store", "replace_obs"]


class SampleWriter:
    """Writes one sample; a context manager. Leaving it without ``commit`` removes what was written.

    ``write_shard`` may be called from several threads, once for each shard, in any order.
    Raises StoreError on entry when the sample is committed already, another process is writing it, or there is no
    store of our major version.
    """

    def __init__(self, path: Location, name: str, n_cells: int) -> None:
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

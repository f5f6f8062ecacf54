"""Stores of closed cells whose obs is what a test is about."""

from pathlib import Path

import numpy as np
import pandas as pd

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store

SPACE = IslandSpace.all(Assembly("toy", ("chr1",), (50_000,)))


def obs_store(path: Path, **samples: pd.DataFrame) -> IslandStore:
    """A store with these obs; barcodes are the sample's name and the row."""
    create_store(path, SPACE, "insertion")
    for name, obs in samples.items():
        with SampleWriter(path, name, len(obs)) as writer:
            for shard in range(-(-len(obs) // 4000)):
                n = min(4000, len(obs) - 4000 * shard)
                writer.write_shard(
                    shard, OpenIslands(np.zeros(n + 1, np.int64), np.empty(0, "i4"), np.empty(0, "u1"))
                )
            barcodes = [f"{name}{row}" for row in range(len(obs))]
            writer.commit(obs.set_axis(barcodes), np.ones(len(SPACE), bool), {})
    return IslandStore.open(path)

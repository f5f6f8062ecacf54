"""Stores whose content is known."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import SHARD_CELLS
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store

N_ISLANDS = 40


@dataclass
class KnownStore:
    """A store on disk and what is in it, as a dense matrix and one measured mask a sample."""

    store: IslandStore
    levels: np.ndarray
    measured: list[np.ndarray]

    def row(self, cell):
        return {int(i): int(self.levels[cell, i]) for i in np.flatnonzero(self.levels[cell])}


def small_space(n_islands=N_ISLANDS, width_bp=5000):
    start = np.arange(n_islands, dtype=np.int64) * width_bp
    genes = np.full(n_islands, "", object)
    chrom = np.zeros(n_islands, np.int32)
    return IslandSpace("toy", ("chr1",), width_bp, "all", chrom, start, start + width_bp, genes)


def open_islands(levels):
    islands = [np.flatnonzero(row) for row in levels]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in islands])]).astype(np.int64)
    flat = np.concatenate([np.empty(0, int), *islands])
    return OpenIslands(offsets, flat.astype(np.int32), levels[levels > 0].astype(np.uint8))


def write_store(path, n_cells_of_samples, seed=0, space=None):
    rng = np.random.default_rng(seed)
    space = small_space() if space is None else space
    create_store(path, space, "insertion")
    parts, masks = [np.empty((0, len(space)), np.uint8)], []
    for number, n_cells in enumerate(n_cells_of_samples):
        measured = rng.random(len(space)) < 0.8
        levels = (
            rng.integers(1, 6, (n_cells, len(space))) * (rng.random((n_cells, len(space))) < 0.15) * measured
        )
        with SampleWriter(path, f"s{number}", n_cells) as writer:
            for shard in range(-(-n_cells // SHARD_CELLS)):
                rows = levels[shard * SHARD_CELLS : (shard + 1) * SHARD_CELLS]
                writer.write_shard(shard, open_islands(rows))
            obs = pd.DataFrame(index=pd.Index([f"s{number}-{i}" for i in range(n_cells)], name="barcode"))
            writer.commit(obs, measured, {})
        parts.append(levels.astype(np.uint8))
        masks.append(measured)
    return KnownStore(IslandStore.open(path), np.concatenate(parts), masks)

"""Stores of random cells for the tests of the store floor."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.writer import SampleWriter

ASSEMBLY = Assembly("toy", ("chr1", "chr2"), (3_000_000, 1_002_000))
SPACE = IslandSpace.all(ASSEMBLY)
MEASURED = np.arange(len(SPACE)) % 7 != 0


def random_cells(n_cells: int, seed: int, density: float = 0.05) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, len(SPACE), density, "csr", np.uint8, rng)
    matrix.data = rng.integers(1, 6, matrix.nnz).astype(np.uint8)
    return matrix


def barcodes(n_cells: int) -> list[str]:
    return [f"BC{i:05d}-1" for i in range(n_cells)]


def random_obs(n_cells: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B cell", "T cell"], n_cells)),
            "n_fragments": rng.integers(0, 9999, n_cells),
            "score": rng.random(n_cells),
            "note": [None if i % 3 == 0 else f"n{i}" for i in range(n_cells)],
        },
        index=barcodes(n_cells),
    )


def write_sample(
    path: Path, name: str, matrix: sparse.csr_matrix, seed: int = 0, obs: pd.DataFrame | None = None
) -> str:
    """Write and commit a sample; returns its digest."""
    cells = OpenIslands.from_csr(matrix)
    with SampleWriter(path, name, len(cells)) as writer:
        for shard in reversed(range(-(-len(cells) // 4000))):
            writer.write_shard(shard, cells[shard * 4000 : (shard + 1) * 4000])
        obs = random_obs(len(cells), seed) if obs is None else obs
        return writer.commit(obs, MEASURED, {"inputs": ["x"]})

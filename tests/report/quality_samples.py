"""Samples with columns of quality, drawn by chance, and stores that hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.report.quality import RankCurve, SampleQuality
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.writer import SampleWriter, create_store

SPACE = IslandSpace.all(Assembly("toy", ("chr1", "chr2"), (300_000, 102_000)))
LINES = {
    "lines": 1010, "comment": 10, "invalid": 0, "other_contig": 20, "outside_islands": 300, "not_a_cell": 180,
    "counted": 500,
}  # fmt: skip


def fragment_obs(n_cells: int, seed: int = 0) -> pd.DataFrame:
    """All columns that fragments give, as conversion with QC writes them."""
    rng = np.random.default_rng(seed)
    n = rng.integers(100, 9000, n_cells)
    share = rng.beta(5, 5, n_cells)
    return pd.DataFrame(
        {
            "n_fragments": n, "n_insertions": 2 * n, "n_open": n // 3, "fraction_in_islands": share * 0.7,
            "duplicate_rate": np.full(n_cells, np.nan), "fraction_in_peaks": share, "fraction_in_tss": share / 2,
            "tss_enrichment": rng.gamma(9, 1, n_cells), "nucleosome_signal": rng.gamma(10, 0.07, n_cells),
            "fraction_mitochondrial": rng.beta(1, 60, n_cells),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )  # fmt: skip


def matrix_obs(n_cells: int, seed: int = 0) -> pd.DataFrame:
    """All columns that a matrix gives."""
    rng = np.random.default_rng(seed)
    n = rng.integers(100, 9000, n_cells)
    columns = {"n_counts": n, "n_open": n // 3, "fraction_in_islands": rng.beta(8, 3, n_cells)}
    return pd.DataFrame(columns, index=[f"c{i}" for i in range(n_cells)])


def rank_curve(obs: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """The knee curve as conversion records it: the cells, and 5,000 barcodes of few fragments."""
    ambient = np.random.default_rng(seed).integers(1, 90, 5000)
    every = np.sort(np.concatenate([obs["n_fragments"], ambient]))[::-1]
    rank = np.unique(np.geomspace(1, len(every), 60).astype(int))
    found = {"rank": rank.tolist(), "n_fragments": every[rank - 1].tolist()}
    return found | {"n_barcodes": len(every), "n_cells": len(obs)}


def fragments_record(obs: pd.DataFrame) -> dict[str, Any]:
    return {"kind": "fragments", "lines": LINES, "barcode_rank": rank_curve(obs)}


def fragment_sample(name: str, n_cells: int = 300, seed: int = 0) -> SampleQuality:
    obs = fragment_obs(n_cells, seed)
    curve = rank_curve(obs, seed)
    arrays = (np.array(curve[key]) for key in ("rank", "n_fragments"))
    columns = {column: obs[column].to_numpy(float) for column in obs}
    return SampleQuality(name, "fragments", n_cells, columns, RankCurve(*arrays, curve["n_barcodes"]), LINES)


def matrix_sample(name: str, n_cells: int = 300) -> SampleQuality:
    obs = matrix_obs(n_cells)
    columns = {column: obs[column].to_numpy(float) for column in obs}
    return SampleQuality(name, "h5ad", n_cells, columns, None, {})


def write_store(path: Path, samples: dict[str, tuple[pd.DataFrame, dict[str, Any]]]) -> Path:
    """A store of closed cells with these obs and conversions."""
    create_store(path, SPACE, "insertion")
    for name, (obs, conversion) in samples.items():
        closed = OpenIslands(np.zeros(len(obs) + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))
        with SampleWriter(path, name, len(obs)) as writer:
            if len(obs):
                writer.write_shard(0, closed)
            writer.commit(obs, np.ones(len(SPACE), bool), conversion)
    return path

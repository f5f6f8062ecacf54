"""Stores of what a conversion says of itself too, so that all of it can be verified."""

from pathlib import Path

import numpy as np
from random_stores import MEASURED, random_cells, random_obs
from scipy import sparse

from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.writer import SampleWriter


def measured_cells(n_cells: int, seed: int, density: float = 0.02) -> sparse.csr_matrix:
    """Random cells without open islands that were not measured."""
    cells = random_cells(n_cells, seed, density).multiply(MEASURED.astype(np.uint8)).tocsr().astype(np.uint8)
    cells.eliminate_zeros()
    return cells


def write_counted(store: Path | str, name: str, cells: sparse.csr_matrix) -> None:
    n_cells, n_open = cells.shape[0], np.diff(cells.indptr)
    conversion = {
        "kind": "fragments",
        "lines": {"lines": 12, "comment": 2, "counted": 7, "not_a_cell": 2, "invalid": 1},
        "invalid": {"too few columns": 1},
        "peaks": {
            "peaks": 9,
            "in_islands": 7,
            "outside_islands": 2,
            "other_contig": 0,
            "measured_islands": int(MEASURED.sum()),
        },
        "cells": {"cells": n_cells, "without_counts": int((n_open == 0).sum())},
        "assembly": "toy",
        "counting": "insertion",
    }
    with SampleWriter(store, name, n_cells) as writer:
        rows = OpenIslands.from_csr(cells)
        for shard in range(-(-n_cells // 4000)):
            writer.write_shard(shard, rows[shard * 4000 : (shard + 1) * 4000])
        writer.commit(random_obs(n_cells, 3).assign(n_open=n_open), MEASURED, conversion)

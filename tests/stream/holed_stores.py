"""Stores whose obs has text, numbers and truth values, some of them missing, and the cells chosen there."""

import numpy as np
import pandas as pd
from obs_stores import obs_store

from annatac_scale.errors import InputError
from annatac_scale.stream.where import cells_where


def frame(n, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "tissue": rng.choice(["lung", "gut", "é 1", "", "it's"], n),
            "n_open": rng.integers(0, 5, n),
            "small": rng.integers(0, 4, n).astype(np.uint8),
            "score": rng.integers(-3, 4, n) / 2,
            "doublet": rng.random(n) < 0.5,
        }
    )


def with_holes(obs, seed):
    """The same with text and floats that are missing here and there."""
    holes = np.random.default_rng(seed).random((2, len(obs))) < 0.3
    return obs.assign(
        tissue=obs["tissue"].where(~holes[0], None), score=obs["score"].where(~holes[1]).astype("f4")
    )


def holed_store(path):
    """Two samples without anything missing, then one with holes, and one that lacks columns."""
    return obs_store(
        path,
        a=frame(40, 1),
        b=frame(25, 2),
        c=with_holes(frame(40, 3), 4),
        d=frame(5, 5)[["n_open"]],
    )


def chosen(store, where):
    """Ids, none where there are none."""
    try:
        cells = cells_where(store, where)
    except InputError as error:
        if "holds for none of" not in str(error):
            raise
        return []
    assert cells.dtype == np.int64
    return cells.tolist()

"""Quality of cells: what conversion writes into obs by itself."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.ingest.fragments import FragmentCounts

_OWN = ("n_fragments", "n_insertions", "n_counts", "n_open", "fraction_in_islands")
_RESERVED = ("sample", "barcode", "_index", *_OWN)


def unusable(name: str) -> bool:
    """Whether users cannot have an obs column of this name: it is ours, the store's, or would become two folders."""
    return name in _RESERVED or "/" in name


def fragment_quality(counts: FragmentCounts) -> pd.DataFrame:
    """n_fragments (on the assembly), n_insertions (their ends), n_open islands, share of fragments that count."""
    return pd.DataFrame(
        {
            "n_fragments": counts.n_fragments,
            "n_insertions": 2 * counts.n_fragments,
            "n_open": counts.open.n_open,
            "fraction_in_islands": _share(counts.n_inside, counts.n_fragments),
        },
        index=pd.Index(counts.barcodes, dtype=object, name="barcode"),
    )


def matrix_quality(
    barcodes: pd.Index, n_counts: NDArray[np.int64], n_open: NDArray[np.int64], n_inside: NDArray[np.int64]
) -> pd.DataFrame:
    """n_counts (in all peaks), n_open islands, and the share of the counts that lie in islands."""
    columns = {"n_counts": n_counts, "n_open": n_open, "fraction_in_islands": _share(n_inside, n_counts)}
    return pd.DataFrame(columns, index=barcodes)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole, 0 where whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def with_given(own: pd.DataFrame, given: pd.DataFrame) -> pd.DataFrame:
    """Our columns, then the user's of the same rows; where a name is taken the user's gets the end ``_given``."""
    names: list[str] = []
    for column in given.columns:
        # A name becomes a folder in the store: a slash would make it two.
        name = str(column).replace("/", "_")
        while name in _RESERVED or name in names:
            name += "_given"
        names.append(name)
    return pd.concat([own, given.set_axis(names, axis=1)], axis=1)

"""Quality of cells: what conversion writes into obs by itself. docs/qc.md has the formulas and their sources."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.ingest import kernel
from annatac_scale.ingest.segments import CENTRE_REACH, FLANK_FROM, FLANK_TO

_OWN = (
    "n_fragments",
    "n_insertions",
    "n_counts",
    "n_open",
    "fraction_in_islands",
    "duplicate_rate",
    "fraction_in_peaks",
    "fraction_in_tss",
    "tss_enrichment",
    "nucleosome_signal",
    "fraction_mitochondrial",
)
_RESERVED = ("sample", "barcode", "_index", *_OWN)


def unusable(name: str) -> bool:
    """Whether users cannot have an obs column of this name: it is ours, the store's, or would become two folders."""
    return name in _RESERVED or "/" in name


def fragment_quality(
    barcodes: Sequence[str],
    quality: NDArray[np.int64],
    n_open: NDArray[np.int64],
    has_quality: bool,
    has_peaks: bool,
    has_tss: bool,
    follows_all: bool,
) -> pd.DataFrame:
    """The obs columns of cells counted from fragments.

    quality: int64 [n_cells, kernel.N_QUALITY]; follows_all: whether all fragments of a cell were followed, not only
    those in islands; has_quality, has_peaks, has_tss: what was known while counting, and so which columns there are
    """
    n_fragments = quality[:, kernel.FRAGMENTS]
    columns: dict[str, NDArray] = {}
    if follows_all:
        columns |= {"n_fragments": n_fragments, "n_insertions": 2 * n_fragments}
    columns["n_open"] = n_open
    if follows_all:
        columns["fraction_in_islands"] = _share(quality[:, kernel.INSIDE], n_fragments)
    if has_quality:
        reads = quality[:, kernel.READS]
        columns["duplicate_rate"] = _ratio(reads - quality[:, kernel.COUNTED], reads)
        if has_peaks:
            columns["fraction_in_peaks"] = _share(quality[:, kernel.IN_PEAKS], n_fragments)
        if has_tss:
            columns["fraction_in_tss"] = _share(quality[:, kernel.IN_TSS], n_fragments)
            columns["tss_enrichment"] = tss_enrichment(quality)
        columns["nucleosome_signal"] = _ratio(quality[:, kernel.MONO], quality[:, kernel.SHORT])
        columns["fraction_mitochondrial"] = _share(quality[:, kernel.MITO], n_fragments)
    return pd.DataFrame(columns, index=pd.Index(barcodes, dtype=object, name="barcode"))


def tss_enrichment(quality: NDArray[np.int64]) -> NDArray[np.float64]:
    """Insertions a bp within 50 bp of a TSS over those a bp in the two outer flanks of 100 bp, of which at least one.

    ENCODE, "ATAC-seq data standards": the signal at the TSS over the mean of the 100 bp at each end of 2,000 bp.
    """
    centre = quality[:, kernel.CENTRE] / (2 * CENTRE_REACH + 1)
    flank = np.maximum(quality[:, kernel.FLANK], 1) / (2 * (FLANK_TO - FLANK_FROM + 1))
    return centre / flank


def matrix_quality(
    barcodes: pd.Index, n_counts: NDArray[np.int64], n_open: NDArray[np.int64], n_inside: NDArray[np.int64]
) -> pd.DataFrame:
    """n_counts (in all peaks), n_open islands, and the share of the counts that lie in islands."""
    columns = {"n_counts": n_counts, "n_open": n_open, "fraction_in_islands": _share(n_inside, n_counts)}
    return pd.DataFrame(columns, index=barcodes)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole, 0 where whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole, NaN where whole is 0: not known."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


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

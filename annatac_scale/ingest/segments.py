"""The genome cut into segments, on each of which all positions lie in the same peaks and equally near to the TSS.

One look-up of a position then answers all that is counted of it, at a cost that does not grow with the peaks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import PROTEIN_CODING
from annatac_scale.genome.assembly import Assembly
from annatac_scale.ingest.peaks import PeakSet

BUCKET_BITS = 9
NO_ISLAND, SEVERAL = -1, -2

TSS_REACH = 1000
"""A fragment is near a TSS where one of its ends is within so many bp."""
CENTRE_REACH = 50
FLANK_FROM, FLANK_TO = 1901, 2000
"""TSS enrichment compares the 101 bp around a TSS with the two flanks of 100 bp at the ends of its 2,000 bp."""

_MOST_PLACES = 1 << 27


class Segments(NamedTuple):
    """Segments in the order of the genome, positions counted over all chromosomes in a row.

    base: int64 [n_chromosomes], where a chromosome begins; size: int64 [n_chromosomes], its bp
    start: int64 [n + 1], where segments begin, ended by a number beyond all positions
    bucket: int32, the segment that holds each multiple of 512
    island: int32 [n], the island of the one peak there, NO_ISLAND, or SEVERAL where there are more
    offsets: int32 [n + 1], ``at_island`` and ``at_first``, int32: the island and first segment of each peak there
    begun: int32 [n], how many peaks begin in this segment or before; ``by_start``, int32: islands of peaks by start
    near: uint8 [n], bit 0: in a peak, whether its start is in an island or not; bit 1: near a TSS
    centre, flank: uint16 [n], of how many TSS this is the centre, or a flank
    Peaks are those in islands, but for ``near``.
    """

    base: NDArray[np.int64]
    size: NDArray[np.int64]
    start: NDArray[np.int64]
    bucket: NDArray[np.int32]
    island: NDArray[np.int32]
    offsets: NDArray[np.int32]
    at_island: NDArray[np.int32]
    at_first: NDArray[np.int32]
    begun: NDArray[np.int32]
    by_start: NDArray[np.int32]
    near: NDArray[np.uint8]
    centre: NDArray[np.uint16]
    flank: NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class _Intervals:
    """Intervals on the row of all chromosomes: start and end, int64 [n]."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]


def cut_genome(peaks: PeakSet, assembly: Assembly, tss: pd.DataFrame | None = None) -> Segments:
    """The segments of a peak set, and of the TSS in a placed table (annotation.place_tss) where one is given.

    Raises InputError where so many peaks lie over each other that the segments would not fit in memory.
    """
    size = np.array(assembly.sizes, np.int64)
    base = np.cumsum(size) - size
    known = np.flatnonzero(peaks.chrom >= 0)
    every = _Intervals(
        base[peaks.chrom[known]] + peaks.start[known], base[peaks.chrom[known]] + peaks.end[known]
    )
    inside = known[peaks.island[known] >= 0]
    inside = inside[np.lexsort((peaks.end[inside], peaks.start[inside], peaks.chrom[inside]))]
    counted = _Intervals(
        base[peaks.chrom[inside]] + peaks.start[inside], base[peaks.chrom[inside]] + peaks.end[inside]
    )
    reach = _around_tss(tss, base, size)
    borders = [x for i in (every, *reach.values()) for x in (i.start, i.end)]
    start = np.unique(np.concatenate([base, *borders, [base[-1] + size[-1]]])) if len(base) else base
    first, stop = np.searchsorted(start, counted.start), np.searchsorted(start, counted.end)
    island = peaks.island[inside].astype(np.int32)
    offsets, at = _peaks_of_segments(first, stop, len(start))
    near = _depth(every, start) > 0
    # A start counts from the first bucket that begins at it or later: as searchsorted, at a tenth of its time.
    begun_at = (start + (1 << BUCKET_BITS) - 1) >> BUCKET_BITS
    bucket = np.cumsum(np.bincount(begun_at, minlength=(start[-1] >> BUCKET_BITS) + 2), dtype=np.int32) - 1
    return Segments(
        base,
        size,
        np.append(start, np.iinfo(np.int64).max),
        bucket,
        _single_island(offsets, island[at]),
        offsets,
        island[at],
        first[at].astype(np.int32),
        np.searchsorted(first, np.arange(len(start)), side="right").astype(np.int32),
        island,
        near.astype(np.uint8) + 2 * (_depth(reach["near"], start) > 0).astype(np.uint8),
        _depth(reach["centre"], start).astype(np.uint16),
        (_depth(reach["left"], start) + _depth(reach["right"], start)).astype(np.uint16),
    )


def _around_tss(
    tss: pd.DataFrame | None, base: NDArray[np.int64], size: NDArray[np.int64]
) -> dict[str, _Intervals]:
    """The intervals about each TSS of a protein-coding gene, or each TSS where none is known to be of one."""
    if tss is None:
        code = position = np.empty(0, np.int64)
    else:
        coding = tss[tss["type"] == PROTEIN_CODING]
        chosen = coding if len(coding) else tss
        code, position = chosen["code"].to_numpy(np.int64), chosen["position"].to_numpy(np.int64)

    def between(a: int, b: int) -> _Intervals:
        """From a to b bp, both included, of each TSS, as far as its chromosome goes."""
        left, right = np.maximum(position + a, 0), np.minimum(position + b + 1, size[code])
        kept = left < right
        return _Intervals((base[code] + left)[kept], (base[code] + right)[kept])

    return {
        "near": between(-TSS_REACH, TSS_REACH),
        "centre": between(-CENTRE_REACH, CENTRE_REACH),
        "left": between(-FLANK_TO, -FLANK_FROM),
        "right": between(FLANK_FROM, FLANK_TO),
    }


def _depth(intervals: _Intervals, start: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many intervals lie over each segment."""
    begin = np.bincount(np.searchsorted(start, intervals.start), minlength=len(start))
    end = np.bincount(np.searchsorted(start, intervals.end), minlength=len(start))
    return np.cumsum(begin - end)


def _peaks_of_segments(
    first: NDArray[np.int64], stop: NDArray[np.int64], n: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """For peaks over the segments first..stop: offsets int32 [n + 1], and the peaks of each segment by start."""
    spans = stop - first
    if spans.sum() > _MOST_PLACES:
        raise InputError(
            f"peaks: found {len(first):,} that lie over each other {spans.sum():,} times; expected peaks as a caller "
            "gives them, which hardly overlap; merge them"
        )
    peak = np.repeat(np.arange(len(first)), spans)
    segment = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans) + np.repeat(first, spans)
    order = np.argsort(segment, kind="stable")
    offsets = np.searchsorted(segment[order], np.arange(n + 1))
    return offsets.astype(np.int32), peak[order]


def _single_island(offsets: NDArray[np.int32], at_island: NDArray[np.int32]) -> NDArray[np.int32]:
    n = np.diff(offsets)
    island = np.full(len(n), NO_ISLAND, np.int32)
    island[n == 1] = at_island[offsets[:-1][n == 1]]
    island[n > 1] = SEVERAL
    return island

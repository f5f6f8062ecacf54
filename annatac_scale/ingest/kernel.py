"""The counting kernel: from the bytes of fragment lines to counts of (barcode, island), with no Python object a line.

``count_lines`` works through a buffer of whole lines and returns when it is done or needs something of Python: the
meaning of a new contig, a larger table, an emptied buffer of keys. Nothing of the line at hand has been counted then,
so that it is called again from the same place. The kernels hold no lock and release the GIL.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.genome.assembly import Assembly
from annatac_scale.ingest.key_table import ABSENT, NO_ROOM, KeyTable, look_up, same_bytes
from annatac_scale.ingest.peaks import PeakSet

INSERTION, FRAGMENT, PAIRED_INSERTION = 0, 1, 2

DONE, NEW_CONTIG, CONTIGS_FULL, BARCODES_FULL, KEYS_FULL = 0, 1, 2, 3, 4
FEW_COLUMNS, BAD_START, BAD_END, END_NOT_AFTER_START, END_BEYOND, NO_BARCODE = 10, 11, 12, 13, 14, 15

LINES, COMMENTS, OTHER_CONTIG, NOT_LISTED, KEYS = 0, 1, 2, 3, 4
N_COUNTERS = 5

UNRESOLVED, FOREIGN = -2, -1

_BUCKET_BITS = 9
_TAB, _NEWLINE, _RETURN, _SPACE, _HASH, _ZERO = 9, 10, 13, 32, 35, 48
_MAX_DIGITS = 18


class PeakIndex(NamedTuple):
    """The peaks in islands by (chrom, start), to be found by position. Peaks may overlap.

    start, end: int64 [n]; island: int32 [n]
    reach: int64 [n], the largest end of this and the peaks before it on its chromosome
    bounds: int64 [n_chromosomes + 1], the peaks of a chromosome
    bucket: int64, the first peak that starts at or after each multiple of 512 bp
    first_bucket: int64 [n_chromosomes], a chromosome's place in ``bucket``
    """

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    island: NDArray[np.int32]
    reach: NDArray[np.int64]
    bounds: NDArray[np.int64]
    bucket: NDArray[np.int64]
    first_bucket: NDArray[np.int64]


class Tallies(NamedTuple):
    """What the kernel counts into.

    contigs, barcodes: the names met; contig_code, contig_lines: int64 [contigs.room], a contig's chromosome (FOREIGN:
    not in the assembly, UNRESOLVED: to be asked for) and its valid lines
    n_fragments, n_inside: int64 [barcodes.room], a barcode's lines on the assembly, and those with a count in an island
    keys: int64, barcode * n_islands + island, one entry a count; counters: int64 [N_COUNTERS]
    """

    contigs: KeyTable
    contig_code: NDArray[np.int64]
    contig_lines: NDArray[np.int64]
    barcodes: KeyTable
    n_fragments: NDArray[np.int64]
    n_inside: NDArray[np.int64]
    keys: NDArray[np.int64]
    counters: NDArray[np.int64]


class Rules(NamedTuple):
    """What the kernel goes by: strategy, n_islands, whether only listed barcodes count, chromosome sizes int64."""

    strategy: int
    n_islands: int
    listed_only: bool
    sizes: NDArray[np.int64]


def index_peaks(peaks: PeakSet, assembly: Assembly) -> PeakIndex:
    """Sort the peaks that lie in islands and make their bucket table."""
    used = np.flatnonzero(peaks.island >= 0)
    used = used[np.lexsort((peaks.end[used], peaks.start[used], peaks.chrom[used]))]
    chrom, start, end = peaks.chrom[used], peaks.start[used], peaks.end[used]
    bounds = np.searchsorted(chrom, np.arange(len(assembly.sizes) + 1)).astype(np.int64)
    n_buckets = (np.array(assembly.sizes, np.int64) >> _BUCKET_BITS) + 1
    reach, buckets = end.copy(), []
    for a, b, n in zip(bounds[:-1], bounds[1:], n_buckets, strict=True):
        np.maximum.accumulate(end[a:b], out=reach[a:b])
        buckets.append(a + np.searchsorted(start[a:b], np.arange(n) << _BUCKET_BITS))
    bucket = np.concatenate(buckets).astype(np.int64)
    return PeakIndex(start, end, peaks.island[used], reach, bounds, bucket, np.cumsum(n_buckets) - n_buckets)


@njit(nogil=True, cache=True)
def _find(text, byte, a, b):  # type: ignore[no-untyped-def]
    """Where ``byte`` comes first in text[a:b], else b."""
    while a < b and text[a] != byte:
        a += 1
    return a


@njit(nogil=True, cache=True)
def _number(text, a, b):  # type: ignore[no-untyped-def]
    """The number that text[a:b] writes in digits, -1 where it holds anything else."""
    if a == b or b - a > _MAX_DIGITS:
        return -1
    value = 0
    for i in range(a, b):
        digit = np.int64(text[i]) - _ZERO
        if digit < 0 or digit > 9:
            return -1
        value = 10 * value + digit
    return value


@njit(nogil=True, cache=True)
def _is_comment(text, a, b):  # type: ignore[no-untyped-def]
    """Whether the line text[a:b] is blank or begins with #."""
    if a < b and text[a] == _HASH:
        return True
    for i in range(a, b):  # noqa: SIM110  (all() of a generator does not compile)
        if text[i] != _SPACE and text[i] != _TAB and text[i] != _RETURN:
            return False
    return True


@njit(nogil=True, cache=True)
def _add_overlaps(index, chrom, span, but, key, keys, n_keys):  # type: ignore[no-untyped-def]
    """Append key + island for each peak that overlaps span = (a, b), without those that hold the position ``but``.

    Returns the new number of keys, -1 where they do not fit.
    """
    a, b = span
    begin, stop = index.bounds[chrom], index.bounds[chrom + 1]
    i = index.bucket[index.first_bucket[chrom] + (b >> _BUCKET_BITS)]
    while i < stop and index.start[i] < b:
        i += 1
    i -= 1
    while i >= begin and index.reach[i] > a:
        if index.end[i] > a and not (index.start[i] <= but < index.end[i]):
            if n_keys == len(keys):
                return -1
            keys[n_keys] = key + index.island[i]
            n_keys += 1
        i -= 1
    return n_keys


@njit(nogil=True, cache=True)
def _count_fragment(index, strategy, chrom, start, end, key, keys, n_keys):  # type: ignore[no-untyped-def]
    """Append the counts of one fragment; returns the new number of keys, -1 where they do not fit."""
    if strategy == FRAGMENT:
        return _add_overlaps(index, chrom, (start, end), -1, key, keys, n_keys)
    n_keys = _add_overlaps(index, chrom, (start, start + 1), -1, key, keys, n_keys)
    if n_keys < 0:
        return -1
    # Paired: a peak that holds both ends counts once.
    but = start if strategy == PAIRED_INSERTION else -1
    return _add_overlaps(index, chrom, (end - 1, end), but, key, keys, n_keys)


@njit(nogil=True, cache=True)
def _parse(text, at, end):  # type: ignore[no-untyped-def]
    """Status, end of the contig, start and end of the fragment, begin and end of the barcode of text[at:end]."""
    tab1 = _find(text, _TAB, at, end)
    tab2 = _find(text, _TAB, tab1 + 1, end)
    tab3 = _find(text, _TAB, tab2 + 1, end)
    if tab3 >= end:
        return FEW_COLUMNS, 0, 0, 0, 0, 0
    left, right = _number(text, tab1 + 1, tab2), _number(text, tab2 + 1, tab3)
    tab4 = _find(text, _TAB, tab3 + 1, end)
    status = DONE
    if left < 0:
        status = BAD_START
    elif right < 0:
        status = BAD_END
    elif right <= left:
        status = END_NOT_AFTER_START
    elif tab4 == tab3 + 1:
        status = NO_BARCODE
    return status, tab1, left, right, tab3 + 1, tab4


@njit(nogil=True, cache=True)
def _tally(index, rules, tallies, chrom, left, right, barcode):  # type: ignore[no-untyped-def]
    """Count the fragment left:right of a barcode (or ABSENT); False, and nothing counted, where the keys do not fit."""
    counters = tallies.counters
    if barcode == ABSENT:
        counters[NOT_LISTED] += 1
        return True
    key = barcode * rules.n_islands
    n_keys = _count_fragment(index, rules.strategy, chrom, left, right, key, tallies.keys, counters[KEYS])
    if n_keys < 0:
        return False
    tallies.n_fragments[barcode] += 1
    tallies.n_inside[barcode] += n_keys > counters[KEYS]
    counters[KEYS] = n_keys
    return True


@njit(nogil=True, cache=True)
def count_lines(text, at, index, rules, tallies):  # type: ignore[no-untyped-def]
    """Count the lines of ``text`` (uint8, whole lines) from ``at`` on; returns (where it stopped, why).

    ``why`` is DONE, a need (NEW_CONTIG, one of the three _FULL) or what is wrong with the line there.
    """
    counters = tallies.counters
    # The previous line's contig: sorted files name the same one again and again.
    last_a, last_n, contig = 0, -1, -1
    while at < len(text):
        stop = _find(text, _NEWLINE, at, len(text))
        end = stop - 1 if stop > at and text[stop - 1] == _RETURN else stop
        if _is_comment(text, at, end):
            counters[COMMENTS] += 1
        else:
            status, contig_end, left, right, a, b = _parse(text, at, end)
            if status != DONE:
                return at, status
            if contig_end - at != last_n or not same_bytes(text, at, text, last_a, last_n):
                contig = look_up(tallies.contigs, text, at, contig_end, True)
                if contig == NO_ROOM:
                    return at, CONTIGS_FULL
                if tallies.contig_code[contig] == UNRESOLVED:
                    return at, NEW_CONTIG
                last_a, last_n = at, contig_end - at
            chrom = tallies.contig_code[contig]
            if chrom == FOREIGN:
                counters[OTHER_CONTIG] += 1
            elif right > rules.sizes[chrom]:
                return at, END_BEYOND
            else:
                barcode = look_up(tallies.barcodes, text, a, b, not rules.listed_only)
                if barcode == NO_ROOM:
                    return at, BARCODES_FULL
                if not _tally(index, rules, tallies, chrom, left, right, barcode):
                    return at, KEYS_FULL
            tallies.contig_lines[contig] += 1
        counters[LINES] += 1
        at = stop + 1
    return at, DONE

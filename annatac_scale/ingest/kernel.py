"""The counting kernel: from the bytes of fragment lines to counts of (barcode, island), with no Python object a line.

``count_lines`` works through a buffer of whole lines and returns when it is done or needs something of Python: the
meaning of a new contig, a larger table, an emptied buffer of keys. Nothing of the line at hand has been counted then,
so that it is called again from the same place. The kernels hold no lock and release the GIL.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annatac_scale.ingest.key_table import ABSENT, NO_ROOM, KeyTable, look_up, same_bytes
from annatac_scale.ingest.segments import BUCKET_BITS, SEVERAL
from annatac_scale.store.compiled import compiled, inlined

INSERTION, FRAGMENT, PAIRED_INSERTION = 0, 1, 2

DONE, NEW_CONTIG, CONTIGS_FULL, BARCODES_FULL, KEYS_FULL = 0, 1, 2, 3, 4
FEW_COLUMNS, NO_CONTIG, BAD_START, BAD_END, END_NOT_AFTER_START, NO_BARCODE, END_BEYOND = (
    10,
    11,
    12,
    13,
    14,
    15,
    16,
)
FIRST_INVALID, N_INVALID = 10, 7

LINES, COMMENTS, OTHER_CONTIG, OUTSIDE, NOT_LISTED, KEYS, INVALID = 0, 1, 2, 3, 4, 5, 6
N_COUNTERS = INVALID + N_INVALID

FRAGMENTS, INSIDE, IN_PEAKS, IN_TSS, CENTRE, FLANK, SHORT, MONO, MITO, COUNTED, READS = range(11)
N_QUALITY = 11

UNRESOLVED, FOREIGN = -2, -1

SHORT_BELOW, MONO_BELOW = 147, 295
"""Fragments below 147 bp hold no nucleosome, those of 147 to 294 bp hold one (Signac, NucleosomeSignal)."""

_BUCKET = np.int64(BUCKET_BITS)
_TAB, _NEWLINE, _RETURN, _SPACE, _HASH, _ZERO = 9, 10, 13, 32, 35, 48
_PLUS, _MINUS, _DOT = 43, 45, 46
_MAX_DIGITS = 18
_MAX_READS = 1 << 40


class Tallies(NamedTuple):
    """What the kernel counts into.

    contigs, barcodes: the names met; contig_code, contig_lines: int64 [contigs.room], a contig's chromosome (FOREIGN:
    not in the assembly, UNRESOLVED: to be asked for) and its valid lines
    quality: int64 [barcodes.room, N_QUALITY], what was seen of a barcode, in the columns FRAGMENTS ... READS
    keys: int64, barcode * n_islands + island, one entry a count
    counters: int64 [N_COUNTERS], lines in all, by what became of them, and from INVALID on by what is wrong with them
    """

    contigs: KeyTable
    contig_code: NDArray[np.int64]
    contig_lines: NDArray[np.int64]
    barcodes: KeyTable
    quality: NDArray[np.int64]
    keys: NDArray[np.int64]
    counters: NDArray[np.int64]


class Rules(NamedTuple):
    """What the kernel goes by.

    strategy: INSERTION, FRAGMENT or PAIRED_INSERTION; n_islands
    n_listed: the barcodes from this number on are no cells, -1 where none are listed
    quality: whether all is to be known of each barcode; else only what ``n_listed`` and the islands call for
    count_invalid: whether invalid lines are counted and passed over; mitochondrion: bool [n_chromosomes]
    """

    strategy: int
    n_islands: int
    n_listed: int
    quality: bool
    count_invalid: bool
    mitochondrion: NDArray[np.bool_]


@inlined
def _find(text, byte, a, b):  # type: ignore[no-untyped-def]
    """Where ``byte`` comes first in text[a:b], else b."""
    while a < b and text[a] != byte:
        a += 1
    return a


@inlined
def _is_number(text, a, b):  # type: ignore[no-untyped-def]
    """Whether text[a:b] is a number in digits."""
    if a == b or b - a > _MAX_DIGITS:
        return False
    for i in range(a, b):  # noqa: SIM110  (all() of a generator does not compile)
        if text[i] < _ZERO or text[i] > _ZERO + 9:
            return False
    return True


@inlined
def _is_comment(text, a, b):  # type: ignore[no-untyped-def]
    """Whether the line text[a:b] is blank or begins with #."""
    if a < b and text[a] == _HASH:
        return True
    for i in range(a, b):  # noqa: SIM110  (all() of a generator does not compile)
        if text[i] != _SPACE and text[i] != _TAB and text[i] != _RETURN:
            return False
    return True


@compiled
def _problem(text, at, end):  # type: ignore[no-untyped-def]
    """What is wrong with the line text[at:end], of which something is."""
    tab1 = _find(text, _TAB, at, end)
    tab2 = _find(text, _TAB, tab1 + 1, end)
    tab3 = _find(text, _TAB, tab2 + 1, end)
    if tab3 >= end:
        return FEW_COLUMNS
    if tab1 == at:
        return NO_CONTIG
    if not _is_number(text, tab1 + 1, tab2):
        return BAD_START
    if not _is_number(text, tab2 + 1, tab3):
        return BAD_END
    if _find(text, _TAB, tab3 + 1, end) == tab3 + 1:
        return NO_BARCODE
    return END_NOT_AFTER_START


@inlined
def _reads(text, at, stop):  # type: ignore[no-untyped-def]
    """The reads that column 5, which begins at ``at``, tells; 0 where it does not, or where column 6 is a strand."""
    reads, i = 0, at
    while i < stop and text[i] >= _ZERO and text[i] <= _ZERO + 9 and reads < _MAX_READS:
        reads = 10 * reads + (np.int64(text[i]) - _ZERO)
        i += 1
    if i < stop and text[i] == _TAB:
        strand = i + 1
        after = text[strand + 1] if strand < stop else text[stop]
        alone = after in (_TAB, _NEWLINE, _RETURN)
        if alone and text[strand] in (_PLUS, _MINUS, _DOT):
            return 0
    elif i < stop and text[i] != _RETURN:
        return 0
    return reads


@inlined
def _segment(segments, position):  # type: ignore[no-untyped-def]
    """The segment that holds a position."""
    segment = np.int64(segments.bucket[position >> _BUCKET])
    while segments.start[segment + 1] <= position:
        segment += 1
    return segment


@inlined
def _n_peaks(segments, segment):  # type: ignore[no-untyped-def]
    """The peaks in islands over a segment."""
    if segments.island[segment] == SEVERAL:
        return segments.offsets[segment + 1] - segments.offsets[segment]
    return 1 if segments.island[segment] >= 0 else 0


@inlined
def _add_peaks(segments, segment, after, key, keys, n_keys):  # type: ignore[no-untyped-def]
    """Append key + island for the peaks over a segment that begin after the segment ``after``."""
    island = segments.island[segment]
    if island >= 0 and after < 0:
        keys[n_keys] = key + island
        return n_keys + 1
    for i in range(segments.offsets[segment], segments.offsets[segment + 1]):
        if segments.at_first[i] > after:
            keys[n_keys] = key + segments.at_island[i]
            n_keys += 1
    return n_keys


@inlined
def _add_counts(segments, strategy, first, last, key, keys, n_keys):  # type: ignore[no-untyped-def]
    """Append the counts of a fragment whose ends lie in two segments; returns the new number of keys."""
    n_keys = _add_peaks(segments, first, -1, key, keys, n_keys)
    if strategy == FRAGMENT:
        for i in range(segments.begun[first], segments.begun[last]):
            keys[n_keys] = key + segments.by_start[i]
            n_keys += 1
        return n_keys
    # Paired: of the peaks over the second end, those that begin after the first end do not hold both.
    return _add_peaks(segments, last, first if strategy == PAIRED_INSERTION else -1, key, keys, n_keys)


@inlined
def _add_quality(segments, rules, of_barcode, chrom, first, last, length):  # type: ignore[no-untyped-def]
    """Add what a fragment tells of its barcode, but for its reads."""
    near = segments.near[first] | segments.near[last]
    of_barcode[IN_PEAKS] += near & 1
    of_barcode[IN_TSS] += near >> 1
    of_barcode[CENTRE] += np.int64(segments.centre[first]) + segments.centre[last]
    of_barcode[FLANK] += np.int64(segments.flank[first]) + segments.flank[last]
    if length < SHORT_BELOW:
        of_barcode[SHORT] += 1
    elif length < MONO_BELOW:
        of_barcode[MONO] += 1
    of_barcode[MITO] += rules.mitochondrion[chrom]


@inlined
def _read_number(text, at):  # type: ignore[no-untyped-def]
    """The number in the digits from ``at`` on, and where they end: before the line's newline at the latest."""
    value = np.int64(0)
    while text[at] >= _ZERO and text[at] <= _ZERO + 9:
        value = 10 * value + (np.int64(text[at]) - _ZERO)
        at += 1
    return value, at


@inlined
def _parse(text, at, tab1):  # type: ignore[no-untyped-def]
    """Whether the line at ``at``, whose contig a tab at ``tab1`` ends, is a fragment; start, end, barcode, newline."""
    left, tab2 = _read_number(text, tab1 + 1)
    if text[tab2] != _TAB or tab2 == tab1 + 1 or tab2 - tab1 > _MAX_DIGITS + 1:
        return False, left, left, at, at, at
    right, tab3 = _read_number(text, tab2 + 1)
    if text[tab3] != _TAB or right <= left or tab3 - tab2 > _MAX_DIGITS + 1:
        return False, left, right, at, at, at
    a = tab3 + 1
    b = a
    while text[b] != _TAB and text[b] != _NEWLINE:
        b += 1
    stop = b
    if text[b] == _TAB:
        stop = _find(text, _NEWLINE, b + 1, len(text))
    elif b > a and text[b - 1] == _RETURN:
        b -= 1
    return b > a, left, right, a, b, stop


@inlined
def _ends(text, at):  # type: ignore[no-untyped-def]
    """The end of the line's text, which may lie before a carriage return, and its newline."""
    stop = _find(text, _NEWLINE, at, len(text))
    return (stop - 1 if stop > at and text[stop - 1] == _RETURN else stop), stop


@compiled
def count_lines(text, at, segments, rules, tallies):  # type: ignore[no-untyped-def]
    """Count the lines of ``text`` (uint8, whole lines) from ``at`` on; returns (where it stopped, why).

    ``why`` is DONE, a need (NEW_CONTIG, one of the three _FULL) or what is wrong with the line there.
    """
    counters = tallies.counters
    # The previous line's contig: sorted files name the same one again and again.
    last_a, last_n, contig, chrom = 0, 0, -1, FOREIGN
    while at < len(text):
        tab1 = at + last_n
        known = last_n > 0 and tab1 < len(text) and text[tab1] == _TAB
        if not known or not same_bytes(text, at, text, last_a, last_n):
            end, stop = _ends(text, at)
            if _is_comment(text, at, end):
                counters[COMMENTS] += 1
                counters[LINES] += 1
                at = stop + 1
                continue
            tab1 = _find(text, _TAB, at, end)
            if at < tab1 < end:
                contig = look_up(tallies.contigs, text, at, tab1, True)
                if contig == NO_ROOM:
                    return at, CONTIGS_FULL
                chrom = tallies.contig_code[contig]
                if chrom == UNRESOLVED:
                    return at, NEW_CONTIG
                # A name that begins with a space may be all of a blank line, which has to be told first.
                last_a, last_n = at, (tab1 - at if text[at] > _SPACE else 0)
        sound, left, right, a, b, stop = False, 0, 0, at, at, at
        if tab1 > at and text[tab1] == _TAB:
            sound, left, right, a, b, stop = _parse(text, at, tab1)
        if not sound or (chrom >= 0 and right > segments.size[chrom]):
            end, stop = _ends(text, at)
            problem = END_BEYOND if sound else _problem(text, at, end)
            if not rules.count_invalid:
                return at, problem
            counters[INVALID + problem - FIRST_INVALID] += 1
        elif chrom < 0:
            counters[OTHER_CONTIG] += 1
            tallies.contig_lines[contig] += 1
        else:
            need = _count(text, chrom, left, right, (a, b, stop), segments, rules, tallies)
            if need != DONE:
                return at, need
            tallies.contig_lines[contig] += 1
        counters[LINES] += 1
        at = stop + 1
    return at, DONE


@inlined
def _count(text, chrom, left, right, barcode_span, segments, rules, tallies):  # type: ignore[no-untyped-def]
    """Count a fragment; DONE, or what is needed first: nothing has been counted then."""
    counters = tallies.counters
    a, b, stop = barcode_span
    first = _segment(segments, segments.base[chrom] + left)
    last = _segment(segments, segments.base[chrom] + right - 1)
    n_counts = _n_peaks(segments, first)
    if rules.strategy == FRAGMENT:
        n_counts += segments.begun[last] - segments.begun[first]
    else:
        n_counts += _n_peaks(segments, last)
    n_keys = counters[KEYS]
    if n_keys + n_counts > len(tallies.keys):
        return KEYS_FULL
    # What lies outside islands need not know its barcode, unless all of a barcode is to be known.
    if n_counts > 0 or rules.quality or rules.n_listed < 0:
        barcode = look_up(tallies.barcodes, text, a, b, rules.quality or rules.n_listed < 0)
        if barcode == NO_ROOM:
            return BARCODES_FULL
        if barcode == ABSENT:
            counters[NOT_LISTED] += 1
        else:
            of_barcode = tallies.quality[barcode]
            of_barcode[FRAGMENTS] += 1
            of_barcode[INSIDE] += n_counts > 0
            if n_counts > 0 and (rules.n_listed < 0 or barcode < rules.n_listed):
                key = barcode * rules.n_islands
                counters[KEYS] = _add_counts(segments, rules.strategy, first, last, key, tallies.keys, n_keys)
            if rules.quality:
                _add_quality(segments, rules, of_barcode, chrom, first, last, right - left)
                reads = _reads(text, b + 1, stop) if b < stop else 0
                of_barcode[READS] += reads
                of_barcode[COUNTED] += reads > 0
    counters[OUTSIDE] += n_counts == 0
    return DONE

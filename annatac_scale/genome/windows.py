"""Windows of an assembly, sorted by chromosome and start: all bins of one width, or those of a BED file."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.rows import BED_COMMENTS, Path, complaint, read_rows, shown, whole_number


class Windows(NamedTuple):
    """Chromosome codes int32 [n], starts and ends int64 [n], 0-based and half-open."""

    chrom: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]


def all_bins(assembly: Assembly, width_bp: int) -> Windows:
    """Every bin of ``width_bp`` of every chromosome; the last of a chromosome ends with it."""
    if width_bp < 1:
        raise InputError(f"width_bp: found {width_bp}; expected at least 1 bp; leave it out for the default")
    sizes = np.array(assembly.sizes, np.int64)
    n_bins = -(-sizes // width_bp)
    chrom = np.repeat(np.arange(len(sizes), dtype=np.int32), n_bins)
    first_bin = np.cumsum(n_bins) - n_bins
    start = (np.arange(len(chrom)) - first_bin[chrom]) * width_bp
    return Windows(chrom, start, np.minimum(start + width_bp, sizes[chrom]))


def read_windows(assembly: Assembly, path: Path) -> Windows:
    """The windows of a BED file, in any order there.

    Raises InputError for windows that overlap, are empty, pass their chromosome's end or lie on none.
    """
    rows = [
        (*_parse_window(assembly, path, number, fields), number)
        for number, fields in read_rows(path, BED_COMMENTS)
    ]
    if not rows:
        expected = "expected at least one line 'chrom start end'"
        raise InputError(f"{path}: found no window; {expected}; check that this is the right file")
    chrom, start, end, number = np.array(sorted(rows), np.int64).T
    overlapping = np.flatnonzero((chrom[1:] == chrom[:-1]) & (start[1:] < end[:-1])) + 1
    for i in overlapping[:1]:
        name, before = assembly.chromosomes[chrom[i]], i - 1
        raise complaint(
            path,
            number[i],
            f"{name}:{start[i]}-{end[i]} across {start[before]}-{end[before]} of line {number[before]}",
            "windows that do not overlap",
            "merge the two (bedtools merge) or remove one",
        )
    return Windows(chrom.astype(np.int32), start.copy(), end.copy())


def _parse_window(assembly: Assembly, path: Path, number: int, fields: list[str]) -> tuple[int, int, int]:
    start, end = (whole_number(field) for field in fields[1:3]) if len(fields) >= 3 else (None, None)
    if start is None or end is None or start >= end:
        expected = "'chrom start end' with 0 <= start < end"
        raise complaint(path, number, shown("\t".join(fields)), expected, "give a BED file")
    code = assembly.code(fields[0])
    if code is None:
        expected = f"a chromosome of {assembly.name} such as {assembly.chromosomes[0]}"
        remedy = "check the assembly, or remove the line"
        raise complaint(path, number, f"contig {shown(fields[0])}", expected, remedy)
    if end > assembly.sizes[code]:
        expected = (
            f"at most {assembly.sizes[code]}, the size of {assembly.chromosomes[code]} in {assembly.name}"
        )
        raise complaint(path, number, f"end {end}", expected, "check the assembly, or cut the window")
    return code, start, end

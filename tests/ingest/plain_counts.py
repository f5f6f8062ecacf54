"""What counting must give: docs/qc.md and the rules of DESIGN.md in slow code, one line, peak and TSS at a time."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace

Interval = tuple[str, int, int]
Tss = tuple[str, int]

FATES = ("comment", "invalid", "other_contig", "outside_islands", "not_a_cell", "counted")


class Fragment(NamedTuple):
    chrom: int | None
    start: int
    end: int
    barcode: bytes
    further: list[bytes]

    @property
    def ends(self) -> tuple[int, int]:
        return self.start, self.end - 1


@dataclass
class Plain:
    """rows: {barcode: {island: level}} in order of the rows; fragments: of each cell; n_fragments: of every barcode"""

    rows: dict[bytes, dict[int, int]]
    lines: dict[str, int]
    invalid: dict[str, int]
    fragments: dict[bytes, list[Fragment]]
    n_fragments: Counter[bytes]
    inside: dict[bytes, int] = field(default_factory=dict)


def text_lines(text: bytes) -> list[bytes]:
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]


def read(line: bytes, assembly: Assembly) -> str | Fragment:
    """A fragment, or "comment", or what is wrong."""
    if line.startswith(b"#") or not line.strip(b" \t\r"):
        return "comment"
    columns = line.split(b"\t")
    if len(columns) < 4:
        return "few_columns"
    if not columns[0]:
        return "no_contig"
    for column, kind in ((columns[1], "bad_start"), (columns[2], "bad_end")):
        if not column.isdigit() or len(column) > 18:
            return kind
    if not columns[3]:
        return "no_barcode"
    start, end = int(columns[1]), int(columns[2])
    if start >= end:
        return "end_not_after_start"
    chrom = assembly.code(columns[0].decode(errors="replace"))
    if chrom is not None and end > assembly.sizes[chrom]:
        return "end_beyond_chromosome"
    return Fragment(chrom, start, end, columns[3], columns[4:])


def hits(fragment: Fragment, peak: Interval, assembly: Assembly, strategy: str) -> int:
    if fragment.chrom is None or fragment.chrom != assembly.code(peak[0]):
        return 0
    _, left, right = peak
    if strategy == "fragment":
        return int(fragment.start < right and fragment.end > left)
    ends = [left <= position < right for position in fragment.ends]
    return int(any(ends)) if strategy == "paired-insertion" else sum(ends)


def island_of(peak: Interval, space: IslandSpace, assembly: Assembly) -> int | None:
    for i in range(len(space)):
        if space.chrom[i] == assembly.code(peak[0]) and space.start[i] <= peak[1] < space.end[i]:
            return i
    return None


def count_plainly(
    text: bytes,
    peaks: Sequence[Interval],
    space: IslandSpace,
    assembly: Assembly,
    strategy: str = "insertion",
    listed: Sequence[str] | None = None,
    min_fragments: int = 0,
) -> Plain:
    """As convert counts with ``--on-invalid count``."""
    islands = [(peak, island_of(peak, space, assembly)) for peak in peaks]
    counted = [(peak, island) for peak, island in islands if island is not None]
    n_peaks = Counter(island for _, island in counted)
    lines, invalid = dict.fromkeys(("lines", *FATES), 0), Counter()
    fragments: list[tuple[Fragment, Counter[int]]] = []
    for line in text_lines(text):
        lines["lines"] += 1
        fragment = read(line, assembly)
        if isinstance(fragment, Fragment):
            if fragment.chrom is None:
                lines["other_contig"] += 1
                continue
            counts: Counter[int] = Counter()
            for peak, island in counted:
                counts[island] += hits(fragment, peak, assembly, strategy)
            fragments.append((fragment, +counts))
        elif fragment == "comment":
            lines["comment"] += 1
        else:
            lines["invalid"] += 1
            invalid[fragment] += 1
    n_fragments = Counter(fragment.barcode for fragment, _ in fragments)
    if listed is None:
        cells = sorted(barcode for barcode, n in n_fragments.items() if n >= min_fragments)
    else:
        cells = [barcode.encode() for barcode in listed]
    sums: dict[bytes, Counter[int]] = {cell: Counter() for cell in cells}
    found = Plain(
        {}, lines, dict(invalid), {cell: [] for cell in cells}, n_fragments, dict.fromkeys(cells, 0)
    )
    for fragment, counts in fragments:
        is_cell = fragment.barcode in sums
        fate = ("counted" if is_cell else "not_a_cell") if counts else "outside_islands"
        lines[fate] += 1
        if is_cell:
            sums[fragment.barcode] += counts
            found.fragments[fragment.barcode].append(fragment)
            found.inside[fragment.barcode] += bool(counts)
    found.rows = {
        cell: {island: min(5, math.ceil(n / n_peaks[island])) for island, n in sorted(counts.items())}
        for cell, counts in sums.items()
    }
    return found


def quality_plainly(
    fragments: Sequence[Fragment],
    inside: int,
    peaks: Sequence[Interval],
    tss: Sequence[Tss],
    assembly: Assembly,
) -> dict[str, float]:
    """docs/qc.md of one cell; n_open is told by its row."""
    n = len(fragments)

    def share(of: int) -> float:
        return of / n if n else 0.0

    def near(fragment: Fragment, low: int, high: int) -> list[int]:
        """For each end and TSS whether they are ``low`` to ``high`` bp apart."""
        sites = [position for chrom, position in tss if assembly.code(chrom) == fragment.chrom]
        return [int(low <= abs(end - site) <= high) for end in fragment.ends for site in sites]

    reads = [told for told in map(reads_plainly, fragments) if told]
    centre = sum(sum(near(fragment, 0, 50)) for fragment in fragments)
    flank = sum(sum(near(fragment, 1901, 2000)) for fragment in fragments)
    lengths = [fragment.end - fragment.start for fragment in fragments]
    short, mono = sum(length < 147 for length in lengths), sum(147 <= length <= 294 for length in lengths)
    return {
        "n_fragments": n,
        "n_insertions": 2 * n,
        "fraction_in_islands": share(inside),
        "duplicate_rate": 1 - len(reads) / sum(reads) if reads else math.nan,
        "fraction_in_peaks": share(
            sum(any(hits(f, p, assembly, "insertion") for p in peaks) for f in fragments)
        ),
        "fraction_in_tss": share(sum(any(near(f, 0, 1000)) for f in fragments)),
        "tss_enrichment": (centre / 101) / (max(flank, 1) / 200),
        "nucleosome_signal": mono / short if short else math.nan,
        "fraction_mitochondrial": share(
            sum(assembly.chromosomes[f.chrom] in ("chrM", "chrMT", "M", "MT") for f in fragments)  # type: ignore[index]
        ),
    }


def reads_plainly(fragment: Fragment) -> int:
    """What column 5 tells of duplicates, 0 where nothing."""
    if len(fragment.further) > 1 and fragment.further[1] in (b"+", b"-", b"."):
        return 0
    told = fragment.further[0] if fragment.further else b""
    # Numbers so large that a sum of them would pass 64 bits are taken for texts.
    return int(told) if told.isdigit() and len(told) < 14 else 0

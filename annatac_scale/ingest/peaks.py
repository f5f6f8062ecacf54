"""Peak sets: the intervals that a data set was counted over, and the island that each of them belongs to."""

import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.genome.rows import BED_COMMENTS, Path, complaint, read_rows, shown, whole_number
from annatac_scale.store.schema import N_LEVELS

_BED = ("contig", "start", "end")
_NAME = r"^(?P<contig>.+)[:_-](?P<start>[0-9]+)[_-](?P<end>[0-9]+)$"
_MOST_DIGITS = 18


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals as a file gives them, in its order: contig object (str) [n], start and end int64 [n]."""

    contig: NDArray[np.object_]
    start: NDArray[np.int64]
    end: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.contig)

    def name(self, i: int) -> str:
        """Interval ``i`` as ``chr1:100-200``."""
        return f"{self.contig[i]}:{self.start[i]}-{self.end[i]}"

    def first_duplicate(self) -> int | None:
        """The first interval that is there already, None where all differ."""
        columns = {"contig": pd.factorize(self.contig)[0], "start": self.start, "end": self.end}
        again = pd.DataFrame(columns).duplicated().to_numpy()
        return int(again.argmax()) if again.any() else None


@dataclass(frozen=True, eq=False)
class PeakSet:
    """Peaks in the order of their file.

    chrom: int32 [n], index into the assembly's chromosomes, -1 for a contig that the assembly does not have
    start, end: int64 [n], 0-based, half-open
    island: int32 [n], the island that holds the peak's start, -1 where none does
    n: int64 [n_islands], peaks of each island
    """

    chrom: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    island: NDArray[np.int32]
    n: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chrom)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """bool [n_islands]: the islands that hold a peak."""
        return self.n > 0

    def accounting(self) -> dict[str, int]:
        """How many peaks there are, lie in an island, outside all islands, or on another contig."""
        other = int((self.chrom < 0).sum())
        inside = int((self.island >= 0).sum())
        return {
            "peaks": len(self),
            "in_islands": inside,
            "outside_islands": len(self) - inside - other,
            "other_contig": other,
            "measured_islands": int(self.measured.sum()),
        }

    @classmethod
    def of_intervals(
        cls, intervals: Intervals, assembly: Assembly, space: IslandSpace, source: object
    ) -> "PeakSet":
        """Place intervals in an assembly and an island space; ``source`` names their file in messages.

        Raises InputError when no contig is one of the assembly's, when a peak passes its chromosome's end, and when no
        island holds a peak: all signs of another assembly.
        """
        code_of = {contig: assembly.code(contig) for contig in dict.fromkeys(intervals.contig)}
        codes = {contig: -1 if code is None else code for contig, code in code_of.items()}
        chrom = np.array([codes[contig] for contig in intervals.contig], np.int32)
        _check_assembly(intervals, chrom, assembly, source)
        island = space.locate(chrom, intervals.start)
        if not (island >= 0).any():
            raise InputError(
                f"{source}: found {len(intervals):,} peaks, none of which starts in one of the "
                f"{len(space):,} islands; expected some; check the assembly, or select other islands"
            )
        n = np.bincount(island[island >= 0], minlength=len(space)).astype(np.int64)
        return cls(chrom, intervals.start, intervals.end, island, n)

    @classmethod
    def of_space(cls, space: IslandSpace) -> "PeakSet":
        """The islands themselves as the peaks: how fragments are counted without a peak set."""
        n = len(space)
        return cls(space.chrom, space.start, space.end, np.arange(n, dtype=np.int32), np.ones(n, np.int64))


def levels(counts: NDArray[np.int64], n_peaks: NDArray[np.int64]) -> NDArray[np.uint8]:
    """min(ceil(S / n), 5) in integers: S counts of an island in a cell (at least 1), n its peaks (at least 1)."""
    # Signed on purpose: -(-S // n) on unsigned integers wraps around and caps everything at 5.
    mean = (np.asarray(counts, np.int64) + n_peaks - 1) // n_peaks
    return np.minimum(mean, N_LEVELS).astype(np.uint8)


def read_bed(path: Path) -> tuple[Intervals, int]:
    """The distinct intervals of a BED file of peaks (further columns are ignored), and how many lines repeat one.

    Raises InputError naming the line that is not ``chrom start end`` with 0 <= start < end, and for no line at all.
    """
    rows = _clean_rows(path)
    if rows is None:
        rows = _checked_rows(path)
    if rows.empty:
        raise InputError(f"{path}: found no peak; expected lines 'chrom start end'; give a BED file of peaks")
    distinct = rows.drop_duplicates()
    intervals = Intervals(
        distinct["contig"].to_numpy(object), distinct["start"].to_numpy(), distinct["end"].to_numpy()
    )
    return intervals, len(rows) - len(distinct)


def _clean_rows(path: Path) -> pd.DataFrame | None:
    """Columns contig, start, end of a file that is as a peak caller writes it; None for any other, right or wrong."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        start = 0
        while data.startswith(b"#", start):
            start = data.find(b"\n", start) + 1 or len(data)
        n_columns = data[start : data.find(b"\n", start)].count(b"\t") + 1
        names = [*_BED, *(str(i) for i in range(3, n_columns))]
        table = csv.read_csv(
            io.BytesIO(data[start:]),
            csv.ReadOptions(column_names=names, use_threads=False),
            csv.ParseOptions(delimiter="\t", quote_char=False),
            csv.ConvertOptions(
                column_types={"contig": pa.string(), "start": pa.int64(), "end": pa.int64()},
                include_columns=list(_BED),
                null_values=[],
            ),
        )
    except (OSError, EOFError, ValueError, KeyError, zlib.error):
        return None
    rows: pd.DataFrame = table.to_pandas()
    plain = rows["contig"].str.fullmatch(r"[A-Za-z0-9][^\s]*").all() and "track" not in set(rows["contig"])
    return rows if plain and ((rows["start"] >= 0) & (rows["start"] < rows["end"])).all() else None


def _checked_rows(path: Path) -> pd.DataFrame:
    """The same, line by line."""
    found = []
    for number, fields in read_rows(path, BED_COMMENTS):
        start, end = (whole_number(field) for field in fields[1:3]) if len(fields) >= 3 else (None, None)
        if start is None or end is None or start >= end or not fields[0]:
            raise complaint(
                path,
                number,
                shown("\t".join(fields)),
                "'chrom start end' with 0 <= start < end",
                "give a BED file of peaks",
            )
        found.append((fields[0], start, end))
    return pd.DataFrame(found, columns=list(_BED))


def parse_names(names: Sequence[str], source: object, remedy: str) -> Intervals:
    """Intervals from peak names such as ``chr1:1-2``, ``chr1-1-2`` or ``chrUn_X_v1_1_2``: the last two numbers count.

    Raises InputError for the first name that is not like that.
    """
    parts = pc.extract_regex(pa.array(names, pa.large_string()), _NAME)
    contig, *ends = (parts.field(i) for i in range(3))
    short = [pc.less_equal(pc.utf8_length(end), _MOST_DIGITS) for end in ends]
    is_name = pc.and_(parts.is_valid(), pc.and_(*short))
    start, end = (pc.if_else(is_name, end, "0").cast(pa.int64()).to_numpy() for end in ends)
    bad = start >= end
    if bad.any():
        name = shown(names[int(bad.argmax())])
        raise InputError(
            f"{source}: found a peak named {name}; expected names such as chr1:100-600; {remedy}"
        )
    # One object for each contig, not for each peak.
    contigs = contig.dictionary_encode()
    return Intervals(np.array(contigs.dictionary.to_pylist(), object)[contigs.indices.to_numpy()], start, end)


def as_intervals(rows: Sequence[tuple[str, int, int]]) -> Intervals:
    """Intervals from rows (contig, start, end)."""
    contig = np.array([row[0] for row in rows], object)
    positions = np.array([row[1:] for row in rows], np.int64).reshape(-1, 2)
    return Intervals(contig, positions[:, 0].copy(), positions[:, 1].copy())


def _check_assembly(
    intervals: Intervals, chrom: NDArray[np.int32], assembly: Assembly, source: object
) -> None:
    known = chrom >= 0
    remedy = "check the assembly"
    if not known.any():
        some = ", ".join(shown(contig) for contig in list(dict.fromkeys(intervals.contig))[:3])
        raise InputError(
            f"{source}: found peaks on {some} and no peak on a chromosome of {assembly.name}; expected "
            f"names such as {assembly.chromosomes[0]}; {remedy}"
        )
    beyond = known & (intervals.end > np.array(assembly.sizes, np.int64)[chrom])
    if beyond.any():
        i = int(np.flatnonzero(beyond)[0])
        size = assembly.sizes[chrom[i]]
        raise InputError(
            f"{source}: found {int(beyond.sum()):,} of {len(intervals):,} peaks ({beyond.mean():.1%}) "
            f"that pass the end of their chromosome, the first {intervals.name(i)}; expected ends of at "
            f"most {size}, the size in {assembly.name}; {remedy}"
        )

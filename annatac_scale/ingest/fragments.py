"""Count ranges of fragment files: from lines ``contig start end barcode ...`` to spills, every line accounted for.

The order of lines never matters. A line that repeats counts again. Column 5, the reads that support a fragment, never
changes counts; it tells the share of duplicates.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from annatac_scale.errors import AnnatacError, InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.rows import shown
from annatac_scale.ingest import kernel
from annatac_scale.ingest.bgzf import BrokenTextError
from annatac_scale.ingest.key_table import KeyTable, copied, empty_table, grown
from annatac_scale.ingest.segments import Segments
from annatac_scale.ingest.spill import Spill, encode_counts, packed
from annatac_scale.ingest.tally import Tally
from annatac_scale.ingest.text import RangeReader, TextFile, cut_off, n_lines_before
from annatac_scale.store.place import Place

STRATEGIES = {
    "insertion": kernel.INSERTION,
    "fragment": kernel.FRAGMENT,
    "paired-insertion": kernel.PAIRED_INSERTION,
}

INVALID = {
    kernel.FEW_COLUMNS: "few_columns",
    kernel.NO_CONTIG: "no_contig",
    kernel.BAD_START: "bad_start",
    kernel.BAD_END: "bad_end",
    kernel.END_NOT_AFTER_START: "end_not_after_start",
    kernel.NO_BARCODE: "no_barcode",
    kernel.END_BEYOND: "end_beyond_chromosome",
}
"""What may be wrong with a line, as it is named in a conversion's record."""

MITOCHONDRIA = ("chrM", "chrMT", "M", "MT")

_KEYS = 1 << 22
_PARTS = "parts.json"
_BUFFERS_OF_PART = 128
_COLUMNS = "4 or more columns 'contig start end barcode' separated by tabs"
_EXPECTED = {
    kernel.FEW_COLUMNS: _COLUMNS,
    kernel.NO_CONTIG: f"a contig in {_COLUMNS}",
    kernel.BAD_START: f"a whole number as start in {_COLUMNS}, with header lines marked by #",
    kernel.BAD_END: f"a whole number as end in {_COLUMNS}, with header lines marked by #",
    kernel.END_NOT_AFTER_START: "an end greater than the start",
    kernel.NO_BARCODE: "a barcode in column 4",
}


@dataclass(frozen=True, eq=False)
class Counting:
    """How the lines of a file are counted.

    strategy: "insertion" (each end of a fragment, at start and end - 1), "fragment" (each peak that it overlaps) or
    "paired-insertion" (each end, but a peak that holds both counts once)
    barcodes: the table of those that are cells, numbered by their rows; None: cells are called from what was counted
    quality: whether all QC is to be known of each barcode
    count_invalid: whether invalid lines are counted and passed over, instead of raising InputError
    n_keys: counts held before they are added up
    """

    assembly: Assembly
    segments: Segments
    n_islands: int
    strategy: str = "insertion"
    barcodes: KeyTable | None = None
    quality: bool = True
    count_invalid: bool = False
    n_keys: int = _KEYS

    @property
    def n_listed(self) -> int:
        """How many barcodes are listed, -1 where none are."""
        return -1 if self.barcodes is None else int(self.barcodes.size[0])

    def rules(self) -> kernel.Rules:
        """All of it as the kernel takes it."""
        mitochondrion = np.array([name in MITOCHONDRIA for name in self.assembly.chromosomes])
        return kernel.Rules(
            STRATEGIES[self.strategy],
            self.n_islands,
            self.n_listed,
            self.quality,
            self.count_invalid,
            mitochondrion,
        )


def spill_names(file: TextFile, place: Place) -> list[str]:
    """The spills of a file that was counted: one a range, or those of the parts of a single stream."""
    if file.n_ranges > 1:
        return [f"ranges/{number}" for number in range(file.n_ranges)]
    names: list[str] = json.loads(place.read(_PARTS))
    return names


def count_range(
    file: TextFile, number: int, counting: Counting, place: Place, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Count a range and write its spill, unless it is there; returns the spill's summary.

    advance: told the bytes of the file and the lines that were worked through
    Raises InputError naming file and line for an invalid line and for data cut off or damaged.
    """
    name = spill_names(file, place)[number]
    if _may_be_used(place, name, counting):
        return Spill(place, name).summary | {"found": True}
    reader = RangeReader(file, number, lambda n_bytes: advance(n_bytes, 0))
    strand = _Strand(counting, advance)
    with _explained(file, number, counting) as counted:
        for i, buffer in enumerate(counted(reader.buffers())):
            strand.count(i, buffer)
    summary, arrays = strand.told()
    summary |= {"first_block": reader.first_block, "end": reader.end, "digest": reader.digest().hex()}
    place.write(name, packed(summary, arrays))
    return summary


def count_stream(
    file: TextFile, n_strands: int, counting: Counting, place: Place, advance: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """As ``count_range``, for a file of one range, whose text is dealt to several threads while it is decompressed.

    Each thread writes a spill for every 128 buffers, so that memory does not grow with the file; those that an earlier
    run left are not counted again, though the file is decompressed from its beginning.
    """
    if place.size(_PARTS) is not None:
        names = spill_names(file, place)
        if all(_may_be_used(place, name, counting) for name in names):
            return [Spill(place, name).summary | {"found": True} for name in names]
    reader = RangeReader(file, 0, lambda n_bytes: advance(n_bytes, 0))
    n_strands = max(1, n_strands)
    strands = [_Parts(strand, n_strands, counting, place, advance) for strand in range(n_strands)]
    with _explained(file, 0, counting) as counted:
        (_deal if n_strands > 1 else _follow)(counted(reader.buffers()), strands)
    for strand in strands:
        strand.end(reader.digest().hex())
    names = [name for strand in strands for name in strand.names]
    place.write(_PARTS, json.dumps(names).encode())
    return [Spill(place, name).summary for name in names]


@contextmanager
def _explained(
    file: TextFile, number: int, counting: Counting
) -> Iterator[Callable[[Iterator[bytes]], Iterator[bytes]]]:
    """Turn what is wrong with a range into InputErrors that name its place; gives what its buffers go through."""
    where = _Where(file, number)
    try:
        yield where.counted
    except _InvalidLineError as error:
        raise error.explained(file, where.line_of(error), counting.assembly) from error
    except BrokenTextError as error:
        raise cut_off(file.location, where.n_lines(), error) from error


def check_lines(file: TextFile, lines: bytes, counting: Counting) -> None:
    """Raise InputError for an invalid line among the first ``lines`` of a file, where those are not passed over."""
    try:
        _Strand(counting, lambda n_bytes, n_lines: None).count(0, lines)
    except _InvalidLineError as error:
        raise error.explained(file, error.n_before + 1, counting.assembly) from error


def _may_be_used(place: Place, name: str, counting: Counting) -> bool:
    """Whether an earlier run's spill is there, whole, and without invalid lines where those are not passed over."""
    if place.size(name) is None:
        return False
    spill = Spill(place, name)
    if not spill.is_whole():
        return False
    return counting.count_invalid or not any(spill.summary["lines"][kind] for kind in INVALID.values())


class _InvalidLineError(Exception):
    """A line that is none of a fragment; ``n_before`` lines of the buffer ``buffer`` come before it."""

    def __init__(self, buffer: int, n_before: int, line: str, status: int) -> None:
        super().__init__(line)
        self.buffer = buffer
        self.n_before = n_before
        self.line = line
        self.status = status

    def explained(self, file: TextFile, number: int, assembly: Assembly) -> AnnatacError:
        """What to tell the user."""
        expected, remedy = _EXPECTED.get(self.status, ""), "give a fragment file; mend or remove the line"
        if self.status == kernel.END_BEYOND:
            code = assembly.code(self.line.split("\t")[0])
            size = assembly.sizes[code] if code is not None else 0
            expected = f"an end of at most {size}, the size of that chromosome in {assembly.name}"
            remedy = "check the assembly, or remove the line"
        return InputError(
            f"{file.location}, line {number}: found {shown(self.line)}; expected {expected}; {remedy}, or pass over "
            "such lines with --on-invalid count"
        )


class _Where:
    """Finds the number of a line in the whole file, where that is asked for."""

    def __init__(self, file: TextFile, number: int) -> None:
        self.file = file
        self.number = number
        self._n = 0

    def counted(self, buffers: Iterator[bytes]) -> Iterator[bytes]:
        """The same buffers, noted down."""
        for buffer in buffers:
            self._n += 1
            yield buffer

    def _before(self, n_buffers: int) -> int:
        """Lines before the buffer of a number: they are read once more, which only errors ask for."""
        lines = n_lines_before(self.file, self.number)
        try:
            for i, buffer in enumerate(RangeReader(self.file, self.number).buffers()):
                if i >= n_buffers:
                    break
                lines += buffer.count(b"\n")
        except BrokenTextError:
            pass
        return lines

    def line_of(self, error: _InvalidLineError) -> int:
        """The number of an invalid line."""
        return self._before(error.buffer) + error.n_before + 1

    def n_lines(self) -> int:
        """All whole lines before the damage."""
        return self._before(self._n)


def _follow(buffers: Iterator[bytes], strands: list["_Parts"]) -> None:
    for i, buffer in enumerate(buffers):
        strands[0].count(i, buffer)


def _deal(buffers: Iterator[bytes], strands: list["_Parts"]) -> None:
    """Count buffers in a thread a strand while the next are read; never more than one waits for each."""
    with ThreadPoolExecutor(len(strands)) as pool:
        busy: dict[int, Future[None]] = {}
        for i, buffer in enumerate(buffers):
            strand = i % len(strands)
            if strand in busy:
                # Taken out, so that the strands stay in the order of their buffers, and the first error is told.
                busy.pop(strand).result()
            busy[strand] = pool.submit(strands[strand].count, i, buffer)
        for future in busy.values():
            future.result()


class _Parts:
    """One strand of a stream: of all buffers every ``n_strands``-th, counted in parts of which each has its spill."""

    def __init__(
        self,
        strand: int,
        n_strands: int,
        counting: Counting,
        place: Place,
        advance: Callable[[int, int], None],
    ) -> None:
        self.strand = strand
        self.n_strands = n_strands
        self.counting = counting
        self.place = place
        self.advance = advance
        self.names: list[str] = []
        self._open: _Strand | None = None

    def count(self, number: int, buffer: bytes) -> None:
        """Count a buffer, the ``number``-th of the stream, unless its part is there."""
        name = self._name(number // self.n_strands // _BUFFERS_OF_PART)
        if name not in self.names[-1:]:
            self._write("")
            self._begin(name)
        if self._open is not None:
            self._open.count(number, buffer)

    def end(self, digest: str) -> None:
        """Write the last part; ``digest`` is that of the whole file."""
        if not self.names:
            self._begin(self._name(0))
        self._write(digest)

    def _name(self, part: int) -> str:
        return f"ranges/{part * self.n_strands + self.strand}"

    def _begin(self, name: str) -> None:
        self.names.append(name)
        found = _may_be_used(self.place, name, self.counting)
        self._open = None if found else _Strand(self.counting, self.advance)

    def _write(self, digest: str) -> None:
        if self._open is not None:
            summary, arrays = self._open.told()
            summary |= {"first_block": -1, "end": -1, "digest": digest}
            self.place.write(self.names[-1], packed(summary, arrays))
            self._open = None


class _Strand:
    """Feeds the kernel, and gives it what it asks for."""

    def __init__(self, counting: Counting, advance: Callable[[int, int], None]) -> None:
        self.counting = counting
        self.advance = advance
        self.rules = counting.rules()
        contigs = empty_table()
        barcodes = empty_table(1 << 15) if counting.barcodes is None else copied(counting.barcodes)
        self.tallies = kernel.Tallies(
            contigs,
            np.full(contigs.room, kernel.UNRESOLVED, np.int64),
            np.zeros(contigs.room, np.int64),
            barcodes,
            np.zeros((barcodes.room, kernel.N_QUALITY), np.int64),
            # A single fragment may touch every peak, and no more than twice.
            np.empty(max(counting.n_keys, 2 * len(counting.segments.by_start) + 2), np.int64),
            np.zeros(kernel.N_COUNTERS, np.int64),
        )
        self.tally = Tally()

    def count(self, number: int, buffer: bytes) -> None:
        """Count a buffer of whole lines, the ``number``-th of its range."""
        text = np.frombuffer(buffer, np.uint8)
        n_before = int(self.tallies.counters[kernel.LINES])
        at, status = 0, kernel.KEYS_FULL
        while status != kernel.DONE:
            at, status = kernel.count_lines(text, at, self.counting.segments, self.rules, self.tallies)
            if status == kernel.NEW_CONTIG:
                self._resolve_contig()
            elif status == kernel.CONTIGS_FULL:
                self._grow_contigs(len(_line_at(buffer, at)))
            elif status == kernel.BARCODES_FULL:
                self._grow_barcodes(len(_line_at(buffer, at)))
            elif status == kernel.KEYS_FULL:
                self._empty_keys()
            elif status != kernel.DONE:
                n = int(self.tallies.counters[kernel.LINES]) - n_before
                raise _InvalidLineError(number, n, _line_at(buffer, at).decode(errors="replace"), status)
        self.advance(0, int(self.tallies.counters[kernel.LINES]) - n_before)

    def told(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Summary and arrays of the spill."""
        self._empty_keys()
        keys, counts = self.tally.result()
        table = self.tallies.barcodes
        order = self._order()
        encoded, entry_ends, count_ends = encode_counts(keys, counts, self.counting.n_islands, order)
        lengths = np.diff(table.ends)[order]
        arrays = {
            "name_ends": np.concatenate([[0], np.cumsum(lengths)]),
            "names": _gathered(table.arena, table.ends[:-1][order], lengths),
            "quality": self.tallies.quality[order].ravel(),
            "entry_ends": entry_ends,
            "count_ends": count_ends,
            "entries": encoded,
        }
        return {"lines": self._lines(), "contigs": self._contigs()}, arrays

    def _order(self) -> NDArray[np.int64]:
        """The barcodes met by the order of their rows: as listed, or by their bytes."""
        n, n_listed = int(self.tallies.barcodes.size[0]), max(0, self.counting.n_listed)
        met = np.flatnonzero(self.tallies.quality[:n, kernel.FRAGMENTS])
        if n_listed:
            return met
        table = self.tallies.barcodes
        names = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), n, [None, pa.py_buffer(table.ends[: n + 1]), pa.py_buffer(table.arena)]
        )
        order = pc.sort_indices(names).to_numpy().astype(np.int64)
        return order[self.tallies.quality[order, kernel.FRAGMENTS] > 0]

    def _lines(self) -> dict[str, int]:
        """Lines by what became of them; those inside islands are divided into cells and others later."""
        counters = self.tallies.counters
        invalid = counters[kernel.INVALID :].tolist()
        return {
            "lines": int(counters[kernel.LINES]),
            "comment": int(counters[kernel.COMMENTS]),
            "other_contig": int(counters[kernel.OTHER_CONTIG]),
            "outside_islands": int(counters[kernel.OUTSIDE]),
            "not_listed": int(counters[kernel.NOT_LISTED]),
        } | {name: invalid[status - kernel.FIRST_INVALID] for status, name in INVALID.items()}

    def _contigs(self) -> dict[str, list[int]]:
        """Chromosome (-1: not in the assembly) and valid lines of each contig that has some."""
        names = [name.decode(errors="surrogateescape") for name in self.tallies.contigs.all_keys()]
        code, lines = self.tallies.contig_code.tolist(), self.tallies.contig_lines.tolist()
        return {name: [code[i], lines[i]] for i, name in enumerate(names) if lines[i]}

    def _resolve_contig(self) -> None:
        """Look up the contig met last: the kernel asks for each as it comes."""
        last = int(self.tallies.contigs.size[0]) - 1
        code = self.counting.assembly.code(self.tallies.contigs.key(last).decode(errors="replace"))
        self.tallies.contig_code[last] = kernel.FOREIGN if code is None else code

    def _grow_contigs(self, key_bytes: int) -> None:
        contigs = grown(self.tallies.contigs, key_bytes)
        self.tallies = self.tallies._replace(
            contigs=contigs,
            contig_code=_extended(self.tallies.contig_code, contigs.room, kernel.UNRESOLVED),
            contig_lines=_extended(self.tallies.contig_lines, contigs.room, 0),
        )

    def _grow_barcodes(self, key_bytes: int) -> None:
        barcodes = grown(self.tallies.barcodes, key_bytes)
        self.tallies = self.tallies._replace(
            barcodes=barcodes, quality=_extended(self.tallies.quality, barcodes.room, 0)
        )

    def _empty_keys(self) -> None:
        self.tally.add(self.tallies.keys[: self.tallies.counters[kernel.KEYS]])
        self.tallies.counters[kernel.KEYS] = 0


def _extended(values: NDArray[np.int64], length: int, fill: int) -> NDArray[np.int64]:
    longer = np.full((length, *values.shape[1:]), fill, np.int64)
    longer[: len(values)] = values
    return longer


def _gathered(
    arena: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The bytes ``arena[start : start + length]`` of all in a row."""
    before = np.cumsum(lengths) - lengths
    return arena[np.repeat(starts - before, lengths) + np.arange(lengths.sum())]


def _line_at(buffer: bytes, at: int) -> bytes:
    """The line that begins at ``at``, without its end."""
    return buffer[at : buffer.index(b"\n", at)].removesuffix(b"\r")

"""Fragment files: from lines ``contig start end barcode ...`` to open islands, every line accounted for.

Columns 5 and on never matter, nor does the order of lines. A line that repeats counts again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.rows import Path, complaint, shown
from annatac_scale.ingest import kernel
from annatac_scale.ingest.bgzf import TEXT_BYTES, BrokenTextError, whole_lines
from annatac_scale.ingest.key_table import KeyTable, empty_table, grown, look_up
from annatac_scale.ingest.peaks import PeakSet, levels
from annatac_scale.ingest.tally import Tally
from annatac_scale.store.open_islands import OpenIslands

STRATEGIES = {
    "insertion": kernel.INSERTION,
    "fragment": kernel.FRAGMENT,
    "paired-insertion": kernel.PAIRED_INSERTION,
}

_KEYS = 1 << 22
_MAX_CONTIGS_SHOWN = 20


@dataclass(frozen=True)
class CountingRules:
    """How fragments are counted, and which barcodes are cells.

    counting: "insertion" (each end of a fragment, at start and end - 1), "fragment" (each peak that it overlaps) or
    "paired-insertion" (each end, but a peak that holds both counts once)
    barcodes: the cells, in the order of their rows; None: those with ``min_fragments``, sorted by their bytes
    text_bytes, n_keys: sizes of the buffers of text and of counts
    """

    counting: str = "insertion"
    barcodes: tuple[str, ...] | None = None
    min_fragments: int = 1000
    text_bytes: int = TEXT_BYTES
    n_keys: int = _KEYS


@dataclass(frozen=True, eq=False)
class FragmentCounts:
    """The cells of a fragment file.

    barcodes: [n_cells]; open: their open islands
    n_fragments, n_inside: int64 [n_cells], fragments on the assembly, and those with a count in an island
    lines: comment, other_contig, not_a_cell, outside_islands, counted; they add up to ``lines``
    contigs: ``renamed`` {name in the file: chromosome}, ``other`` {name: lines} of up to 20, and ``n_other``
    chromosomes: those with a line, in the assembly's order
    """

    barcodes: list[str]
    open: OpenIslands
    n_fragments: NDArray[np.int64]
    n_inside: NDArray[np.int64]
    lines: dict[str, int]
    contigs: dict[str, Any]
    chromosomes: list[str]


def count_fragments(
    path: Path,
    assembly: Assembly,
    peaks: PeakSet,
    index: kernel.PeakIndex,
    rules: CountingRules,
    advance: Callable[[int], None],
) -> FragmentCounts:
    """Count a fragment file over the islands of ``peaks``, given with their index; ``advance`` is told the bytes read.

    Raises InputError naming file and line for an invalid line and for data cut off or damaged, and naming the file
    where nothing fits: no line at all, none on the assembly's chromosomes, no cell.
    """
    counter = _Counter(path, assembly, peaks, index, rules)
    try:
        for text in whole_lines(path, advance, rules.text_bytes):
            counter.count(np.frombuffer(text, np.uint8))
    except BrokenTextError as error:
        raise InputError(
            f"{path}, after line {counter.n_lines}: found {error}; expected a whole file; copy or make it again"
        ) from error
    counter.check_matches()
    return counter.cells()


class _Counter:
    """Feeds the kernel, and gives it what it asks for."""

    def __init__(
        self, path: Path, assembly: Assembly, peaks: PeakSet, index: kernel.PeakIndex, rules: CountingRules
    ) -> None:
        self.path = path
        self.assembly = assembly
        self.peaks = peaks
        self.rules = rules
        self.index = index
        self.kernel_rules = kernel.Rules(
            STRATEGIES[rules.counting],
            len(peaks.n),
            rules.barcodes is not None,
            np.array(assembly.sizes, np.int64),
        )
        contigs, barcodes = empty_table(), _barcode_table(rules.barcodes)
        self.tallies = kernel.Tallies(
            contigs,
            np.full(contigs.room, kernel.UNRESOLVED, np.int64),
            np.zeros(contigs.room, np.int64),
            barcodes,
            np.zeros(barcodes.room, np.int64),
            np.zeros(barcodes.room, np.int64),
            # A single fragment may touch every peak, and no more than twice.
            np.zeros(max(rules.n_keys, 2 * len(peaks) + 2), np.int64),
            np.zeros(kernel.N_COUNTERS, np.int64),
        )
        self.tally = Tally()

    @property
    def n_lines(self) -> int:
        """Lines counted so far."""
        return int(self.tallies.counters[kernel.LINES])

    def count(self, text: NDArray[np.uint8]) -> None:
        """Count a buffer of whole lines."""
        at, status = 0, kernel.KEYS_FULL
        while status != kernel.DONE:
            at, status = kernel.count_lines(text, at, self.index, self.kernel_rules, self.tallies)
            if status == kernel.NEW_CONTIG:
                self._resolve_contig()
            elif status == kernel.CONTIGS_FULL:
                self._grow_contigs(len(_line_at(text, at)))
            elif status == kernel.BARCODES_FULL:
                self._grow_barcodes(len(_line_at(text, at)))
            elif status == kernel.KEYS_FULL:
                self._empty_keys()
            elif status != kernel.DONE:
                raise self._complaint(_line_at(text, at).decode(errors="replace"), status)

    def check_matches(self) -> None:
        """Raise InputError where no line lies on the assembly, or none is of a listed barcode."""
        lines = self._line_counts()
        if lines["lines"] == lines["comment"]:
            raise InputError(
                f"{self.path}: found no fragment; expected at least one line 'contig start end barcode'; "
                "check the path, or leave the file out"
            )
        if lines["lines"] == lines["comment"] + lines["other_contig"]:
            raise InputError(
                f"{self.path}: found {lines['other_contig']:,} fragments on {self._some_contigs()}, none "
                f"on a chromosome of {self.assembly.name}; expected names such as "
                f"{self.assembly.chromosomes[0]}; check the assembly"
            )
        if self.rules.barcodes is not None and not self.tallies.n_fragments.any():
            listed = ", ".join(shown(barcode) for barcode in self.rules.barcodes[:3])
            raise InputError(
                f"{self.path}: found no fragment of any of the {len(self.rules.barcodes):,} listed "
                f"barcodes, such as {listed}; expected barcodes as in the file, such as "
                f"{_some_barcodes(self.path)}; give the list of this sample"
            )

    def cells(self) -> FragmentCounts:
        """The cells of what was counted. Raises InputError where no barcode is one."""
        self._empty_keys()
        names = self.tallies.barcodes.all_keys()
        n_fragments = self.tallies.n_fragments[: len(names)]
        chosen = self._choose(names, n_fragments)
        keys, counts = self.tally.result()
        barcode, island = np.divmod(keys, len(self.peaks.n))
        offsets = np.searchsorted(barcode, np.arange(len(names) + 1))
        level = levels(counts, self.peaks.n[island])
        return FragmentCounts(
            [self._text(names[i]) for i in chosen.tolist()],
            OpenIslands(offsets.astype(np.int64), island.astype(np.int32), level).take(chosen),
            n_fragments[chosen],
            self.tallies.n_inside[chosen],
            self._line_counts(chosen),
            self._contigs(),
            self._chromosomes(),
        )

    def _choose(self, names: list[bytes], n_fragments: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the barcodes that are cells, in the order of their rows."""
        if self.rules.barcodes is not None:
            return np.arange(len(names))
        enough = np.flatnonzero(n_fragments >= self.rules.min_fragments)
        if not len(enough):
            most = int(n_fragments.argmax())
            raise InputError(
                f"{self.path}: found no barcode with {self.rules.min_fragments:,} fragments among "
                f"{len(names):,}, the largest, {shown(self._text(names[most]))}, has "
                f"{n_fragments[most]:,}; expected at least one cell; give --min-fragments "
                f"{_rounded(n_fragments[most])} or a list with --barcodes"
            )
        return np.array(sorted(enough.tolist(), key=names.__getitem__), np.int64)

    def _line_counts(self, cells: NDArray[np.int64] | None = None) -> dict[str, int]:
        tallies = self.tallies
        of_barcodes = int(tallies.n_fragments.sum())
        cells = np.empty(0, np.int64) if cells is None else cells
        inside, of_cells = int(tallies.n_inside[cells].sum()), int(tallies.n_fragments[cells].sum())
        return {
            "lines": self.n_lines,
            "comment": int(tallies.counters[kernel.COMMENTS]),
            "other_contig": int(tallies.counters[kernel.OTHER_CONTIG]),
            "not_a_cell": int(tallies.counters[kernel.NOT_LISTED]) + of_barcodes - of_cells,
            "outside_islands": of_cells - inside,
            "counted": inside,
        }

    def _contigs(self) -> dict[str, Any]:
        names = [self._text(name) for name in self.tallies.contigs.all_keys()]
        code, n_lines = self.tallies.contig_code, self.tallies.contig_lines
        other = {name: int(n_lines[i]) for i, name in enumerate(names) if code[i] == kernel.FOREIGN}
        chromosome = {
            name: self.assembly.chromosomes[code[i]] for i, name in enumerate(names) if code[i] >= 0
        }
        return {
            "renamed": {name: meant for name, meant in chromosome.items() if name != meant},
            "other": dict(sorted(other.items(), key=lambda item: -item[1])[:_MAX_CONTIGS_SHOWN]),
            "n_other": len(other),
        }

    def _chromosomes(self) -> list[str]:
        met = np.unique(self.tallies.contig_code[self.tallies.contig_lines > 0])
        return [self.assembly.chromosomes[code] for code in met[met >= 0].tolist()]

    def _resolve_contig(self) -> None:
        """Look up the contig met last: the kernel asks for each as it comes."""
        last = int(self.tallies.contigs.size[0]) - 1
        code = self.assembly.code(self._text(self.tallies.contigs.key(last)))
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
            barcodes=barcodes,
            n_fragments=_extended(self.tallies.n_fragments, barcodes.room, 0),
            n_inside=_extended(self.tallies.n_inside, barcodes.room, 0),
        )

    def _empty_keys(self) -> None:
        self.tally.add(self.tallies.keys[: self.tallies.counters[kernel.KEYS]])
        self.tallies.counters[kernel.KEYS] = 0

    def _complaint(self, line: str, status: int) -> InputError:
        expected, remedy = _EXPECTED.get(status, ""), "give a fragment file; mend or remove the line"
        if status == kernel.END_BEYOND:
            code = self.assembly.code(line.split("\t")[0])
            size = self.assembly.sizes[code] if code is not None else 0
            expected = f"an end of at most {size}, the size of that chromosome in {self.assembly.name}"
            remedy = "check the assembly, or remove the line"
        return complaint(self.path, self.n_lines + 1, shown(line), expected, remedy)

    def _some_contigs(self) -> str:
        names = self.tallies.contigs.all_keys()
        return ", ".join(shown(self._text(name)) for name in names[:3]) + (", ..." if len(names) > 3 else "")

    def _text(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: found the name {name!r}; expected contigs and barcodes in UTF-8; "
                "convert the file to UTF-8"
            ) from error


_COLUMNS = "4 or more columns 'contig start end barcode' separated by tabs"
_EXPECTED = {
    kernel.FEW_COLUMNS: _COLUMNS,
    kernel.BAD_START: f"a whole number as start in {_COLUMNS}, with header lines marked by #",
    kernel.BAD_END: f"a whole number as end in {_COLUMNS}, with header lines marked by #",
    kernel.END_NOT_AFTER_START: "an end greater than the start",
    kernel.NO_BARCODE: "a barcode in column 4",
}


def _barcode_table(barcodes: Sequence[str] | None) -> KeyTable:
    """An empty table, or one of the listed barcodes, numbered as listed."""
    if barcodes is None:
        return empty_table(1 << 16)
    keys = [barcode.encode() for barcode in barcodes]
    text = np.frombuffer(b"".join(keys), np.uint8)
    ends = np.cumsum([0, *map(len, keys)])
    table = empty_table(len(keys) + 1, max(map(len, keys)) + 1)
    for a, b in pairwise(ends.tolist()):
        look_up(table, text, a, b, True)
    return table


def _extended(values: NDArray[np.int64], length: int, fill: int) -> NDArray[np.int64]:
    return np.concatenate([values, np.full(length - len(values), fill, np.int64)])


def _line_at(text: NDArray[np.uint8], at: int) -> bytes:
    """The line that begins at ``at``, without its end; ``text`` ends with a newline."""
    stop = at
    while text[stop] != ord("\n"):
        stop += 1
    return text[at:stop].tobytes().removesuffix(b"\r")


def _some_barcodes(path: Path) -> str:
    """The first barcodes of a file, for messages."""
    for text in whole_lines(path, lambda _: None):
        lines = [line.split(b"\t") for line in text[:100_000].splitlines()]
        found = dict.fromkeys(line[3] for line in lines if len(line) > 3 and not line[0].startswith(b"#"))
        return ", ".join(shown(barcode.decode(errors="replace")) for barcode in list(found)[:3])
    return "none"


def _rounded(n: np.int64) -> int:
    """A round number no greater than n: 345 -> 300."""
    digit = 10 ** (len(str(n)) - 1)
    return int(n) // digit * digit

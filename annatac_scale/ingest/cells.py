"""Which barcodes of a fragment file are cells, from what its ranges told; their rows, their quality, and all lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.rows import shown
from annatac_scale.ingest import kernel
from annatac_scale.ingest.fragments import INVALID, Counting
from annatac_scale.ingest.key_table import KeyTable, copied, empty_table, grown, look_up_all
from annatac_scale.ingest.quality import tss_enrichment
from annatac_scale.ingest.spill import Spill
from annatac_scale.ingest.text import TextFile, digest_of_parts
from annatac_scale.store.place import Place

_MAX_CONTIGS_SHOWN = 20
_MAX_RANKS = 200


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a fragment file.

    barcodes: [n_cells]; quality: int64 [n_cells, kernel.N_QUALITY]
    lines: lines, comment, invalid, other_contig, outside_islands, not_a_cell, counted: the last six add up to the first
    invalid: lines by what is wrong with them; contigs: ``renamed`` {name in the file: chromosome}, ``other`` {name:
    lines} of up to 20, and ``n_other``; chromosomes: those with a line, in the assembly's order
    barcode_rank: fragments of the barcodes by rank, at up to 200 ranks; None where not all barcodes were followed
    digest: of the file, as text.digest_of_parts makes it
    """

    barcodes: list[str]
    quality: NDArray[np.int64]
    lines: dict[str, int]
    invalid: dict[str, int]
    contigs: dict[str, Any]
    chromosomes: list[str]
    barcode_rank: dict[str, Any] | None
    digest: str


def choose_cells(
    file: TextFile,
    place: Place,
    names: Sequence[str],
    counting: Counting,
    min_fragments: int,
    min_tsse: float,
) -> Cells:
    """Add up what the spills ``names`` tell, choose the cells, and put down the row of each spill's barcodes.

    Cells are the listed barcodes in their order; without a list those with ``min_fragments`` fragments and a TSS
    enrichment of ``min_tsse``, sorted by their bytes. Memory: about 1 kB for each barcode of the file, and 4 bytes
    for each barcode of each range. Raises InputError where nothing fits: no line at all, none on the assembly's
    chromosomes, no cell.
    """
    merged = _Merged(file, counting)
    for name in names:
        merged.add(Spill(place, name))
    merged.check()
    chosen = merged.choose(min_fragments, min_tsse)
    row_of = np.full(max(1, len(merged.quality)), -1, np.int32)
    row_of[chosen] = np.arange(len(chosen))
    for name, numbers in zip(names, merged.numbers, strict=True):
        place.write(rows_name(name), row_of[numbers].tobytes())
    return merged.cells(chosen)


def rows_name(spill: str) -> str:
    """Where the rows of a spill's barcodes are: int32, -1 for those that are no cells."""
    return spill.replace("ranges/", "rows/")


class _Merged:
    """All barcodes of a file."""

    def __init__(self, file: TextFile, counting: Counting) -> None:
        self.file = file
        self.counting = counting
        self.table = empty_table(1 << 16) if counting.barcodes is None else copied(counting.barcodes)
        self._quality = np.zeros((self.table.room, kernel.N_QUALITY), np.int64)
        self.numbers: list[NDArray[np.int32]] = []
        self._counts: dict[str, int] = {}
        self._contigs: dict[str, list[int]] = {}
        self._digests: list[bytes] = []
        self._end = -1

    def add(self, spill: Spill) -> None:
        """Add the barcodes and lines of a spill."""
        summary = spill.summary
        for name, n in summary["lines"].items():
            self._counts[name] = self._counts.get(name, 0) + n
        for name, (code, n) in summary["contigs"].items():
            self._contigs[name] = [code, self._contigs.get(name, [code, 0])[1] + n]
        self._check_span(summary)
        # Of the parts of a stream, the last of each strand tells the digest of the file, and only those.
        if summary["digest"] and len(self._digests) < self.file.n_ranges:
            self._digests.append(bytes.fromhex(summary["digest"]))
        text, ends = spill.array("names"), spill.array("name_ends")
        numbers = np.empty(len(ends) - 1, np.int64)
        done = 0
        while (done := look_up_all(self.table, text, ends, numbers, done)) < len(numbers):
            self.table = grown(self.table, int(ends[done + 1] - ends[done]))
        if len(self._quality) < self.table.room:
            longer = np.zeros((self.table.room, kernel.N_QUALITY), np.int64)
            longer[: len(self._quality)] = self._quality
            self._quality = longer
        # Each barcode comes once in a spill.
        self._quality[numbers] += spill.array("quality").reshape(-1, kernel.N_QUALITY)
        self.numbers.append(numbers.astype(np.int32))

    def _check_span(self, summary: Mapping[str, Any]) -> None:
        """Raise InputError unless a range's blocks begin where those of the range before ended."""
        if summary["first_block"] < 0:
            return
        if self._end not in (-1, summary["first_block"]):
            raise InputError(
                f"{self.file.location}: found a BGZF block at byte {summary['first_block']:,} where the blocks before "
                f"it end at byte {self._end:,}; expected one to follow the other; compress the text anew with bgzip"
            )
        self._end = summary["end"]

    @property
    def quality(self) -> NDArray[np.int64]:
        """int64 [n_barcodes, kernel.N_QUALITY]."""
        return self._quality[: int(self.table.size[0])]

    def check(self) -> None:
        """Raise InputError where no line lies on the assembly, or none is of a listed barcode."""
        counts, location, assembly = self._counts, self.file.location, self.counting.assembly
        n_invalid = sum(counts[name] for name in INVALID.values())
        if counts["lines"] == counts["comment"] + n_invalid:
            raise InputError(
                f"{location}: found no fragment{f' and {n_invalid:,} invalid lines' if n_invalid else ''}; expected at "
                "least one line 'contig start end barcode'; check the path, or leave the file out"
            )
        if not any(code >= 0 for code, _ in self._contigs.values()):
            raise InputError(
                f"{location}: found {counts['other_contig']:,} fragments on {self._some_contigs()}, none on a "
                f"chromosome of {assembly.name}; expected names such as {assembly.chromosomes[0]}; check the assembly"
            )
        n_listed = self.counting.n_listed
        if n_listed > 0 and not self.quality[:n_listed, kernel.FRAGMENTS].any():
            listed = ", ".join(self._shown(i) for i in range(min(3, n_listed)))
            found = ", ".join(self._shown(i) for i in range(n_listed, min(n_listed + 3, len(self.quality))))
            raise InputError(
                f"{location}: found no fragment of any of the {n_listed:,} listed barcodes, such as {listed}"
                f"{', in its islands' if not self.counting.quality else ''}; expected barcodes as in the file"
                f"{f', such as {found}' if found else ''}; give the list of this sample"
            )

    def choose(self, min_fragments: int, min_tsse: float) -> NDArray[np.int64]:
        """The numbers of the barcodes that are cells, in the order of their rows."""
        if self.counting.barcodes is not None:
            return np.arange(self.counting.n_listed)
        n_fragments = self.quality[:, kernel.FRAGMENTS]
        enough = n_fragments >= min_fragments
        enriched = tss_enrichment(self.quality) >= min_tsse if min_tsse > 0 else np.ones(len(enough), bool)
        cells = np.flatnonzero(enough & enriched)
        if not len(cells):
            most = int(n_fragments.argmax())
            wanted = f" and a TSS enrichment of {min_tsse:g}" if min_tsse > 0 else ""
            reach = f"; {int(enough.sum()):,} have the fragments" if min_tsse > 0 else ""
            raise InputError(
                f"{self.file.location}: found no barcode with {min_fragments:,} fragments{wanted} among "
                f"{len(n_fragments):,}, the largest, {self._shown(most)}, has {int(n_fragments[most]):,}{reach}; "
                f"expected at least one cell; give --min-fragments {_rounded(n_fragments[most])}"
                f"{', a lower --min-tsse' if min_tsse > 0 else ''} or a list with --barcodes"
            )
        return cells[pc.sort_indices(_texts(self.table, cells)).to_numpy()]

    def cells(self, chosen: NDArray[np.int64]) -> Cells:
        """The chosen barcodes and the fate of all lines."""
        counts = self._counts
        invalid = {name: counts[name] for name in INVALID.values() if counts[name]}
        inside = self.quality[:, kernel.INSIDE]
        counted = int(inside[chosen].sum())
        lines = {
            "lines": counts["lines"],
            "comment": counts["comment"],
            "invalid": sum(invalid.values()),
            "other_contig": counts["other_contig"],
            "outside_islands": counts["outside_islands"],
            "not_a_cell": counts["not_listed"] + int(inside.sum()) - counted,
            "counted": counted,
        }
        assembly = self.counting.assembly
        met = {code for code, _ in self._contigs.values()}
        return Cells(
            [self._text(number) for number in chosen.tolist()],
            self.quality[chosen],
            lines,
            invalid,
            _told_contigs(self._contigs, assembly),
            [name for code, name in enumerate(assembly.chromosomes) if code in met],
            self._ranks(len(chosen)),
            digest_of_parts(self._digests),
        )

    def _ranks(self, n_cells: int) -> dict[str, Any] | None:
        if not self.counting.quality and self.counting.barcodes is not None:
            return None
        n = np.sort(self.quality[:, kernel.FRAGMENTS])[::-1]
        n = n[n > 0]
        rank = np.unique(np.geomspace(1, len(n), _MAX_RANKS).astype(np.int64))
        return {
            "rank": rank.tolist(),
            "n_fragments": n[rank - 1].tolist(),
            "n_barcodes": len(n),
            "n_cells": n_cells,
        }

    def _some_contigs(self) -> str:
        names = list(self._contigs)
        return ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")

    def _shown(self, number: int) -> str:
        return shown(self.table.key(number).decode(errors="replace"))

    def _text(self, number: int) -> str:
        name = self.table.key(number)
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.file.location}: found the barcode {name!r}; expected barcodes in UTF-8; convert the file to "
                "UTF-8"
            ) from error


def _texts(table: KeyTable, numbers: NDArray[np.int64]) -> pa.Array:
    """Keys of a table as a large_binary array."""
    n = int(table.size[0])
    buffers = [None, pa.py_buffer(table.ends[: n + 1]), pa.py_buffer(table.arena)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), n, buffers).take(pa.array(numbers))


def _told_contigs(contigs: Mapping[str, list[int]], assembly: Assembly) -> dict[str, Any]:
    other = {name: n for name, (code, n) in contigs.items() if code < 0}
    chromosome = {name: assembly.chromosomes[code] for name, (code, _) in contigs.items() if code >= 0}
    return {
        "renamed": {name: meant for name, meant in sorted(chromosome.items()) if name != meant},
        "other": dict(sorted(other.items(), key=lambda item: (-item[1], item[0]))[:_MAX_CONTIGS_SHOWN]),
        "n_other": len(other),
    }


def _rounded(n: np.int64) -> int:
    """A round number no greater than n: 345 -> 300."""
    digit = 10 ** (len(str(n)) - 1)
    return int(n) // digit * digit

"""The IslandSpace: the ordered windows of a genome that are the features of every store and model."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import PROTEIN_CODING, builtin_tss
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES, Assembly
from annatac_scale.genome.rows import BED_COMMENTS, Path, complaint, read_rows, shown, whole_number
from annatac_scale.progress import Progress, Silent

DEFAULT_WIDTH_BP = 5000


@dataclass(frozen=True, eq=False)
class IslandSpace:
    """The islands of an assembly, sorted by (chrom, start), none overlapping another.

    chromosomes: all chromosomes of the assembly in natural order, with or without islands
    width_bp: width of the bins (the last of a chromosome may be shorter); 0 for windows from a file
    selection: "tss" (bins that hold a TSS), "all" (all bins) or "windows" (from a BED file)
    chrom: int32 [n], index into chromosomes
    start, end: int64 [n], 0-based, half-open
    genes: object [n], "" or the genes whose TSS lies in the island, by position: "A,B"

    Raises InputError where the arrays do not hold sorted, separate islands.
    """

    assembly: str
    chromosomes: tuple[str, ...]
    width_bp: int
    selection: str
    chrom: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    genes: NDArray[np.object_]

    def __post_init__(self) -> None:
        if not len(self.chrom) == len(self.start) == len(self.end) == len(self.genes) > 0:
            raise InputError(
                f"islands of {self.assembly}: found {len(self.chrom)} chrom, {len(self.start)} start, "
                f"{len(self.end)} end and {len(self.genes)} genes; expected one of each an island, "
                "and at least one island; make the islands anew"
            )
        known = (self.chrom >= 0) & (self.chrom < len(self.chromosomes))
        proper = known & (self.start >= 0) & (self.start < self.end)
        later = (self.chrom[1:] > self.chrom[:-1]) | (
            (self.chrom[1:] == self.chrom[:-1]) & (self.start[1:] >= self.end[:-1])
        )
        if not (proper.all() and later.all()):
            raise InputError(
                f"islands of {self.assembly}: found islands that overlap, are empty, out of order or on no "
                "chromosome; expected them sorted and separate; make the islands anew"
            )

    def __len__(self) -> int:
        return len(self.chrom)

    @classmethod
    def all(
        cls,
        assembly: Assembly,
        tss: pd.DataFrame | None = None,
        width_bp: int = DEFAULT_WIDTH_BP,
        progress: Progress | None = None,
    ) -> "IslandSpace":
        """All bins of ``width_bp`` of every chromosome, with the genes of a TSS table."""
        chrom, start, end = _all_bins(assembly, width_bp)
        space = cls(
            assembly.name, assembly.chromosomes, width_bp, "all", chrom, start, end, _no_genes(len(chrom))
        )
        return space if tss is None else space._with_genes(_placed(assembly, tss, progress))

    @classmethod
    def tss(
        cls,
        assembly: Assembly,
        tss: pd.DataFrame,
        width_bp: int = DEFAULT_WIDTH_BP,
        progress: Progress | None = None,
    ) -> "IslandSpace":
        """The bins that hold the TSS of a protein-coding gene, or of any gene where no row has that type."""
        placed = _placed(assembly, tss, progress)
        coding = placed["type"] == PROTEIN_CODING
        if coding.any():
            choosing = placed[coding]
        elif (tss["type"] == PROTEIN_CODING).any():
            raise InputError(
                f"TSS table: found no protein-coding gene on a chromosome of {assembly.name}; expected some; "
                "check that the table and the assembly belong together"
            )
        else:
            choosing = placed
        chrom, start, end = _all_bins(assembly, width_bp)
        bins = cls(
            assembly.name, assembly.chromosomes, width_bp, "tss", chrom, start, end, _no_genes(len(chrom))
        )
        kept = np.unique(bins.locate(choosing["code"].to_numpy(), choosing["position"].to_numpy()))
        space = cls(
            assembly.name,
            assembly.chromosomes,
            width_bp,
            "tss",
            chrom[kept],
            start[kept],
            end[kept],
            _no_genes(len(kept)),
        )
        return space._with_genes(placed)

    @classmethod
    def windows(
        cls, assembly: Assembly, path: Path, tss: pd.DataFrame | None = None, progress: Progress | None = None
    ) -> "IslandSpace":
        """The windows of a BED file, in any order, with the genes of a TSS table.

        Raises InputError for windows that overlap, are empty, pass the end of their chromosome or lie on none.
        """
        chrom, start, end = _read_windows(assembly, path)
        space = cls(
            assembly.name, assembly.chromosomes, 0, "windows", chrom, start, end, _no_genes(len(chrom))
        )
        return space if tss is None else space._with_genes(_placed(assembly, tss, progress))

    def locate(self, chrom: NDArray[np.integer], position: NDArray[np.integer]) -> NDArray[np.int32]:
        """The island that holds each position, -1 where none does (as for a chrom of -1).

        chrom: int [m], index into chromosomes; position: int [m], 0-based. Returns int32 [m].
        """
        chrom, position = np.asarray(chrom, np.int64), np.asarray(position, np.int64)
        island = np.searchsorted(self._starts, chrom * self._stride + position, side="right") - 1
        # Positions past a chromosome's end reach into the keys of the next one: hence the look at chrom.
        inside = (
            (self.chrom[island] == chrom) & (self.start[island] <= position) & (position < self.end[island])
        )
        return np.where(inside & (island >= 0), island, -1).astype(np.int32)

    @cached_property
    def _stride(self) -> int:
        return int(self.end.max()) + 1

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Chromosome and start in one increasing number, int64 [n]."""
        return self.chrom.astype(np.int64) * self._stride + self.start

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the lines ``assembly<TAB>width_bp`` and, an island each, ``chrom<TAB>start<TAB>end``."""
        digest = hashlib.sha256(f"{self.assembly}\t{self.width_bp}\n".encode())
        for chromosome, start, end, _ in self._by_chromosome():
            digest.update(
                "".join([f"{chromosome}\t{a}\t{b}\n" for a, b in zip(start, end, strict=True)]).encode()
            )
        return digest.hexdigest()

    def names(self) -> list[str]:
        """The islands as ``chr1:0-5000``."""
        return [
            f"{chromosome}:{a}-{b}"
            for chromosome, start, end, _ in self._by_chromosome()
            for a, b in zip(start, end, strict=True)
        ]

    def write(self, path: Path) -> None:
        """Write as a gzip table ``chrom start end genes`` below a ``#`` line of JSON with all else.

        The bytes depend on the islands alone. The file is written aside and renamed.
        """
        head = {
            "assembly": self.assembly,
            "width_bp": self.width_bp,
            "selection": self.selection,
            "sha256": self.sha256,
            "chromosomes": self.chromosomes,
        }
        target = FilePath(path)
        aside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                file.write(f"#{json.dumps(head)}\nchrom\tstart\tend\tgenes\n".encode())
                for chromosome, *columns in self._by_chromosome():
                    rows = zip(*columns, strict=True)
                    file.write(
                        "".join([f"{chromosome}\t{a}\t{b}\t{genes}\n" for a, b, genes in rows]).encode()
                    )
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> "IslandSpace":
        """Read what write() wrote; InputError where it is anything else or its islands were changed."""
        wrong = f"{path}: found no islands as annatac_scale writes them"
        remedy = "make the islands anew; for windows of your own give a BED file as the selection"
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                head = json.loads(file.readline().removeprefix("#"))
                table = pd.read_csv(file, sep="\t", keep_default_na=False, dtype={"chrom": str, "genes": str})
            codes = {chromosome: code for code, chromosome in enumerate(head["chromosomes"])}
            space = cls(
                head["assembly"],
                tuple(head["chromosomes"]),
                head["width_bp"],
                head["selection"],
                table["chrom"].map(codes).to_numpy(np.int32),
                table["start"].to_numpy(np.int64),
                table["end"].to_numpy(np.int64),
                table["genes"].to_numpy(object),
            )
            recorded = head["sha256"]
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{wrong} ({error}); expected the '#' line and the table; {remedy}") from error
        if space.sha256 != recorded:
            raise InputError(
                f"{path}: found islands with sha256 {space.sha256}; expected {recorded}; {remedy}"
            )
        return space

    def _by_chromosome(self) -> Iterator[tuple[str, list[int], list[int], list[str]]]:
        """Chromosome, and start, end and genes of its islands, as Python values, which format faster."""
        edges = np.searchsorted(self.chrom, np.arange(len(self.chromosomes) + 1))
        for chromosome, a, b in zip(self.chromosomes, edges[:-1], edges[1:], strict=True):
            yield chromosome, self.start[a:b].tolist(), self.end[a:b].tolist(), self.genes[a:b].tolist()

    def _with_genes(self, placed: pd.DataFrame) -> "IslandSpace":
        """The same islands with the genes of a placed TSS table."""
        island = self.locate(placed["code"].to_numpy(), placed["position"].to_numpy())
        inside = placed.assign(island=island)[island >= 0].sort_values(["island", "position", "gene"])
        named: dict[int, list[str]] = {}
        for i, gene in zip(inside["island"].tolist(), inside["gene"].tolist(), strict=True):
            named.setdefault(i, []).append(gene)
        genes = self.genes.copy()
        for i, names in named.items():
            genes[i] = ",".join(dict.fromkeys(filter(None, names)))
        return IslandSpace(
            self.assembly,
            self.chromosomes,
            self.width_bp,
            self.selection,
            self.chrom,
            self.start,
            self.end,
            genes,
        )


def select_islands(
    assembly: Assembly, selection: str, tss: pd.DataFrame | None = None, progress: Progress | None = None
) -> IslandSpace:
    """The islands of a selection: "tss", "all", or the path of a BED file.

    Without a TSS table a built-in assembly uses its own; "tss" on any other raises InputError.
    """
    if tss is None and assembly.name in BUILTIN_ASSEMBLIES:
        tss = builtin_tss(assembly.name)
    if selection == "all":
        return IslandSpace.all(assembly, tss, progress=progress)
    if selection != "tss":
        return IslandSpace.windows(assembly, selection, tss, progress)
    if tss is None:
        raise InputError(
            f"selection 'tss' on assembly {shown(assembly.name)}: found no TSS table; expected one for any assembly "
            f"but {', '.join(BUILTIN_ASSEMBLIES)}; give a TSS or GTF file, or select all"
        )
    return IslandSpace.tss(assembly, tss, progress=progress)


def _all_bins(
    assembly: Assembly, width_bp: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    if width_bp < 1:
        raise InputError(
            f"width_bp: found {width_bp}; expected at least 1 bp; leave it out for {DEFAULT_WIDTH_BP}"
        )
    sizes = np.array(assembly.sizes, np.int64)
    n_bins = -(-sizes // width_bp)
    chrom = np.repeat(np.arange(len(sizes), dtype=np.int32), n_bins)
    first_bin = np.cumsum(n_bins) - n_bins
    start = (np.arange(len(chrom)) - first_bin[chrom]) * width_bp
    return chrom, start, np.minimum(start + width_bp, sizes[chrom])


def _no_genes(n_islands: int) -> NDArray[np.object_]:
    return np.full(n_islands, "", object)


def _placed(assembly: Assembly, tss: pd.DataFrame, progress: Progress | None) -> pd.DataFrame:
    """The rows of a TSS table on a chromosome of the assembly, plus its index ``code``; says what is left out."""
    codes = {contig: assembly.code(contig) for contig in tss["chrom"].unique()}
    unknown = sorted(contig for contig, code in codes.items() if code is None)
    placed = tss[~tss["chrom"].isin(unknown)]
    some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
    if placed.empty:
        raise InputError(
            f"TSS table: found contigs {some}, none of which is in {assembly.name}; expected names such as "
            f"{assembly.chromosomes[0]}; check that the table and the assembly belong together"
        )
    if unknown:
        (progress or Silent()).say(
            f"{len(tss) - len(placed):,} of {len(tss):,} TSS lie on {len(unknown)} contigs that {assembly.name} "
            f"does not have ({some}) and are left out"
        )
    placed = placed.assign(code=placed["chrom"].map(codes).astype("int64"))
    size = np.array(assembly.sizes, np.int64)[placed["code"]]
    beyond = placed[(placed["position"] >= size) | (placed["position"] < 0)]
    if len(beyond):
        row = beyond.iloc[0]
        raise InputError(
            f"TSS table: found {len(beyond):,} TSS outside their chromosome, the first {row['gene']} at "
            f"{row['chrom']}:{row['position']}; expected positions inside {assembly.name}; "
            "check that the table and the assembly belong together"
        )
    return placed


def _read_windows(
    assembly: Assembly, path: Path
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    rows = [
        (*_parse_window(assembly, path, number, fields), number)
        for number, fields in read_rows(path, BED_COMMENTS)
    ]
    if not rows:
        raise InputError(
            f"{path}: found no window; expected at least one line 'chrom start end'; check the file"
        )
    chrom, start, end, number = np.array(sorted(rows), np.int64).T
    overlaps = np.flatnonzero((chrom[1:] == chrom[:-1]) & (start[1:] < end[:-1]))
    if len(overlaps):
        i = overlaps[0] + 1
        name = assembly.chromosomes[chrom[i]]
        raise complaint(
            path,
            number[i],
            f"{name}:{start[i]}-{end[i]}, which overlaps {name}:{start[i - 1]}-{end[i - 1]} of line {number[i - 1]}",
            "windows that do not overlap",
            "merge the two (bedtools merge) or remove one",
        )
    return chrom.astype(np.int32), start, end


def _parse_window(assembly: Assembly, path: Path, number: int, fields: list[str]) -> tuple[int, int, int]:
    start, end = (whole_number(field) for field in fields[1:3]) if len(fields) >= 3 else (None, None)
    if start is None or end is None or start >= end:
        raise complaint(
            path,
            number,
            shown("\t".join(fields)),
            "'chrom start end' with 0 <= start < end",
            "give a BED file",
        )
    code = assembly.code(fields[0])
    if code is None:
        raise complaint(
            path,
            number,
            f"contig {shown(fields[0])}",
            f"a chromosome of {assembly.name} such as {assembly.chromosomes[0]}",
            "check the assembly, or remove the line",
        )
    if end > assembly.sizes[code]:
        raise complaint(
            path,
            number,
            f"end {end}",
            f"at most {assembly.sizes[code]}, the size of {assembly.chromosomes[code]} in {assembly.name}",
            "check the assembly, or cut the window",
        )
    return code, start, end

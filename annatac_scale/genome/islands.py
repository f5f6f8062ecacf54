"""The IslandSpace: the ordered windows of a genome that are the features of every store and model."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import PROTEIN_CODING, builtin_tss, place_tss
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES, Assembly
from annatac_scale.genome.rows import Path, shown
from annatac_scale.genome.windows import Windows, all_bins, read_windows
from annatac_scale.progress import Progress

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
        lengths = [len(column) for column in (self.chrom, self.start, self.end, self.genes)]
        if lengths != [len(self)] * 4 or not lengths[0]:
            raise InputError(
                f"islands of {self.assembly}: found columns chrom, start, end, genes of {lengths} rows; "
                "expected equal lengths of at least one; make the islands anew"
            )
        proper = (
            (self.chrom >= 0)
            & (self.chrom < len(self.chromosomes))
            & (self.start >= 0)
            & (self.start < self.end)
        )
        same = self.chrom[1:] == self.chrom[:-1]
        later = np.where(same, self.start[1:] >= self.end[:-1], self.chrom[1:] > self.chrom[:-1])
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
        space = cls._of(assembly, width_bp, "all", all_bins(assembly, width_bp))
        return space if tss is None else space._with_genes(place_tss(assembly, tss, progress))

    @classmethod
    def tss(
        cls,
        assembly: Assembly,
        tss: pd.DataFrame,
        width_bp: int = DEFAULT_WIDTH_BP,
        progress: Progress | None = None,
    ) -> "IslandSpace":
        """The bins that hold the TSS of a protein-coding gene, or of any gene where no row has that type."""
        placed = place_tss(assembly, tss, progress)
        coding = placed["type"] == PROTEIN_CODING
        choosing = placed[coding] if (tss["type"] == PROTEIN_CODING).any() else placed
        if choosing.empty:
            raise InputError(
                f"TSS table: found protein-coding genes, but none on a contig of {assembly.name}; "
                "expected some; check that table and assembly belong together"
            )
        bins = cls._of(assembly, width_bp, "tss", all_bins(assembly, width_bp))
        kept = np.unique(bins.locate(choosing["code"].to_numpy(), choosing["position"].to_numpy()))
        windows = Windows(bins.chrom[kept], bins.start[kept], bins.end[kept])
        return cls._of(assembly, width_bp, "tss", windows)._with_genes(placed)

    @classmethod
    def windows(
        cls,
        assembly: Assembly,
        path: Path,
        tss: pd.DataFrame | None = None,
        progress: Progress | None = None,
    ) -> "IslandSpace":
        """The windows of a BED file (see read_windows for what is refused), with the genes of a TSS table."""
        space = cls._of(assembly, 0, "windows", read_windows(assembly, path))
        return space if tss is None else space._with_genes(place_tss(assembly, tss, progress))

    @classmethod
    def _of(cls, assembly: Assembly, width_bp: int, selection: str, windows: Windows) -> "IslandSpace":
        no_genes = np.full(len(windows.chrom), "", object)
        return cls(assembly.name, assembly.chromosomes, width_bp, selection, *windows, no_genes)

    def _with_genes(self, placed: pd.DataFrame) -> "IslandSpace":
        """The same islands with the genes of a placed TSS table."""
        island = self.locate(placed["code"].to_numpy(), placed["position"].to_numpy())
        inside = placed.assign(island=island)[island >= 0].sort_values(["island", "position", "gene"])
        names_of: dict[int, list[str]] = {}
        for i, gene in zip(inside["island"].tolist(), inside["gene"].tolist(), strict=True):
            names_of.setdefault(i, []).append(gene)
        genes = self.genes.copy()
        for i, names in names_of.items():
            genes[i] = ",".join(dict.fromkeys(filter(None, names)))
        return replace(self, genes=genes)

    def locate(self, chrom: NDArray[np.integer], position: NDArray[np.integer]) -> NDArray[np.int32]:
        """The island that holds each position, -1 where none does (as for a chrom of -1).

        chrom: int [m], index into chromosomes; position: int [m], 0-based. Returns int32 [m].
        """
        chrom, position = np.asarray(chrom, np.int64), np.asarray(position, np.int64)
        island = np.searchsorted(self._keys, chrom * self._stride + position, side="right") - 1
        # A position past its chromosome's end reaches into the keys of the next one: hence the look at chrom.
        # An island of -1 reads the last one, which starts after the position or lies on another chromosome.
        inside = (
            (self.chrom[island] == chrom) & (self.start[island] <= position) & (position < self.end[island])
        )
        return np.where(inside, island, -1).astype(np.int32)

    @cached_property
    def _stride(self) -> int:
        return int(self.end.max()) + 1

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        """Chromosome and start of each island in one increasing number, int64 [n]."""
        return self.chrom.astype(np.int64) * self._stride + self.start

    @cached_property
    def sha256(self) -> str:
        """Hex digest of a line ``assembly<TAB>width_bp`` and one ``chrom<TAB>start<TAB>end`` an island."""
        digest = hashlib.sha256(f"{self.assembly}\t{self.width_bp}\n".encode())
        for name, starts, ends, _ in self._by_chromosome():
            rows = [f"{name}\t{start}\t{end}\n" for start, end in zip(starts, ends, strict=True)]
            digest.update("".join(rows).encode())
        return digest.hexdigest()

    def names(self) -> list[str]:
        """The islands as ``chr1:0-5000``."""
        return [
            f"{name}:{start}-{end}"
            for name, starts, ends, _ in self._by_chromosome()
            for start, end in zip(starts, ends, strict=True)
        ]

    def _by_chromosome(self) -> Iterator[tuple[str, list[int], list[int], list[str]]]:
        """Chromosome, and start, end and genes of its islands as Python values, which format faster."""
        edges = np.searchsorted(self.chrom, np.arange(len(self.chromosomes) + 1))
        for name, a, b in zip(self.chromosomes, edges[:-1], edges[1:], strict=True):
            yield name, self.start[a:b].tolist(), self.end[a:b].tolist(), self.genes[a:b].tolist()

    def write(self, path: Path) -> None:
        """Write a gzip table ``chrom start end genes`` below one ``#`` line of JSON that carries the rest.

        The bytes depend on the islands alone. The file is written aside and renamed.
        Raises InputError where its folder does not exist.
        """
        target = FilePath(path)
        if not target.parent.is_dir():
            raise InputError(f"{target}: its folder does not exist; make it or check the path")
        head = {
            "assembly": self.assembly,
            "width_bp": self.width_bp,
            "selection": self.selection,
            "sha256": self.sha256,
            "chromosomes": self.chromosomes,
        }
        aside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                file.write(f"#{json.dumps(head)}\nchrom\tstart\tend\tgenes\n".encode())
                for name, *columns in self._by_chromosome():
                    rows = zip(*columns, strict=True)
                    file.write("".join([f"{name}\t{a}\t{b}\t{genes}\n" for a, b, genes in rows]).encode())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> "IslandSpace":
        """Read what write() wrote; InputError where it is anything else or its islands were changed."""
        remedy = "make the islands anew; for windows of your own give a BED file as the selection"
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                head = json.loads(file.readline().removeprefix("#"))
                table = pd.read_csv(file, sep="\t", keep_default_na=False, dtype={"chrom": str, "genes": str})
            space, recorded = cls._parse(head, table), head["sha256"]
        except (OSError, EOFError, zlib.error, KeyError, TypeError, ValueError) as error:
            found = f"found no islands as annatac_scale writes them ({error!r})"
            raise InputError(f"{path}: {found}; expected a '#' line and the table; {remedy}") from error
        if space.sha256 != recorded:
            raise InputError(
                f"{path}: found islands with sha256 {space.sha256}; expected {recorded}; {remedy}"
            )
        return space

    @classmethod
    def _parse(cls, head: dict, table: pd.DataFrame) -> "IslandSpace":
        codes = {name: code for code, name in enumerate(head["chromosomes"])}
        return cls(
            head["assembly"],
            tuple(head["chromosomes"]),
            head["width_bp"],
            head["selection"],
            table["chrom"].map(codes).fillna(-1).to_numpy(np.int32),
            table["start"].to_numpy(np.int64),
            table["end"].to_numpy(np.int64),
            table["genes"].to_numpy(object),
        )


def select_islands(
    assembly: Assembly,
    selection: str,
    tss: pd.DataFrame | None = None,
    progress: Progress | None = None,
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
            f"selection 'tss' on assembly {shown(assembly.name)}: found no TSS table; expected one, as the "
            f"assembly is none of {', '.join(BUILTIN_ASSEMBLIES)}; give a TSS or GTF file, or select all"
        )
    return IslandSpace.tss(assembly, tss, progress=progress)

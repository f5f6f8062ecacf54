"""Assemblies: the names and sizes of a genome's chromosomes, and which chromosome a contig's name means."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path, complaint, read_rows, shown, whole_number

BUILTIN_ASSEMBLIES = ("hg38", "hg19", "mm10", "mm9")

_SYNONYMS = {
    "grch38": "hg38",
    "grch37": "hg19",
    "grcm38": "mm10",
    "grcm39": "mm39",
    "ncbi37": "mm9",
    "mgscv37": "mm9",
}
"""What the Genome Reference Consortium calls the assemblies that UCSC named."""

_RANK_AFTER_NUMBERS = {"X": 1, "Y": 2, "M": 3, "MT": 3}
_MITOCHONDRION = ("M", "MT", "chrMT")


@dataclass(frozen=True)
class Assembly:
    """A genome assembly: chromosomes in natural order (see natural_order) and their sizes in bp."""

    name: str
    chromosomes: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def builtin(cls, name: str) -> "Assembly":
        """One of BUILTIN_ASSEMBLIES; InputError for any other name."""
        check_builtin(name)
        with resources.as_file(
            resources.files("annatac_scale.genome") / "data" / f"{name}.chrom.sizes"
        ) as path:
            return cls.from_chrom_sizes(path, name)

    @classmethod
    def from_chrom_sizes(cls, path: Path, name: str) -> "Assembly":
        """From a table ``chromosome size`` (further columns, as in a .fai, are ignored), in any order.

        Raises InputError for a missing or non-integer size, a chromosome given twice, or an empty table.
        """
        size_of: dict[str, int] = {}
        for number, fields in read_rows(path):
            chromosome, size = _parse_size(path, number, fields)
            if chromosome in size_of:
                raise complaint(
                    path,
                    number,
                    f"chromosome {shown(chromosome)} again",
                    "each chromosome once",
                    "remove one of the two lines",
                )
            size_of[chromosome] = size
        if not size_of:
            raise InputError(
                f"{path}: found no line with a chromosome; expected 'chromosome<TAB>size'; "
                "give a chrom.sizes or .fai file"
            )
        chromosomes = natural_order(size_of)
        return cls(name, chromosomes, tuple(size_of[chromosome] for chromosome in chromosomes))

    def code(self, contig: str) -> int | None:
        """Index of the chromosome that a contig's name in a data file means, None where there is none.

        The first of these that is a chromosome: the name itself; chrM for M, MT and chrMT; "chr" + name; then
        the same three for the name without the assembly in front, under any of its names and with any number of
        underscores (``hg19_chr1``, ``GRCh38___chr1`` in files of two genomes).
        """
        code = self._code_of_plain(contig)
        if code is None:
            for name in self._names:
                if contig.lower().startswith(f"{name}_"):
                    return self._code_of_plain(contig[len(name) :].lstrip("_"))
        return code

    def _code_of_plain(self, contig: str) -> int | None:
        for name in (contig, "chrM" if contig in _MITOCHONDRION else contig, f"chr{contig}"):
            if name in self._codes:
                return self._codes[name]
        return None

    @cached_property
    def _names(self) -> list[str]:
        """All names of the assembly, in lower case."""
        common = common_name(self.name)
        return [self.name.lower(), common, *(name for name, meant in _SYNONYMS.items() if meant == common)]

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {chromosome: code for code, chromosome in enumerate(self.chromosomes)}


def common_name(assembly: str) -> str:
    """The name, in lower case, that an assembly has here, for one of its names: hg38 for GRCh38."""
    return _SYNONYMS.get(assembly.lower(), assembly.lower())


def check_builtin(name: str) -> None:
    """Raise InputError unless ``name`` is one of BUILTIN_ASSEMBLIES."""
    if name not in BUILTIN_ASSEMBLIES:
        raise InputError(
            f"assembly: found {shown(name)}; expected one of {', '.join(BUILTIN_ASSEMBLIES)}; "
            "for any other genome give its chrom.sizes and its TSS or GTF file"
        )


def natural_order(chromosomes: Iterable[str]) -> tuple[str, ...]:
    """Numbered chromosomes by number, then X, Y, M, then all others by name; with or without "chr"."""

    def key(chromosome: str) -> tuple[int, int, str]:
        stem = chromosome.removeprefix("chr")
        number = whole_number(stem)
        return (
            (0, number, chromosome)
            if number is not None
            else (_RANK_AFTER_NUMBERS.get(stem, 4), 0, chromosome)
        )

    return tuple(sorted(chromosomes, key=key))


def _parse_size(path: Path, number: int, fields: list[str]) -> tuple[str, int]:
    remedy = "give a table 'chromosome<TAB>size', such as UCSC's chrom.sizes or a .fai"
    if len(fields) < 2 or not fields[0]:
        raise complaint(path, number, shown("\t".join(fields)), "a chromosome and its size", remedy)
    size = whole_number(fields[1])
    if not size:
        raise complaint(path, number, f"size {shown(fields[1])}", "a whole number of bp above 0", remedy)
    return fields[0], size

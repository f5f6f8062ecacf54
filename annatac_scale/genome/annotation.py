"""TSS tables: where genes start.

A TSS table is a DataFrame, a gene a row: chrom (str), position (int64, 0-based), strand (str), gene (str) and
type (str: "protein_coding", any other kind, or "unknown").
"""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np
import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly, check_builtin
from annatac_scale.genome.rows import (
    BED_COMMENTS,
    Path,
    complaint,
    read_lines,
    read_rows,
    shown,
    whole_number,
)
from annatac_scale.progress import Progress, Silent

PROTEIN_CODING = "protein_coding"
UNKNOWN_TYPE = "unknown"

_TSS_FORMATS = "'chrom tss0 strand gene [type]' or the six columns of a BED file, separated by tabs"
_REMEDY = "give a table in one of the two forms, or a GTF file as such"


class Tss(NamedTuple):
    """A row of a TSS table."""

    chrom: str
    position: int
    strand: str
    gene: str
    type: str


def builtin_tss(assembly: str) -> pd.DataFrame:
    """The TSS table that the package ships for a built-in assembly (origin and form: data/README.md)."""
    check_builtin(assembly)
    packed = (resources.files("annatac_scale.genome") / "data" / f"{assembly}.tss.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = pd.DataFrame({name: values for name, *values in (line.split("\t") for line in lines)})
    position = table["step"].astype("int64").groupby(table["chrom"], sort=False).cumsum()
    return table.assign(position=position)[list(Tss._fields)]


def read_tss(path: Path) -> pd.DataFrame:
    """Read a TSS table: tab-separated ``chrom tss0 strand gene [type]``, with or without header, or BED6.

    Of a BED interval the TSS is ``start`` on +, ``end - 1`` on -. Raises InputError for anything else.
    """
    rows = [
        _parse_tss(path, number, fields)
        for number, fields in read_rows(path, BED_COMMENTS)
        if fields[:2] != ["chrom", "tss0"]
    ]
    return _as_table(path, rows)


def _parse_tss(path: Path, number: int, fields: list[str]) -> Tss:
    if len(fields) >= 4 and fields[2] in ("+", "-", "."):
        position = whole_number(fields[1])
        if position is not None:
            return Tss(
                fields[0], position, fields[2], fields[3], fields[4] if len(fields) > 4 else UNKNOWN_TYPE
            )
    elif len(fields) >= 6 and fields[5] in ("+", "-"):
        start, end = whole_number(fields[1]), whole_number(fields[2])
        if start is not None and end is not None and start < end:
            position = start if fields[5] == "+" else end - 1
            return Tss(fields[0], position, fields[5], fields[3], UNKNOWN_TYPE)
    raise complaint(path, number, shown("\t".join(fields)), _TSS_FORMATS, _REMEDY)


def _as_table(path: Path, rows: list[Tss]) -> pd.DataFrame:
    if not rows:
        raise InputError(
            f"{path}: found no TSS; expected at least one line; check that this is the right file"
        )
    return pd.DataFrame(rows, columns=list(Tss._fields)).astype({"position": "int64"})


@dataclass
class _Gene:
    """What the lines of a GTF file have told of one gene so far."""

    chrom: str
    strand: str
    position: int
    name: str | None = None
    type: str | None = None


def read_gtf(path: Path) -> pd.DataFrame:
    """Read the genes of a GTF file, each at its 5'-most position over all its lines, of whatever feature.

    gene is gene_name, else gene_id; type is gene_type (GENCODE), else gene_biotype (Ensembl), else "unknown".
    A gene_id on two chromosomes or strands is two genes. Raises InputError for a line that is not GTF.
    """
    genes: dict[tuple[str, str, str], _Gene] = {}
    for chrom, strand, five_prime, gene_id, attributes in _gtf_lines(path):
        gene = genes.setdefault((gene_id, chrom, strand), _Gene(chrom, strand, five_prime))
        gene.position = max(gene.position, five_prime) if strand == "-" else min(gene.position, five_prime)
        gene.name = gene.name or _attribute(attributes, "gene_name")
        gene.type = gene.type or _attribute(attributes, "gene_type") or _attribute(attributes, "gene_biotype")
    rows = [
        Tss(gene.chrom, gene.position, gene.strand, gene.name or gene_id, gene.type or UNKNOWN_TYPE)
        for (gene_id, _, _), gene in genes.items()
    ]
    return _as_table(path, rows)


def _gtf_lines(path: Path) -> Iterator[tuple[str, str, int, str, str]]:
    """Chromosome, strand, 5' position (0-based), gene_id and attributes of every line."""
    for number, line in read_lines(path):
        if line.isspace() or line.startswith("#"):
            continue
        fields = line.split("\t")
        gene_id = _attribute(fields[8], "gene_id") if len(fields) == 9 else None
        start, end = (whole_number(field) for field in fields[3:5]) if gene_id else (None, None)
        if not gene_id or not start or not end or start > end:
            raise complaint(
                path,
                number,
                shown(line.strip()),
                'the 9 columns of a GTF line with gene_id "..."',
                "give a GTF file; convert a GFF3 file to GTF first",
            )
        yield fields[0], fields[6], (end if fields[6] == "-" else start) - 1, gene_id, fields[8]


def _attribute(attributes: str, key: str) -> str | None:
    match = re.search(rf'(?:^|[;\s]){key} (?:"([^"]*)"|([^";\s]+))', attributes)
    return (match[1] or match[2]) if match else None


def place_tss(assembly: Assembly, tss: pd.DataFrame, progress: Progress | None = None) -> pd.DataFrame:
    """The rows of a TSS table on a chromosome of the assembly; the new column ``code`` has its index.

    What lies on other contigs is left out, which is said. Raises InputError where nothing is left, or where a
    TSS lies outside its chromosome.
    """
    code_of = {contig: assembly.code(contig) for contig in tss["chrom"].unique()}
    unknown = sorted(contig for contig, code in code_of.items() if code is None)
    some = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
    placed = tss[~tss["chrom"].isin(unknown)]
    if placed.empty:
        raise InputError(
            f"TSS table: found {len(tss):,} TSS, none on a contig of {assembly.name} ({some}); expected "
            f"names such as {assembly.chromosomes[0]}; check that table and assembly belong together"
        )
    if unknown:
        (progress or Silent()).say(
            f"{len(tss) - len(placed):,} of {len(tss):,} TSS lie on {len(unknown):,} contigs that "
            f"{assembly.name} does not have ({some}): left out"
        )
    placed = placed.assign(code=placed["chrom"].map(code_of).astype("int64"))
    _check_inside(assembly, placed)
    return placed


def _check_inside(assembly: Assembly, placed: pd.DataFrame) -> None:
    size = np.array(assembly.sizes, np.int64)[placed["code"]]
    outside = placed[(placed["position"] < 0) | (placed["position"] >= size)]
    for row in outside[:1].itertuples():
        raise InputError(
            f"TSS table: found {len(outside):,} TSS outside their chromosome, the first {row.gene} at "
            f"{row.chrom}:{row.position}; expected positions inside {assembly.name}; "
            "check that table and assembly belong together"
        )

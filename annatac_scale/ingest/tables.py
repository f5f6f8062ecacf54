"""Small tables that users write or other tools leave: sample sheets, tables of labels, lists of cells."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import common_name
from annatac_scale.genome.rows import Path, complaint, read_lines, shown

MISSING = ("", "NA", "NaN", "nan")
"""What stands in a table of texts for a missing value."""
_IS_CELL = re.compile("is_cell|is_((?P<genome>.*)_)?cell_barcode")
_YES, _NO = ("1", "1.0", "true"), ("0", "0.0", "false")

_Lines = Iterator[tuple[int, str]]
"""Line numbers and their text, or what is left of it."""


def read_table(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """A table with a header line, tab-separated, plain or gzip; all values as str, stripped.

    Raises InputError for a column of ``needed`` that is missing, a column twice, a line of another length, no line.
    """
    rows = [
        (number, [field.strip() for field in line.rstrip("\r\n").split("\t")])
        for number, line in read_lines(path)
        if not line.isspace()
    ]
    header = rows[0][1] if rows else []
    missing = [name for name in needed if name not in header]
    if missing or len(set(header)) < len(header) or "" in header:
        raise InputError(
            f"{path}: found the columns {shown(', '.join(header))}; expected a header line, separated by "
            f"tabs, that names each column once, with {', '.join(needed)}; mend the first line"
        )
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            raise wrong_number_of_fields(path, number, len(fields), len(header), "tabs", "mend the line")
    if len(rows) == 1:
        raise InputError(
            f"{path}: found a header line alone; expected at least one line below it; check the file"
        )
    return pd.DataFrame([fields for _, fields in rows[1:]], columns=header, dtype=object)


def wrong_number_of_fields(
    path: Path, line: int, found: int, expected: int, separators: str, remedy: str
) -> InputError:
    """The error for a row of another length than the header; separators: as "tabs"."""
    return complaint(
        path, line, f"{found} fields", f"{expected}, as the header has, separated by {separators}", remedy
    )


def typed(column: pd.Series) -> pd.Series:
    """A column of texts as integers or floats where every value is such a number, else as a categorical of texts.

    The texts "", NA, NaN and nan are missing values. Numbers that would not be written back alike, such as the donor
    "01", stay texts.
    """
    present = column[~column.isin(MISSING)]
    numbers = pd.to_numeric(present, errors="coerce")
    padded = present.str.fullmatch(r"[+-]?0[0-9]+.*") | present.str.startswith("+")
    if len(present) and numbers.notna().all() and not padded.any():
        return numbers.reindex(column.index)
    return column.where(~column.isin(MISSING)).astype("category")


def read_barcodes(path: Path, assembly: str | None = None) -> tuple[str, ...]:
    """The cells that a list or a table of Cell Ranger names, in the file's order; plain or gzip, told by its header.

    A list has a barcode a line, in its first column, such as the ``barcodes.tsv`` of a filtered matrix; a header
    ``barcode`` is left out. A table has a header with ``barcode`` and a column that is 1 for cells: Cell Ranger ATAC's
    ``singlecell.csv`` (is__cell_barcode, or one is_GENOME_cell_barcode a genome: that of ``assembly`` counts) or Cell
    Ranger ARC's ``per_barcode_metrics.csv`` (is_cell; its fragments carry ``barcode``, not ``atac_barcode``).

    Raises InputError for a barcode that comes twice, a line of another length, a value that is neither 1 nor 0, a table
    that does not tell the cells of ``assembly``, and for no cell at all.

    Source: 10x Genomics, support.10xgenomics.com/single-cell-atac/software/pipelines/latest/output/singlecell
    and support.10xgenomics.com/single-cell-multiome-atac-gex/software/pipelines/latest/output/per_barcode_metrics
    """
    lines = ((number, line.rstrip("\r\n")) for number, line in read_lines(path) if not line.isspace())
    first = next(lines, (0, ""))
    table = _CellTable.of(path, first[1], assembly)
    line_of: dict[str, int] = {}
    for number, barcode in table.cells(lines) if table else _listed(chain([first], lines)):
        if line_of.setdefault(barcode, number) != number:
            raise complaint(
                path,
                number,
                f"barcode {shown(barcode)} of line {line_of[barcode]} again",
                "each barcode once",
                "remove one of the two lines",
            )
    if not line_of:
        found = f"no 1 in column {table.header[table.tells]}" if table else "no barcode"
        expected = "a cell" if table else "one a line"
        raise InputError(f"{path}: found {found}; expected {expected}; check the file")
    return tuple(line_of)


def _listed(lines: _Lines) -> _Lines:
    """Line numbers and barcodes of a list."""
    cells = ((number, line.split("\t", 1)[0]) for number, line in lines)
    cells = ((number, barcode) for number, barcode in cells if barcode.strip())
    number, barcode = next(cells, (0, "barcode"))
    if barcode.lower() != "barcode":
        yield number, barcode
    yield from cells


@dataclass(frozen=True)
class _CellTable:
    """A table that tells which barcodes are cells: its columns, and which two of them say so."""

    path: Path
    header: list[str]
    delimiter: str
    barcode: int
    tells: int

    @classmethod
    def of(cls, path: Path, line: str, assembly: str | None) -> "_CellTable | None":
        """The table that ``line`` is the header of; None where it begins a list."""
        delimiter = "," if "," in line else "\t"
        header = _fields(line, delimiter)
        names = [name.lower() for name in header]
        if "barcode" not in names or not (delimiter == "," or any(map(_IS_CELL.fullmatch, header))):
            return None
        tells = _column_of_cells(path, header, assembly)
        return cls(path, header, delimiter, names.index("barcode"), header.index(tells))

    def cells(self, lines: _Lines) -> _Lines:
        """Line numbers and barcodes of the cells. NO_BARCODE, all reads without a barcode, is none: it holds 0."""
        for number, line in lines:
            fields = _fields(line, self.delimiter)
            value = fields[self.tells].lower() if len(fields) == len(self.header) else None
            if value in _YES:
                yield number, fields[self.barcode]
            elif value not in _NO:
                raise self._complaint(number, fields)

    def _complaint(self, number: int, fields: list[str]) -> InputError:
        if len(fields) != len(self.header):
            found, expected = f"{len(fields)} fields", f"{len(self.header)}, as the header has"
        else:
            found, expected = f"{shown(fields[self.tells])} in column {self.header[self.tells]}", "1 or 0"
        return complaint(self.path, number, found, expected, "mend the line, or copy the file again")


def _fields(line: str, delimiter: str) -> list[str]:
    # Splitting is several times faster than the csv module, which only quotes need.
    return next(csv.reader([line], delimiter=delimiter)) if '"' in line else line.split(delimiter)


def _column_of_cells(path: Path, header: list[str], assembly: str | None) -> str:
    """The column that tells the cells of an assembly. Raises InputError where none does, or it is not known which."""
    genome_of = {name: found["genome"] for name in header if (found := _IS_CELL.fullmatch(name))}
    asked = None if assembly is None else common_name(assembly)
    fitting = [n for n, genome in genome_of.items() if not genome or asked in (None, common_name(genome))]
    if len(fitting) == 1:
        return fitting[0]
    if not genome_of:
        raise InputError(
            f"{path}: found a table of barcodes with the columns {shown(', '.join(header))}; expected "
            "is__cell_barcode or is_cell among them, as Cell Ranger writes; give such a table, or a list of the cells"
        )
    raise InputError(
        f"{path}: found the cells of several genomes or of another, in the columns {', '.join(genome_of)}; expected "
        f"one for {assembly or 'the assembly'}; give the assembly as it is called there, or a list of the cells"
    )


def some(names: list[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")

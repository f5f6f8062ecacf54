"""Small tab-separated tables that users write: sample sheets, tables of labels, lists of barcodes."""

import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path, complaint, read_lines, shown

_MISSING = ("", "NA", "NaN", "nan")


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
            raise complaint(
                path,
                number,
                f"{len(fields)} fields",
                f"{len(header)}, as the header has, separated by tabs",
                "mend the line",
            )
    if len(rows) == 1:
        raise InputError(
            f"{path}: found a header line alone; expected at least one line below it; check the file"
        )
    return pd.DataFrame([fields for _, fields in rows[1:]], columns=header, dtype=object)


def typed(column: pd.Series) -> pd.Series:
    """A column of texts as integers or floats where every value is such a number, else as a categorical of texts.

    The texts "", NA, NaN and nan are missing values. Numbers that would not be written back alike, such as the donor
    "01", stay texts.
    """
    present = column[~column.isin(_MISSING)]
    numbers = pd.to_numeric(present, errors="coerce")
    padded = present.str.fullmatch(r"[+-]?0[0-9]+.*") | present.str.startswith("+")
    if len(present) and numbers.notna().all() and not padded.any():
        return numbers.reindex(column.index)
    return column.where(~column.isin(_MISSING)).astype("category")


def read_barcodes(path: Path) -> tuple[str, ...]:
    """The barcodes of a list, in its order: the first column of a plain or gzip text, a header ``barcode`` left out.

    Raises InputError for a barcode that comes twice, and for none at all.
    """
    line_of: dict[str, int] = {}
    for number, line in read_lines(path):
        barcode = line.rstrip("\r\n").split("\t")[0]
        if not barcode.strip() or (not line_of and barcode.lower() == "barcode"):
            continue
        if barcode in line_of:
            raise complaint(
                path,
                number,
                f"barcode {shown(barcode)} of line {line_of[barcode]} again",
                "each barcode once",
                "remove one of the two lines",
            )
        line_of[barcode] = number
    if not line_of:
        raise InputError(f"{path}: found no barcode; expected one a line; check the file")
    return tuple(line_of)


def some(names: list[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(shown(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")

"""Rows of the small text tables that describe a genome: chrom.sizes, TSS tables, BED and GTF files."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator

from annatac_scale.errors import InputError

Path = str | os.PathLike[str]

BED_COMMENTS = ("#", "track ", "browser ")


def read_rows(path: Path, comments: tuple[str, ...] = ("#",)) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and stripped fields of every line that is neither blank nor a comment.

    Fields are split at tabs, in a line without tabs at any white space. The file may be gzip or BGZF (told by
    its first bytes, not its name) and may end its lines with CRLF. Raises InputError where it cannot be read.
    """
    for number, line in read_lines(path):
        if line.isspace() or line.startswith(comments):
            continue
        yield number, [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and text of every line of a plain or gzip file; InputError if it is unreadable."""
    number = 0
    try:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            for number, line in enumerate(text, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}, after line {number}: found damaged or cut gzip data ({error}); "
            "expected a whole gzip file; copy the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, after line {number}: found bytes that are not UTF-8; "
            "expected a plain or gzip text file; check that this is the right file"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")


def whole_number(text: str) -> int | None:
    """The number written in ``text`` with 1 to 18 digits 0-9, else None (int() would take ``1_000`` too)."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def complaint(path: Path, number: int, found: str, expected: str, remedy: str) -> InputError:
    """The error to raise for a bad line: file, line, found, expected, what to do, in one line."""
    return InputError(f"{path}, line {number}: found {found}; expected {expected}; {remedy}")


def shown(text: str) -> str:
    """``text`` quoted for a message, on one line and not endless."""
    return repr(text if len(text) <= 60 else text[:57] + "...")

"""Matrix Market files of counts, plain or gzip: parsed by a kernel that releases the GIL, a bufferful at a time.

The format: a banner, comments (%), a line ``rows columns entries``, then a line ``row column value`` for each entry, in
any order, rows and columns counted from 1; ``pattern`` files leave the value out, which is 1. Blank lines, comments
between the entries, CRLF and several blanks between the numbers are taken; entries that come twice add up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import complaint, shown, whole_number
from annatac_scale.ingest.bgzf import GZIP, BrokenTextError, Bytes, inflate
from annatac_scale.ingest.text import cut_off, whole_lines
from annatac_scale.ingest.transpose import Entries, Fill
from annatac_scale.store.compiled import compiled
from annatac_scale.store.place import Location, blob_of

_TEXT_BYTES = 1 << 20
_FIELDS = ("integer", "real", "pattern")
_REMEDY = "copy the file again, or write it anew"

_DONE, _FULL, _NO_NUMBERS, _ROW, _COLUMN, _TOO_MANY, _VALUE = range(7)

_MAX_DIGITS = 18
_MAX_COUNT = 2**31 - 1
_TAB, _NEWLINE, _RETURN, _SPACE, _PERCENT, _PLUS, _DOT, _ZERO = 9, 10, 13, 32, 37, 43, 46, 48

BadValue = Callable[[float, int, int, str], InputError]
"""(value, row, column, place in words) -> the error for a value that is no count."""


@dataclass(frozen=True)
class Market:
    """A Matrix Market file and what its head says; n_lines: of the head."""

    path: Location
    n_rows: int
    n_columns: int
    n_entries: int
    is_pattern: bool
    n_lines: int


def read_market(path: Location) -> Market:
    """Read the head of a Matrix Market file.

    Raises InputError for anything but a coordinate, general matrix of integer, real or pattern, naming what it is.
    """
    banner: list[str] | None = None
    number = 0
    try:
        for text in texts(path):
            for raw in text.split(b"\n")[:-1]:
                line = raw.decode("utf-8-sig", "replace").rstrip("\r")
                number += 1
                if banner is None:
                    banner = _banner(path, line)
                elif line.strip() and not line.lstrip().startswith("%"):
                    sizes = [whole_number(field) for field in line.split()]
                    if len(sizes) != 3 or None in sizes:
                        raise complaint(path, number, shown(line), "'rows columns entries'", _REMEDY)
                    n_rows, n_columns, n_entries = (size or 0 for size in sizes)
                    return Market(path, n_rows, n_columns, n_entries, "pattern" in banner, number)
    except BrokenTextError as error:
        raise cut_off(path, number, error) from error
    raise InputError(
        f"{path}, after line {number}: found the end of the file; expected a Matrix Market file with a line "
        f"'rows columns entries'; {_REMEDY}"
    )


def _banner(path: Location, line: str) -> list[str]:
    words = line.lower().split()
    if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"]:
        raise complaint(
            path, 1, shown(line), "'%%MatrixMarket matrix coordinate integer general' or alike", _REMEDY
        )
    if words[2] != "coordinate" or words[3] not in _FIELDS or words[4] != "general":
        raise complaint(
            path,
            1,
            f"a matrix that is {' '.join(words[2:])}",
            f"coordinate, one of {', '.join(_FIELDS)}, and general",
            "write all counts as a sparse matrix",
        )
    return words


def market_entries(market: Market, column_of_row: NDArray[np.int32] | None, bad_value: BadValue) -> Fill:
    """The entries of a file of peaks x cells, in its order; cells are the rows of what is given.

    column_of_row: int32 [n_rows], the number of each peak, -1 for rows that are none, which are left out; None: all are
    bad_value: makes the error for a peak's value that is no count

    While filling, raises InputError, naming file and line, for lines that are not three numbers, numbers out of range
    and values that are no counts, and for another number of entries than the head says.
    """
    numbers = np.arange(market.n_rows, dtype=np.int32) if column_of_row is None else column_of_row

    def fill(entries: Entries) -> Iterator[int]:
        reader = _Reader(market, numbers, bad_value)
        n = 0
        try:
            for text in texts(market.path):
                at, array = 0, np.frombuffer(text, np.uint8)
                while (place := reader.parse(array, at, entries, n)) is not None:
                    at, n = place
                    if n == len(entries.rows):
                        yield n
                        n = 0
                n = reader.n_filled
        except BrokenTextError as error:
            raise cut_off(market.path, int(reader.state[_LINES]), error) from error
        reader.check_end()
        if n:
            yield n

    return fill


_LINES, _SEEN, _FILLED, _BAD_ROW, _BAD_COLUMN = range(5)


class _Reader:
    """Parses the text of a file; state: lines, entries seen, entries in the buffer, row and column of a bad value."""

    def __init__(self, market: Market, numbers: NDArray[np.int32], bad_value: BadValue) -> None:
        self.market = market
        self.numbers = numbers
        self.bad_value = bad_value
        self.state = np.zeros(5, np.int64)

    @property
    def n_filled(self) -> int:
        """Entries in the buffer."""
        return int(self.state[_FILLED])

    def parse(
        self, text: NDArray[np.uint8], at: int, entries: Entries, n_filled: int
    ) -> tuple[int, int] | None:
        """Parse on from ``at`` until the buffer is full: (where that was, its entries); None at the text's end."""
        market = self.market
        self.state[_FILLED] = n_filled
        at, status = _parse(
            text, at, market.n_lines, market.n_columns, market.n_entries, market.is_pattern, self.numbers, entries,
            self.state,
        )  # fmt: skip
        if status == _FULL:
            return at, self.n_filled
        if status != _DONE:
            self._refuse(text, at, status)
        return None

    def _refuse(self, text: NDArray[np.uint8], at: int, status: int) -> NoReturn:
        """Raise the error for the line that begins at ``at``."""
        market, number = self.market, int(self.state[_LINES]) + 1
        line = text[at : at + 200].tobytes().split(b"\n")[0].decode(errors="replace").rstrip("\r")
        row, column = int(self.state[_BAD_ROW]), int(self.state[_BAD_COLUMN])
        if status == _VALUE:
            raise self.bad_value(float(line.split()[2]), row, column, f", line {number}")
        what = "two numbers 'row column'" if market.is_pattern else "three numbers 'row column value'"
        expected = {
            _NO_NUMBERS: what,
            _ROW: f"a row of 1 to {market.n_rows:,}",
            _COLUMN: f"a column of 1 to {market.n_columns:,}",
            _TOO_MANY: f"no more than the {market.n_entries:,} entries that line {market.n_lines} tells",
        }[status]
        raise complaint(market.path, number, shown(line), expected, _REMEDY)

    def check_end(self) -> None:
        """Raise InputError unless there were as many entries as the head tells."""
        n, market = int(self.state[_SEEN]), self.market
        if n != market.n_entries:
            raise InputError(
                f"{market.path}, after line {self.state[_LINES]}: found the end of the file after {n:,} entries; "
                f"expected {market.n_entries:,}, as line {market.n_lines} tells; {_REMEDY}"
            )


def texts(path: Location) -> Iterator[bytes]:
    """The file's text in buffers of whole lines. Raises BrokenTextError."""
    source = Bytes(blob_of(path), 0, lambda place, piece: None)
    zipped = source.hold(2) and source.data.startswith(GZIP)
    pieces = inflate(source) if zipped else _plain(source)
    return whole_lines(pieces, iter(()), True, _TEXT_BYTES)


def _plain(source: Bytes) -> Iterator[bytes]:
    while source.hold(1):
        yield source.take()


@compiled
def _is_blank(byte):  # type: ignore[no-untyped-def]
    return byte in (_SPACE, _TAB, _RETURN)


@compiled
def _skip_blanks(text, at):  # type: ignore[no-untyped-def]
    while _is_blank(text[at]):
        at += 1
    return at


@compiled
def _number(text, at):  # type: ignore[no-untyped-def]
    """The number in digits at ``at`` and where it ends; -1 where there is none, or none that ends at a blank."""
    start, number = at, np.int64(0)
    while _ZERO <= text[at] <= _ZERO + 9:
        number = 10 * number + (np.int64(text[at]) - _ZERO)
        at += 1
    if at == start or at - start > _MAX_DIGITS or not (_is_blank(text[at]) or text[at] == _NEWLINE):
        return np.int64(-1), at
    return number, at


@compiled
def _count(text, at):  # type: ignore[no-untyped-def]
    """The count written as any decimal number, and where it ends; -1 for another number or none, -2 for no number.

    ``3``, ``+3.0`` and ``30e-1`` are 3. Zeros wait until a digit follows: they may be those behind the point.
    """
    start = at
    negative = text[at] == _PLUS + 2
    if negative or text[at] == _PLUS:
        at += 1
    number, waiting, n_digits, scale, behind = np.int64(0), 0, 0, 0, 0
    while _ZERO <= text[at] <= _ZERO + 9 or (text[at] == _DOT and not behind):
        if text[at] == _DOT:
            behind = 1
        else:
            n_digits += 1
            scale -= behind
            if text[at] == _ZERO:
                waiting += 1
            else:
                for _ in range(min(waiting, _MAX_DIGITS) + 1 if number > 0 else 1):
                    number = min(10 * number, 1 << 59)
                number += np.int64(text[at]) - _ZERO
                waiting = 0
        at += 1
    scale += waiting
    power, sign = 0, 1
    if (text[at] | 32) == 101 and n_digits > 0:
        at += 1
        if text[at] == _PLUS or text[at] == _PLUS + 2:
            sign = -1 if text[at] == _PLUS + 2 else 1
            at += 1
        first = at
        while _ZERO <= text[at] <= _ZERO + 9:
            power = min(10 * power + (np.int64(text[at]) - _ZERO), 9999)
            at += 1
        if at == first:
            return np.int64(-2), at
    if n_digits == 0 or not (_is_blank(text[at]) or text[at] == _NEWLINE):
        return _word(text, start)
    scale += sign * power
    if number == 0:
        return np.int64(0), at
    if negative or scale < 0:
        return np.int64(-1), at
    for _ in range(min(scale, _MAX_DIGITS)):
        number = min(10 * number, 1 << 59)
    return (number if number <= _MAX_COUNT else np.int64(-1)), at


@compiled
def _word(text, at):  # type: ignore[no-untyped-def]
    """-1 for nan, inf and infinity, -2 for all else; and where it ends."""
    end = at
    while text[end] > _SPACE:
        end += 1
    if text[at] == _PLUS or text[at] == _PLUS + 2:
        at += 1
    if end - at == 3 or end - at == 8:
        a, b, c = text[at] | 32, text[at + 1] | 32, text[at + 2] | 32
        is_nan = a == 110 and b == 97 and c == 110
        is_infinite = a == 105 and b == 110 and c == 102
        if is_infinite or (is_nan and end - at == 3):
            return np.int64(-1), end
    return np.int64(-2), end


@compiled
def _parse(text, at, n_head, n_columns, n_entries, is_pattern, numbers, entries, state):  # type: ignore[no-untyped-def]
    """Write the entries of the lines of ``text`` (whole lines) from ``at`` on; returns (where it stopped, why)."""
    rows, peaks, counts = entries.rows, entries.peaks, entries.counts
    lines, seen, n = state[_LINES], state[_SEEN], state[_FILLED]
    status = _DONE
    while at < len(text):
        i = _skip_blanks(text, at)
        if lines < n_head or text[i] == _NEWLINE or text[i] == _PERCENT:
            while text[i] != _NEWLINE:
                i += 1
            at = i + 1
            lines += 1
            continue
        if n == len(rows):
            status = _FULL
            break
        row, i = _number(text, i)
        column, i = _number(text, _skip_blanks(text, i))
        value, i = np.int64(1), _skip_blanks(text, i)
        if row >= 0 and column >= 0 and not is_pattern:
            value, i = _count(text, i)
            i = _skip_blanks(text, i)
        if row < 0 or column < 0 or value == -2 or text[i] != _NEWLINE:
            status = _NO_NUMBERS
        elif seen == n_entries:
            status = _TOO_MANY
        elif row == 0 or row > len(numbers):
            status = _ROW
        elif column == 0 or column > n_columns:
            status = _COLUMN
        elif value < 0 and numbers[row - 1] >= 0:
            status = _VALUE
            state[_BAD_ROW], state[_BAD_COLUMN] = numbers[row - 1], column - 1
        if status != _DONE:
            break
        if numbers[row - 1] >= 0:
            rows[n], peaks[n], counts[n] = column - 1, numbers[row - 1], value
            n += 1
        seen += 1
        lines += 1
        at = i + 1
    state[_LINES], state[_SEEN], state[_FILLED] = lines, seen, n
    return at, status

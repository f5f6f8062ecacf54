"""Tables of two columns about labels, as people write them: a label map, a hierarchy."""

import csv
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import complaint, read_lines, shown
from annatac_scale.model.labels import label_text
from annatac_scale.store.place import Location, on_disk

_NAMED = 10
"""Most names in one message."""


def read_pairs(location: Location, option: str, header: tuple[str, str]) -> list[tuple[int, str, str]]:
    """Line numbers and the two labels of each row, as ``label_text`` has them: "" where a field is empty or missing.

    location: on a disk; separated by tabs, or by commas where the first line has no tab; fields may stand in double
    quotes; plain or gzip; blank lines are left out
    option: that named the file; header: names of the columns, which the first line may hold

    Raises InputError for a URL, for a file that cannot be read, a row that has not two fields, and for no row.
    """
    path = on_disk(location, option)
    lines = [line for _, line in read_lines(path)]
    first = next((line for line in lines if not line.isspace()), "")
    rows = [
        (number, label_text(left), label_text(right))
        for number, (left, right) in _rows(path, lines, "\t" if "\t" in first else ",", header)
    ]
    if rows and (rows[0][1].lower(), rows[0][2].lower()) == header:
        del rows[0]
    if not rows:
        raise InputError(
            f"{path}: found no row; expected two columns, {' and '.join(header)}; check {option} and the file"
        )
    return rows


def _rows(
    path: Path, lines: list[str], delimiter: str, header: tuple[str, str]
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if not any(map(str.strip, fields)):
                continue
            if len(fields) != len(header):
                raise complaint(
                    path,
                    reader.line_num,
                    f"{len(fields)} fields",
                    f"two, {' and '.join(header)}, separated by tabs, or all by commas",
                    "mend the line, or put a name that holds a comma in double quotes",
                )
            yield reader.line_num, fields
    except csv.Error as error:
        raise complaint(
            path, reader.line_num, f"quotes that do not fit ({error})", "pairs of them", "mend the line"
        ) from error


def near_misses(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Unknown names for a message, each with the known one that is most like it."""
    names, candidates = sorted(unknown), {name.casefold(): name for name in known}
    told = []
    for name in names[:_NAMED]:
        near = difflib.get_close_matches(name.casefold(), candidates, 1)
        told.append(shown(name) + (f" (did you mean {shown(candidates[near[0]])}?)" if near else ""))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(told) + more

"""Matrix Market files: every spelling of counts is read as scipy reads it, all else is refused by its line."""

import gzip
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from compressed_files import FORMS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix_files import BARCODES, PEAKS, names, some_counts, write_10x_mtx
from scipy import sparse
from scipy.io import mmread

from annatac_scale.errors import InputError
from annatac_scale.ingest import market
from annatac_scale.ingest.market import market_entries, read_market
from annatac_scale.ingest.tenx import n_cells_10x_mtx, open_10x_mtx
from annatac_scale.ingest.transpose import Entries

HEAD = "%%MatrixMarket matrix coordinate integer general\n"
TAKEN = ["plain", "gzip", "many members", "bgzf"]
Triple = tuple[int, int, int]


class BadValueError(Exception):
    """Stands for the error that a matrix makes of a value."""


def bad_value(value: float, row: int, column: int, where: str) -> InputError:
    raise BadValueError(value, row, column, where)


def entries_of(path: Path, room: int = 1000, numbers: list[int] | None = None) -> list[Triple]:
    """(row, column, value) of the file, counted from 0, in its order."""
    buffer = Entries(*(np.empty(room, np.int32) for _ in range(3)))
    found: list[Triple] = []
    peaks = None if numbers is None else np.array(numbers, np.int32)
    for n in market_entries(read_market(path), peaks, bad_value)(buffer):
        cells, rows, counts = (array[:n].tolist() for array in buffer)
        found += zip(rows, cells, counts, strict=True)
    return found


def written(path: Path, lines: list[str], head: str = HEAD, shape: str = "9 8", n: int | None = None) -> Path:
    n = len(lines) if n is None else n
    path.write_text(f"{head}{shape} {n}\n" + "".join(f"{line}\n" for line in lines))
    return path


BLANKS = st.sampled_from([" ", "  ", "\t", " \t "])
ENDS = st.sampled_from(["\n", "\r\n", " \n", "\t\r\n"])
BETWEEN = st.sampled_from(["", "", "", "\n", " \n", "% 1 1 1\n", "%\r\n", "\r\n"])


def spelled(value: int) -> st.SearchStrategy[str]:
    v = value
    return st.sampled_from([f"{v}", f"+{v}", f"{v}.", f"{v}.000", f"{v:.3e}", f"00{v}", f"{v}00e-2"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), room=st.integers(1, 12), form=st.sampled_from(TAKEN))
def test_any_spelling_gives_the_entries_in_order(
    tmp_path: Path, data: st.DataObject, room: int, form: str
) -> None:
    triples = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 999))))
    text = [HEAD, data.draw(BETWEEN), f"9 8 {len(triples)}\n"]
    for row, column, value in triples:
        a, b = data.draw(BLANKS), data.draw(BLANKS)
        text += [data.draw(BETWEEN), data.draw(st.sampled_from(["", " ", "\t"]))]
        text += [f"{row}{a}{column}{b}{data.draw(spelled(value))}", data.draw(ENDS)]
    whole = "".join(text)
    if data.draw(st.booleans()):
        whole = whole.removesuffix("\n")
    (tmp_path / "m.mtx").write_bytes(FORMS[form](whole.encode()))
    assert entries_of(tmp_path / "m.mtx", room) == [(r - 1, c - 1, v) for r, c, v in triples]


def test_lines_may_be_cut_anywhere_by_the_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i % 9 + 1} {i % 8 + 1} {i}" for i in range(400)]
    path = written(tmp_path / "m.mtx", lines)
    expected = [(i % 9, i % 8, i) for i in range(400)]
    for form in TAKEN:
        (tmp_path / "packed").write_bytes(FORMS[form](path.read_bytes()))
        for n_bytes in (1, 7, 50, 1000):
            monkeypatch.setattr(market, "_TEXT_BYTES", n_bytes)
            assert entries_of(tmp_path / "packed", room=33) == expected


NUMBERS = st.from_regex(
    r"[+-]?([0-9]{1,25}(\.[0-9]{0,25})?|\.[0-9]{1,25})([eE][+-]?[0-9]{1,2})?", fullmatch=True
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NUMBERS)
def test_a_number_is_a_count_if_it_is_whole_and_fits(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "m.mtx", [f"1 1 {text}"])
    exact = Decimal(text)
    if exact == exact.to_integral_value() and 0 <= exact <= 2**31 - 1:
        assert entries_of(path) == [(0, 0, int(exact))]
    else:
        with pytest.raises(BadValueError) as caught:
            entries_of(path)
        assert caught.value.args == (float(text), 0, 0, ", line 3")


@pytest.mark.parametrize(
    "value", ["nan", "NaN", "-nan", "inf", "-Inf", "Infinity", "0.5", "-1", "2147483648", "1e99"]
)
def test_what_is_no_count_is_given_with_its_line(tmp_path: Path, value: str) -> None:
    path = written(tmp_path / "m.mtx", ["1 1 5", "", "3 2 " + value, "1 1 1"], n=3)
    with pytest.raises(BadValueError) as caught:
        entries_of(path)
    assert str(caught.value.args) == str((float(value), 2, 1, ", line 5"))
    # Rows that are no peaks may hold what they like.
    assert entries_of(path, numbers=[0, -1, -1, *range(1, 7)]) == [(0, 0, 5), (0, 0, 1)]


BAD_LINES = {
    "1 1": "three numbers 'row column value'",
    "1 1 x": "three numbers",
    "1 1 1 1": "three numbers",
    "1 1 1e": "three numbers",
    "1 1 1.2.3": "three numbers",
    "1 1 nano": "three numbers",
    "1 1 -": "three numbers",
    "1 1 .": "three numbers",
    "1,1,1": "three numbers",
    "-1 1 1": "three numbers",
    "1.0 1 1": "three numbers",
    "x": "three numbers",
    "9999999999999999999 1 1": "three numbers",
    "0 1 1": "a row of 1 to 9",
    "10 1 1": "a row of 1 to 9",
    "1 0 1": "a column of 1 to 8",
    "1 9 1": "a column of 1 to 8",
    "4294967297 1 1": "a row of 1 to 9",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_entry_is_refused_with_its_number(tmp_path: Path, line: str, zipped: bool) -> None:
    path = written(tmp_path / "m.mtx", ["1 1 1", "% said", line, "2 2 2"], n=3)
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    message = rf"m\.mtx, line 5: found {re.escape(repr(line))}; expected {BAD_LINES[line]}"
    with pytest.raises(InputError, match=message):
        entries_of(path)


def test_too_few_and_too_many_entries_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.mtx", ["1 1 1", "2 2 2", ""], n=3)
    with pytest.raises(
        InputError, match=r"after line 5: found the end .* after 2 entries; expected 3, as line 2"
    ):
        entries_of(path)
    path = written(tmp_path / "m.mtx", ["1 1 1", "2 2 2", "3 3 3"], n=2)
    with pytest.raises(
        InputError, match=r"line 5: found '3 3 3'; expected no more than the 2 entries that line 2"
    ):
        entries_of(path)


def test_a_pattern_counts_one_for_each_entry(tmp_path: Path) -> None:
    head = "%%MatrixMarket matrix coordinate pattern general\n"
    assert entries_of(written(tmp_path / "m.mtx", ["1 1", "9 8"], head)) == [(0, 0, 1), (8, 7, 1)]
    with pytest.raises(InputError, match="line 3: found '1 1 1'; expected two numbers 'row column'"):
        entries_of(written(tmp_path / "m.mtx", ["1 1 1"], head))


@pytest.mark.parametrize(
    ("banner", "found"),
    [
        ("%%MatrixMarket matrix array integer general", "a matrix that is array integer general"),
        ("%%MatrixMarket matrix coordinate complex general", "a matrix that is coordinate complex general"),
        ("%%MatrixMarket matrix coordinate integer symmetric", "a matrix that is coordinate integer symmetric"),
        ("%%MatrixMarket matrix coordinate real skew-symmetric", "a matrix that is coordinate real skew-"),
        ("%%MatrixMarket matrix coordinate real hermitian", "a matrix that is coordinate real hermitian"),
        ("%%MatrixMarket vector coordinate real general", "'%%MatrixMarket vector"),
        ("9 8 1", "'9 8 1'"),
    ],
)  # fmt: skip
def test_other_matrices_are_refused_by_name(tmp_path: Path, banner: str, found: str) -> None:
    path = written(tmp_path / "m.mtx", ["1 1 1"], banner + "\n")
    with pytest.raises(InputError, match=f"line 1: found {re.escape(found)}"):
        read_market(path)


def test_the_banner_may_be_in_any_case_and_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.mtx", ["1 1 1"], "\ufeff%%matrixMARKET Matrix Coordinate REAL General\r\n%\n\n"
    )
    assert entries_of(path) == [(0, 0, 1)]


@pytest.mark.parametrize(
    "text", ["", HEAD, HEAD + "% said\n", HEAD + "9 8", HEAD + "9 8 x\n", HEAD + "1 1 1 1\n"]
)
def test_a_head_that_is_not_whole_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.mtx").write_text(text)
    with pytest.raises(InputError, match=r"m\.mtx, (after )?line \d: found .* 'rows columns entries'"):
        read_market(tmp_path / "m.mtx")


@pytest.mark.parametrize("cut", [1, 9, 200, 2000])
@pytest.mark.parametrize("form", ["gzip", "bgzf"])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, form: str, cut: int) -> None:
    path = written(tmp_path / "m.mtx.gz", [f"{i % 9 + 1} {i % 8 + 1} {i * 7919 % 1000}" for i in range(5000)])
    path.write_bytes(FORMS[form](path.read_bytes())[:-cut])
    with pytest.raises(InputError, match=r"m\.mtx\.gz, after line \d+: found the end of the file"):
        entries_of(path)


def test_entries_that_come_twice_add_up_as_in_scipy(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    triples = rng.integers(1, [10, 9, 5], (300, 3))
    path = written(tmp_path / "m.mtx", [" ".join(map(str, triple)) for triple in triples])
    sums: Counter[tuple[int, int]] = Counter()
    for row, column, value in entries_of(path):
        sums[row, column] += value
    expected = sparse.coo_matrix(mmread(path)).toarray()
    assert [[sums[r, c] for c in range(8)] for r in range(9)] == expected.tolist()


def folder_of(path: Path, matrix: sparse.csr_matrix, change: Callable[[list[str]], object] = list) -> Path:
    bed = ["\t".join(map(str, peak)) for peak in PEAKS]
    folder = write_10x_mtx(path, matrix, "peaks.bed", bed, zipped=False)
    lines = (folder / "matrix.mtx").read_text().splitlines()
    change(lines)
    (folder / "matrix.mtx").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize("order", ["by cells", "by peaks", "shuffled"])
def test_a_folder_may_have_its_entries_in_any_order(tmp_path: Path, order: str) -> None:
    counts = some_counts()

    def change(lines: list[str]) -> None:
        body = lines[3:]
        keys: dict[str, Callable[[str], object]] = {
            "by cells": lambda line: [int(number) for number in line.split()][1::-1],
            "by peaks": lambda line: [int(number) for number in line.split()],
            "shuffled": lambda line: hash((line, 5)),
        }
        lines[3:] = sorted(body, key=keys[order])  # type: ignore[arg-type]

    folder = folder_of(tmp_path / "m", counts, change)
    assert n_cells_10x_mtx(folder) == 30
    assert open_10x_mtx(folder).counts(np.arange(30)).toarray().tolist() == counts.toarray().tolist()


def test_a_value_of_a_folder_is_refused_by_line_barcode_and_peak(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", some_counts(), lambda lines: lines.insert(3, "5 8 0.693"))
    text = (folder / "matrix.mtx").read_text().replace("33 30 297", "33 30 298").replace("integer", "real")
    (folder / "matrix.mtx").write_text(text)
    message = (
        rf"found 0\.693 in matrix\.mtx, line 4 for barcode '{BARCODES[7]}', peak {names(PEAKS)[4]}, which looks "
        "normalised or log-transformed; expected counts"
    )
    with pytest.raises(InputError, match=message):
        open_10x_mtx(folder).prepare()

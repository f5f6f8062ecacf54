"""Tables of two columns: what is read, and what is refused in which line."""

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.model.labels import label_text
from annatac_scale.model.pairs import near_misses, read_pairs

HEADER = ("from", "to")


def pairs_of(path: Path) -> list[tuple[int, str, str]]:
    return read_pairs(path, "--label-map", HEADER)


@pytest.mark.parametrize(
    "text",
    [
        "from\tto\nT cell\tT\n\n B,cell \tB\ndoublet\t\n",
        "T cell\tT\n\n\nB,cell\tB\ndoublet\tNA\n",
        '\ufeffFrom,To\r\nT cell,T\r\n,\r\n"B,cell",B\r\ndoublet,\r\n',
        'T cell\tT\n"B,cell"\tB\n \t \ndoublet\t""\n',
    ],
    ids=["tabs and header", "no header", "commas of a spreadsheet", "quotes"],
)
def test_tables_of_all_forms_say_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "map").write_bytes(text.encode())
    (tmp_path / "map.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("map", "map.gz"):
        rows = [row[1:] for row in pairs_of(tmp_path / name)]
        assert rows == [("T cell", "T"), ("B,cell", "B"), ("doublet", "")]


FIELDS = st.text(st.sampled_from("ab\t,\" é細\n'|"), min_size=1, max_size=5).filter(lambda text: text.strip())


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8), st.sampled_from(["\t", ","]))
def test_what_a_spreadsheet_writes_is_read(
    tmp_path_factory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("pairs") / "map"
    with path.open("w", newline="") as file:
        # A header that has tabs in all tables of tabs, and none in those of commas.
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([HEADER, *rows])
    expected = [(label_text(left), label_text(right)) for left, right in rows]
    assert [row[1:] for row in pairs_of(path)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from\tto\na\tb\nc\n", r"map, line 3: found 1 fields; expected two, from and to"),
        ("a,b\nc,d,e\n", r"map, line 2: found 3 fields; .*put a name that holds a comma in double quotes"),
        ("a b\n", r"map, line 1: found 1 fields"),
        ("from\tto\n", r"map: found no row; expected two columns, from and to; check --label-map"),
        ("\n \n", r"map: found no row"),
        ('a\tb\n"c\td\n', r"map, line 2: found quotes that do not fit"),
    ],
    ids=["short", "long", "one", "header", "empty", "quotes"],
)
def test_what_is_no_table_of_two_columns_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(InputError, match=message):
        pairs_of(tmp_path / "map")


def test_a_file_that_is_not_there_and_a_url_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: cannot be read"):
        pairs_of(tmp_path / "none")
    with pytest.raises(InputError, match="--label-map s3://b/map: found an URL"):
        read_pairs("s3://b/map", "--label-map", HEADER)


def test_names_are_told_with_the_one_most_like_them_and_not_all_of_many() -> None:
    told = near_misses(["t cels", "zzz"], ["T cell", "B cell"])
    assert told == "'t cels' (did you mean 'T cell'?), 'zzz'"
    assert near_misses([f"n{i:02}" for i in range(13)], []).endswith("'n09' and 3 more")

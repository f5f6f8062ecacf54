"""Sample sheets, tables of labels, lists of barcodes, names of samples."""

import gzip
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from annatac_scale.errors import InputError
from annatac_scale.ingest.labels import join_labels, read_labels
from annatac_scale.ingest.quality import with_given
from annatac_scale.ingest.sheet import SampleInput, check_samples, default_name, name_inputs, read_sheet
from annatac_scale.ingest.tables import read_barcodes, read_table, typed
from annatac_scale.progress import Silent


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/pbmc.h5ad", "pbmc"),
        ("pbmc.fragments.tsv.gz", "pbmc"),
        ("GSM1_rep.1.tsv.gz", "GSM1_rep.1"),
        ("x/filtered_peak_bc_matrix/", "filtered_peak_bc_matrix"),
        ("x/filtered_peak_bc_matrix.h5", "filtered_peak_bc_matrix"),
        ("my cells (1).bed", "my_cells__1_"),
        (".hidden.tsv", "hidden"),
    ],
)
def test_a_sample_is_named_after_its_file(path: str, name: str) -> None:
    assert default_name(path) == name


def test_a_folder_given_as_a_dot_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run7").mkdir()
    monkeypatch.chdir(tmp_path / "run7")
    assert default_name(".") == "run7"


def test_a_sheet_gives_paths_beside_it_and_obs_columns(tmp_path: Path) -> None:
    sheet = tmp_path / "in" / "samples.tsv"
    sheet.parent.mkdir()
    sheet.write_bytes(
        b"\xef\xbb\xbfsample\tpath\tpeaks\tdonor\tage\tsite\r\n"
        b"s1\ta.tsv.gz\tp.bed\t01\t31\tnorth\r\n\r\n"
        b"\t/abs/b.h5ad\t\t02\t\tsouth\r\n"
    )
    first, second = read_sheet(sheet)
    assert (first.name, first.path, first.peaks) == ("s1", tmp_path / "in/a.tsv.gz", tmp_path / "in/p.bed")
    assert dict(first.columns) == {"donor": "01", "age": 31, "site": "north"}
    assert (second.name, second.path, second.peaks) == ("b", Path("/abs/b.h5ad"), None)
    assert dict(second.columns) == {"donor": "02", "site": "south"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header line"),
        ("sample\tfile\na\tb\n", "with path"),
        ("path\tpath\na\tb\n", "names each column once"),
        ("path,donor\na,b\n", "separated by tabs"),
        ("path\tdonor\na\n", "line 2: found 1 fields; expected 2"),
        ("path\n", "a header line alone"),
        ("path\tdonor\n\tD1\n", "row 1 without a path"),
        ("path\tn_open\na\t4\n", "the column 'n_open', which is reserved"),
        ("path\ta/b\na\t4\n", "the column 'a/b', which is reserved or has a slash"),
    ],
)
def test_a_sheet_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    sheet = tmp_path / "s.tsv"
    sheet.write_text(text)
    with pytest.raises(InputError, match=f"s.tsv.*{message}"):
        read_sheet(sheet)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a b", "é", "..", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected letters, digits"):
        check_samples([SampleInput(name, tmp_path)])


def test_the_same_name_or_file_twice_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.tsv", tmp_path / "b.tsv"
    a.touch()
    b.symlink_to(a)
    with pytest.raises(InputError, match="'a': found the name twice"):
        check_samples(name_inputs([a, tmp_path / "." / "a.tsv"]))
    with pytest.raises(InputError, match=r"b\.tsv: found the same file in samples a and b"):
        check_samples(name_inputs([a, b]))
    with pytest.raises(InputError, match=r"c\.tsv: found no such file"):
        check_samples(name_inputs([a, tmp_path / "c.tsv"]))
    with pytest.raises(InputError, match="found 1 names for 2 inputs"):
        name_inputs([a, b], ["x"])
    with pytest.raises(InputError, match="found none"):
        check_samples([])


def test_columns_are_numbers_only_where_they_stay_the_same() -> None:
    table = pd.DataFrame(
        {"i": ["1", "20", ""], "f": ["1.5", "2", "NA"], "padded": ["01", "2", "3"], "t": ["B", "", "T"],
         "plus": ["+1", "2", "3"], "zero": ["0", "0.5", "-0.5"], "none": ["", "NA", ""]}, dtype=object,
    ).apply(typed)  # fmt: skip
    assert table["i"].tolist()[:2] == [1, 20]
    assert pd.isna(table["i"][2])
    assert table["f"].tolist()[:2] == [1.5, 2]
    assert table["zero"].tolist() == [0, 0.5, -0.5]
    assert list(table["padded"]) == ["01", "2", "3"]
    assert list(table["plus"]) == ["+1", "2", "3"]
    assert list(table["t"].cat.categories) == ["B", "T"]
    assert table["t"].isna().tolist() == [False, True, False]
    assert table["none"].isna().all()


def test_a_list_of_barcodes_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "b.tsv.gz"
    path.write_bytes(gzip.compress(b"barcode\tx\r\nB-1\t3\r\n\r\n#A\nC d\n"))
    assert read_barcodes(path) == ("B-1", "#A", "C d")
    path.write_bytes(b"A\nB\nA\n")
    with pytest.raises(InputError, match="line 3: found barcode 'A' of line 1 again"):
        read_barcodes(path)
    path.write_bytes(b"\n")
    with pytest.raises(InputError, match="found no barcode"):
        read_barcodes(path)


OBS = pd.DataFrame(
    {"n_open": [5, 6, 7], "cell_type": ["x", "y", "z"]}, index=pd.Index(["A", "B", "C"], name="barcode")
)


def test_labels_are_joined_by_barcode_and_what_misses_is_said(tmp_path: Path, said: Any) -> None:
    path = tmp_path / "cells.tsv"
    path.write_text("cell_type\tbarcode\tage\nNK\tB\t3\nT\tZ\t4\nB\tA\t5\n")
    joined = join_labels(OBS, read_labels(path), "s", said)
    assert list(joined.index) == ["A", "B", "C"]
    assert list(joined.columns) == ["n_open", "cell_type", "age"]
    assert joined["cell_type"].tolist()[:2] == ["B", "NK"]
    assert joined["cell_type"].isna().tolist() == [False, False, True]
    assert "2 of 3 cells have labels" in said
    assert "1 of its 3 rows for the sample are of no cell" in said


def test_labels_with_a_sample_column_are_joined_to_that_sample_alone(tmp_path: Path) -> None:
    path = tmp_path / "cells.tsv"
    path.write_text("sample\tbarcode\tt\ns1\tA\tfirst\ns2\tA\tsecond\n")
    labels = read_labels(path)
    assert join_labels(OBS, labels, "s2", Silent())["t"].tolist()[0] == "second"
    assert join_labels(OBS, labels, "s3", Silent())["t"].isna().all()


def test_labels_that_match_no_barcode_show_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "cells.tsv"
    path.write_text("barcode\tt\nA-1\tx\n")
    with pytest.raises(
        InputError, match=r"barcodes such as 'A-1' and none of sample s; expected .* 'A', 'B', 'C'"
    ):
        join_labels(OBS, read_labels(path), "s", Silent())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("barcode\tt\nA\tx\nA\ty\n", "found barcode 'A' twice"),
        ("sample\tbarcode\tt\ns\tA\tx\ns\tA\ty\n", "found barcode 'A' twice"),
        ("cell\tt\nA\tx\n", "with barcode"),
        ("barcode\tn_counts\nA\t5\n", "the column 'n_counts', which is reserved"),
        ("barcode\ta/b\nA\t5\n", "the column 'a/b', which is reserved or has a slash"),
        ("barcode\tsample\nA\ts\n", "no column of labels"),
    ],
)
def test_a_table_of_labels_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cells.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"cells.tsv: .*{message}"):
        read_labels(path)


def test_a_table_keeps_all_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\n007\tNA\n \tx \n")
    assert read_table(path, ("a",)).to_dict("list") == {"a": ["007", ""], "b": ["NA", "x"]}


def test_given_columns_never_replace_our_own() -> None:
    given = pd.DataFrame({"n_open": [1, 2, 3], "n_open_given": [4, 5, 6], "a/b": [7, 8, 9]}, index=OBS.index)
    joined = with_given(OBS[["n_open"]], given)
    assert joined.to_dict("list") == {
        "n_open": [5, 6, 7],
        "n_open_given": [1, 2, 3],
        "n_open_given_given": [4, 5, 6],
        "a_b": [7, 8, 9],
    }

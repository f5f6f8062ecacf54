"""Labels are read alike from every kind of file, and what is wrong with a file is said."""

import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.ingest.label_column import is_label_file, read_label_column
from annatac_scale.model.labels import label_texts

BARCODES = ["c1", "c2", "c3", "c4"]
CELLS = pd.DataFrame(
    {"sample": ["a", "a", "b", "b"], "type": ["T cell", "B", None, "B"], "other": [1, 2, 3, 4]},
    index=pd.Index(BARCODES, name="barcode"),
)


def write_h5ad(path: Path, obs: pd.DataFrame) -> None:
    anndata.AnnData(sparse.csr_matrix(np.ones((len(obs), 2))), obs=obs).write_h5ad(path)


def write(path: Path, cells: pd.DataFrame) -> Path:
    ending = path.name.partition(".")[2]
    if ending == "h5ad":
        write_h5ad(path, cells)
    elif ending == "parquet":
        cells.to_parquet(path)
    else:
        cells.to_csv(path, sep="," if "csv" in ending else "\t")
    return path


ENDINGS = ["csv", "tsv", "txt", "csv.gz", "tsv.gz", "parquet", "h5ad"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_gives_the_same_labels(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"labels.{ending}", CELLS)
    assert is_label_file(path)
    table = read_label_column(path, "type")
    assert set(table.columns) == {"barcode", "label", "sample"}
    assert table["barcode"].tolist() == BARCODES
    assert table["sample"].tolist() == CELLS["sample"].tolist()
    assert [None if pd.isna(one) else one for one in table["label"]] == ["T cell", "B", None, "B"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_numbers_are_the_same_labels_in_every_kind_of_file_and_a_table_without_samples_has_none(
    ending: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"labels.{ending}", CELLS[["other"]].assign(gaps=[1.0, None, 10.0, 0.5]))
    table = read_label_column(path, "other")
    assert set(table.columns) == {"barcode", "label"}
    assert label_texts(table["label"]).tolist() == ["1", "2", "3", "4"]
    assert label_texts(read_label_column(path, "gaps")["label"]).tolist() == ["1", "", "10", "0.5"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_of_numbers_are_the_same_labels_in_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"labels.{ending}", CELLS[[]].assign(type=["1.0", "1e1", "10", "01"]))
    assert label_texts(read_label_column(path, "type")["label"]).tolist() == ["1", "1e1", "10", "01"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", [None, "cell"])
def test_an_index_that_pandas_wrote_names_the_cells(ending: str, name: str | None, tmp_path: Path) -> None:
    cells = CELLS.set_axis(pd.Index(BARCODES, name=name))
    path = write(tmp_path / f"labels.{ending}", cells)
    if name is None or ending == "parquet":
        assert read_label_column(path, "type")["barcode"].tolist() == BARCODES
    else:
        with pytest.raises(
            InputError, match="found the columns cell, sample, type, other; expected one called"
        ):
            read_label_column(path, "type")


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    wide = pd.DataFrame({f"x{i}": ["1"] * 50 for i in range(200)}, index=[f"c{i}" for i in range(50)])
    wide = wide.rename_axis("barcode").assign(type="A")
    path = write(tmp_path / "wide.parquet", wide)
    seen = []
    read = pq.read_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq, "read_table", lambda *args, **kw: seen.append(kw["columns"]) or read(*args, **kw))
        read_label_column(path, "type")
    assert seen == [["barcode", "type"]]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_column_that_is_not_there_is_named_beside_those_that_are(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"labels.{ending}", CELLS)
    with pytest.raises(
        InputError, match=r"found no column 'celltype'; .*there are .*type.*give one of these"
    ):
        read_label_column(path, "celltype")


@pytest.mark.parametrize("ending", ["csv.gz", "parquet", "h5ad"])
def test_damaged_files_are_refused(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"labels.{ending}", CELLS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        InputError, match=r"labels\.[a-z0-9.]+.*(cannot be read|found damaged or cut gzip data)"
    ):
        read_label_column(path, "type")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_not_there_is_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_label_column(tmp_path / f"nosuch.{ending}", "type")


def test_what_is_no_table_of_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("")
    with pytest.raises(InputError, match="found no row"):
        read_label_column(path, "type")
    path.write_text("barcode,type\n")
    with pytest.raises(InputError, match="found no row"):
        read_label_column(path, "type")
    path.write_text("barcode,type\nc1,A\n,B\n")
    with pytest.raises(InputError, match="found 1 rows without a barcode"):
        read_label_column(path, "type")
    path.write_bytes(gzip.compress(b"barcode,type\n"))
    with pytest.raises(InputError, match="found no row"):
        read_label_column(path, "type")
    with pytest.raises(InputError, match=r"found the ending '\.xlsx'; expected"):
        read_label_column(tmp_path / "labels.xlsx", "type")
    assert not is_label_file(tmp_path / "labels.xlsx")
    assert not is_label_file(tmp_path / "csv")


def test_blanks_around_and_codes_with_zeros_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text("barcode\ttype\n c1 \t 01 \nc2\t2\nc3\tNA\n")
    table = read_label_column(path, "type")
    assert table["barcode"].tolist() == ["c1", "c2", "c3"]
    assert table["label"].tolist()[:2] == ["01", "2"]
    assert pd.isna(table["label"][2])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("barcode,type\nc1,B\nc2,CD4, naive\n", "line 3: found 3 fields; expected 2, as the header has"),
        ("barcode,type\nc1,CD4, naive\nc2,B,\n", "line 2: found 3 fields; .*in double quotes"),
        (
            '"type","other"\n"c1","B","x"\n"c2","T","x"\n',
            "found the columns type, other; expected one called",
        ),
        ('"barcode","type"\n"1","c1","B"\n', "line 2: found 3 fields; .*write.table .*begin the header with"),
        ("barcode,other,type\nc1,x,B\nc2,x\n", "line 3: found 2 fields; expected 3"),
        ("barcode,type\nc1,B\n\n  \nc2\n", "line 5: found 1 fields; expected 2"),
        ('barcode,type\n"c1\n",B\nc2,B,B\n', "line 4: found 3 fields"),
        ('barcode,type\nc1,"B\nc2,T\n', "line 3: found quotes that do not fit"),
        ("barcode,type,type\nc1,B,T\n", "found two columns 'type'; expected each name once"),
    ],
)
def test_rows_that_do_not_fit_the_header_are_refused_by_line(tmp_path: Path, text: str, found: str) -> None:
    for ending, separator in (("csv", ","), ("tsv", "\t"), ("csv.gz", ",")):
        path = tmp_path / f"labels.{ending}"
        content = text.replace(",", separator).encode()
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
        with pytest.raises(InputError, match=rf"labels\.{ending}.*{found}"):
            read_label_column(path, "type")


def test_a_name_that_holds_the_separator_stands_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbfbarcode,type\r\nc1,"CD4, ""naive"""\r\n\r\n"c2",B\r\n')
    table = read_label_column(path, "type")
    assert table["barcode"].tolist() == ["c1", "c2"]
    assert table["label"].tolist() == ['CD4, "naive"', "B"]

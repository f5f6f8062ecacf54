"""Lists and tables that name cells. The tables are laid out as the pages of 10x Genomics show them."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.ingest.tables import read_barcodes

SINGLECELL = """\
barcode,total,duplicate,mitochondrial,passed_filters,cell_id,is__cell_barcode,TSS_fragments,peak_region_cutsites
NO_BARCODE,14876,7802,0,4842,None,0,0,0
TTTG-1,27,10,1,16,_cell_0,1,2,12
AAAC-1,8,4,0,4,None,0,2,0
CCCG-1,90,40,1,49,_cell_1,1,20,33
"""
SINGLECELL_2 = """\
barcode,total,duplicate,nonprimary,passed_filters,is__cell_barcode,excluded_reason,TSS_fragments
NO_BARCODE,986507,102223,324,699796,0,0,0
AAACGAAAGAAAGGGT-1,8,0,0,3,0,0,1
AAACGAAAGAAATACC-1,700,2,0,2,1,0,0
"""
TWO_GENOMES = """\
barcode,total,passed_filters,passed_filters_GRCh38,passed_filters_mm10,cell_id,is_GRCh38_cell_barcode,is_mm10_cell_barcode
NO_BARCODE,14,4,2,2,None,0,0
HUMAN-1,27,16,16,0,GRCh38_cell_0,1,0
MOUSE-1,27,16,0,16,mm10_cell_0,0,1
BOTH-1,54,32,16,16,GRCh38_cell_1/mm10_cell_1,1,1
NONE-1,2,1,1,0,None,0,0
"""
PER_BARCODE = """\
barcode,gex_barcode,atac_barcode,is_cell,excluded_reason,gex_raw_reads,atac_fragments
AAACAGCCAAACAACA-1,AAACAGCCAAACAACA-1,ACAGCGGGTGTGTTAC-1,0,0,11,6
AAACAGCCAAATATCC-1,AAACAGCCAAATATCC-1,ACAGCGGGTTGTGACT-1,1,0,58263,7937
AAACAGCCAAACATAG-1,AAACAGCCAAACATAG-1,ACAGCGGGTTGTTCTT-1,0,2,7,1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anything.txt"


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        (SINGLECELL, ("TTTG-1", "CCCG-1")),
        (SINGLECELL_2, ("AAACGAAAGAAATACC-1",)),
        (SINGLECELL_2.replace("is__cell", "is_cell"), ("AAACGAAAGAAATACC-1",)),
        (PER_BARCODE, ("AAACAGCCAAATATCC-1",)),
    ],
    ids=["atac_1", "atac_2", "atac_2_as_documented", "arc"],
)
@pytest.mark.parametrize("assembly", [None, "hg38", "anything"])
def test_cells_of_a_table_of_one_genome_are_told_by_its_header(
    text: str, cells: tuple[str, ...], assembly: str | None, path: Path
) -> None:
    path.write_text(text)
    assert read_barcodes(path, assembly) == cells


@pytest.mark.parametrize(
    ("assembly", "cells"),
    [("hg38", ("HUMAN-1", "BOTH-1")), ("GRCh38", ("HUMAN-1", "BOTH-1")), ("mm10", ("MOUSE-1", "BOTH-1"))],
)
def test_of_two_genomes_the_column_of_the_assembly_counts(
    assembly: str, cells: tuple[str, ...], path: Path
) -> None:
    path.write_text(TWO_GENOMES)
    assert read_barcodes(path, assembly) == cells


@pytest.mark.parametrize("assembly", [None, "hg19", "mm9"])
def test_of_two_genomes_none_is_guessed(assembly: str | None, path: Path) -> None:
    path.write_text(TWO_GENOMES)
    with pytest.raises(InputError, match="is_GRCh38_cell_barcode, is_mm10_cell_barcode; expected one for"):
        read_barcodes(path, assembly)


def test_a_lone_genome_is_taken_unless_another_is_asked_for(path: Path) -> None:
    path.write_text("barcode,is_hg19_cell_barcode\nA-1,1\n")
    assert read_barcodes(path) == read_barcodes(path, "hg19") == ("A-1",)
    with pytest.raises(InputError, match="is_hg19_cell_barcode; expected one for hg38"):
        read_barcodes(path, "hg38")


@pytest.mark.parametrize(
    "saved",
    [
        lambda text: gzip.compress(text.encode()),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace(",", "\t").encode(),
        lambda text: text.removesuffix("\n").encode(),
        lambda text: text.replace("\n", "\n\n").encode(),
        lambda text: "\n".join(f",{line}" for line in text.splitlines()).encode(),
        lambda text: text.replace(",1,0,58263", ",True,0,58263").replace(",0,0,11", ",False,0,11").encode(),
    ],
    ids=["gzip", "crlf", "bom", "tabs", "no_last_newline", "blank_lines", "row_names", "true_false"],
)
def test_a_table_saved_again_by_another_program_is_read_alike(saved: object, path: Path) -> None:
    path.write_bytes(saved(PER_BARCODE))  # type: ignore[operator]
    assert read_barcodes(path) == ("AAACAGCCAAATATCC-1",)


names = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(names, st.booleans()), min_size=1, unique_by=lambda row: row[0]))
def test_any_barcode_of_a_quoted_table_is_kept_whole(
    rows: list[tuple[str, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("barcode", "is_cell", "x"), *((name, int(cell), 'say "x, y"') for name, cell in rows)])
    path = tmp_path_factory.mktemp("quoted") / "t.csv"
    path.write_text(text.getvalue())
    cells = tuple(name for name, cell in rows if cell)
    if cells:
        assert read_barcodes(path) == cells
    else:
        with pytest.raises(InputError, match="found no 1 in column is_cell"):
            read_barcodes(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SINGLECELL.replace(",1,2,12", ",0,2,12").replace(",1,20,33", ",0,20,33"), "no 1 in column is__cell_b"),
        (SINGLECELL.splitlines()[0], "no 1 in column is__cell_barcode"),
        (SINGLECELL + "GGGA-1,27,10\n", r", line 6: found 3 fields; expected 9, as the header has"),
        (SINGLECELL + "TTTG-1,27,10,1,16,_cell_0,1,2,12\n", "line 6: found barcode 'TTTG-1' of line 3 again"),
        (SINGLECELL.replace(",1,2,12", ",yes,2,12"), "line 3: found 'yes' in column is__cell_barcode; expected 1 or 0"),
        ("barcode,cluster\nA-1,3\n", "columns 'barcode, cluster'; expected is__cell_barcode or is_cell"),
        ("Barcode,Graph-based\nA-1,Cluster 3\n", "columns 'Barcode, Graph-based'; expected is__cell_barcode"),
    ],
    ids=["no_cell", "header_alone", "torn_line", "twice", "neither", "no_column", "loupe"],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(text: str, message: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_barcodes(path)


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("AAAC-1\nAAAG-1\n", ("AAAC-1", "AAAG-1")),
        ("barcode\nAAAC-1\n", ("AAAC-1",)),
        ("Barcode\tcluster\nAAAC-1\t2\n", ("AAAC-1",)),
        ("\n\nbarcode\tx\n\nA,B\t1\nis_cell\n", ("A,B", "is_cell")),
        ("a:b_c#d-1 e\nbarcode\n", ("a:b_c#d-1 e", "barcode")),
    ],
    ids=["plain", "header", "columns", "blank_lines", "odd_names"],
)
def test_a_list_is_no_table(text: str, cells: tuple[str, ...], path: Path) -> None:
    path.write_text(text)
    assert read_barcodes(path, "hg38") == cells

import gzip
from pathlib import Path

import pandas as pd
import pytest

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import builtin_tss, place_tss, read_gtf, read_tss
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES, Assembly
from annatac_scale.progress import Silent

COLUMNS = ["chrom", "position", "strand", "gene", "type"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows(table: pd.DataFrame) -> list[tuple]:
    assert list(table.columns) == COLUMNS
    assert table["position"].dtype == "int64"
    return list(table.itertuples(index=False, name=None))


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("name", "n_genes", "types"),
    [
        ("hg38", 58_336, {"protein_coding": 19_883, "other": 38_453}),
        ("hg19", 28_091, {"protein_coding": 19_502, "other": 8_589}),
        ("mm10", 25_009, {"protein_coding": 20_783, "other": 4_226}),
        ("mm9", 37_591, {"unknown": 37_591}),
    ],
)
def test_builtin_tables_hold_every_gene_of_their_source(
    name: str, n_genes: int, types: dict[str, int]
) -> None:
    table = builtin_tss(name)
    assert len(rows(table)) == n_genes
    assert table["type"].value_counts().to_dict() == types
    assert set(table["strand"]) == {"+", "-"}
    assert (table["gene"] != "").all()


# Starts as the sources give them.
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("hg38", ("chr1", 11868, "+", "DDX11L1", "other")),
        ("hg38", ("chr7", 151227165, "-", "ABCF2", "protein_coding")),
        ("hg19", ("chr1", 17435, "-", "MIR6859-1", "other")),
        ("hg19", ("chrY", 1664347, "+", "ASMT", "protein_coding")),
        ("mm10", ("chr1", 4497353, "-", "Sox17", "protein_coding")),
        ("mm9", ("chr11", 84684318, "-", "Ggnbp2", "unknown")),
    ],
)
def test_builtin_tables_hold_known_genes(name: str, row: tuple) -> None:
    assert row in rows(builtin_tss(name))


@pytest.mark.parametrize("name", BUILTIN_ASSEMBLIES)
def test_every_builtin_tss_lies_on_its_assembly(name: str) -> None:
    said = Said()
    table = builtin_tss(name)
    assert len(place_tss(Assembly.builtin(name), table, said)) == len(table)
    assert said.lines == []


def test_a_builtin_table_of_an_unknown_assembly_is_refused() -> None:
    with pytest.raises(InputError, match="'hg18'"):
        builtin_tss("hg18")


@pytest.mark.parametrize("header", ["", "chrom\ttss0\tstrand\tgene\ttype\n"])
def test_our_table_reads_with_and_without_header_and_type(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "t", header + "# comment\nchr1\t0\t+\tA\tprotein_coding\r\n\nchr2\t7\t-\tNA\n")
    assert rows(read_tss(path)) == [
        ("chr1", 0, "+", "A", "protein_coding"),
        ("chr2", 7, "-", "NA", "unknown"),
    ]


def test_the_tss_of_a_bed_interval_is_its_5_prime_end(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.bed", "track name=x\nchr1\t100\t200\tA B\t0\t+\nchr1\t100\t200\tC\t.\t-\textra\n"
    )
    assert rows(read_tss(path)) == [("chr1", 100, "+", "A B", "unknown"), ("chr1", 199, "-", "C", "unknown")]


@pytest.mark.parametrize(
    "line",
    [
        "chr1\t100\t200\tA\t0\t.",
        "chr1\t100\t200",
        "chr1\t200\t100\tA\t0\t+",
        "chr1\tx\t+\tA",
        "chr1\t-5\t+\tA",
        "chr1\t5\t+",
        'chr1\tsrc\tgene\t1\t9\t.\t+\t.\tgene_id "A";',
    ],
)
def test_a_line_that_is_no_tss_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "bad.tsv", f"chr1\t5\t+\tA\n{line}\n")
    with pytest.raises(InputError, match=r"bad\.tsv, line 2: found .*; expected 'chrom tss0 strand gene"):
        read_tss(path)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no TSS"):
        read_tss(write(tmp_path / "t", "chrom\ttss0\tstrand\tgene\ttype\n"))


GTF = (
    "#!genome-build toy\n"
    'chr1\tsrc\tgene\t101\t200\t.\t+\t.\tgene_id "G1"; gene_type "protein_coding"; gene_name "Alpha";\n'
    'chr1\tsrc\ttranscript\t101\t180\t.\t+\t.\tgene_id "G1"; transcript_id "T1"; ref_gene_id "no";\n'
    '\n1\tsrc\tgene\t101\t200\t.\t-\t.\tgene_id "G2"; gene_biotype "lncRNA";\n'
)


def test_a_gtf_gives_one_row_a_gene_at_its_5_prime_end(tmp_path: Path) -> None:
    expected = [("chr1", 100, "+", "Alpha", "protein_coding"), ("1", 199, "-", "G2", "lncRNA")]
    assert rows(read_gtf(write(tmp_path / "t.gtf", GTF))) == expected
    (tmp_path / "t.gtf.gz").write_bytes(gzip.compress(GTF.replace("\n", "\r\n").encode()))
    assert rows(read_gtf(tmp_path / "t.gtf.gz")) == expected


def test_a_gtf_without_gene_rows_takes_the_5_prime_most_of_its_lines(tmp_path: Path) -> None:
    spans = [
        (50, 60, "+", "G1"),
        (31, 40, "+", "G1"),
        (41, 45, "-", "G2"),
        (10, 90, "-", "G2"),
        (5, 9, "-", "G1"),
    ]
    text = "".join(
        f'chr1\tsrc\texon\t{a}\t{b}\t.\t{strand}\t.\ttranscript_id "T"; gene_id "{gene}"\n'
        for a, b, strand, gene in spans
    )
    expected = {("G1", "+"): 30, ("G2", "-"): 89, ("G1", "-"): 8}
    table = read_gtf(write(tmp_path / "t.gtf", text))
    assert {(gene, strand): position for _, position, strand, gene, _ in rows(table)} == expected


@pytest.mark.parametrize(
    "line",
    [
        "chr1\tsrc\tgene\t101\t200\t.\t+\t.\tID=gene1;Name=Alpha",
        'chr1\tsrc\tgene\t0\t200\t.\t+\t.\tgene_id "A"',
        'chr1\tsrc\tgene\t201\t200\t.\t+\t.\tgene_id "A"',
        'chr1\tsrc\tgene\tx\t200\t.\t+\t.\tgene_id "A"',
        'chr1 src gene 1 200 . + . gene_id "A"',
        'chr1\tsrc\tgene\t1\t200\t.\t+\t.\tgene_id ""',
        "chr1\t100\t200",
    ],
)
def test_a_line_that_is_no_gtf_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match=r"bad\.gtf, line 7: found .*expected the 9 columns of a GTF line"):
        read_gtf(write(tmp_path / "bad.gtf", GTF + "\n" + line + "\n"))


def toy_tss(*genes: tuple[str, int]) -> pd.DataFrame:
    data = [(chrom, position, "+", f"g{i}", "unknown") for i, (chrom, position) in enumerate(genes)]
    return pd.DataFrame(data, columns=COLUMNS)


TOY = Assembly("toy", ("chr1", "chr2"), (100, 50))


def test_placing_keeps_the_rows_of_known_contigs_and_says_what_it_leaves_out() -> None:
    said = Said()
    placed = place_tss(TOY, toy_tss(("2", 49), ("KI270", 1), ("chr1", 0), ("scaf", 3), ("KI270", 2)), said)
    assert placed[["gene", "code"]].to_numpy().tolist() == [["g0", 1], ["g2", 0]]
    assert said.lines == ["3 of 5 TSS lie on 2 contigs that toy does not have (KI270, scaf): left out"]


def test_a_table_of_which_nothing_lies_on_the_assembly_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"2 TSS, none on a contig of toy \(chrA, chrB\); expected names such as chr1"
    ):
        place_tss(TOY, toy_tss(("chrA", 1), ("chrB", 2)))


@pytest.mark.parametrize(("chrom", "position"), [("chr2", 50), ("chr1", -1)])
def test_a_tss_outside_its_chromosome_is_refused(chrom: str, position: int) -> None:
    with pytest.raises(
        InputError, match=rf"1 TSS outside their chromosome, the first g1 at {chrom}:{position}"
    ):
        place_tss(TOY, toy_tss(("chr1", 1), (chrom, position)))

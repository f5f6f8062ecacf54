import gzip
import hashlib
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import builtin_tss
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace, select_islands

TOY = Assembly("toy", ("chr1", "chr2", "chrX"), (12_000, 5_000, 3))


def tss_table(*genes: tuple[str, int, str, str]) -> pd.DataFrame:
    """Rows of (chrom, position, gene, type)."""
    table = pd.DataFrame(genes, columns=["chrom", "position", "gene", "type"])
    return table.assign(strand="+")[["chrom", "position", "strand", "gene", "type"]]


def windows_of(space: IslandSpace) -> list[tuple[str, int, int]]:
    columns = (space.chrom.tolist(), space.start.tolist(), space.end.tolist())
    return [(space.chromosomes[code], start, end) for code, start, end in zip(*columns, strict=True)]


def bed(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# selections


def test_all_bins_cover_every_chromosome_and_end_with_it() -> None:
    space = IslandSpace.all(TOY)
    assert windows_of(space) == [
        ("chr1", 0, 5_000),
        ("chr1", 5_000, 10_000),
        ("chr1", 10_000, 12_000),
        ("chr2", 0, 5_000),
        ("chrX", 0, 3),
    ]
    assert space.names()[2:4] == ["chr1:10000-12000", "chr2:0-5000"]
    assert (space.chrom.dtype, space.start.dtype, space.end.dtype) == (np.int32, np.int64, np.int64)
    assert (space.selection, space.width_bp, space.assembly) == ("all", 5_000, "toy")
    assert space.genes.tolist() == [""] * 5


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 25))
def test_all_bins_equal_a_plain_loop(sizes: list[int], width_bp: int) -> None:
    names = tuple(f"chr{i + 1}" for i in range(len(sizes)))
    expected = [
        (name, start, min(start + width_bp, size))
        for name, size in zip(names, sizes, strict=True)
        for start in range(0, size, width_bp)
    ]
    assert windows_of(IslandSpace.all(Assembly("toy", names, tuple(sizes)), width_bp=width_bp)) == expected


# The sources' own numbers of bins, and of bins that hold a TSS of a protein-coding (mm9: of any) gene.
@pytest.mark.parametrize(
    ("name", "n_all", "n_tss"),
    [
        ("hg38", 642_102, 17_931),
        ("hg19", 627_482, 17_862),
        ("mm10", 546_210, 19_370),
        ("mm9", 545_174, 33_310),
    ],
)
def test_builtin_assemblies_have_the_known_numbers_of_islands(name: str, n_all: int, n_tss: int) -> None:
    assembly = Assembly.builtin(name)
    assert len(select_islands(assembly, "all", None)) == n_all
    space = select_islands(assembly, "tss", None)
    assert len(space) == n_tss

    table = builtin_tss(name)
    coding = table[table["type"] == "protein_coding"] if name != "mm9" else table
    expected = {(c, p // 5_000 * 5_000) for c, p in zip(coding["chrom"], coding["position"], strict=True)}
    assert {(chrom, start) for chrom, start, _ in windows_of(space)} == expected


def test_tss_islands_are_the_bins_of_coding_genes_but_name_all_genes() -> None:
    table = tss_table(
        ("chr1", 4_999, "B", "protein_coding"),
        ("chr1", 11_999, "Z", "protein_coding"),
        ("chr1", 11_999, "A", "protein_coding"),
        ("chr1", 10, "L", "lncRNA"),
        ("chr1", 7_000, "M", "lncRNA"),
        ("X", 2, "C", "protein_coding"),
        ("chrX", 1, "C", "protein_coding"),
    )
    space = IslandSpace.tss(TOY, table)
    assert windows_of(space) == [("chr1", 0, 5_000), ("chr1", 10_000, 12_000), ("chrX", 0, 3)]
    assert space.genes.tolist() == ["L,B", "A,Z", "C"]
    assert IslandSpace.all(TOY, table).genes.tolist() == ["L,B", "M", "A,Z", "", "C"]


def test_where_no_gene_is_known_to_be_coding_every_tss_makes_an_island() -> None:
    space = IslandSpace.tss(TOY, tss_table(("chr2", 0, "A", "unknown"), ("chr1", 5_000, "B", "other")))
    assert windows_of(space) == [("chr1", 5_000, 10_000), ("chr2", 0, 5_000)]


def test_coding_genes_that_lie_elsewhere_are_not_replaced_by_others() -> None:
    table = tss_table(("chr9", 0, "A", "protein_coding"), ("chr1", 0, "B", "lncRNA"))
    with pytest.raises(InputError, match="protein-coding genes, but none on a contig of toy"):
        IslandSpace.tss(TOY, table)


def test_windows_come_sorted_from_a_file_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "windows.bed"
    head = "browser hide all\ntrack name=w\n# comment\n\n"
    text = "X\t0\t3\tname\t0\t+\r\nchr1\t10\t20\nchr2\t0\t5000\n\nchr1\t5\t10\n"
    path.write_bytes(gzip.compress((head + text).encode()))
    space = IslandSpace.windows(
        TOY, path, tss_table(("chr1", 9, "A", ""), ("chr1", 10, "B", ""), ("chr1", 30, "C", ""))
    )
    assert windows_of(space) == [("chr1", 5, 10), ("chr1", 10, 20), ("chr2", 0, 5_000), ("chrX", 0, 3)]
    assert space.genes.tolist() == ["A", "B", "", ""]
    assert (space.width_bp, space.selection) == (0, "windows")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["chr1\t0\t10", "chr2\t0\t10", "chr1\t9\t20"], r"line 3: found chr1:9-20 across 0-10 of line 1"),
        (["chr1\t0\t10", "chr1\t0\t10"], r"line 2: found chr1:0-10 across 0-10 of line 1"),
        (["chr1\t0\t10", "1\t5\t6"], r"line 2: found chr1:5-6 across"),
        (["chr1\t0\t12001"], r"line 1: found end 12001; expected at most 12000, the size of chr1 in toy"),
        (
            ["chr1\t10\t10"],
            r"line 1: found 'chr1\\t10\\t10'; expected 'chrom start end' with 0 <= start < end",
        ),
        (["chr1\t20\t10"], r"line 1: found"),
        (["chr1\t-1\t10"], r"line 1: found"),
        (["chr1\t10"], r"line 1: found"),
        (["chrom\tstart\tend"], r"line 1: found 'chrom\\tstart\\tend'"),
        (
            ["chr1\t0\t10", "chr7\t0\t10"],
            r"line 2: found contig 'chr7'; expected a chromosome of toy such as chr1",
        ),
        ([], "found no window"),
    ],
)
def test_bad_windows_are_refused_with_their_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        IslandSpace.windows(TOY, bed(tmp_path / "bad.bed", *lines))
    assert "bad.bed" in str(caught.value)


def test_select_islands_takes_the_selections_by_name_and_else_a_path(tmp_path: Path) -> None:
    table = tss_table(("chr2", 0, "A", "unknown"))
    assert select_islands(TOY, "all", None).selection == "all"
    assert len(select_islands(TOY, "tss", table)) == 1
    path = bed(tmp_path / "w.bed", "chr2\t0\t7")
    assert select_islands(TOY, str(path), table).genes.tolist() == ["A"]
    with pytest.raises(InputError, match="assembly 'toy': found no TSS table"):
        select_islands(TOY, "tss", None)
    with pytest.raises(InputError, match="tsss: cannot be read"):
        select_islands(TOY, "tsss", None)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="width_bp: found 0"):
        IslandSpace.all(TOY, width_bp=0)


# locate


@st.composite
def spaces(draw: st.DrawFn) -> IslandSpace:
    """Any separate windows on up to four chromosomes, some of which hold none."""
    chromosomes = tuple(f"chr{i + 1}" for i in range(draw(st.integers(1, 4))))
    windows = []
    for code in range(len(chromosomes)):
        edges = sorted(draw(st.sets(st.integers(0, 40), max_size=8)))
        windows += [(code, a, b) for a, b in pairwise(edges) if draw(st.booleans())]
    windows = windows or [(0, 3, 9)]
    chrom, start, end = np.array(windows, np.int64).T
    genes = np.full(len(windows), "", object)
    return IslandSpace("toy", chromosomes, 0, "windows", chrom.astype(np.int32), start, end, genes)


def plain_locate(space: IslandSpace, chrom: int, position: int) -> int:
    for island in range(len(space)):
        if space.chrom[island] == chrom and space.start[island] <= position < space.end[island]:
            return island
    return -1


@settings(max_examples=200)
@given(spaces(), st.lists(st.tuples(st.integers(-1, 5), st.integers(-5, 200)), max_size=20))
def test_locate_equals_a_plain_loop(space: IslandSpace, places: list[tuple[int, int]]) -> None:
    chrom = np.array([chrom for chrom, _ in places], np.int32)
    position = np.array([position for _, position in places], np.int64)
    found = space.locate(chrom, position)
    assert found.dtype == np.int32
    assert found.tolist() == [plain_locate(space, *place) for place in places]


def test_in_all_bins_a_position_lies_in_the_bin_of_its_quotient() -> None:
    assembly = Assembly.builtin("hg38")
    space = IslandSpace.all(assembly)
    rng = np.random.default_rng(0)
    chrom = rng.integers(0, len(assembly.sizes), 5_000)
    position = (rng.random(5_000) * np.array(assembly.sizes)[chrom]).astype(np.int64)
    first = [0]
    for size in assembly.sizes:
        first.append(first[-1] + -(-size // 5_000))
    expected = [first[c] + p // 5_000 for c, p in zip(chrom.tolist(), position.tolist(), strict=True)]
    assert space.locate(chrom, position).tolist() == expected


# identity


def test_sha256_is_that_of_the_lines_it_names() -> None:
    space = IslandSpace.all(TOY)
    lines = ["toy\t5000", *("\t".join(map(str, window)) for window in windows_of(space))]
    assert space.sha256 == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_sha256_tells_assembly_width_and_islands_apart_but_not_genes() -> None:
    other_name = Assembly("toy2", TOY.chromosomes, TOY.sizes)
    other_size = Assembly("toy", TOY.chromosomes, (12_001, 5_000, 3))
    spaces = [IslandSpace.all(TOY), IslandSpace.all(TOY, width_bp=10), IslandSpace.all(other_name)]
    spaces += [IslandSpace.all(other_size), IslandSpace.tss(TOY, tss_table(("chr1", 0, "A", "")))]
    assert len({space.sha256 for space in spaces}) == len(spaces)
    assert IslandSpace.all(TOY, tss_table(("chr1", 0, "A", ""))).sha256 == IslandSpace.all(TOY).sha256


@given(st.randoms())
def test_shuffled_files_give_the_same_space(
    tmp_path_factory: pytest.TempPathFactory, random: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("shuffled")
    sizes = [f"{name}\t{size}" for name, size in zip(TOY.chromosomes, TOY.sizes, strict=True)]
    windows = ["chr1\t0\t10", "chr1\t10\t20", "chrX\t1\t2", "chr2\t50\t60"]
    genes = [("chr1", 1, "A", "unknown"), ("chr2", 51, "B", "unknown"), ("chrX", 1, "C", "unknown")]

    def made() -> list[IslandSpace]:
        assembly = Assembly.from_chrom_sizes(bed(folder / "sizes", *sizes), "toy")
        table = tss_table(*genes)
        path = bed(folder / "w.bed", *windows)
        return [select_islands(assembly, selection, table) for selection in ("all", "tss", str(path))]

    before = made()
    for lines in (sizes, windows, genes):
        random.shuffle(lines)
    for a, b in zip(before, made(), strict=True):
        assert (a.sha256, a.chromosomes, a.genes.tolist()) == (b.sha256, b.chromosomes, b.genes.tolist())
        assert windows_of(a) == windows_of(b)


@pytest.mark.parametrize(
    ("chrom", "start", "end"),
    [
        ([0, 0], [5, 0], [9, 5]),
        ([0, 0], [0, 4], [5, 9]),
        ([1, 0], [0, 0], [5, 5]),
        ([0, 3], [0, 0], [5, 5]),
        ([-1, 0], [0, 0], [5, 5]),
        ([0, 0], [-1, 5], [5, 9]),
        ([0, 0], [0, 5], [5, 5]),
        ([0, 0], [0, 5], [5]),
        ([], [], []),
    ],
)
def test_islands_that_are_not_sorted_and_separate_are_refused(
    chrom: list[int], start: list[int], end: list[int]
) -> None:
    genes = np.full(len(chrom), "", object)
    arrays = (np.array(chrom, np.int32), np.array(start, np.int64), np.array(end, np.int64))
    with pytest.raises(InputError, match="make the islands anew"):
        IslandSpace("toy", ("chr1", "chr2", "chr3"), 5, "all", *arrays, genes)


# files


def all_of(space: IslandSpace) -> tuple:
    fields = (space.assembly, space.chromosomes, space.width_bp, space.selection, space.sha256)
    return (
        *fields,
        windows_of(space),
        space.genes.tolist(),
        space.genes.dtype,
        space.chrom.dtype,
        space.start.dtype,
    )


def test_a_written_space_reads_back_the_same(tmp_path: Path) -> None:
    table = tss_table(("chr1", 0, "NA", "x"), ("chr1", 1, "null", "x"), ("chrX", 0, "007", "x"))
    for space in (IslandSpace.all(TOY, table), IslandSpace.tss(TOY, table)):
        space.write(tmp_path / "islands.tsv.gz")
        assert all_of(IslandSpace.read(tmp_path / "islands.tsv.gz")) == all_of(space)
    assert [path.name for path in tmp_path.iterdir()] == ["islands.tsv.gz"]


def test_chromosomes_named_by_bare_numbers_read_back_as_text(tmp_path: Path) -> None:
    space = IslandSpace.all(Assembly("ensembl", ("1", "2", "MT"), (10, 20, 30)))
    space.write(tmp_path / "i.gz")
    assert all_of(IslandSpace.read(tmp_path / "i.gz")) == all_of(space)


def test_the_file_is_a_plain_table_for_others(tmp_path: Path) -> None:
    space = IslandSpace.tss(TOY, tss_table(("chr1", 0, "A", "x"), ("chr2", 0, "B", "x")))
    space.write(tmp_path / "i.tsv.gz")
    table = pd.read_csv(tmp_path / "i.tsv.gz", sep="\t", comment="#")
    assert table.to_numpy().tolist() == [["chr1", 0, 5_000, "A"], ["chr2", 0, 5_000, "B"]]


def test_equal_spaces_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        IslandSpace.all(TOY).write(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "islands.tsv.gz"
    IslandSpace.all(TOY).write(path)
    text = gzip.decompress(path.read_bytes()).decode()
    lines = text.splitlines(keepends=True)
    damaged = {
        "a row less": "".join(lines[:-1]),
        "moved": text.replace("chr1\t0\t5000", "chr1\t1\t5000"),
        "unknown chromosome": text.replace("chrX\t0", "chrQ\t0"),
        "no header": "".join(lines[1:]),
        "column missing": text.replace("start\t", ""),
        "not a number": text.replace("\t10000\t", "\tx\t"),
        "header of another kind": "#[1, 2]\n" + "".join(lines[1:]),
        "bed": "chr1\t0\t10\n",
        "empty": "",
    }
    for content in damaged.values():
        path.write_bytes(gzip.compress(content.encode()))
        with pytest.raises(InputError, match=r"islands\.tsv\.gz.*make the islands anew"):
            IslandSpace.read(path)
    path.write_text(text)
    with pytest.raises(InputError, match="found no islands as annatac_scale writes them"):
        IslandSpace.read(path)
    with pytest.raises(InputError, match="found no islands"):
        IslandSpace.read(tmp_path / "absent")


def test_a_file_cut_or_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "islands.tsv.gz"
    IslandSpace.all(TOY).write(path)
    whole = path.read_bytes()
    for at in range(10, len(whole)):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(content)
            with pytest.raises(InputError):
                IslandSpace.read(path)


def test_writing_into_a_missing_folder_names_the_path_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "i.gz"
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: its folder does not exist; make it"):
        IslandSpace.all(TOY).write(path)
    assert list(tmp_path.iterdir()) == []

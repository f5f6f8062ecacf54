import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES, Assembly, natural_order


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# hg19 of two-genome files, Ensembl names, the names of mitochondria: the rule, line by line.
CONTIG_RULE = [
    ("chr1", "chr1"),
    ("1", "chr1"),
    ("X", "chrX"),
    ("M", "chrM"),
    ("MT", "chrM"),
    ("chrMT", "chrM"),
    ("hg19_chr1", "chr1"),
    ("hg19_1", "chr1"),
    ("hg19_MT", "chrM"),
    ("hg19___chr1", "chr1"),
    ("GRCh37_chr1", "chr1"),
    ("GRCh37___1", "chr1"),
    ("GRCh38_chr1", None),
    ("hg1_chr1", None),
    ("GL000009.2", "GL000009.2"),
    ("mm10_chr1", None),
    ("chr2", None),
    ("Chr1", None),
    ("chrchr1", None),
    ("", None),
    ("hg19_", None),
    ("hg19_hg19_chr1", None),
]


@pytest.mark.parametrize(("contig", "expected"), CONTIG_RULE)
def test_a_contig_means_a_chromosome_by_the_stated_rule(contig: str, expected: str | None) -> None:
    assembly = Assembly("hg19", ("chr1", "chrX", "chrM", "GL000009.2"), (10, 10, 10, 10))
    code = assembly.code(contig)
    assert (None if code is None else assembly.chromosomes[code]) == expected


def test_an_assembly_of_any_name_may_stand_in_front() -> None:
    assert Assembly("my_own", ("chr1",), (5,)).code("my_own_chr1") == 0
    assert Assembly("my_own", ("chr1",), (5,)).code("my_chr1") is None


def test_an_exact_name_wins_over_every_other_reading() -> None:
    assembly = Assembly("toy", ("1", "chr1", "chrM", "chrMT", "toy_1"), (1, 2, 3, 4, 5))
    codes = [assembly.code(contig) for contig in ("1", "chr1", "chrMT", "toy_1", "MT")]
    assert codes == [0, 1, 3, 4, 2]


def test_mitochondria_without_chrm_are_found_under_the_name_there_is() -> None:
    assert Assembly("toy", ("MT",), (5,)).code("MT") == 0
    assert Assembly("toy", ("chrMT",), (5,)).code("MT") == 0


def test_the_natural_order_is_numbers_then_x_y_m_then_names() -> None:
    expected = ["chr1", "chr2", "chr10", "chr22", "chrX", "chrY", "chrM", "KI270728.1", "chr1_alt", "chrUn_1"]
    assert list(natural_order(reversed(expected))) == expected
    assert natural_order(["MT", "Y", "X", "10", "9"]) == ("9", "10", "X", "Y", "MT")


@pytest.mark.parametrize("name", BUILTIN_ASSEMBLIES)
def test_builtin_assemblies_start_with_chr1_and_are_in_natural_order(name: str) -> None:
    assembly = Assembly.builtin(name)
    autosomes = 22 if name.startswith("hg") else 19
    assert list(assembly.chromosomes[: autosomes + 3]) == [
        *(f"chr{i}" for i in range(1, autosomes + 1)),
        "chrX",
        "chrY",
        "chrM",
    ]
    assert assembly.chromosomes == natural_order(assembly.chromosomes)
    assert assembly.code("MT") == assembly.code("chrM") == autosomes + 2


# Sizes as UCSC and the papers state them, bp.
@pytest.mark.parametrize(
    ("name", "chr1", "chr_y"),
    [
        ("hg38", 248956422, 57227415),
        ("hg19", 249250621, 59373566),
        ("mm10", 195471971, 91744698),
        ("mm9", 197195432, 15902555),
    ],
)
def test_builtin_assemblies_have_the_published_sizes(name: str, chr1: int, chr_y: int) -> None:
    assembly = Assembly.builtin(name)
    size_of = dict(zip(assembly.chromosomes, assembly.sizes, strict=True))
    assert (size_of["chr1"], size_of["chrY"]) == (chr1, chr_y)


def test_an_unknown_builtin_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"'hg18'.*hg38, hg19, mm10, mm9.*chrom\.sizes"):
        Assembly.builtin("hg18")


def test_comments_blank_lines_crlf_a_bom_and_further_columns_are_no_matter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sizes", "\ufeff# made by hand\r\n\r\nchr2\t20\t6\t60\t61\r\nchr1 \t 10 \r\n  \r\n"
    )
    assert Assembly.from_chrom_sizes(path, "toy") == Assembly("toy", ("chr1", "chr2"), (10, 20))


def test_spaces_may_stand_for_tabs_and_the_last_newline_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "sizes", "chr1   10\nchr2 20")
    assert Assembly.from_chrom_sizes(path, "toy").sizes == (10, 20)


def test_gzip_is_told_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "sizes.txt"
    # Two members, as bgzip writes them.
    path.write_bytes(gzip.compress(b"chr1\t10\n") + gzip.compress(b"chr2\t20\n"))
    assert Assembly.from_chrom_sizes(path, "toy").chromosomes == ("chr1", "chr2")


def test_ten_thousand_scaffolds_with_odd_names_work(tmp_path: Path) -> None:
    names = [f"Scaf_{i}.{i % 7}-{'x' * (i % 3)}" for i in range(10_000)]
    random.Random(1).shuffle(names)
    path = write(tmp_path / "sizes", "".join(f"{name}\t{len(name)}\n" for name in names))
    assembly = Assembly.from_chrom_sizes(path, "toy")
    assert assembly.chromosomes == tuple(sorted(names))
    assert [assembly.code(name) for name in sorted(names)] == list(range(10_000))
    assert assembly.sizes == tuple(len(name) for name in sorted(names))


@given(
    st.dictionaries(st.from_regex(r"\A[A-Za-z0-9_.-]{1,8}\Z"), st.integers(1, 10**9), min_size=1),
    st.randoms(),
)
def test_the_order_of_lines_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int], random: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    lines = [f"{name}\t{size}\n" for name, size in sizes.items()]
    first = Assembly.from_chrom_sizes(write(folder / "a", "".join(lines)), "toy")
    random.shuffle(lines)
    assert Assembly.from_chrom_sizes(write(folder / "b", "".join(lines)), "toy") == first
    assert dict(zip(first.chromosomes, first.sizes, strict=True)) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\t10\nchr2\n", r"line 2: found 'chr2'; expected a chromosome and its size"),
        ("chr1\t10\n\nchr2\tabc\n", r"line 3: found size 'abc'; expected a whole number of bp above 0"),
        ("chr1\t1.5\n", r"line 1: found size '1\.5'"),
        ("chr1\t-5\n", r"line 1: found size '-5'"),
        ("chr1\t0\n", r"line 1: found size '0'"),
        ("chr1\t1_000\n", r"line 1: found size '1_000'"),
        ("chr1\t١٢\n", r"line 1: found size"),
        ("chr1\t" + "9" * 5000, r"line 1: found size '9+\.\.\.'"),
        ("\t10\n", r"line 1: found '\\t10'"),
        ("chrom\tsize\nchr1\t10\n", r"line 1: found size 'size'"),
        (
            "chr1\t10\nchr2\t5\nchr1\t10\n",
            r"line 3: found chromosome 'chr1' again; expected each chromosome once",
        ),
        ("# nothing\n\n", r"found no line with a chromosome"),
        ("", r"found no line with a chromosome"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Assembly.from_chrom_sizes(write(tmp_path / "bad.sizes", text), "toy")
    assert "bad.sizes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Assembly.from_chrom_sizes(tmp_path / "absent", "toy")
    with pytest.raises(InputError, match="directory"):
        Assembly.from_chrom_sizes(tmp_path, "toy")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"chr1\t10\nchr2\t20\n")[:-9])
    with pytest.raises(InputError, match="found damaged or cut gzip data"):
        Assembly.from_chrom_sizes(tmp_path / "cut.gz", "toy")
    (tmp_path / "binary").write_bytes(b"chr1\t10\n\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        Assembly.from_chrom_sizes(tmp_path / "binary", "toy")

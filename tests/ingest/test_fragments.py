"""Fragment files counted over islands, against a plain loop over lines and peaks."""

import gzip
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.fragments import CountingRules, FragmentCounts, count_fragments
from annatac_scale.ingest.kernel import index_peaks
from annatac_scale.ingest.peaks import PeakSet, as_intervals

TOY = Assembly("toy", ("chr1", "chr2", "chrM"), (10_000, 4_200, 900))
BINS = IslandSpace.all(TOY, width_bp=1000)

Row = tuple[str, int, int, str]
Interval = tuple[str, int, int]


def write(path: Path, rows: Sequence[tuple[object, ...]]) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def count(path: Path, peaks: PeakSet | None = None, rules: CountingRules | None = None) -> FragmentCounts:
    peaks = PeakSet.of_space(BINS) if peaks is None else peaks
    rules = CountingRules(min_fragments=0) if rules is None else rules
    return count_fragments(path, TOY, peaks, index_peaks(peaks, TOY), rules, lambda _: None)


def as_dict(counts: FragmentCounts) -> dict[str, dict[int, int]]:
    """{barcode: {island: level}} in the order of the rows."""
    rows = {}
    for i, barcode in enumerate(counts.barcodes):
        part = counts.open[i : i + 1]
        assert (np.diff(part.islands) > 0).all()
        rows[barcode] = dict(zip(part.islands.tolist(), part.levels.tolist(), strict=True))
    return rows


def hits(fragment: Row, peak: Interval, counting: str) -> int:
    contig, start, end, _ = fragment
    chrom, left, right = peak
    if contig != chrom:
        return 0
    if counting == "fragment":
        return int(start < right and end > left)
    ends = [left <= position < right for position in (start, end - 1)]
    return int(any(ends)) if counting == "paired-insertion" else sum(ends)


def plain_loop(rows: Sequence[Row], peaks: Sequence[Interval], counting: str) -> dict[str, dict[int, int]]:
    """The rules of DESIGN.md, one fragment and one peak at a time."""
    first_bin = {"chr1": 0, "chr2": 10, "chrM": 15}
    island_of = {peak: first_bin[peak[0]] + peak[1] // 1000 for peak in peaks}
    n = Counter(island_of.values())
    sums: dict[str, Counter[int]] = {barcode: Counter() for barcode in sorted({row[3] for row in rows})}
    for row in rows:
        for peak in peaks:
            sums[row[3]][island_of[peak]] += hits(row, peak, counting)
    return {
        barcode: {i: min(5, -(-s // n[i])) for i, s in sorted(islands.items()) if s}
        for barcode, islands in sums.items()
    }


def intervals(longest: int) -> st.SearchStrategy[Interval]:
    """Intervals inside the toy genome; many of them near each other, so that they meet."""

    def place(drawn: tuple[int, int, int, bool]) -> Interval:
        chrom, start, length, near = drawn
        size = TOY.sizes[chrom]
        start = (start % 300 if near else start) % size
        return TOY.chromosomes[chrom], start, min(size, start + length)

    return st.tuples(st.integers(0, 2), st.integers(0, 9999), st.integers(1, longest), st.booleans()).map(
        place
    )


BARCODES = st.sampled_from(["A", "B-1", "CC:x", "d d", "#e", "AAACCC" * 6])


@pytest.mark.parametrize("counting", ["insertion", "fragment", "paired-insertion"])
@given(
    rows=st.lists(st.tuples(intervals(700), BARCODES).map(lambda t: (*t[0], t[1])), min_size=1, max_size=40),
    peaks=st.lists(intervals(3000), min_size=1, max_size=25, unique=True),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
def test_counts_equal_a_plain_loop_with_overlapping_unsorted_peaks(
    tmp_path: Path, counting: str, rows: list[Row], peaks: list[Interval]
) -> None:
    peak_set = PeakSet.of_intervals(as_intervals(peaks), TOY, BINS, "peaks")
    rules = CountingRules(counting, min_fragments=0, text_bytes=64, n_keys=1)
    counts = count(write(tmp_path / "f.tsv", rows), peak_set, rules)
    assert as_dict(counts) == plain_loop(rows, peaks, counting)


@pytest.mark.parametrize("counting", ["insertion", "fragment", "paired-insertion"])
def test_without_peaks_the_islands_are_the_peaks(tmp_path: Path, counting: str) -> None:
    rows = [
        ("chr1", 900, 1100, "A"),
        ("chr1", 990, 1000, "A"),
        ("chr2", 0, 4200, "B"),
        ("chrM", 899, 900, "B"),
    ]
    bins = [("chr1", i, i + 1000) for i in range(0, 10_000, 1000)]
    bins += [("chr2", i, min(i + 1000, 4200)) for i in range(0, 4200, 1000)] + [("chrM", 0, 900)]
    counts = count(write(tmp_path / "f.tsv", rows), None, CountingRules(counting, min_fragments=0))
    assert as_dict(counts) == plain_loop(rows, bins, counting)


def test_a_fragment_over_more_peaks_than_the_buffer_holds_counts_in_all(tmp_path: Path) -> None:
    peaks = [("chr1", i, i + 5) for i in range(0, 9000, 10)]
    peak_set = PeakSet.of_intervals(as_intervals(peaks), TOY, BINS, "peaks")
    rows = [("chr1", 0, 10_000, "A"), ("chr1", 0, 9000, "B")] * 3
    counts = count(
        write(tmp_path / "f.tsv", rows), peak_set, CountingRules("fragment", min_fragments=0, n_keys=1)
    )
    assert as_dict(counts) == {name: dict.fromkeys(range(9), 3) for name in "AB"}


ROWS: list[Row] = [
    (("chr1", "chr2", "chrM")[i % 3], i * 37 % 800, i * 37 % 800 + 20 + i % 60, f"BC{i * i % 23}-1")
    for i in range(500)
]


def test_the_order_of_lines_and_further_columns_never_matter(tmp_path: Path) -> None:
    expected = count(write(tmp_path / "f.tsv", ROWS))
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for name, rows in {
        "shuffled": shuffled,
        "by barcode": sorted(ROWS, key=lambda row: row[3]),
        "counts": [(*row, i % 9) for i, row in enumerate(ROWS)],
        "odd counts": [(*row, (".", "1.0", "")[i % 3], "+") for i, row in enumerate(ROWS)],
        "eight": [(*row, 1, "+", "x", "") for row in shuffled],
    }.items():
        found = count(write(tmp_path / name, rows))
        assert found.barcodes == expected.barcodes
        assert as_dict(found) == as_dict(expected)
        assert found.lines == expected.lines


def test_comments_and_blank_lines_anywhere_are_counted_as_such(tmp_path: Path) -> None:
    expected = as_dict(count(write(tmp_path / "f.tsv", ROWS)))
    lines = [("\t".join(map(str, row)) + "\n").encode() for row in ROWS]
    strange = [b"# id=x\n", b"\n", b"   \n", b"\t\n", b"#\n", b"\r\n", b"#chr1\t1\t2\tA\n"]
    for text_bytes in (1, 100, 4096):
        mixed = [line for pair in zip(lines, strange * 100, strict=False) for line in pair]
        path = tmp_path / "mixed.tsv"
        path.write_bytes(b"".join(strange + mixed + strange))
        counts = count(path, None, CountingRules(min_fragments=0, text_bytes=text_bytes))
        assert as_dict(counts) == expected
        assert counts.lines["comment"] == 14 + 500


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("ended", [True, False])
def test_line_ends_and_a_missing_last_newline_do_not_matter(tmp_path: Path, ending: str, ended: bool) -> None:
    text = ending.join("\t".join(map(str, row)) for row in ROWS) + ending * ended
    path = tmp_path / "f.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert as_dict(count(path)) == as_dict(count(write(tmp_path / "g.tsv", ROWS)))


@pytest.mark.parametrize("barcode", ["a_b", "x:1:2", "#x", "A-1", "two words", " lead", "é", "B" * 10_000])
def test_column_4_is_kept_whole(tmp_path: Path, barcode: str) -> None:
    rows = [("chr1", i, i + 9, barcode) for i in range(50)]
    path = tmp_path / "f.tsv.gz"
    path.write_bytes(gzip.compress("".join("\t".join(map(str, row)) + "\n" for row in rows).encode()))
    counts = count(path, None, CountingRules(min_fragments=0, text_bytes=3000))
    assert counts.barcodes == [barcode]
    assert counts.n_fragments.tolist() == [50]


def test_thousands_of_scaffolds_with_odd_names(tmp_path: Path) -> None:
    names = [f"HLA-{i}*01:0{i % 9}_v.{i}-x" for i in range(10_000)]
    scaffolds = Assembly("many", tuple(sorted(names)), (500,) * len(names))
    space = IslandSpace.all(scaffolds)
    path = write(tmp_path / "f.tsv", [(name, 1, 5, "A") for name in names])
    peaks = PeakSet.of_space(space)
    rules = CountingRules(min_fragments=0)
    counts = count_fragments(path, scaffolds, peaks, index_peaks(peaks, scaffolds), rules, lambda _: None)
    assert counts.open.islands.tolist() == list(range(10_000))
    assert set(counts.open.levels.tolist()) == {2}


def test_contig_names_are_reconciled_and_reported(tmp_path: Path) -> None:
    rows = [("1", 5, 9, "A"), ("chr1", 5, 9, "A"), ("toy_chr2", 1, 5, "A"), ("MT", 1, 2, "A")]
    rows += [("mm9_chr1", 1, 2, "A"), ("CAADRL010001205.1", 1, 2, "A"), ("CAADRL010001205.1", 3, 4, "A")]
    counts = count(write(tmp_path / "f.tsv", rows))
    assert as_dict(counts) == {"A": {0: 4, 10: 2, 15: 2}}
    assert counts.contigs == {
        "renamed": {"1": "chr1", "toy_chr2": "chr2", "MT": "chrM"},
        "other": {"CAADRL010001205.1": 2, "mm9_chr1": 1},
        "n_other": 2,
    }
    assert counts.chromosomes == ["chr1", "chr2", "chrM"]


def test_a_file_without_a_line_on_the_assembly_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", [("NC_1", 5, 9, "A"), ("NC_2", 5, 9, "A")])
    with pytest.raises(
        InputError, match=r"f\.tsv: found 2 fragments on 'NC_1', 'NC_2', none on a chromosome of toy"
    ):
        count(path)


@pytest.mark.parametrize("text", ["", "# only\n#headers\n", "\n\n"])
def test_a_file_without_fragments_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.tsv"
    path.write_text(text)
    for rules in (CountingRules(min_fragments=0), CountingRules(barcodes=("A",))):
        with pytest.raises(InputError, match=r"f\.tsv: found no fragment"):
            count(path, None, rules)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("chr1\t5\t9", "4 or more columns"),
        ("chr1 5 9 A", "4 or more columns"),
        ("chrom\tstart\tend\tbarcode\tcount", "a whole number as start"),
        ("chr1\t-5\t9\tA", "a whole number as start"),
        ("chr1\t5.0\t9\tA", "a whole number as start"),
        ("chr1\t\t9\tA", "a whole number as start"),
        ("chr1\t5\t1e3\tA", "a whole number as end"),
        ("chr1\t5\t 9\tA", "a whole number as end"),
        ("chr1\t9\t9\tA", "an end greater than the start"),
        ("chr1\t9\t5\tA", "an end greater than the start"),
        ("chr1\t5\t10001\tA", "an end of at most 10000"),
        ("1\t10001\t10002\tA", "an end of at most 10000"),
        ("chr1\t5\t99999999999999999999\tA", "a whole number as end"),
        ("chr1\t5\t5000000000\tA", "an end of at most 10000"),
        ("chr1\t5\t9\t", "a barcode in column 4"),
        ("chr1\t5\t9\t\t1", "a barcode in column 4"),
        ("elsewhere\t9\t5\tA", "an end greater than the start"),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_an_invalid_line_stops_with_its_place(tmp_path: Path, line: str, expected: str, ending: str) -> None:
    path = tmp_path / "f.tsv"
    path.write_bytes(("# head\nchr1\t1\t2\tA\n\n" + line + ending).encode())
    with pytest.raises(InputError) as caught:
        count(path, None, CountingRules(min_fragments=0, text_bytes=8))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 4: found {line!r}; expected {expected}")
    assert "\n" not in message


def test_a_barcode_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_bytes(b"chr1\t1\t5\tA\xff\n")
    with pytest.raises(
        InputError, match=r"f\.tsv: found the name b'A.xff'; expected contigs and barcodes in UTF-8"
    ):
        count(path)


def test_a_long_invalid_line_is_shown_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", [("chr1", 9, 5, "A" * 5000)])
    with pytest.raises(InputError) as caught:
        count(path)
    assert len(str(caught.value)) < 400


def test_a_truncated_gzip_names_file_byte_and_line(tmp_path: Path) -> None:
    text = "".join("\t".join(map(str, row)) + "\n" for row in ROWS).encode()
    path = tmp_path / "f.tsv.gz"
    path.write_bytes(gzip.compress(text)[:-30])
    with pytest.raises(
        InputError, match=r"f\.tsv\.gz, after line [0-9]+: found .*byte .*; expected a whole file"
    ):
        count(path)


def test_listed_barcodes_are_the_rows_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", ROWS)
    everything = as_dict(count(path))
    listed = ("BC9-1", "none", "BC0-1", "BC4")
    counts = count(path, None, CountingRules(barcodes=listed))
    assert as_dict(counts) == {
        "BC9-1": everything["BC9-1"],
        "none": {},
        "BC0-1": everything["BC0-1"],
        "BC4": {},
    }
    assert list(counts.barcodes) == list(listed)
    assert counts.n_fragments.tolist() == [sum(row[3] == name for row in ROWS) for name in listed]


def test_a_list_that_matches_nothing_is_refused_with_examples_of_both(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", [("chr1", 1, 5, "AAA-1")])
    with pytest.raises(InputError, match=r"any of the 1 listed barcodes, such as 'AAA';.*such as 'AAA-1'"):
        count(path, None, CountingRules(barcodes=("AAA",)))


def test_barcodes_with_enough_fragments_are_cells_sorted_by_bytes(tmp_path: Path) -> None:
    rows = [("chr1", 1, 5, name) for name in ["b"] * 3 + ["a"] * 2 + ["B"] * 4 + ["é"] * 3]
    counts = count(write(tmp_path / "f.tsv", rows), None, CountingRules(min_fragments=3))
    assert counts.barcodes == ["B", "b", "é"]
    assert counts.lines["not_a_cell"] == 2


def test_keeping_no_cell_says_what_the_largest_has(tmp_path: Path) -> None:
    rows = [("chr1", 1, 5, name) for name in ["b"] * 345 + ["a"] * 2]
    with pytest.raises(InputError, match=r"no barcode with 1,000 .* 'b', has 345; .* --min-fragments 300"):
        count(write(tmp_path / "f.tsv", rows), None, CountingRules())


LINES = st.one_of(
    st.tuples(intervals(700), BARCODES).map(lambda t: "\t".join(map(str, (*t[0], t[1])))),
    st.sampled_from(["", "# c", " ", "chrX\t1\t2\tA", "chrUn_1\t5\t6\tB-1\t1"]),
)


@given(lines=st.lists(LINES, min_size=1, max_size=40), listed=st.none() | st.just(("A", "d d", "z")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
def test_every_line_is_accounted_for_once(
    tmp_path: Path, lines: list[str], listed: tuple[str, ...] | None
) -> None:
    peaks = [("chr1", 0, 150), ("chr1", 700, 1300), ("chr2", 100, 300)]
    peak_set = PeakSet.of_intervals(as_intervals(peaks), TOY, BINS, "peaks")
    path = tmp_path / "f.tsv"
    path.write_text("\n".join([*lines, "chr1\t1\t5\tA", "chr1\t2\t5\tA"]) + "\n")
    found = count(path, peak_set, CountingRules(barcodes=listed, min_fragments=2)).lines

    fields = [line.split("\t") for line in path.read_text().splitlines()]
    rows = [(f[0], int(f[1]), int(f[2]), f[3]) for f in fields if len(f) >= 4]
    known = [row for row in rows if row[0] in TOY.chromosomes]
    per_barcode = Counter(row[3] for row in known)
    cells = set(listed) if listed else {barcode for barcode, n in per_barcode.items() if n >= 2}
    inside = [row for row in known if row[3] in cells and any(hits(row, peak, "insertion") for peak in peaks)]
    of_cells = [row for row in known if row[3] in cells]
    assert found == {
        "lines": len(fields),
        "comment": len(fields) - len(rows),
        "other_contig": len(rows) - len(known),
        "not_a_cell": len(known) - len(of_cells),
        "outside_islands": len(of_cells) - len(inside),
        "counted": len(inside),
    }
    assert found["lines"] == sum(n for name, n in found.items() if name != "lines")

"""Fragment files counted over islands, against a plain loop over lines and peaks."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from compressed_files import FORMS, bgzf
from counted import BINS, STRATEGIES, TOY, Counted, Way, count, lines_of, peak_set, some_bins
from fragment_lines import FRAGMENTS, PEAKS, intervals, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_counts import FATES, Interval, Plain, count_plainly

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.peaks import PeakSet

FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
SOME = some_bins(0, 2, 3, 10, 12, 15)
LISTED = ("d d", "A", "absent", "é_2")

Row = tuple[str, int, int, str]


def written(tmp_path: Path, data: bytes, name: str = "f") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def check(found: Counted, expected: Plain) -> None:
    assert list(found.rows.items()) == [(cell.decode(), row) for cell, row in expected.rows.items()]
    assert found.cells.lines == expected.lines
    assert found.cells.invalid == expected.invalid
    assert found.cells.lines["lines"] == sum(found.cells.lines[fate] for fate in FATES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    text=texts(),
    peaks=PEAKS,
    quality=st.booleans(),
    listed=st.none() | st.just(LISTED),
    min_fragments=st.integers(0, 2),
    n_keys=st.integers(1, 50),
)
@settings(**FEW, max_examples=120)
def test_counts_and_lines_equal_a_plain_loop(
    tmp_path: Path,
    strategy: str,
    text: bytes,
    peaks: list[Interval],
    quality: bool,
    listed: tuple[str, ...] | None,
    min_fragments: int,
    n_keys: int,
) -> None:
    """Case 10 and the whole: peaks unsorted, over each other, over bins, outside islands, on unknown contigs."""
    way = Way(
        peak_set(peaks, SOME),
        strategy=strategy,
        listed=listed,
        quality=quality,
        count_invalid=True,
        min_fragments=min_fragments,
        n_keys=n_keys,
    )
    expected = count_plainly(text, peaks, SOME, TOY, strategy, listed, min_fragments)
    check(count(written(tmp_path, text), way), expected)


@pytest.mark.parametrize("form", FORMS)
@given(
    text=texts(),
    share=st.floats(0.02, 1.1),
    text_bytes=st.integers(1, 500),
    read_bytes=st.integers(1, 500),
    n_keys=st.integers(1, 9),
    n_strands=st.integers(1, 4),
    block=st.integers(1, 300),
    listed=st.none() | st.just(LISTED),
)
@settings(**FEW, max_examples=25)
def test_no_form_ranges_buffers_or_strands_change_anything(
    tmp_path: Path,
    form: str,
    text: bytes,
    share: float,
    text_bytes: int,
    read_bytes: int,
    n_keys: int,
    n_strands: int,
    block: int,
    listed: tuple[str, ...] | None,
) -> None:
    """Cases 2, 13, 16, 18 and 22."""
    whole = Way(count_invalid=True, listed=listed)
    data = bgzf(text, block) if form == "bgzf" else FORMS[form](text)
    way = replace(
        whole,
        range_bytes=max(1, int(share * len(data))),
        text_bytes=text_bytes,
        read_bytes=read_bytes,
        n_keys=n_keys,
        n_strands=n_strands,
    )
    found = count(written(tmp_path, data), way)
    assert found.essence() == count(written(tmp_path, text, "g"), whole).essence()
    assert found.told == (len(data), found.cells.lines["lines"])


@given(lines=st.lists(FRAGMENTS, min_size=2, max_size=20), seed=st.integers(0, 9))
@settings(**FEW, max_examples=20)
def test_lines_in_any_order_count_the_same(tmp_path: Path, lines: list[bytes], seed: int) -> None:
    """Case 2: by coordinate, by barcode and at random."""
    by_barcode = sorted(lines, key=lambda line: line.split(b"\t")[3])
    shuffled = random.Random(seed).sample(lines, len(lines))
    essence = count(written(tmp_path, b"\n".join(sorted(lines)))).essence()
    for order in (by_barcode, shuffled):
        text = b"\n".join(order)
        assert count(written(tmp_path, text), Way(range_bytes=1 + len(text) // 20)).essence() == essence


def test_ranges_of_a_single_byte_give_each_line_once(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfchr1\t5\t9\tA\r\n\n\n#\n" + lines_of(
        [("chr1", i, i + 9, "ABC"[i % 3]) for i in range(12)]
    )
    expected = count(written(tmp_path, text)).essence()
    for data in (text, bgzf(text, 1)):
        for range_bytes in (1, 2) if data == text else (28, 29):
            assert count(written(tmp_path, data), Way(range_bytes=range_bytes)).essence() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("quality", [True, False])
def test_without_peaks_the_islands_are_the_peaks(tmp_path: Path, strategy: str, quality: bool) -> None:
    rows = [
        ("chr1", 900, 1100, "A"),
        ("chr1", 990, 1000, "A"),
        ("chr2", 0, 4200, "B"),
        ("chrM", 899, 900, "B"),
    ]
    bins = [("chr1", i, i + 1000) for i in range(0, 10_000, 1000)]
    bins += [("chr2", i, min(i + 1000, 4200)) for i in range(0, 4200, 1000)] + [("chrM", 0, 900)]
    found = count(written(tmp_path, lines_of(rows)), Way(strategy=strategy, quality=quality))
    check(found, count_plainly(lines_of(rows), bins, BINS, TOY, strategy))


def test_a_fragment_over_more_peaks_than_the_buffer_holds_counts_in_all(tmp_path: Path) -> None:
    peaks = [("chr1", i, i + 5) for i in range(0, 9000, 10)]
    rows = [("chr1", 0, 10_000, "A"), ("chr1", 0, 9000, "B")] * 3
    found = count(written(tmp_path, lines_of(rows)), Way(peak_set(peaks), strategy="fragment", n_keys=1))
    assert found.rows == {name: dict.fromkeys(range(9), 3) for name in "AB"}


def test_an_end_in_many_peaks_counts_in_each(tmp_path: Path) -> None:
    peaks = [("chr1", i, 1000 + i) for i in range(500)]
    rows = [("chr1", 600, 990, "A"), ("chr1", 1200, 1201, "A")]
    for strategy in STRATEGIES:
        found = count(written(tmp_path, lines_of(rows)), Way(peak_set(peaks), strategy=strategy, n_keys=1))
        check(found, count_plainly(lines_of(rows), peaks, BINS, TOY, strategy))


@given(rows=st.lists(intervals(700), min_size=1, max_size=30), width=st.integers(50, 4000))
@settings(**FEW, max_examples=30)
def test_insertions_do_not_depend_on_bins(tmp_path: Path, rows: list[Interval], width: int) -> None:
    """Case 10: two insertions a fragment, whatever the bins."""
    space = IslandSpace.all(TOY, width_bp=width)
    path = written(tmp_path, lines_of([(*row, "A") for row in rows]))
    found = count(path, Way(PeakSet.of_space(space)))
    sites = [(row[0], end // width) for row in rows for end in (row[1], row[2] - 1)]
    assert sorted(found.rows["A"].values()) == sorted(min(5, sites.count(site)) for site in set(sites))


ROWS: list[Row] = [
    (("chr1", "chr2", "chrM")[i % 3], i * 37 % 800, i * 37 % 800 + 20 + i % 60, f"BC{i * i % 23}-1")
    for i in range(500)
]


def test_the_order_of_lines_and_further_columns_never_change_counts(tmp_path: Path) -> None:
    """Cases 2, 14 and 19: 4 to 8 columns, and whatever column 5 holds."""
    expected = count(written(tmp_path, lines_of(ROWS)))
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for rows in (
        shuffled,
        sorted(ROWS, key=lambda row: row[3]),
        [(*row, i % 9) for i, row in enumerate(ROWS)],
        [(*row, (".", "1.0", "")[i % 3], "+") for i, row in enumerate(ROWS)],
        [(*row, 10**30, "+", "x") for row in ROWS],
        [(*row, 1, "+", "x", "") for row in shuffled],
        [(*row, *range(i % 5)) for i, row in enumerate(ROWS)],
    ):
        found = count(written(tmp_path, lines_of(rows)))
        assert found.rows == expected.rows
        assert list(found.rows) == list(expected.rows)
        assert found.cells.lines == expected.cells.lines


@pytest.mark.parametrize("form", ["plain", "bgzf"])
def test_comments_and_blank_lines_at_every_border_are_counted_as_such(tmp_path: Path, form: str) -> None:
    """Case 16: at the top, in the middle, at the end, and at borders of ranges and blocks."""
    expected = count(written(tmp_path, lines_of(ROWS))).rows
    lines = lines_of(ROWS).splitlines(keepends=True)
    strange = [b"# id=x\n", b"\n", b"   \n", b"\t\n", b"#\n", b"\r\n", b"#chr1\t1\t2\tA\n"]
    mixed = [line for pair in zip(lines, strange * 100, strict=False) for line in pair]
    text = b"".join(strange + mixed + strange)
    for shift in range(0, 24, 3):
        data = b"#" * shift + b"\n" + text
        packed = bgzf(data, 600) if form == "bgzf" else data
        found = count(written(tmp_path, packed), Way(range_bytes=600))
        assert found.rows == expected
        assert found.cells.lines["comment"] == 14 + 500 + 1


def test_a_blank_line_is_one_after_a_contig_of_spaces_too(tmp_path: Path) -> None:
    """Case 16: what a line is does not depend on the line before."""
    lines = [b"chr1\t1\t2\tA", b" \t1\t2\tA", b" \t", b" \t \t"]
    for order in (lines, lines[::-1]):
        found = count(written(tmp_path, b"\n".join(order)))
        assert (found.cells.lines["comment"], found.cells.lines["other_contig"]) == (2, 1)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("further", [(), (3,), ("",), (3, "+")])
def test_line_ends_and_a_mark_do_not_matter(
    tmp_path: Path, ending: str, ended: bool, mark: bytes, further: tuple[object, ...]
) -> None:
    """Case 22."""
    rows = [(*row, *further) for row in ROWS]
    text = lines_of(rows, ending)
    path = written(tmp_path, mark + (text if ended else text.removesuffix(ending.encode())))
    assert count(path).essence() == count(written(tmp_path, lines_of(rows), "g")).essence()


@pytest.mark.parametrize(
    "barcode", ["a_b", "x:1:2", "#x", "A-1", "two words", " lead", "é", "\x00", "a\x00b", "a\rb"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_column_4_is_kept_whole(tmp_path: Path, barcode: str, listed: bool) -> None:
    """Case 9: counts like a renamed one."""
    rows = [("chr1", i, i + 9, name) for i in range(50) for name in (barcode, "other")]
    found = count(
        written(tmp_path, lines_of(rows)), Way(listed=[barcode] if listed else None, range_bytes=300)
    )
    renamed = count(written(tmp_path, lines_of([(*row[:3], "renamed") for row in rows if row[3] == barcode])))
    assert found.rows[barcode] == renamed.rows["renamed"]
    assert set(found.rows) == {barcode} | (set() if listed else {"other"})


@pytest.mark.parametrize("form", FORMS)
def test_barcodes_of_10_kb_may_span_blocks_and_ranges(tmp_path: Path, form: str) -> None:
    """Case 18."""
    names = ["B" * 10_000, "B" * 9_999 + "C", "C"]
    rows = [("chr1", i, i + 9, names[i % 3]) for i in range(60)]
    short = count(written(tmp_path, lines_of([(*row[:3], str(names.index(row[3]))) for row in rows])))
    for range_bytes in (4000, 1 << 20):
        path = written(tmp_path, FORMS[form](lines_of(rows)))
        way = Way(range_bytes=max(range_bytes, path.stat().st_size // 30), text_bytes=3000)
        found = count(path, way)
        assert [found.rows[name] for name in names] == list(short.rows.values())
        assert count(path, replace(way, listed=names)).rows == found.rows


def test_thousands_of_scaffolds_with_odd_names(tmp_path: Path) -> None:
    """Case 15."""
    names = [f"HLA-{i}*01:0{i % 9}_v.{i}-x" for i in range(10_000)]
    scaffolds = Assembly("many", tuple(sorted(names)), (500,) * len(names))
    peaks = PeakSet.of_space(IslandSpace.all(scaffolds))
    path = written(tmp_path, lines_of([(name, 1, 5, "A") for name in names]))
    for range_bytes in (50_000, 1 << 20):
        found = count(path, Way(peaks, assembly=scaffolds, range_bytes=range_bytes))
        assert found.rows == {"A": dict.fromkeys(range(10_000), 2)}


def test_contig_names_are_reconciled_and_reported(tmp_path: Path) -> None:
    """Cases 7 and 21: numbers first and names with a dot later."""
    rows = [("1", 5, 9, "A"), ("chr1", 5, 9, "A"), ("toy_chr2", 1, 5, "A"), ("MT", 1, 2, "A")]
    rows += [("mm9_chr1", 1, 2, "A"), ("CAADRL010001205.1", 1, 2, "A"), ("CAADRL010001205.1", 3, 4, "A")]
    for range_bytes in (15, 1 << 20):
        found = count(written(tmp_path, lines_of(rows)), Way(range_bytes=range_bytes))
        assert found.rows == {"A": {0: 4, 10: 2, 15: 2}}
        assert found.cells.contigs == {
            "renamed": {"1": "chr1", "toy_chr2": "chr2", "MT": "chrM"},
            "other": {"CAADRL010001205.1": 2, "mm9_chr1": 1},
            "n_other": 2,
        }
        assert found.cells.chromosomes == ["chr1", "chr2", "chrM"]


def test_one_spelling_or_another_of_all_contigs_counts_the_same(tmp_path: Path) -> None:
    """Case 7: never an all-zero store."""
    expected = count(written(tmp_path, lines_of(ROWS))).rows
    for rename in (
        lambda name: name.removeprefix("chr"),
        lambda name: f"toy_{name}",
        lambda name: f"toy_{name.removeprefix('chr')}",
        lambda name: "MT" if name == "chrM" else name,
    ):
        assert (
            count(written(tmp_path, lines_of([(rename(row[0]), *row[1:]) for row in ROWS]))).rows == expected
        )


def test_an_index_beside_the_file_is_never_looked_at(tmp_path: Path) -> None:
    """Case 12: no .tbi, a stale one, a wrong one."""
    path = written(tmp_path, bgzf(lines_of(ROWS), 500), "f.tsv.gz")
    expected = count(path, Way(range_bytes=700)).essence()
    for data in (b"", b"TBI\1 stale", bgzf(b"TBI\1" + bytes(100))):
        written(tmp_path, data, "f.tsv.gz.tbi")
        assert count(path, Way(range_bytes=700)).essence() == expected

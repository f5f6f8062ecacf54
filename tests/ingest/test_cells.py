"""Which barcodes become cells, the rank curve, and what is told where nothing fits."""

from pathlib import Path

import numpy as np
import pytest
from counted import BINS, TOY, Way, count, lines_of, peak_set, tss_table
from fragment_lines import FRAGMENTS, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_counts import count_plainly, quality_plainly

from annatac_scale.errors import InputError

FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
ROWS = [
    (("chr1", "chr2", "chrM")[i % 3], i * 37 % 800, i * 37 % 800 + 20 + i % 60, f"BC{i * i % 23}-1")
    for i in range(500)
]
SITES = [("chr1", 150), ("chr1", 2100), ("chr2", 90)]


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f.tsv"
    path.write_bytes(data)
    return path


def test_listed_barcodes_are_the_rows_in_their_order(tmp_path: Path) -> None:
    """Case 8: each keeps a row, also without fragments; the others are counted as no cells."""
    path = written(tmp_path, lines_of(ROWS))
    everything = count(path).rows
    listed = ["BC9-1", "none", "BC0-1", "BC4"]
    for way in (
        Way(listed=listed),
        Way(listed=listed, quality=False, range_bytes=999),
        Way(listed=listed, n_keys=1),
    ):
        found = count(path, way)
        assert list(found.rows.items()) == [
            ("BC9-1", everything["BC9-1"]),
            ("none", {}),
            ("BC0-1", everything["BC0-1"]),
            ("BC4", {}),
        ]
        of_cells = sum(row[3] in listed for row in ROWS)
        assert (found.cells.lines["counted"], found.cells.lines["not_a_cell"]) == (
            of_cells,
            len(ROWS) - of_cells,
        )
        assert found.cells.quality[:, 0].tolist() == [sum(row[3] == name for row in ROWS) for name in listed]


def test_more_rows_than_a_shard_holds_keep_their_order(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(9001)]
    rows = [("chr1", i % 10 * 1000, i % 10 * 1000 + 20, names[i * 7919 % 9001]) for i in range(9001)]
    path = written(tmp_path, lines_of(rows))
    of_name = {row[3]: {row[1] // 1000: 2} for row in rows}
    called = count(path, Way(range_bytes=path.stat().st_size // 5))
    assert list(called.rows.items()) == [(name, of_name[name]) for name in sorted(names)]
    listed = names[::-2]
    chosen = count(path, Way(listed=listed, quality=False, range_bytes=path.stat().st_size // 5))
    assert list(chosen.rows.items()) == [(name, of_name[name]) for name in listed]


def test_a_list_that_matches_nothing_is_refused_with_examples_of_both(tmp_path: Path) -> None:
    path = written(tmp_path, b"chr1\t1\t5\tAAA-1\n")
    with pytest.raises(InputError, match=r"any of the 1 listed barcodes, such as 'AAA';.*such as 'AAA-1'"):
        count(path, Way(listed=["AAA"]))
    with pytest.raises(InputError, match=r"any of the 1 listed barcodes, such as 'AAA', in its islands;"):
        count(path, Way(listed=["AAA"], quality=False))


def test_barcodes_with_enough_fragments_are_cells_sorted_by_bytes(tmp_path: Path) -> None:
    rows = [("chr1", 1, 5, name) for name in ["b"] * 3 + ["a"] * 2 + ["B"] * 4 + ["é"] * 3 + ["b\0"] * 3]
    found = count(written(tmp_path, lines_of(rows)), Way(min_fragments=3, range_bytes=40))
    assert list(found.rows) == ["B", "b", "b\0", "é"]
    assert found.cells.lines["not_a_cell"] == 2


def test_fragments_on_other_contigs_make_no_cell(tmp_path: Path) -> None:
    rows = [("chrUn", 1, 5, "a")] * 9 + [("chr1", 1, 5, "b")]
    assert list(count(written(tmp_path, lines_of(rows)), Way(min_fragments=0)).rows) == ["b"]


def test_fragments_outside_islands_make_a_cell(tmp_path: Path) -> None:
    rows = [("chr1", 500, 520, "a")] * 2 + [("chr1", 1, 5, "b")] * 2
    for quality in (True, False):
        way = Way(peak_set([("chr1", 0, 10)]), min_fragments=2, quality=quality)
        assert count(written(tmp_path, lines_of(rows)), way).rows == {"a": {}, "b": {0: 4}}


@given(text=texts(), min_fragments=st.integers(0, 4), min_tsse=st.sampled_from([0.5, 2, 10, 100]))
@settings(**FEW, max_examples=60)
def test_cells_have_the_fragments_and_the_enrichment_asked_for(
    tmp_path: Path, text: bytes, min_fragments: int, min_tsse: float
) -> None:
    peaks = [("chr1", 0, 3000), ("chr2", 0, 200)]
    way = Way(
        peak_set(peaks),
        tss_table(SITES),
        count_invalid=True,
        min_fragments=min_fragments,
        min_tsse=min_tsse,
        range_bytes=max(50, len(text) // 9),
    )
    plain = count_plainly(text, peaks, BINS, TOY)
    expected = [
        barcode.decode()
        for barcode, fragments in plain.fragments.items()
        if len(fragments) >= min_fragments
        and quality_plainly(fragments, 0, peaks, SITES, TOY)["tss_enrichment"] >= min_tsse
    ]
    path = written(tmp_path, text)
    if expected:
        found = count(path, way)
        assert list(found.rows) == expected
        assert found.cells.barcode_rank is not None
        assert found.cells.barcode_rank["n_cells"] == len(expected)
        inside = sum(plain.inside.values())
        assert found.cells.lines["counted"] == sum(plain.inside[name.encode()] for name in expected)
        assert found.cells.lines["not_a_cell"] == inside - found.cells.lines["counted"]
    else:
        with pytest.raises(InputError, match="found no barcode with"):
            count(path, way)


@given(lines=st.lists(FRAGMENTS, min_size=1, max_size=30), listed=st.none() | st.just(["A", "absent"]))
@settings(**FEW, max_examples=40)
def test_the_rank_curve_is_of_all_barcodes(
    tmp_path: Path, lines: list[bytes], listed: list[str] | None
) -> None:
    text = b"\n".join([*lines, b"chr1\t1\t5\tA"])
    found = count(written(tmp_path, text), Way(listed=listed)).cells.barcode_rank
    n = sorted(count_plainly(text, [("chr1", 0, 100)], BINS, TOY).n_fragments.values(), reverse=True)
    assert found == {
        "rank": list(range(1, len(n) + 1)),
        "n_fragments": n,
        "n_barcodes": len(n),
        "n_cells": 2 if listed else len(n),
    }


def test_a_long_rank_curve_is_thinned_from_its_first_to_its_last(tmp_path: Path) -> None:
    names = [f"b{i}" for i in range(3000)]
    rows = [("chr1", 1, 5, name) for i, name in enumerate(names) for _ in range(1 + 3000 // (i + 1) // 30)]
    curve = count(written(tmp_path, lines_of(rows))).cells.barcode_rank
    n = np.sort([1 + 3000 // (i + 1) // 30 for i in range(3000)])[::-1]
    assert curve is not None
    assert (curve["rank"][0], curve["rank"][-1]) == (1, 3000)
    assert len(curve["rank"]) <= 200
    assert (np.diff(curve["rank"]) > 0).all()
    assert curve["n_fragments"] == n[np.array(curve["rank"]) - 1].tolist()


def test_the_curve_is_left_out_where_not_all_barcodes_are_followed(tmp_path: Path) -> None:
    found = count(written(tmp_path, lines_of(ROWS)), Way(listed=["BC0-1"], quality=False))
    assert found.cells.barcode_rank is None
    assert count(written(tmp_path, lines_of(ROWS)), Way(quality=False)).cells.barcode_rank is not None


def test_keeping_no_cell_says_what_the_largest_has(tmp_path: Path) -> None:
    rows = [("chr1", 1, 5, name) for name in ["b"] * 345 + ["a"] * 2]
    path = written(tmp_path, lines_of(rows))
    with pytest.raises(InputError, match=r"no barcode with 1,000 .* 'b', has 345; .* --min-fragments 300"):
        count(path, Way(min_fragments=1000))
    with pytest.raises(
        InputError, match=r"and a TSS enrichment of 5 .*; 1 have the fragments; .* lower --min-tsse"
    ):
        count(path, Way(min_fragments=300, min_tsse=5, tss=tss_table([("chr2", 4000)])))


def test_a_cell_that_is_not_utf_8_is_refused_and_others_may_be(tmp_path: Path) -> None:
    path = written(tmp_path, b"chr1\t1\t5\tA\xff\nchr1\t1\t5\tB\nchr1\t1\t5\tB\nchr\xff\t1\t5\tB\n")
    found = count(path, Way(min_fragments=2))
    assert list(found.rows) == ["B"]
    assert found.cells.contigs["n_other"] == 1
    with pytest.raises(InputError, match=r"f\.tsv: found the barcode b'A.xff'; expected barcodes in UTF-8"):
        count(path)


def test_other_contigs_are_told_by_their_lines(tmp_path: Path) -> None:
    rows = [(f"un{i:02d}", 1, 5, "A") for i in range(30) for _ in range(1 + i % 3)] + [("chr1", 1, 5, "A")]
    contigs = count(written(tmp_path, lines_of(rows)), Way(range_bytes=200)).cells.contigs
    assert contigs["n_other"] == 30
    by_lines = sorted((-(1 + i % 3), f"un{i:02d}") for i in range(30))[:20]
    assert list(contigs["other"].items()) == [(name, -n) for n, name in by_lines]

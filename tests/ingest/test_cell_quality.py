"""Every QC column, against docs/qc.md one fragment and one TSS at a time."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from counted import BINS, TOY, Way, count, lines_of, peak_set, some_bins, tss_table
from fragment_lines import PEAKS, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_counts import Interval, Tss, count_plainly, quality_plainly

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest import kernel
from annatac_scale.ingest.peaks import PeakSet
from annatac_scale.ingest.quality import fragment_quality

FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
SOME = some_bins(0, 2, 3, 10, 12, 15)
SITES = st.lists(
    st.one_of(
        st.tuples(st.just("chr1"), st.integers(0, 9999) | st.integers(0, 120) | st.integers(2000, 2300)),
        st.tuples(st.just("2"), st.integers(0, 4199) | st.sampled_from([0, 4199])),
        st.tuples(st.just("MT"), st.sampled_from([0, 1, 450, 899])),
    ),
    min_size=1,
    max_size=6,
)
"""Near each other, at both ends of chromosomes, with chromosomes named otherwise."""


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f.tsv"
    path.write_bytes(data)
    return path


def same(found: pd.DataFrame, expected: list[dict[str, float]]) -> None:
    for column, values in found.items():
        if column != "n_open":
            np.testing.assert_allclose(
                values, [row[str(column)] for row in expected], rtol=1e-12, err_msg=str(column)
            )


@pytest.mark.parametrize("strategy", ["insertion", "fragment"])
@given(text=texts(), peaks=PEAKS, sites=SITES, listed=st.none() | st.just(("d d", "A", "absent")))
@settings(**FEW, max_examples=80)
def test_every_column_equals_a_plain_loop(
    tmp_path: Path,
    strategy: str,
    text: bytes,
    peaks: list[Interval],
    sites: list[Tss],
    listed: tuple[str, ...] | None,
) -> None:
    way = Way(
        peak_set(peaks, SOME),
        tss_table(sites),
        strategy,
        listed,
        count_invalid=True,
        range_bytes=max(40, len(text) // 5),
    )
    found = count(written(tmp_path, text), way)
    plain = count_plainly(text, peaks, SOME, TOY, strategy, listed)
    expected = [
        quality_plainly(fragments, plain.inside[cell], peaks, sites, TOY)
        for cell, fragments in plain.fragments.items()
    ]
    assert set(found.obs.columns) == {*expected[0], "n_open"}
    same(found.obs, expected)
    assert found.obs["n_open"].tolist() == [len(row) for row in plain.rows.values()]
    assert list(found.obs.index) == list(found.rows)


@pytest.mark.parametrize(
    ("further", "rate"),
    [
        ([[]], math.nan),
        ([[1]], 0),
        ([[4]], 0.75),
        ([[1], [3]], 0.5),
        ([["."]], math.nan),
        ([["1.0"]], math.nan),
        ([["1.0"], [2]], 0.5),
        ([[""]], math.nan),
        ([["", "x"]], math.nan),
        ([[0]], math.nan),
        ([[0], [2]], 0.5),
        ([["-4"]], math.nan),
        ([["+4"]], math.nan),
        ([[" 4"]], math.nan),
        ([["4 "]], math.nan),
        ([["4x"]], math.nan),
        ([["007"]], 6 / 7),
        ([[4, "+"]], math.nan),
        ([[4, "-"]], math.nan),
        ([[4, "."]], math.nan),
        ([[4, "+", "x"]], math.nan),
        ([[4, "++"]], 0.75),
        ([[4, "x"]], 0.75),
        ([[4, ""]], 0.75),
        ([[4, "+"], [2]], 0.5),
        ([[4], [], ["."], [0], [2, "-"]], 0.75),
        ([[10**9]], 1 - 1e-9),
        ([[10**30], [2]], 0.5),
        ([["9" * 300]], math.nan),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("n_strands", [1, 2])
def test_the_duplicate_rate_follows_column_5(
    tmp_path: Path, further: list[list[object]], rate: float, ending: str, n_strands: int
) -> None:
    """Case 19 and docs/qc.md: 1 - n / sum of c over the lines that tell."""
    text = lines_of([("chr1", 5, 9, "A", *columns) for columns in further], ending)
    for data in (text, text.removesuffix(ending.encode())):
        found = count(written(tmp_path, data), Way(n_strands=n_strands))
        np.testing.assert_allclose(found.obs["duplicate_rate"], [rate])
        assert found.rows == {"A": {0: min(5, 2 * len(further))}}


def test_lengths_at_the_borders_of_nucleosomes(tmp_path: Path) -> None:
    lengths = {"short": 146, "mono": 147, "long mono": 294, "di": 295}
    rows = [("chr1", 0, n, barcode) for name, n in lengths.items() for barcode in (name, "all")]
    signal = count(written(tmp_path, lines_of(rows))).obs["nucleosome_signal"]
    np.testing.assert_equal(
        signal.to_dict(), {"short": 0, "mono": math.nan, "long mono": math.nan, "di": math.nan, "all": 2}
    )


@pytest.mark.parametrize(
    ("distance", "is_centre", "is_flank", "is_near"),
    [
        (0, True, False, True),
        (50, True, False, True),
        (51, False, False, True),
        (1000, False, False, True),
        (1001, False, False, False),
        (1900, False, False, False),
        (1901, False, True, False),
        (2000, False, True, False),
        (2001, False, False, False),
    ],
)
@pytest.mark.parametrize("side", [-1, 1])
def test_borders_of_centre_flanks_and_reach(
    tmp_path: Path, distance: int, side: int, is_centre: bool, is_flank: bool, is_near: bool
) -> None:
    site = 5000
    rows = [("chr1", site + side * distance, site + side * distance + 1, "A")]
    found = count(written(tmp_path, lines_of(rows)), Way(tss=tss_table([("chr1", site)])))
    # A fragment of 1 bp has both its ends there.
    assert found.cells.quality[0, [kernel.CENTRE, kernel.FLANK, kernel.IN_TSS]].tolist() == [
        2 * is_centre,
        2 * is_flank,
        is_near,
    ]
    assert found.obs["tss_enrichment"].tolist() == [(2 * is_centre / 101) / (max(1, 2 * is_flank) / 200)]


def test_a_fragment_over_both_flanks_counts_two_of_them(tmp_path: Path) -> None:
    sites = [("chr1", 5000), ("chr1", 5000), ("chr1", 5010)]
    found = count(written(tmp_path, b"chr1\t3050\t6951\tA\n"), Way(tss=tss_table(sites)))
    assert found.cells.quality[0, [kernel.CENTRE, kernel.FLANK, kernel.IN_TSS]].tolist() == [0, 6, 0]


@pytest.mark.parametrize(
    ("types", "n_sites"), [("protein_coding", 2), ("", 2), (["protein_coding", "x"], 1), (["x", "y"], 2)]
)
def test_only_protein_coding_genes_count_where_any_are_known(
    tmp_path: Path, types: list[str] | str, n_sites: int
) -> None:
    table = tss_table([("chr1", 5000), ("chr1", 5001)], types)
    found = count(written(tmp_path, b"chr1\t5000\t5001\tA\n"), Way(tss=table))
    assert found.cells.quality[0, kernel.CENTRE] == 2 * n_sites


@pytest.mark.parametrize("name", ["chrM", "chrMT", "M", "MT"])
def test_the_mitochondrion_may_have_any_of_its_names(tmp_path: Path, name: str) -> None:
    assembly = Assembly("toy", ("chr1", name), (5000, 900))
    way = Way(PeakSet.of_space(IslandSpace.all(assembly, width_bp=1000)), assembly=assembly)
    text = lines_of([("chr1", 1, 5, "A"), (name, 1, 5, "A"), (name, 5, 9, "A"), ("chr1", 1, 5, "B")])
    assert count(written(tmp_path, text), way).obs["fraction_mitochondrial"].to_dict() == {"A": 2 / 3, "B": 0}


@pytest.mark.parametrize("name", ["chrM", "chrMT", "M", "MT", "toy_MT"])
def test_the_mitochondrion_may_have_any_name_in_the_file(tmp_path: Path, name: str) -> None:
    found = count(written(tmp_path, lines_of([("chr1", 1, 5, "A"), (name, 1, 5, "A")])))
    assert found.obs["fraction_mitochondrial"].tolist() == [0.5]


def test_peaks_outside_islands_are_in_fraction_in_peaks_alone(tmp_path: Path) -> None:
    peaks = [("chr1", 0, 100), ("chr1", 1200, 1300)]  # the second in a bin that is no island
    rows = [
        ("chr1", 5, 60, "A"),
        ("chr1", 1250, 1290, "A"),
        ("chr1", 1900, 1950, "A"),
        ("chr1", 1900, 1950, "A"),
    ]
    found = count(written(tmp_path, lines_of(rows)), Way(peak_set(peaks, SOME))).obs.iloc[0]
    assert (found["fraction_in_peaks"], found["fraction_in_islands"]) == (0.5, 0.25)


@given(text=texts(), peaks=PEAKS)
@settings(**FEW, max_examples=30)
def test_without_qc_what_is_left_is_the_same(tmp_path: Path, text: bytes, peaks: list[Interval]) -> None:
    path = written(tmp_path, text)
    with_qc = count(path, Way(peak_set(peaks), count_invalid=True))
    without = count(path, Way(peak_set(peaks), count_invalid=True, quality=False))
    assert list(without.obs.columns) == ["n_fragments", "n_insertions", "n_open", "fraction_in_islands"]
    pd.testing.assert_frame_equal(without.obs, with_qc.obs[list(without.obs.columns)])
    assert without.cells.lines == with_qc.cells.lines
    assert without.cells.barcode_rank == with_qc.cells.barcode_rank


@pytest.mark.parametrize("has_peaks", [True, False])
@pytest.mark.parametrize("has_tss", [True, False])
@pytest.mark.parametrize("has_quality", [True, False])
@pytest.mark.parametrize("follows_all", [True, False])
def test_columns_that_nothing_tells_of_are_left_out(
    has_peaks: bool, has_tss: bool, has_quality: bool, follows_all: bool
) -> None:
    none = np.zeros((2, kernel.N_QUALITY), np.int64)
    obs = fragment_quality(["a", "b"], none, np.array([0, 3]), has_quality, has_peaks, has_tss, follows_all)
    expected = ["n_fragments", "n_insertions", "n_open", "fraction_in_islands"] if follows_all else ["n_open"]
    if has_quality:
        expected += ["duplicate_rate", *["fraction_in_peaks"] * has_peaks]
        expected += [*["fraction_in_tss", "tss_enrichment"] * has_tss]
        expected += ["nucleosome_signal", "fraction_mitochondrial"]
    assert list(obs.columns) == expected
    assert obs["n_open"].tolist() == [0, 3]
    # A cell without a fragment: shares are 0, ratios of nothing are not known.
    undefined = {"duplicate_rate", "nucleosome_signal"}
    for column in set(expected) - {"n_open"}:
        assert obs[column].isna().all() if column in undefined else (obs[column] == 0).all()


def test_bins_are_the_peaks_where_there_are_none(tmp_path: Path) -> None:
    found = count(written(tmp_path, b"chr1\t5\t9\tA\n"), Way(PeakSet.of_space(BINS))).obs
    assert found["fraction_in_peaks"].tolist() == [1]

"""Peak files and names, peaks placed in islands, and the level rule."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.peaks import PeakSet, as_intervals, levels, parse_names, read_bed


@pytest.mark.parametrize(
    ("name", "contig"),
    [
        ("chr1:1-2", "chr1"),
        ("chr1-1-2", "chr1"),
        ("chr1_1_2", "chr1"),
        ("chrUn_X_v1_1_2", "chrUn_X_v1"),
        ("chrUn-X.v1:1-2", "chrUn-X.v1"),
        ("hg19_chr1:1-2", "hg19_chr1"),
        ("1-1-2", "1"),
    ],
)
def test_the_last_two_numbers_of_a_peak_name_are_start_and_end(name: str, contig: str) -> None:
    parsed = parse_names([name], "x.h5ad", "mend")
    assert (parsed.contig[0], parsed.start[0], parsed.end[0]) == (contig, 1, 2)


@pytest.mark.parametrize("name", ["0", "GATA1", "chr1", "chr1:5", "chr1:9-3", "chr1:a-b", "", "chr1:1.0-2.0"])
def test_a_name_without_coordinates_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=rf"x\.h5ad: found a peak named '{name}'"):
        parse_names(["chr1:1-2", name], "x.h5ad", "mend")


BED = "#track\n\nchr1\t100\t200\tpeak1\t5\nchr1 300 400\n   \nchr1\t100\t200\n# end\nchr2\t0\t10"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_bed_files_may_have_comments_blank_lines_crlf_and_more_columns(
    tmp_path: Path, zipped: bool, ending: str
) -> None:
    path = tmp_path / "peaks.bed"
    text = BED.replace("\n", ending).encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    intervals, repeated = read_bed(path)
    found = list(zip(intervals.contig, intervals.start.tolist(), intervals.end.tolist(), strict=True))
    assert found == [("chr1", 100, 200), ("chr1", 300, 400), ("chr2", 0, 10)]
    assert repeated == 1


@pytest.mark.parametrize(
    "line", ["chr1\t5", "chr1\tx\t9", "chr1\t9\t9", "chr1\t-1\t9", "chrom\tstart\tend", "\t1\t2"]
)
def test_a_bed_line_that_is_no_interval_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "peaks.bed"
    path.write_text(f"# x\nchr1\t1\t2\n{line}\n")
    with pytest.raises(InputError, match=r"peaks\.bed, line 3: found .*; expected 'chrom start end'"):
        read_bed(path)


def test_a_bed_file_without_peaks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peaks.bed"
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="found no peak"):
        read_bed(path)


def test_a_peak_belongs_to_the_bin_of_its_start(toy: Assembly, bins: IslandSpace) -> None:
    rows = [("chr1", 999, 2500), ("1", 1000, 1001), ("MT", 0, 900), ("chrX", 5, 10), ("chr2", 4100, 4200)]
    peaks = PeakSet.of_intervals(as_intervals(rows), toy, bins, "x")
    assert peaks.island.tolist() == [0, 1, 15, -1, 14]
    assert peaks.chrom.tolist() == [0, 0, 2, -1, 1]
    assert np.flatnonzero(peaks.measured).tolist() == [0, 1, 14, 15]
    assert peaks.accounting() == {
        "peaks": 5,
        "in_islands": 4,
        "outside_islands": 0,
        "other_contig": 1,
        "measured_islands": 4,
    }


def test_peaks_on_no_known_contig_are_refused_with_examples(toy: Assembly, bins: IslandSpace) -> None:
    with pytest.raises(InputError, match=r"p\.bed: found peaks on 'X', 'Y'.* no peak on a chromosome of toy"):
        PeakSet.of_intervals(as_intervals([("X", 1, 2), ("Y", 1, 2)]), toy, bins, "p.bed")


def test_peaks_past_the_end_are_refused_with_their_share(toy: Assembly, bins: IslandSpace) -> None:
    rows = [("chr1", 1, 2), ("chr2", 4000, 4201), ("chr1", 5, 6), ("chr1", 7, 8)]
    with pytest.raises(InputError, match=r"1 of 4 peaks \(25\.0%\).*chr2:4000-4201.*at most 4200"):
        PeakSet.of_intervals(as_intervals(rows), toy, bins, "p.bed")


def test_peaks_in_no_island_are_refused(toy: Assembly, tmp_path: Path) -> None:
    (tmp_path / "w.bed").write_text("chr1\t0\t100\n")
    windows = IslandSpace.windows(toy, tmp_path / "w.bed")
    with pytest.raises(InputError, match="none of which starts in one of the 1 islands"):
        PeakSet.of_intervals(as_intervals([("chr1", 100, 110)]), toy, windows, "p.bed")


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(1, 2**31)), min_size=1))
def test_levels_are_the_mean_rounded_up_and_capped(pairs: list[tuple[int, int]]) -> None:
    counts, n = np.array(pairs, np.int64).T
    expected = [min(5, s // k + (s % k > 0)) for s, k in pairs]
    assert levels(counts, n).tolist() == expected


def test_levels_do_not_wrap_for_unsigned_counts() -> None:
    assert levels(np.array([1, 2, 3], np.uint32), np.array([2, 2, 2], np.int64)).tolist() == [1, 1, 2]

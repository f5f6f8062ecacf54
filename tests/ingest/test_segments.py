"""The genome in segments, against a dict of every position of a tiny one."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from counted import tss_table
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import place_tss
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest import segments
from annatac_scale.ingest.peaks import PeakSet, as_intervals
from annatac_scale.ingest.segments import NO_ISLAND, SEVERAL, Segments, cut_genome

TINY = Assembly("tiny", ("a", "b", "c"), (1500, 40, 2600))
BINS = IslandSpace.all(TINY, width_bp=100)
PLACES = [(chrom, position) for chrom in range(3) for position in range(TINY.sizes[chrom])]


@st.composite
def intervals(draw: st.DrawFn) -> tuple[str, int, int]:
    chrom = draw(st.integers(0, 2))
    start = draw(st.integers(0, TINY.sizes[chrom] - 1) | st.integers(0, 20))
    end = start + draw(st.integers(1, 900) | st.integers(1, 20))
    return TINY.chromosomes[chrom], start, min(end, TINY.sizes[chrom])


@st.composite
def sites(draw: st.DrawFn) -> tuple[str, int]:
    chrom = draw(st.integers(0, 2))
    size = TINY.sizes[chrom]
    return TINY.chromosomes[chrom], draw(st.integers(0, size - 1) | st.sampled_from([0, size - 1]))


def segment_of(cut: Segments, chrom: int, position: int) -> int:
    place = int(cut.base[chrom]) + position
    segment = int(cut.bucket[place >> segments.BUCKET_BITS])
    assert cut.start[segment] <= place
    while cut.start[segment + 1] <= place:
        segment += 1
    return segment


def seen_at(cut: Segments, segment: int) -> dict[str, object]:
    a, b = cut.offsets[segment], cut.offsets[segment + 1]
    return {
        "islands": sorted(cut.at_island[a:b].tolist()),
        "near": int(cut.near[segment]),
        "centre": int(cut.centre[segment]),
        "flank": int(cut.flank[segment]),
    }


@given(
    peaks=st.lists(intervals(), min_size=1, max_size=12),
    tss=st.lists(sites(), max_size=5),
    outside=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_every_position_knows_its_peaks_and_tss(
    peaks: list[tuple[str, int, int]], tss: list[tuple[str, int]], outside: list[bool]
) -> None:
    placed = PeakSet.of_intervals(as_intervals([*peaks, ("zz", 5, 9)]), TINY, BINS, "peaks")
    island = placed.island.copy()
    island[:-1][np.array(outside[: len(peaks)])] = -1
    placed = PeakSet(placed.chrom, placed.start, placed.end, island, placed.n)
    cut = cut_genome(placed, TINY, place_tss(TINY, tss_table(tss)) if tss else None)
    assert (np.diff(cut.start) > 0).all()
    for chrom, position in PLACES:
        name = TINY.chromosomes[chrom]
        over = [i for i, peak in enumerate(peaks) if peak[0] == name and peak[1] <= position < peak[2]]
        away = [abs(position - site) for where, site in tss if where == name]
        segment = segment_of(cut, chrom, position)
        islands = sorted(int(island[i]) for i in over if island[i] >= 0)
        assert seen_at(cut, segment) == {
            "islands": islands,
            "near": bool(over) + 2 * any(distance <= 1000 for distance in away),
            "centre": sum(distance <= 50 for distance in away),
            "flank": sum(1901 <= distance <= 2000 for distance in away),
        }
        single = islands[0] if len(islands) == 1 else SEVERAL if islands else NO_ISLAND
        assert cut.island[segment] == single


@given(peaks=st.lists(intervals(), min_size=1, max_size=12), ends=st.tuples(sites(), sites()))
def test_peaks_that_begin_between_two_positions_are_found(
    peaks: list[tuple[str, int, int]], ends: tuple[tuple[str, int], tuple[str, int]]
) -> None:
    placed = PeakSet.of_intervals(as_intervals(peaks), TINY, BINS, "peaks")
    cut = cut_genome(placed, TINY)
    (first_chrom, first), (last_chrom, last) = ((TINY.chromosomes.index(c), p) for c, p in ends)
    if (first_chrom, first) > (last_chrom, last):
        return
    a, b = segment_of(cut, first_chrom, first), segment_of(cut, last_chrom, last)
    found = Counter(cut.by_start[cut.begun[a] : cut.begun[b]].tolist())
    # Segments are cut at every border, so that one which begins in the first's segment holds the position itself.
    starts = [(TINY.chromosomes.index(peak[0]), peak[1]) for peak in peaks]
    expected = Counter(
        int(placed.island[i])
        for i, start in enumerate(starts)
        if (first_chrom, first) < start <= (last_chrom, last)
    )
    assert found == expected
    for segment in {a, b}:
        at_first = cut.at_first[cut.offsets[segment] : cut.offsets[segment + 1]]
        assert (at_first <= segment).all()


def test_all_tss_count_where_none_is_known_to_be_of_a_protein_coding_gene() -> None:
    peaks = PeakSet.of_space(BINS)
    rows = [("a", 100), ("a", 700)]
    for types, n_sites in (("", 2), ("lincRNA", 2), (["protein_coding", "lincRNA"], 1)):
        cut = cut_genome(peaks, TINY, place_tss(TINY, tss_table(rows, types)))
        centres = sum(seen_at(cut, segment_of(cut, 0, position))["centre"] for position in (100, 700))
        assert centres == n_sites


def test_no_table_of_tss_is_no_tss() -> None:
    cut = cut_genome(PeakSet.of_space(BINS), TINY)
    assert not cut.centre.any()
    assert not cut.flank.any()
    assert set(cut.near.tolist()) == {1, 0}  # 0: beyond the last position


def test_peaks_that_lie_over_each_other_too_often_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MOST_PLACES", 1000)
    peaks = PeakSet.of_intervals(as_intervals([("a", i, 100 + i) for i in range(50)]), TINY, BINS, "peaks")
    with pytest.raises(InputError, match="peaks: found 50 that lie over each other"):
        cut_genome(peaks, TINY)


def test_a_genome_of_more_than_two_to_the_31_bp_is_cut() -> None:
    wide = Assembly("wide", ("a", "b", "c"), (2**30, 2**31 - 1, 2**30))
    ends = [(name, size - 10, size) for name, size in zip(wide.chromosomes, wide.sizes, strict=True)]
    space = IslandSpace.all(wide, width_bp=2**29)
    cut = cut_genome(
        PeakSet.of_intervals(as_intervals(ends), wide, space, "peaks"),
        wide,
        pd.DataFrame({"code": [2], "position": [2**30 - 1], "type": "protein_coding"}),
    )
    for chrom, (_, start, end) in enumerate(ends):
        for position, inside in ((start - 1, 0), (start, 1), (end - 1, 1)):
            segment = segment_of(cut, chrom, position)
            assert (cut.island[segment] >= 0) == inside
    assert cut.centre[segment_of(cut, 2, 2**30 - 51)] == 1

"""Projection onto a vocabulary, against a plain loop over islands and base pairs."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from known_stores import open_islands, small_space, write_store

from annatac_scale.errors import ModelError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.projection import LEAST_COVERED, Coverage, Projection
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary

CHROMOSOMES = ("chr1", "chr2", "chrX")


@dataclass(eq=False)
class StandInSample:
    """What a projection looks at in a sample."""

    name: str
    measured: np.ndarray

    def read_measured(self):
        return self.measured


class StandInStore:
    """What a projection looks at in a store, without a disk."""

    path = "atlas.zarr"

    def __init__(self, space, measured):
        self.space = space
        self.n_islands = len(space)
        self.islands_sha256 = space.sha256
        self.samples = {
            f"s{i}": StandInSample(f"s{i}", np.asarray(mask, bool)) for i, mask in enumerate(measured)
        }


def space_of(windows, chromosomes=CHROMOSOMES):
    """windows: (chrom, start, end) in order"""
    chrom = np.array([chromosomes.index(name) for name, _, _ in windows], np.int32)
    start, end = np.array([window[1:] for window in windows], np.int64).T
    return IslandSpace(
        "toy", chromosomes, 0, "windows", chrom, start.copy(), end.copy(), np.full(len(windows), "", object)
    )


def onto(windows):
    """A vocabulary of these windows, and its islands."""
    space = space_of(windows)
    vocabulary = Vocabulary(space.sha256, len(windows), np.arange(len(windows), dtype=np.int32))
    return vocabulary, pd.DataFrame(windows, columns=["chrom", "start", "end"])


def listed(rows):
    return [
        dict(zip(rows.islands[a:b].tolist(), rows.levels[a:b].tolist(), strict=True))
        for a, b in pairwise(rows.offsets)
    ]


def is_sorted(rows):
    return all((np.diff(rows.islands[a:b]) > 0).all() for a, b in pairwise(rows.offsets))


def plain_places(windows, islands):
    """For each window the island that shares most base pairs, the first of equals; None without one."""
    places = []
    for chrom, start, end in windows:
        shared = [len(range(max(start, a), min(end, b))) if name == chrom else 0 for name, a, b in islands]
        places.append(shared.index(max(shared)) if any(shared) else None)
    return places


def plain_rows(places, measured, levels):
    """One dict of levels a cell, as the rule says it."""
    cells = []
    for row in levels:
        cell = {}
        for island in sorted({place for place in places if place is not None}):
            peaks = [i for i, place in enumerate(places) if place == island and measured[i]]
            total = sum(int(row[i]) for i in peaks)
            if total:
                cell[island] = min(math.ceil(total / len(peaks)), 5)
        cells.append(cell)
    return cells


@st.composite
def windows_of(draw):
    """Some windows of some chromosomes, with and without gaps."""
    windows = []
    for name in CHROMOSOMES:
        cuts = sorted(draw(st.sets(st.integers(0, 40), max_size=12)))
        for start, end in pairwise(cuts):
            if draw(st.booleans()):
                windows.append((name, start, end))
    assume(windows)
    return windows


@st.composite
def cases(draw):
    """Windows of a store, of a vocabulary, what two samples measure, and cells."""
    windows, islands = draw(windows_of()), draw(windows_of())
    n = len(windows)
    measured = [np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for _ in range(2)]
    seed, n_cells = draw(st.integers(0, 999)), draw(st.integers(0, 6))
    rng = np.random.default_rng(seed)
    levels = (rng.integers(1, 6, (n_cells, n)) * (rng.random((n_cells, n)) < 0.6)).astype(np.uint8)
    return windows, islands, measured, levels


@given(cases())
def test_any_windows_are_projected_as_a_loop_over_base_pairs_does(case):
    windows, islands, measured, levels = case
    assume(windows != islands)
    places = plain_places(windows, islands)
    covered = [
        sorted({p for p, m in zip(places, mask, strict=True) if m and p is not None}) for mask in measured
    ]
    store = StandInStore(space_of(windows), measured)
    if not any(covered):
        with pytest.raises(ModelError, match="no measured island that shares a base pair"):
            Projection.of(store, *onto(islands))
        return
    projection = Projection.of(store, *onto(islands))
    assert projection.projected
    assert [own.tolist() for own in projection.measured] == covered
    assert {own.dtype for own in projection.measured} == {np.dtype(np.int32)}
    for sample, mask, own, coverage in zip(
        store.samples.values(), measured, covered, projection.coverage, strict=True
    ):
        rows = projection.rows(open_islands(levels * mask), sample)
        assert listed(rows) == plain_rows(places, mask, levels)
        assert is_sorted(rows)
        assert (rows.islands.dtype, rows.levels.dtype, rows.offsets.dtype) == (np.int32, np.uint8, np.int64)
        n_placed = sum(p is not None and bool(m) for p, m in zip(places, mask, strict=True))
        assert coverage == Coverage(
            sample.name, len(islands), len(own), int(mask.sum()), n_placed, projected=True
        )


def projected(windows, islands, levels, measured=None):
    """Rows of cells of one sample, as dicts."""
    measured = np.ones(len(windows), bool) if measured is None else np.array(measured, bool)
    store = StandInStore(space_of(windows), [measured])
    projection = Projection.of(store, *onto(islands))
    return listed(projection.rows(open_islands(np.array(levels, np.uint8)), store.samples["s0"]))


def test_a_window_goes_where_it_shares_most_and_to_the_first_of_equals():
    islands = [("chr1", 0, 10), ("chr1", 10, 20), ("chr1", 20, 30)]
    windows = [("chr1", 4, 9), ("chr1", 9, 12), ("chr1", 12, 13), ("chr1", 15, 25), ("chr1", 28, 40)]
    assert plain_places(windows, islands) == [0, 1, 1, 1, 2]
    each = np.eye(5, dtype=int) * 5
    assert projected(windows, islands, each) == [{0: 5}, {1: 2}, {1: 2}, {1: 2}, {2: 5}]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([1, 0, 0], {0: 1}),
        ([1, 1, 1], {0: 1}),
        ([2, 1, 1], {0: 2}),
        ([5, 5, 5], {0: 5}),
        ([5, 5, 4], {0: 5}),
        ([0, 0, 0], {}),
    ],
)
def test_several_windows_of_one_island_are_averaged_and_rounded_up(levels, expected):
    windows = [("chr1", 0, 10), ("chr1", 20, 30), ("chr1", 40, 50)]
    assert projected(windows, [("chr1", 0, 100)], [levels]) == [expected]


def test_windows_that_a_sample_does_not_measure_count_for_nothing():
    windows = [("chr1", 0, 10), ("chr1", 20, 30), ("chr1", 40, 50), ("chr2", 0, 10)]
    islands = [("chr1", 0, 100), ("chr2", 0, 100), ("chr2", 100, 200)]
    store = StandInStore(space_of(windows), [[1, 1, 1, 0], [1, 0, 0, 1]])
    projection = Projection.of(store, *onto(islands))
    assert [own.tolist() for own in projection.measured] == [[0], [0, 1]]
    rows = open_islands(np.array([[4, 0, 0, 0]], np.uint8))
    assert [listed(projection.rows(rows, sample)) for sample in store.samples.values()] == [
        [{0: 2}],
        [{0: 4}],
    ]
    assert [(c.covered, c.placed) for c in projection.coverage] == [(1 / 3, 1.0), (2 / 3, 1.0)]


def test_samples_may_take_turns():
    store = StandInStore(space_of([("chr1", 0, 10), ("chr1", 10, 20)]), [[1, 1], [1, 0]])
    projection = Projection.of(store, *onto([("chr1", 0, 100)]))
    rows, samples = open_islands(np.array([[4, 0]], np.uint8)), list(store.samples.values())
    said = [listed(projection.rows(rows, samples[i])) for i in (0, 1, 0, 1)]
    assert said == [[{0: 2}], [{0: 4}], [{0: 2}], [{0: 4}]]


def test_all_bins_onto_some_of_the_same_bins_are_what_renumbering_gives(tmp_path):
    known = write_store(tmp_path / "all.zarr", [30, 20], space=small_space())
    kept = np.sort(np.random.default_rng(3).choice(40, 25, replace=False)).astype(np.int32)
    space = known.store.space
    islands = pd.DataFrame({"chrom": "chr1", "start": space.start[kept], "end": space.end[kept]})
    same = Projection.of(known.store, Vocabulary(known.store.islands_sha256, 40, kept))
    # As from a store of these bins alone, which numbers them from 0.
    other = Projection.of(known.store, Vocabulary("f" * 64, 25, np.arange(25, dtype=np.int32)), islands)
    assert (same.projected, other.projected) == (False, True)
    for sample in known.store.samples.values():
        block = sample.read_block(0)
        renumbered = block.renumber(Vocabulary("f" * 64, 40, kept).new_of_old())
        assert listed(same.rows(block, sample)) == listed(other.rows(block, sample)) == listed(renumbered)
    assert [a.tolist() for a in same.measured] == [b.tolist() for b in other.measured]
    assert [replace(c, projected=True) for c in same.coverage] == other.coverage


def test_in_its_own_space_it_is_the_vocabularys(unequal_store):
    vocabulary = Vocabulary.fit(unequal_store.store, None, 40)
    frame = pd.DataFrame({"chrom": [], "start": [], "end": []})
    for islands in (None, frame):
        projection = Projection.of(unequal_store.store, vocabulary, islands)
        assert not projection.projected
        expected = vocabulary.measured(unequal_store.store)
        assert [own.tolist() for own in projection.measured] == [own.tolist() for own in expected]
    for coverage, mask in zip(projection.coverage, unequal_store.measured, strict=True):
        n = int(mask[vocabulary.islands].sum())
        assert coverage == Coverage(coverage.sample, len(vocabulary), n, int(mask.sum()), n, projected=False)


def test_other_islands_are_refused_where_the_vocabularys_are_not_given(unequal_store):
    with pytest.raises(ModelError, match="convert the cells with the model's assembly"):
        Projection.of(unequal_store.store, Vocabulary("0" * 64, 40, np.array([1], np.int32)))


@pytest.mark.parametrize(
    ("windows", "measured"),
    [
        pytest.param([("chr2", 0, 10)], [1], id="another_chromosome"),
        pytest.param([("chr1", 10, 20)], [1], id="beside_each_other"),
        pytest.param([("chr1", 5, 9), ("chr2", 0, 9)], [0, 1], id="what_overlaps_is_not_measured"),
    ],
)
def test_no_overlap_is_refused_with_a_place_of_each(windows, measured):
    store = StandInStore(space_of(windows), [measured])
    first = "{}:{}-{}".format(*windows[0])
    with pytest.raises(ModelError, match=rf"atlas.zarr: .*first island is {first}, the model's chr1:0-10: "):
        Projection.of(store, *onto([("chr1", 0, 10)]))


def test_chromosomes_that_only_one_side_has_are_left_out():
    islands = [("chr1", 0, 10), ("chr2", 0, 10), ("chrX", 0, 10)]
    store = StandInStore(space_of([("1", 0, 9), ("chrX", 0, 9)], ("1", "chrX")), [[1, 1]])
    projection = Projection.of(store, *onto(islands))
    rows = projection.rows(open_islands(np.array([[3, 2]], np.uint8)), store.samples["s0"])
    assert listed(rows) == [{2: 2}]


def test_chromosomes_in_another_order_are_refused():
    store = StandInStore(space_of([("chrX", 0, 9), ("chr1", 0, 9)], ("chrX", "chr1")), [[1, 1]])
    with pytest.raises(ModelError, match="chromosomes in another order"):
        Projection.of(store, *onto([("chr1", 0, 10), ("chrX", 0, 10)]))


def test_positions_of_whole_genomes_do_not_overflow():
    large = 3_000_000_000
    windows = [("chr1", 0, 10), ("chrX", large, large + 10)]
    islands = [("chr1", 5, 20), ("chrX", large - 5, large + 5)]
    assert projected(windows, islands, [[1, 2]]) == [{0: 1, 1: 2}]


def test_islands_that_the_store_does_not_have_are_refused():
    store = StandInStore(space_of([("chr1", 0, 9)]), [[1]])
    projection = Projection.of(store, *onto([("chr1", 0, 10)]))
    rows = OpenIslands(np.array([0, 1]), np.array([1], np.int32), np.array([1], np.uint8))
    with pytest.raises(ValueError, match="island 1 of 1"):
        projection.rows(rows, store.samples["s0"])


def test_tokens_are_listed_by_what_the_projection_measures(tmp_path):
    known = write_store(tmp_path / "narrow.zarr", [12, 7], space=small_space(width_bp=2000))
    starts = np.arange(0, 80_000, 5000)
    islands = pd.DataFrame({"chrom": "chr1", "start": starts, "end": starts + 5000})
    vocabulary = Vocabulary("f" * 64, len(islands), np.arange(len(islands), dtype=np.int32))
    projection = Projection.of(known.store, vocabulary, islands)
    lister = TokenLister(known.store, vocabulary, "all", projection.measured)
    for sample, own in zip(known.store.samples.values(), projection.measured, strict=True):
        rows = projection.rows(sample.read_block(0), sample)
        batch = lister(Batch.from_open(sample.first_cell + np.arange(len(rows)), rows))
        for i in range(len(rows)):
            cell = slice(batch.offsets[i], batch.offsets[i + 1])
            assert batch.islands[cell].tolist() == own.tolist()
            assert np.count_nonzero(batch.tokens[cell]) == rows.n_open[i]


def test_little_coverage_is_warned_of_with_the_number():
    coverage = Coverage("kidney", 1000, 312, 400, 350, projected=False)
    assert (coverage.covered, coverage.placed) == (0.312, 0.875)
    warning = coverage.warning()
    assert warning is not None
    for said in ("kidney: ", "312 of the model's 1,000 islands (31.2%)", "expected 50%", "without --peaks"):
        assert said in warning
    assert "with the model's islands" not in warning
    assert "with the model's islands" in (replace(coverage, projected=True).warning() or "")


def test_enough_coverage_is_not_warned_of():
    enough = Coverage("kidney", 1000, math.ceil(1000 * LEAST_COVERED), 600, 500, projected=False)
    assert enough.warning() is None
    assert replace(enough, n_covered=enough.n_covered - 1).warning() is not None


def test_coverage_tells_both_shares():
    text = Coverage("kidney", 2000, 1500, 4000, 1000, projected=True).text()
    assert "1,500 of the model's 2,000 islands (75.0%)" in text
    assert "1,000 of the 4,000 islands that it measures (25.0%)" in text
    assert Coverage("empty", 10, 0, 0, 0, projected=True).placed == 0.0

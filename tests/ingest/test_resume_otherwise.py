"""A stopped conversion that is run again with other options, or other inputs: only what still holds is used."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from compressed_files import bgzf
from stores import FRAGMENTS, Convert, digests, write_lines, write_peaks
from told import Said

from annatac_scale.errors import InputError, StoreError
from annatac_scale.ingest import graph
from annatac_scale.store.store import IslandStore

RANGE_BYTES = 4000


class _StoppedError(Exception):
    pass


@pytest.fixture
def stopped(toy_convert: Convert, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """convert() that is stopped when all ranges and shards are done."""

    def stop(*_: Any) -> None:
        raise _StoppedError

    def run(*inputs: Any, **options: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(graph, "commit_fragments", stop)
            with pytest.raises(_StoppedError):
                toy_convert(*inputs, range_bytes=RANGE_BYTES, **options)

    return run


@pytest.fixture
def again(toy_convert: Convert, tmp_path: Path) -> Any:
    """The bytes of the input that a second run found done; it is compared with a conversion from the beginning."""

    def run(inputs: Path, **options: Any) -> int:
        said = Said()
        toy_convert(inputs, progress=said, range_bytes=RANGE_BYTES, **options)
        toy_convert(inputs, "anew.zarr", **options)
        assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "anew.zarr")
        assert said.done + said.found == inputs.stat().st_size
        return said.found

    return run


def write_bgzf(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    path.write_bytes(bgzf(write_lines(path.with_suffix(".tsv"), rows).read_bytes(), 500))
    return path


@pytest.fixture
def fragments(tmp_path: Path) -> Path:
    return write_bgzf(tmp_path / "s.gz", FRAGMENTS + FRAGMENTS[:15])


@pytest.fixture
def invalid(tmp_path: Path) -> Path:
    """An invalid line in the second range of many."""
    return write_bgzf(tmp_path / "s.gz", [*FRAGMENTS[:300], ("chr1", 9, 5, "A"), *FRAGMENTS[300:]])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"min_fragments": 0}, {"min_fragments": 101}),
        ({"min_fragments": 101}, {"min_fragments": 0}),
        ({"min_fragments": 10}, {"min_fragments": 10, "on_invalid": "count"}),
    ],
)
def test_other_cells_are_chosen_from_the_same_ranges(
    fragments: Path, stopped: Convert, again: Any, then: Any, now: Any, workers: int
) -> None:
    stopped(fragments, **then)
    assert again(fragments, workers=workers, **now) == fragments.stat().st_size


def test_cells_that_were_too_few_are_chosen_from_the_same_ranges(
    fragments: Path, toy_convert: Convert, again: Any
) -> None:
    with pytest.raises(InputError, match=r"no barcode with 1,000 fragments .* give --min-fragments 100"):
        toy_convert(fragments, range_bytes=RANGE_BYTES)
    assert again(fragments, min_fragments=100) == fragments.stat().st_size


def test_all_is_counted_anew_over_other_peaks_or_otherwise(
    tmp_path: Path, fragments: Path, stopped: Convert, again: Any
) -> None:
    peaks = write_peaks(tmp_path / "p.bed")
    stopped(fragments, min_fragments=0)
    stopped(fragments, min_fragments=0, peaks=peaks)
    write_lines(peaks, [("chr1", 0, 400), ("chr2", 0, 700)])
    stopped(fragments, min_fragments=0, peaks=peaks, qc=False)
    assert again(fragments, min_fragments=0, peaks=peaks) == 0


def test_all_is_counted_anew_from_a_file_that_was_changed(
    tmp_path: Path, fragments: Path, stopped: Convert, again: Any
) -> None:
    stopped(fragments, min_fragments=0)
    write_bgzf(fragments, FRAGMENTS[::-1])
    assert again(fragments, min_fragments=0) == 0


def test_a_spill_that_a_power_cut_damaged_is_counted_again(
    tmp_path: Path, fragments: Path, stopped: Convert, again: Any
) -> None:
    stopped(fragments, min_fragments=0)
    spills = sorted(tmp_path.glob("atlas.zarr/.incoming/s/**/ranges/*"))
    assert len(spills) == -(-fragments.stat().st_size // RANGE_BYTES)
    spills[0].write_bytes(spills[0].read_bytes()[:-1] + b"\xff")
    spills[1].write_bytes(b"")
    spills[2].write_bytes(bytes(500))
    assert again(fragments, min_fragments=0) == fragments.stat().st_size - 3 * RANGE_BYTES


def test_an_invalid_line_is_passed_over_later_with_the_ranges_that_are_done(
    invalid: Path, toy_convert: Convert, again: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, done = graph.count_fragments, []

    def fails_last(job: Any, number: int, *arguments: Any) -> Any:
        try:
            result = count(job, number, *arguments)
        except InputError:
            deadline = time.monotonic() + 20
            while len(done) < job.text.n_ranges - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise
        done.append(number)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(graph, "count_fragments", fails_last)
        with pytest.raises(InputError, match=r"s\.gz, line 301: found 'chr1\\t9\\t5\\tA'"):
            toy_convert(invalid, min_fragments=0, range_bytes=RANGE_BYTES, workers=2)
    assert again(invalid, min_fragments=0, on_invalid="count") == invalid.stat().st_size - RANGE_BYTES


@pytest.mark.parametrize("workers", [1, 3])
def test_an_invalid_line_that_was_passed_over_stops_a_strict_run(
    invalid: Path, toy_convert: Convert, stopped: Convert, again: Any, workers: int
) -> None:
    stopped(invalid, min_fragments=0, on_invalid="count")
    with pytest.raises(InputError, match=r"s\.gz, line 301: found 'chr1\\t9\\t5\\tA'"):
        toy_convert(invalid, min_fragments=0, range_bytes=RANGE_BYTES, workers=workers)
    assert again(invalid, min_fragments=0, on_invalid="count") == invalid.stat().st_size


def test_other_islands_do_not_throw_away_what_a_stopped_run_counted(
    tmp_path: Path, stopped: Convert, toy_convert: Convert
) -> None:
    """The work is kept until the user says that it may go."""
    fragments = write_lines(tmp_path / "s.tsv", FRAGMENTS)
    windows = str(write_lines(tmp_path / "w.bed", [("chr1", 0, 500)]))
    stopped(fragments, min_fragments=0)
    told = r"holds .* but .* was asked for; it has no sample yet, .* remove the store"
    with pytest.raises(StoreError, match=told):
        toy_convert(fragments, min_fragments=0, select=windows)
    said = Said()
    toy_convert(fragments, min_fragments=0, range_bytes=RANGE_BYTES, progress=said)
    assert said.found == fragments.stat().st_size
    stopped(fragments, out="other.zarr", min_fragments=0)
    shutil.rmtree(tmp_path / "other.zarr")
    toy_convert(fragments, "other.zarr", min_fragments=0, select=windows)


def test_fewer_cells_than_a_stopped_run_chose_leave_nothing_of_its_shards(
    tmp_path: Path, stopped: Convert, again: Any
) -> None:
    rows = [("chr1", 10 * (i % 900), 10 * (i % 900) + 9, f"B{i}") for i in range(4100)]
    fragments = write_lines(tmp_path / "s.tsv", [*rows, *rows[:50]])
    stopped(fragments, min_fragments=1)
    shards = tmp_path / "atlas.zarr" / ".incoming" / "s" / "sample" / "X" / "c"
    assert len(list(shards.iterdir())) == 2
    assert again(fragments, min_fragments=2) == fragments.stat().st_size
    assert [path.name for path in (tmp_path / "atlas.zarr/samples/s/X/c").iterdir()] == ["0"]
    assert IslandStore.open(tmp_path / "atlas.zarr").n_cells == 50


def test_another_tss_table_makes_the_quality_anew_or_is_told(
    tmp_path: Path, stopped: Convert, toy_convert: Convert, again: Any
) -> None:
    fragments = write_lines(tmp_path / "s.tsv", FRAGMENTS)
    one, two = (
        write_lines(tmp_path / f"{position}.tsv", [("chr1", position, "+", "G", "protein_coding")])
        for position in (500, 7000)
    )
    stopped(fragments, min_fragments=0, tss=one)
    assert again(fragments, min_fragments=0, tss=two) == 0
    near = IslandStore.open(tmp_path / "atlas.zarr").obs(["fraction_in_tss"])["fraction_in_tss"]
    toy_convert(fragments, "one.zarr", min_fragments=0, tss=one)
    assert (
        near.tolist()
        != IslandStore.open(tmp_path / "one.zarr").obs(["fraction_in_tss"])["fraction_in_tss"].tolist()
    )
    with pytest.raises(StoreError, match=r"500\.tsv \(tss\) has other content than then"):
        toy_convert(fragments, min_fragments=0, tss=one)
    with pytest.raises(StoreError, match="it was made with a file for tss"):
        toy_convert(fragments, min_fragments=0)

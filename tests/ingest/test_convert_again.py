"""Samples added to a store, found there already, or refused; what a failed conversion leaves."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from matrix_files import PEAKS, some_anndata, some_counts
from stores import FRAGMENTS, Convert, all_bytes, digests, write_lines, write_peaks

from annatac_scale.errors import InputError, StoreError
from annatac_scale.ingest import graph
from annatac_scale.store.create import remove_empty
from annatac_scale.store.info import describe
from annatac_scale.store.metadata import committed_samples
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store


def test_two_samples_that_share_barcodes_keep_all_rows_in_input_order(
    tmp_path: Path, toy_convert: Convert
) -> None:
    """Case 20."""
    for name in ("zz", "aa", "mm"):
        write_lines(tmp_path / f"{name}.tsv", FRAGMENTS)
    some_anndata().write_h5ad(tmp_path / "h.h5ad")
    report = toy_convert(
        [tmp_path / f for f in ("zz.tsv", "h.h5ad", "aa.tsv", "mm.tsv")], workers=3, min_fragments=0
    )
    store = IslandStore.open(tmp_path / "atlas.zarr")
    assert list(store.samples) == list(report.converted) == ["zz", "h", "aa", "mm"]
    assert store.n_cells == 4 * 30


def test_no_more_samples_than_workers_and_one_are_on_the_way(
    tmp_path: Path, toy_convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what they put down until their commit has room."""
    names = [f"s{i}" for i in range(12)]
    for name in names:
        write_lines(tmp_path / f"{name}.tsv", FRAGMENTS)
    count, begun = graph.count_fragments, []

    def noted(job: Any, *arguments: Any) -> Any:
        begun.append((job.name, len(committed_samples(tmp_path / "atlas.zarr"))))
        return count(job, *arguments)

    monkeypatch.setattr(graph, "count_fragments", noted)
    inputs = [tmp_path / f"{name}.tsv" for name in names]
    toy_convert(inputs, min_fragments=0, range_bytes=20_000, workers=3)
    assert max(int(name[1:]) - n_committed for name, n_committed in begun) <= 3


def test_a_second_sample_leaves_the_bytes_of_the_first_untouched(
    tmp_path: Path, toy_convert: Convert
) -> None:
    """Case 11."""
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    write_lines(tmp_path / "b.tsv", FRAGMENTS[::2])
    toy_convert(tmp_path / "a.tsv", min_fragments=0)
    before = all_bytes(tmp_path / "atlas.zarr" / "samples" / "a")
    toy_convert(tmp_path / "b.tsv", min_fragments=0)
    assert all_bytes(tmp_path / "atlas.zarr" / "samples" / "a") == before


def test_what_is_there_already_is_skipped(tmp_path: Path, toy_convert: Convert, said: Any) -> None:
    a, b = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_lines(tmp_path / "b.tsv", FRAGMENTS[::2])
    toy_convert(a, min_fragments=0)
    before = digests(tmp_path / "atlas.zarr")
    moved = a.rename(tmp_path / "moved.tsv")
    report = toy_convert([moved, b], sample=["a", "b"], min_fragments=0, progress=said)
    assert (report.skipped, list(report.converted)) == (["a"], ["b"])
    assert digests(tmp_path / "atlas.zarr")["a"] == before["a"]
    assert "a: is in" in said


def test_a_sample_made_otherwise_is_refused_with_the_difference(tmp_path: Path, toy_convert: Convert) -> None:
    a, peaks = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_peaks(tmp_path / "p.bed")
    toy_convert(a, min_fragments=0, peaks=peaks)
    for options, message in [
        ({"min_fragments": 5, "peaks": peaks}, "min_fragments = 0, now 5"),
        ({"min_fragments": 0}, "it was made with a file for peaks"),
        (
            {"min_fragments": 0, "peaks": write_lines(tmp_path / "q.bed", PEAKS[1:])},
            r"q\.bed \(peaks\) has other content",
        ),
    ]:
        with pytest.raises(StoreError, match=f"sample 'a' is there already, but .*{message}"):
            toy_convert(a, **options)
    write_lines(a, FRAGMENTS[1:])
    with pytest.raises(StoreError, match=r"a\.tsv \(data\) has other content"):
        toy_convert(a, min_fragments=0, peaks=peaks)
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(StoreError, match="it was made from fragments, now h5ad"):
        toy_convert(tmp_path / "a.h5ad")


def test_stores_of_other_counting_or_islands_are_not_mixed(tmp_path: Path, toy_convert: Convert) -> None:
    a, b = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_lines(tmp_path / "b.tsv", FRAGMENTS[1:])
    toy_convert(a, min_fragments=0, counting="fragment")
    assert IslandStore.open(tmp_path / "atlas.zarr").counting == "fragment"
    with pytest.raises(StoreError, match="counting"):
        toy_convert(b, min_fragments=0)
    with pytest.raises(StoreError, match=r"width_bp|islands_sha256"):
        toy_convert(
            b, min_fragments=0, counting="fragment", select=str(write_lines(tmp_path / "w.bed", PEAKS[::2]))
        )
    with pytest.raises(InputError, match="counting: found 'cuts'; expected one of insertion"):
        toy_convert(b, counting="cuts")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_input_stops_and_leaves_only_whole_samples(
    tmp_path: Path, toy_convert: Convert, workers: int
) -> None:
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    write_lines(tmp_path / "b.tsv", [*FRAGMENTS, ("chr1", 5, 4, "A")])
    some_anndata().write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(InputError, match=r"b\.tsv, line 3001"):
        toy_convert([tmp_path / f for f in ("a.tsv", "b.tsv", "c.h5ad")], min_fragments=0, workers=workers)
    store = tmp_path / "atlas.zarr"
    if store.exists():  # something was finished
        assert set(describe(IslandStore.open(store)).unfinished) <= {"a", "b", "c"}
        assert set(digests(store)) <= {"a"}
    write_lines(tmp_path / "b.tsv", FRAGMENTS)
    report = toy_convert(
        [tmp_path / f for f in ("a.tsv", "b.tsv", "c.h5ad")], min_fragments=0, workers=workers
    )
    assert sorted([*report.converted, *report.skipped]) == ["a", "b", "c"]
    assert list(digests(store)) == ["a", "b", "c"]


def test_a_sample_of_closed_islands_alone_is_refused(tmp_path: Path, toy_convert: Convert) -> None:
    windows = str(write_lines(tmp_path / "w.bed", [("chr1", 9990, 10_000), ("chr1", 0, 10)]))
    write_lines(tmp_path / "f.tsv", [("chr1", 50, 90, "A")])
    matrix = some_counts().toarray()
    matrix[:, 0] = 0
    some_anndata(matrix).write_h5ad(tmp_path / "h.h5ad")
    for name in ("f.tsv", "h.h5ad"):
        out = f"{name}.zarr"
        with pytest.raises(InputError, match=f"{name}: found no count of any cell in the 2 islands"):
            toy_convert(tmp_path / name, out, min_fragments=0, select=windows)
        assert not digests(tmp_path / out)


def test_a_truncated_file_is_never_a_sample(tmp_path: Path, toy_convert: Convert) -> None:
    """Case 1."""
    text = write_lines(tmp_path / "x.tsv", FRAGMENTS).read_bytes()
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(text)[:-100])
    with pytest.raises(InputError, match=r"cut\.tsv\.gz, after line .*byte"):
        toy_convert(tmp_path / "cut.tsv.gz", min_fragments=0)
    assert not (tmp_path / "atlas.zarr").exists()


def test_a_failed_conversion_leaves_a_store_that_was_there(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "bad.tsv", [("chr1", 5, 4, "A")])
    toy_convert(tmp_path / "a.h5ad")
    before = all_bytes(tmp_path / "atlas.zarr")
    with pytest.raises(InputError, match=r"bad\.tsv, line 1"):
        toy_convert(tmp_path / "bad.tsv", min_fragments=0)
    after = all_bytes(tmp_path / "atlas.zarr")
    assert after == before
    create_store(tmp_path / "empty.zarr", IslandStore.open(tmp_path / "atlas.zarr").space, "insertion")
    with pytest.raises(InputError, match=r"bad\.tsv, line 1"):
        toy_convert(tmp_path / "bad.tsv", "empty.zarr", min_fragments=0)
    with pytest.raises(InputError, match=r"empty\.zarr: holds no sample, .* `annatac convert`"):
        IslandStore.open(tmp_path / "empty.zarr").obs(["cell_type"])


def test_an_empty_store_is_not_removed_while_another_writes(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    remove_empty(tmp_path / "atlas.zarr")
    assert list(digests(tmp_path / "atlas.zarr")) == ["a"]
    store = tmp_path / "new.zarr"
    create_store(store, IslandStore.open(tmp_path / "atlas.zarr").space, "insertion")
    with SampleWriter(store, "s", 1):
        remove_empty(store)
        assert store.exists()
    remove_empty(store)
    remove_empty(store)  # nothing there, nothing to do
    (tmp_path / "mine").mkdir()
    write_lines(tmp_path / "mine" / "notes.txt", [("kept",)])
    with pytest.raises(StoreError, match="mine: exists and is not an island store"):
        toy_convert(tmp_path / "a.h5ad", "mine")
    assert list(all_bytes(tmp_path / "mine")) == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.h5ad", "atlas.zarr", "mine", "toy.chrom.sizes"
    ]  # fmt: skip


def test_a_store_in_which_a_sample_was_begun_stays_where_another_conversion_fails(
    tmp_path: Path, toy_convert: Convert, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    count = graph.count_fragments

    def removed_meanwhile(*arguments: Any) -> Any:
        remove_empty(tmp_path / "atlas.zarr")
        return count(*arguments)

    monkeypatch.setattr(graph, "count_fragments", removed_meanwhile)
    toy_convert(tmp_path / "f.tsv", min_fragments=0)
    assert list(digests(tmp_path / "atlas.zarr")) == ["f"]


@pytest.mark.parametrize("place", ["x.zarr", "samples/x.zarr", "samples/a/deep/x.zarr"])
def test_a_store_within_a_store_is_refused(tmp_path: Path, toy_convert: Convert, place: str) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    before = all_bytes(tmp_path / "atlas.zarr")
    (tmp_path / "link").symlink_to(tmp_path / "atlas.zarr")
    for outer in ("atlas.zarr", "link"):
        with pytest.raises(StoreError, match=r"x\.zarr: lies in .*atlas\.zarr, which is an island store"):
            toy_convert(tmp_path / "a.h5ad", f"{outer}/{place}")
    assert all_bytes(tmp_path / "atlas.zarr") == before
    toy_convert(tmp_path / "a.h5ad", "beside/x.zarr")

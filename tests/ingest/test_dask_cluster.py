"""Conversion on a real Dask cluster: other processes, reached over TCP."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compressed_files import FORMS, bgzf
from distributed import Client, LocalCluster
from matrix_files import BARCODES, some_anndata
from stores import FRAGMENTS, Convert, digests, write_lines, write_peaks

from annatac_scale.errors import InputError
from annatac_scale.ingest import graph
from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=None
    ) as running:
        yield running


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """Fragments in ranges and as a stream, and a matrix; with a column, labels and peaks."""
    text = write_lines(tmp_path / "text.tsv", FRAGMENTS).read_bytes()
    (tmp_path / "ranges.gz").write_bytes(bgzf(text, 500))
    (tmp_path / "stream.gz").write_bytes(FORMS["gzip"](text))
    some_anndata().write_h5ad(tmp_path / "h.h5ad")
    write_peaks(tmp_path / "p.bed")
    write_lines(tmp_path / "cells.tsv", [("barcode", "type"), *((name, name[-3]) for name in BARCODES[:20])])
    rows = [
        ("sample", "path", "peaks", "obs", "donor"),
        ("ranges", "ranges.gz", "p.bed", "cells.tsv", "D1"),
        ("stream", "stream.gz", "", "", "D2"),
        ("matrix", "h.h5ad", "", "", "D3"),
    ]
    return write_lines(tmp_path / "sheet.tsv", rows)


def test_a_cluster_makes_the_same_store_and_tells_of_its_progress(
    tmp_path: Path, toy_convert: Convert, cluster: LocalCluster, sheet: Path, said: Any
) -> None:
    options = {"sheet": sheet, "range_bytes": 4000, "min_fragments": 5}
    toy_convert([], "here.zarr", **options)
    report = toy_convert(
        [], "there.zarr", dask=cluster.scheduler_address, workers=2, progress=said, **options
    )
    assert list(report.converted) == said.finished == ["ranges", "stream", "matrix"]
    here, there = (IslandStore.open(tmp_path / name) for name in ("here.zarr", "there.zarr"))
    assert here.digest == there.digest
    assert there.obs(["donor"])["donor"].tolist() == ["D1"] * 30 + ["D2"] * 30 + ["D3"] * 30
    assert there.samples["ranges"].obs()["type"].notna().sum() == 20
    assert "ranges: 30 cells; 3,000 lines" in said
    assert said.samples.keys() == {"ranges", "stream", "matrix"}
    assert said.n_lines == 2 * len(FRAGMENTS)
    assert said.done == said.samples["ranges"] + said.samples["stream"]
    assert not (tmp_path / "there.zarr" / ".incoming").exists()


def test_what_a_cluster_finished_is_not_done_again_here_nor_there(
    tmp_path: Path, toy_convert: Convert, cluster: LocalCluster, said: Any
) -> None:
    path = tmp_path / "s.gz"
    path.write_bytes(bgzf(write_lines(tmp_path / "s.tsv", FRAGMENTS).read_bytes(), 500))
    for first, then in ((cluster.scheduler_address, None), (None, cluster.scheduler_address)):
        out = f"{then is None}.zarr"
        with pytest.raises(InputError, match=r"found no barcode with 1,000 fragments"):
            toy_convert(path, out, range_bytes=4000, dask=first)
        said.found = said.done = 0
        toy_convert(path, out, range_bytes=4000, dask=then, min_fragments=0, progress=said)
        assert (said.found, said.done) == (path.stat().st_size, 0)
    assert digests(tmp_path / "True.zarr") == digests(tmp_path / "False.zarr")


def test_a_bad_line_is_refused_on_a_cluster_as_here(
    tmp_path: Path, toy_convert: Convert, cluster: LocalCluster
) -> None:
    rows = [*FRAGMENTS, ("chr1", 9, 5, "A"), *FRAGMENTS]
    path = tmp_path / "s.gz"
    path.write_bytes(bgzf(write_lines(tmp_path / "s.tsv", rows).read_bytes(), 500))
    messages = set()
    for dask in (None, cluster.scheduler_address):
        with pytest.raises(InputError) as caught:
            toy_convert(path, f"{dask is None}.zarr", range_bytes=4000, min_fragments=0, dask=dask)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert messages.pop().startswith(f"{path}, line 3001: found 'chr1\\t9\\t5\\tA'; expected an end greater")


def test_workers_stop_before_a_failed_conversion_ends(
    tmp_path: Path, toy_convert: Convert, cluster: LocalCluster
) -> None:
    text = write_lines(tmp_path / "bad.tsv", FRAGMENTS).read_bytes()
    (tmp_path / "long.tsv").write_bytes(text * 400)
    write_lines(tmp_path / "bad.tsv", [("chr1", 9, 5, "A")])
    inputs = [tmp_path / "long.tsv", tmp_path / "bad.tsv"]
    for _ in range(2):
        with pytest.raises(InputError, match=r"bad\.tsv, line 1"):
            toy_convert(inputs, min_fragments=0, dask=cluster.scheduler_address)
        with Client(cluster.scheduler_address) as client:
            assert not any(client.run(_n_tasks).values())
        store = tmp_path / "atlas.zarr"
        assert not store.exists() or describe(IslandStore.open(store)).unfinished == ["long"]


def _n_tasks(dask_worker: Any) -> int:
    return len(dask_worker.state.tasks)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere"])
def test_an_address_without_a_scheduler_is_refused_and_nothing_is_left(
    tmp_path: Path, toy_convert: Convert, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(graph, "_SECONDS_TO_CONNECT", 0.3)
    write_lines(tmp_path / "s.tsv", FRAGMENTS)
    with pytest.raises(InputError, match=f"{address}: found no Dask scheduler .* leave out --dask"):
        toy_convert(tmp_path / "s.tsv", min_fragments=0, dask=address)
    assert not (tmp_path / "atlas.zarr").exists()


def test_a_script_without_a_main_guard_converts_on_a_cluster(
    tmp_path: Path, chrom_sizes: Path, cluster: LocalCluster
) -> None:
    """Case 5."""
    for i in range(6):
        write_lines(tmp_path / f"f{i}.tsv", FRAGMENTS[i:])
    script = tmp_path / "script.py"
    for dask in (None, cluster.scheduler_address):
        script.write_text(
            "from annatac_scale.ingest.convert import convert\n"
            f"files = [{str(tmp_path)!r} + f'/f{{i}}.tsv' for i in range(6)]\n"
            f"r = convert(files, assembly='toy', out={str(tmp_path / f'{dask is None}.zarr')!r}, select='all',\n"
            f"            min_fragments=0, chrom_sizes={str(chrom_sizes)!r}, workers=4, dask={dask!r})\n"
            "print(len(r.converted))\n"
        )
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, timeout=120, check=True
        )
        assert done.stdout.strip() == "6"
    assert digests(tmp_path / "True.zarr") == digests(tmp_path / "False.zarr")


def test_a_worker_that_dies_costs_its_task_alone(
    tmp_path: Path, toy_convert: Convert, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.gz"
    path.write_bytes(bgzf(write_lines(tmp_path / "s.tsv", FRAGMENTS * 10).read_bytes(), 2000))
    with Client(cluster.scheduler_address) as client:
        alive = list(client.run(os.getpid).values())
    tell = graph._tell

    def kill_and_tell(*arguments: Any) -> None:
        if len(alive) == 2:
            os.kill(alive.pop(), signal.SIGKILL)
        tell(*arguments)

    monkeypatch.setattr(graph, "_tell", kill_and_tell)
    toy_convert(path, "there.zarr", range_bytes=4000, min_fragments=0, dask=cluster.scheduler_address)
    assert len(alive) == 1
    toy_convert(path, "here.zarr", min_fragments=0)
    assert digests(tmp_path / "here.zarr") == digests(tmp_path / "there.zarr")

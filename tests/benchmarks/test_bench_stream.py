"""The benchmark of the stream runs, measures what it says, and ends with one line of JSON."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
turns: Any = importlib.import_module("turns")
bench: Any = importlib.import_module("bench_stream")
peers: Any = importlib.import_module("peers")
peer_stream: Any = importlib.import_module("peer_stream")
work: Any = importlib.import_module("stream_work")


def run(name: str, *options: str) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_the_stream_runs_quickly_and_ends_with_json(tmp_path: Path) -> None:
    printed = run("bench_stream.py", "--quick", "--data", str(tmp_path))
    assert "peers: skipped, no --peers given" in printed
    report = json.loads(printed[-1])
    assert list(report["cases"]) == ["store", "peers", "big", "mixing", "latency", "resume", "ranks", "files"]
    assert report["failed"] == []
    cases = report["cases"]
    for name in ("ours_ragged", "ours_encoded"):
        figures = cases["peers"]["runs"][name]
        assert figures["cpu_us_per_cell"]["median"] > 0
        assert figures["rss_mb"] > 10
    assert cases["peers"]["same_cells"]
    assert cases["latency"]["bars"]["same_order"] == 1
    assert cases["ranks"]["all_cells"]
    assert cases["files"]["runs"]["verify_base"]["sound"]
    assert cases["files"]["runs"]["h5ad_tenth"]["out_bytes_per_cell"] > 100
    assert cases["resume"]["bars"]["first_batch_s"] > 0
    assert 1 <= cases["store"]["runs"]["base"]["raw_bytes_per_open"] < 2
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_benchmark_of_clients_reads_with_each_of_them() -> None:
    printed = run("bench_requests.py", "--quick")
    assert printed[0] == "s3fs: skipped, no --s3fs given"
    report = json.loads(printed[-1])
    assert list(report["runs"]) == ["place", "obstore", "obstore_ranges", "pyarrow"]
    assert report["failed"] == []
    for figures in report["runs"].values():
        assert figures["cpu_us_per_request"]["median"] > 0
        assert figures["mb_per_s"]["median"] > 1


def test_unknown_cases_are_named() -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_stream.py"), "--cases", "peers,nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found nothing; expected some of store, peers" in done.stderr


@pytest.mark.parametrize("name", ["bench_stream.py", "bench_requests.py", "store_writer.py", "slow_s3.py"])
def test_every_command_of_the_stream_explains_itself(name: str) -> None:
    assert "usage:" in run(name, "--help")[0]


def test_epochs_are_measured_whole_and_by_themselves() -> None:
    begun: list[int] = []
    closed: list[int] = []

    def epoch(number: int) -> Any:
        begun.append(number)
        try:
            for size in (4, 4, 3):
                yield size, 10 * size
        finally:
            closed.append(number)

    figures = peer_stream.steady(epoch, warm_up=2, n_epochs=2)
    assert (begun, closed) == ([0, 1, 2], [0, 1, 2])
    counts = {name: figures[name] for name in ("epochs", "cells", "n_open", "batches")}
    assert counts == {"epochs": 2, "cells": 22, "n_open": 220, "batches": 6}


def test_ratios_are_taken_round_by_round() -> None:
    found = {
        "a": [{"cells_per_cpu_s": value} for value in (2.0, 6.0, 12.0)],
        "b": [{"cells_per_cpu_s": value} for value in (1.0, 2.0, 2.0)],
        "c": [{"cells_per_cpu_s": 1.0}, {"failed": "exit 1"}],
    }
    assert turns.ratio(found, "a", "b") == {"median": 3.0, "min": 2.0, "max": 6.0}
    assert turns.ratio(found, "a", "c") is None
    assert turns.ratio(found, "a", "none") is None
    assert turns.summary(found["c"]) == {"failed": "exit 1"}


def test_a_run_that_failed_is_reported_and_not_repeated(tmp_path: Path) -> None:
    found = turns.take_turns([turns.Run("broken", {"work": "nothing"})], 3, tmp_path)
    assert len(found["broken"]) == 1
    assert "KeyError" in found["broken"][0]["failed"]
    assert bench.commands.failures({"case": {"runs": turns.summaries(found)}}) == ["case/broken"]


def test_a_run_in_a_fork_says_how_it_failed(tmp_path: Path) -> None:
    run_and_print = (
        "import turns\nfrom pathlib import Path\n"
        "run = turns.Run('broken', {'work': 'nothing'}, fork=[])\n"
        f"print(run.measured(Path({str(tmp_path)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", run_and_print], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert re.search(r"{'failed': \"exit 1: .*KeyError: 'nothing'\"}", done.stdout)


def test_bars_compare_as_they_say() -> None:
    cases = {"peers": {"bars": {"rss_mb": 300.5, "encoded_over_annbatch_zarrs": 3.0, "first_batch_s": None}}}
    assert bench.bars(cases) == {
        "rss_mb": {"found": 300.5, "bar": "<= 300", "met": False},
        "encoded_over_annbatch_zarrs": {"found": 3.0, "bar": ">= 3", "met": True},
    }


def test_entropy_is_the_mean_over_whole_batches() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2, 0, 1, 2, 3, 3])
    assert work.mean_entropy(labels, 4) == pytest.approx((1 + 0 + 2) / 3)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 1_000)
    expected = []
    for start in range(0, 990, 30):
        counts = np.unique(labels[start : start + 30], return_counts=True)[1] / 30
        expected.append(-(counts * np.log2(counts)).sum())
    assert work.mean_entropy(labels, 30) == pytest.approx(np.mean(expected))


def test_an_environment_is_made_once_and_anew_for_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def runs(command: list[str]) -> str:
        commands.append(command)
        (tmp_path / "scdataset").mkdir(exist_ok=True)
        return "no such package" if "broken==1" in command else ""

    monkeypatch.setattr(peers, "_runs", runs)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    for _ in range(2):
        found = peers.make(tmp_path, None)
        assert found == {"scdataset": peers.Peer(Path(sys.executable), str(tmp_path / "scdataset"))}
    assert len(commands) == 1
    monkeypatch.setattr(peers, "SCDATASET", ("broken==1",))
    assert peers.make(tmp_path, None) == {}
    assert len(commands) == 2

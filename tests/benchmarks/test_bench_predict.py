"""The benchmark of prediction runs, measures what it says, and ends with one line of JSON."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench: Any = importlib.import_module("bench_predict")
measure: Any = importlib.import_module("measure")
store_writer: Any = importlib.import_module("store_writer")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_prediction_runs_quickly_and_ends_with_json(tmp_path: Path) -> None:
    asked = ["encoder", "speed", "published", "workers", "kills"]
    command = [sys.executable, str(BENCHMARKS / "bench_predict.py"), "--quick", "--data", str(tmp_path)]
    done = subprocess.run([*command, "--cases", ",".join(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == []
    cases = report["cases"]
    assert list(cases) == asked
    for name, run in (
        *(("encoder", "predict"), ("encoder", "tokens")),
        *(("speed", "predict"), ("speed", "sums"), ("speed", "tokens")),
        *(("published", "predict"), ("published", "loop")),
    ):
        assert cases[name]["runs"][run]["cells_per_s"]["median"] > 0
    assert cases["workers"]["same"]
    assert cases["kills"]["equal"]
    assert cases["kills"]["runs"]["kills"]["kills"] == 2
    assert report["bars"]["over_bare_encoder"]["bar"] == ">= 0.9"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(tmp_path: Path) -> None:
    """Ten times as many parts; kept, or their rows, they would take 300 MB."""
    peaks = []
    for cells in (12_000, 120_000):
        spec = store_writer.Spec(cells=cells, islands=2_000, open=500, types=3)
        store = store_writer.make_store(tmp_path / str(cells), spec)
        task = {
            "store": str(store),
            "model": str(tmp_path / f"model{cells}"),
            "out": str(tmp_path / f"out{cells}"),
        }
        for work in ("model", "predict"):
            (tmp_path / "task.json").write_text(json.dumps({**task, "work": work}))
            command = [sys.executable, str(BENCHMARKS / "predict_work.py"), str(tmp_path / "task.json")]
            figures = measure.measured(command, BENCHMARKS)
            assert "failed" not in figures, figures["failed"]
        peaks.append(figures["rss_mb"])
    assert peaks[1] < peaks[0] + 80


def test_unknown_cases_are_named_and_the_command_explains_itself() -> None:
    for given, code, said in (
        (["--cases", "speed,x"], 2, "found x; expected some of memory"),
        (["--help"], 0, "usage:"),
    ):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "bench_predict.py"), *given],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_bars_compare_as_they_say() -> None:
    cases = {"a": {"bars": {"rss_mb_many": 1600.0, "over_published_loop": 20.0, "rss_mb_few": None}}}
    assert bench.bars(cases) == {
        "rss_mb_many": {"found": 1600.0, "bar": "<= 1500", "met": False},
        "over_published_loop": {"found": 20.0, "bar": ">= 20", "met": True},
    }


def test_files_differ_where_a_byte_does(tmp_path: Path) -> None:
    (tmp_path / "a-0.parquet").write_bytes(b"x")
    before = bench.files_digest(tmp_path)
    (tmp_path / "_manifest.json").write_text("{}")
    assert bench.files_digest(tmp_path) == before
    (tmp_path / "a-0.parquet").write_bytes(b"y")
    assert bench.files_digest(tmp_path) != before

"""The benchmarks of the converter run, measure what they say, and end with one line of JSON."""

import importlib
import json
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
measure: Any = importlib.import_module("measure")
bench: Any = importlib.import_module("bench_convert")
compare: Any = importlib.import_module("compare_snapatac2")


def run(name: str, *options: str, code: int = 0) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_benchmark_of_the_converter_runs_quickly_and_ends_with_json(tmp_path: Path) -> None:
    printed = run("bench_convert.py", "--quick", "--data", str(tmp_path), "--peer-python", "/no/such/python")
    assert "peers: skipped, /no/such/python is not there" in printed
    report = json.loads(printed[-1])
    assert set(report["cases"]) == {"peers", "memory", "formats", "sheet"}
    assert report["failed"] == []
    for case in report["cases"].values():
        assert all(
            figures["cpu_s_median"] > 0 and figures["rss_mb"] > 10 for figures in case["runs"].values()
        )
    assert report["cases"]["peers"]["ratios"]["two_workers_over_one_wall"] > 0
    assert set(report["cases"]["sheet"]["overhead_per_100_samples"]) == {"cpu_s", "wall_s"}


@pytest.mark.slow
def test_a_killed_conversion_ends_with_the_digest_of_an_undisturbed_one() -> None:
    report = json.loads(run("kill_convert.py", "--quick", "--kills", "1")[-1])
    assert report["equal"] == report["runs"] == 1


def test_the_comparison_says_so_where_there_is_no_peer() -> None:
    assert run("compare_snapatac2.py", "--peer-python", "/no/such/python") == [
        "skipped: /no/such/python is not there"
    ]


def test_measured_figures_are_of_the_command_and_its_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass\n"
    program = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n"
        "held = bytearray(200_000_000)\nprint('done')"
    )
    figures = measure.measured([sys.executable, "-c", program], tmp_path)
    assert figures["printed"] == "done"
    assert "failed" not in figures
    assert figures["cpu_s"] >= 0.4
    assert figures["wall_s"] >= 0.4
    assert 200 < figures["rss_mb"] < 400


def test_a_command_that_fails_says_how(tmp_path: Path) -> None:
    figures = measure.measured([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)
    assert figures["failed"] == "exit 1: no such thing"


def test_a_command_over_its_time_is_killed(tmp_path: Path) -> None:
    figures = measure.measured([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, timeout=0.5)
    assert figures["failed"].startswith("exit 137")


def test_summaries_hold_median_and_spread() -> None:
    rounds = [
        {"cpu_s": cpu, "wall_s": 2 * cpu, "rss_mb": 10 * cpu, "tree_rss_mb": 1.0, "load": cpu, "printed": ""}
        for cpu in (3.0, 1.0, 2.0)
    ]
    found = bench.summary(rounds)
    assert found["cpu_s_median"] == 2.0
    assert found["cpu_s_min_max"] == [1.0, 3.0]
    assert found["wall_s_median"] == 4.0
    assert found["rss_mb"] == 30.0
    assert bench.ratio({"a": found, "b": {"failed": "exit 1"}}, "a", "b", "cpu_s_median") is None


def test_expected_islands_are_the_rounded_up_mean_of_their_peaks() -> None:
    rng = np.random.default_rng(0)
    begins = rng.choice(40_000, 30, replace=False)
    peaks = [f"chr1:{begin}-{begin + 500}" for begin in begins]
    names = [f"chr1:{begin}-{begin + 5_000}" for begin in range(0, 40_000, 5_000)]
    counts = rng.poisson(1.0, (20, 30)) * rng.integers(0, 8, (20, 30))
    found = compare.expected_islands(sparse.csr_array(counts), peaks, names).toarray()
    for cell in range(20):
        for island in range(8):
            own = [
                counts[cell, peak] for peak, begin in enumerate(begins.tolist()) if begin // 5_000 == island
            ]
            assert found[cell, island] == (min(ceil(sum(own) / len(own)), 5) if own else 0)


def test_windows_of_real_files_are_disjoint_and_cut_at_fragment_ends() -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 50_000, 300)
    lines = pd.DataFrame({"chrom": "chr1", "start": start, "end": start + rng.integers(1, 400, 300)})
    windows = compare.cut_windows(rng, lines, compare.Assembly.builtin("hg38"), 200)
    assert (windows["start"] < windows["end"]).all()
    assert (windows["start"].to_numpy()[1:] >= windows["end"].to_numpy()[:-1]).all()
    ends = {
        *lines["start"], *(lines["start"] + 1), *lines["end"], *(lines["end"] - 1)
    }  # fmt: skip
    assert set(windows["start"]) <= ends


@pytest.mark.parametrize(
    "name", ["bench_convert.py", "compare_snapatac2.py", "kill_convert.py", "fragments.py"]
)
def test_every_command_explains_itself(name: str) -> None:
    assert "usage:" in run(name, "--help")[0]

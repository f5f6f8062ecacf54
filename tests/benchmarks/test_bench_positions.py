"""The benchmark of the positions runs, measures what it says, and ends with one line of JSON."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench: Any = importlib.import_module("bench_positions")
work: Any = importlib.import_module("positions_work")
store_writer: Any = importlib.import_module("store_writer")


def run(*options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_positions.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_the_positions_runs_quickly_and_ends_with_json(tmp_path: Path) -> None:
    report = json.loads(run("--quick", "--data", str(tmp_path)).stdout.splitlines()[-1])
    assert report["failed"] == []
    cases = report["cases"]
    assert list(cases) == ["cost", "sklearn", "space"]
    for case in cases.values():
        for figures in case["runs"].values():
            assert figures["svd_cpu_s"]["median"] > 0
            assert figures["rss_mb"] > 50
    assert cases["cost"]["runs"]["idf_base"]["passes"] <= 5
    for found in cases["sklearn"]["accuracy"].values():
        assert found["largest_value_error"] < 0.05
        assert found["variance_share"] > 0.98
        assert found["overlap"]["5"] > 0.999


def test_unknown_cases_are_named_and_the_command_explains_itself() -> None:
    assert "found nothing; expected some of cost" in run("--cases", "cost,nothing", code=2).stderr
    assert "usage:" in run("--help").stdout


def test_the_cost_of_more_cells_leaves_out_what_does_not_grow() -> None:
    # 10 s whatever the cells, and 3.6 ms for each: an hour for a million of them.
    found = {
        name: [{"svd_cpu_s": 10 + 3.6e-3 * cells, "cells": cells}]
        for name, cells in (("few", 1_000), ("many", 9_000))
    }
    assert bench.per_cell(found, "many", "few") == pytest.approx(1.0)
    assert bench.per_cell({**found, "few": [{"failed": "exit 1"}]}, "many", "few") is None


@pytest.mark.parametrize("values", ["idf", "levels"])
def test_scikit_learn_gets_the_matrix_that_is_decomposed(tmp_path: Path, values: str) -> None:
    spec = store_writer.Spec(cells=300, islands=200, open=20, types=3)
    task = {"store": str(store_writer.make_store(tmp_path, spec)), "cells": 280, "values": values}
    matrix = work.matrix_of(task)
    dense = work.csr_of(matrix).toarray().astype(np.float64)
    basis = np.random.default_rng(0).standard_normal((dense.shape[1], 4), dtype=np.float32)
    total = np.zeros_like(basis)
    for part in matrix.parts(100):
        matrix.add_products(part, basis, total, lambda n: None)
    np.testing.assert_allclose(total, dense.T @ (dense @ basis), rtol=1e-3, atol=1e-3 * np.abs(total).max())

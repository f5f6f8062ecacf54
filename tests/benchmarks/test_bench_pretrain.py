"""Pretraining is killed, cut off and measured: the runs end as undisturbed ones do, the figures are what they say."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
hosts: Any = importlib.import_module("hosts")


def report_of(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_worker_and_driver_are_killed_ends_with_the_bits_of_an_undisturbed_one() -> None:
    report = report_of("kill_pretrain.py", "--quick")
    assert [kill["target"] for kill in report["kills"]] == ["worker", "driver"]
    assert report["attempts"] == 3
    assert report["equal"]
    assert report["cells_wrong"] == 0


@pytest.mark.nodes
@pytest.mark.timeout(900)
def test_a_run_that_loses_one_of_three_hosts_within_an_epoch_ends_as_an_undisturbed_one() -> None:
    if why := hosts.missing():
        pytest.skip(why)
    report = report_of("lost_node.py", "--steps", "150")
    assert report["world_sizes"] == [3, 2]
    assert report["largest_difference_of_a_loss"] <= 1e-4
    assert report["cells_wrong"] == 0


@pytest.mark.slow
def test_the_benchmark_of_pretraining_runs_quickly_and_ends_with_json() -> None:
    report = report_of("bench_pretrain.py", "--quick", "--cases", "checkpoints")
    found = report["cases"]["checkpoints"]
    assert found["checkpoint_mb"] > 1
    assert found["share_of_10_minutes"] == pytest.approx(found["checkpoint_s"]["median"] / 600, abs=1e-5)

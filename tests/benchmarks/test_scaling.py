"""The page on scaling is what its script writes from the saved results, and the model of a step does its sums."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
scaling: Any = importlib.import_module("scaling")


def test_the_page_is_that_of_the_saved_results() -> None:
    assert scaling.PAGE.read_text() == scaling.page()


def test_nothing_is_exchanged_by_one_gpu_and_a_ring_moves_nearly_twice_the_bytes() -> None:
    machine = scaling.Machine(node_bytes_s=1e9, network_bytes_s=1e9, network_s=0.0)
    assert scaling.all_reduce(1e9, 1, machine) == 0
    assert scaling.all_reduce(1e9, 8, machine) == pytest.approx(2 * 7 / 8)
    assert scaling.all_reduce(1e9, 16, machine) == pytest.approx(2 * 7 / 8 + 2 * 1 / 2)


def test_a_step_takes_as_long_as_its_slowest_side() -> None:
    case, machine = scaling.cases()[0], scaling.Machine()
    measured = scaling.Measured(read_s=1e-6, mask_s=1e-5, cell_bytes=1000, svd_core_h=0.1)
    found = scaling.step(case, 8, machine, measured)
    assert found.total == found.compute + found.optimizer + found.exchange
    assert found.compute == pytest.approx(112 * case.flops / 150e12)
    slow = scaling.step(case, 8, machine, replace(measured, mask_s=1.0))
    assert slow.total == pytest.approx(112 * (1.0 + 1e-6))
    assert slow.bottleneck == "masking on one core"


def test_the_table_of_all_bins_at_k_64_is_what_ranks_exchange() -> None:
    case = scaling.cases()[-1]
    assert case.table_bytes == 642_102 * 64 * 4
    assert case.gradient_bytes > case.table_bytes

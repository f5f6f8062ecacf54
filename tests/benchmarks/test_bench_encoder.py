"""The benchmark of the encoder runs, measures what it says, and its reference computes what ours does."""

import dataclasses
import importlib
import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from annatac_scale.model.linformer import EncoderConfig, Linformer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench: Any = importlib.import_module("bench_encoder")
plain: Any = importlib.import_module("plain_encoder")
work: Any = importlib.import_module("encoder_work")

CONFIG = EncoderConfig(
    width=12, layers=2, heads=3, head_dim=5, k=4, ff=20, attend="all", norm="post", positions="frozen"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_the_encoder_runs_quickly_and_ends_with_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_encoder.py"), "--quick"]
    cases = ["train", "predict", "linear", "tables", "checkpoint"]
    done = subprocess.run([*command, "--cases", ",".join(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == []
    assert list(report["cases"]) == cases
    for name in ("plain_fp32", "all_fp32", "open_500_fp32"):
        figures = report["cases"]["train"]["runs"][name]
        assert figures["cpu_ms_per_cell"]["median"] > 0
        assert figures["peak_mb_per_cell"] >= 0
    assert report["cases"]["train"]["bars"]["train_open_1500"] > 0
    assert report["cases"]["linear"]["bars"]["linear_deviation"] >= 0
    assert 0 < report["cases"]["tables"]["bars"]["tables_share_of_step"] < 1
    assert report["cases"]["tables"]["runs"]["tables_600000"]["table_mb"] == 6_000 * 16 * 4 / 1e6


def test_the_plain_reference_computes_what_our_encoder_does() -> None:
    torch.manual_seed(0)
    n_islands, n_cells = 11, 3
    ours = Linformer(CONFIG, n_islands, torch.randn(n_islands, CONFIG.width)).double()
    reference = plain.PlainEncoder(CONFIG, n_islands).double()
    reference.load_state_dict(plain.plain_weights(ours.state_dict()))
    tokens = torch.randint(0, 7, (n_cells, n_islands))
    islands = torch.arange(n_islands).repeat(n_cells)
    offsets = torch.arange(n_cells + 1) * n_islands
    found, expected = ours(tokens.flatten(), islands, offsets), reference(tokens).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.projection.grad, reference.project.weight.grad.t(), rtol=1e-9, atol=1e-9)


def test_both_are_given_the_same_cells_and_loss() -> None:
    task = work.Task("train", preset="tiny", attend="all", n_open=5, n_islands=9, cells=2)
    cells = work.Cells.drawn(task)
    tokens, targets = cells.dense(9)
    assert tokens.shape == targets.shape == (2, 9)
    assert torch.equal(targets.flatten()[cells.queries], cells.targets)
    assert int((targets != -100).sum()) == len(cells.queries)
    config = dataclasses.replace(task.config(), norm="post")
    ours, reference = work.Pretraining(config, 9), plain.PlainPretraining(config, 9)
    reference.encoder.load_state_dict(plain.plain_weights(ours.encoder.state_dict()))
    reference.level.load_state_dict(ours.level.state_dict())
    found = ours(cells.tokens, cells.islands, cells.offsets, cells.queries, cells.targets)
    torch.testing.assert_close(found, reference(tokens, targets))


def test_open_cells_list_their_open_islands_alone_as_many_as_asked_in_the_mean() -> None:
    cells = work.Cells.drawn(work.Task("train", n_open=100, n_islands=1_000, cells=9))
    counts = cells.offsets.diff()
    assert float(counts.double().mean()) == pytest.approx(100, abs=1)
    assert len(set(counts.tolist())) == 9
    assert bool((cells.tokens > 0).all())
    for start, stop in zip(cells.offsets[:-1].tolist(), cells.offsets[1:].tolist(), strict=True):
        assert bool((cells.islands[start:stop].diff() > 0).all())
    share = len(cells.queries) / len(cells.tokens)
    assert 0.1 < share < 0.2


def test_memory_is_the_peak_after_the_call_begins() -> None:
    memory = work.Memory(torch.device("cpu"))
    # Pages of its own: what malloc gives may be pages that were given back to it and are held already.
    with mmap.mmap(-1, 40_000_000) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert 35 < memory.peak_mb() < 200


def test_unknown_cases_are_named_to_whoever_asks_for_them() -> None:
    command = [sys.executable, str(BENCHMARKS / "bench_encoder.py"), "--cases", "train,nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found nothing; expected some of train, predict" in done.stderr


def test_bars_of_the_encoder_compare_as_they_say() -> None:
    cases = {"train": {"bars": {"train_all": 2.4, "memory_all": 0.61, "train_open_500": None}}}
    assert bench.bars(cases) == {
        "train_all": {"found": 2.4, "bar": ">= 2.3", "met": True},
        "memory_all": {"found": 0.61, "bar": "<= 0.6", "met": False},
    }

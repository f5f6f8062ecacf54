"""What the presets cost for the cells of a store: facts from the store, arithmetic, and rates that were measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import annatac_scale as ats
from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.cost import CellTokens, training_flops
from annatac_scale.model.linformer import Linformer
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.writer import SampleWriter, create_store
from annatac_scale.train import cost
from annatac_scale.train.presets import pretrain_preset

SPACE = IslandSpace.all(Assembly("toy", ("chr1",), (500_000,)))
OPEN = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5, 6]]
"""Islands 1, 2, 3 are open in three cells each, the others in one."""


def write(path: Path, cells: list[list[int]]) -> Path:
    create_store(path, SPACE, "insertion")
    offsets = np.cumsum([0, *map(len, cells)])
    islands = np.array([island for cell in cells for island in cell], np.int32)
    with SampleWriter(path, "kidney", len(cells)) as writer:
        writer.write_shard(0, OpenIslands(offsets, islands, np.ones(len(islands), np.uint8)))
        writer.commit(pd.DataFrame(index=[f"c{i}" for i in range(len(cells))]), np.ones(len(SPACE), bool), {})
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cost, "LEAST_S", 0.0)
    monkeypatch.setattr(cost, "PRESETS", ("tiny", "small"))


@pytest.fixture
def report(quick, tmp_path):
    return ats.info(write(tmp_path / "atlas.zarr", OPEN), cost=True)


def test_cells_and_islands_are_those_of_the_store(report):
    assert (report.n_cells, report.n_islands, report.open_per_cell) == (3, 3, 3.0)
    assert report.device in ("cpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert [(one.preset, one.attend) for one in report.presets] == [
        ("tiny", "all"), ("tiny", "open"), ("small", "all"), ("small", "open")
    ]  # fmt: skip


def test_every_preset_has_its_arithmetic_and_a_measured_rate(report):
    for one in report.presets:
        config = pretrain_preset(one.preset)
        model = Linformer(config.encoder, 3)
        assert one.parameters == sum(p.numel() for p in model.parameters())
        assert one.table_mb == pytest.approx(3 * config.encoder.k * 4 / 1e6)
        assert one.gflop_training > one.gflop_forward > 0
        assert one.cells_per_s_training > 0
        assert one.cells_per_s_forward > 0
        assert one.hours_per_million == pytest.approx(1e6 / one.cells_per_s_training / 3600)
    opened, everything = report.presets[1], report.presets[0]
    assert opened.gflop_forward == everything.gflop_forward  # all three islands are open in the mean cell


def test_the_last_layer_is_trimmed_where_only_masked_tokens_are_asked():
    def tokens(objective: str) -> CellTokens:
        config = replace(pretrain_preset("tiny"), objective=objective, negatives=2, mask_fraction=0.1)
        return cost._training_tokens(config, 100.0, 1000)

    assert tokens("level") == CellTokens(100, 10)
    assert tokens("level+open") == CellTokens(120, 30)
    assert tokens("open+vector") == CellTokens(120, 120)
    assert tokens("vector") == CellTokens(100, 100)


def test_presets_that_pretrain_without_the_encoder_are_named(report):
    idle = [name for name in ("tiny", "small") if not pretrain_preset(name).runs_encoder]
    assert [name for name in ("tiny", "small") if f"Preset {name} pretrains without" in report.text()] == idle
    assert {one.preset for one in report.presets if not one.in_pretraining} == set(idle)


def test_the_report_reads_as_a_table_and_as_json(report):
    lines = report.text().splitlines()
    assert "3, 3.0 open islands a cell" in lines[1]
    assert "3 in the vocabulary" in lines[2]
    rows = [line.split()[:2] for line in lines if line.startswith(("tiny", "small"))]
    assert rows == [["tiny", "all"], ["tiny", "open"], ["small", "all"], ["small", "open"]]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["presets"][0]["preset"] == "tiny"


def test_long_cells_are_measured_shortened_and_scaled_by_flops(quick, monkeypatch):
    calls = []

    def recorded(encoder, cell, n_cells, **options):
        calls.append((cell, n_cells))
        return lambda: None

    monkeypatch.setattr(cost, "_call", recorded)
    monkeypatch.setattr(cost.time, "perf_counter", iter([0.0, 1.0]).__next__)
    config = pretrain_preset("tiny")
    tokens = CellTokens(4 * config.train.micro_tokens, 400.0)
    rate = cost._cells_per_s(config, tokens, training_flops, 100_000, torch.device("cpu"), trains=True)
    measured, n_cells = calls[0]
    assert (measured, n_cells) == (CellTokens(config.train.micro_tokens, 100.0), 1)
    assert rate == pytest.approx(
        training_flops(config.encoder, measured) / training_flops(config.encoder, tokens)
    )


def test_a_call_lists_the_cells_and_asks_the_tokens_that_it_is_to():
    seen = []

    class Recording(Linformer):
        def forward(self, tokens, islands, offsets, queries=None):
            seen.append((tokens, islands, offsets, queries))
            return super().forward(tokens, islands, offsets, queries)

    encoder = Recording(pretrain_preset("tiny").encoder, 50)
    cost._call(encoder, CellTokens(20.0, 3.0), 4, trains=True, bf16=False)()
    tokens, islands, offsets, queries = seen[0]
    assert offsets.tolist() == [0, 20, 40, 60, 80]
    assert len(queries) == 12
    assert bool((tokens[queries] == 6).all())
    for start in range(0, 80, 20):
        assert bool((islands[start : start + 20].diff() > 0).all())
    assert encoder.projection.grad is not None
    encoder.zero_grad()
    cost._call(encoder, CellTokens(20.0, 20.0), 4, trains=False, bf16=True)()
    assert seen[1][3] is None
    assert encoder.projection.grad is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,300"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (9.999, "10.0"),
    ],
)
def test_rates_have_three_digits(value, text):
    assert cost._three_digits(value) == text


def test_a_store_without_islands_to_learn_is_refused(quick, tmp_path):
    with pytest.raises(InputError, match="found no island that is open in 2 or more"):
        ats.info(write(tmp_path / "atlas.zarr", [[1], [2]]), cost=True)
    with pytest.raises(InputError, match="found both --verify and --cost"):
        ats.info(tmp_path / "atlas.zarr", cost=True, verify=True)

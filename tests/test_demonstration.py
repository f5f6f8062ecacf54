"""The demo on its smaller data set: real cells in, figures out, and the commands that it shows can be typed."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from annatac_scale import demonstration
from annatac_scale.cli import main
from annatac_scale.progress import Silent


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines += line.splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    folder, progress = tmp_path_factory.mktemp("demo"), Lines()
    blood = next(data_set for data_set in demonstration.DATA_SETS if data_set.name == "PBSmall")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "DATA_SETS", (blood,))
        (figures,) = demonstration.run_demo(folder, False, progress)
    return folder, progress.lines, figures


@pytest.mark.slow
def test_real_cells_held_out_are_labelled(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    _, _, figures = run
    assert figures["held_out_cells"] == 30
    assert figures["annatac_scale"]["accuracy"] >= 0.8
    assert figures["logistic_regression"]["accuracy"] >= 0.8


def test_the_held_out_cells_are_those_of_the_fold(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    folder, _, _ = run
    cells = pd.read_csv(folder / "PBSmall" / "cells.tsv", sep="\t").set_index("barcode")
    split = pd.read_parquet(folder / "PBSmall" / "finetuned_0" / "split.parquet").set_index("barcode")[
        "split"
    ]
    assert ((split == "test") == (cells["fold"] == 0).reindex(split.index)).all()
    assert set(cells["cell_type"]) == {"B", "M", "T"}


def test_the_commands_shown_can_be_typed_and_find_their_work_done(
    run: tuple[Path, list[str], dict[str, Any]],
) -> None:
    _, lines, _ = run
    commands = [
        shlex.split(line.removeprefix("$ annatac ")) for line in lines if line.startswith("$ annatac ")
    ]
    assert [words[0] for words in commands] == [
        "convert", "convert", "info", "pretrain", "finetune", "predict", "evaluate"
    ]  # fmt: skip
    for words in commands:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, f"{words}: {result.output}"
    assert "30 of 150" in result.output

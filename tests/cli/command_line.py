"""Commands run in this process, and a small atlas to run them on."""

import gzip
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from scipy import sparse

from annatac_scale.cli import main

N_CELLS, N_PEAKS = 120, 80
TYPES = ("B cell", "NK", "T cell")
EPOCHS = ("--epochs", "1")


def run(*words: Any) -> Result:
    """Run a command in this process; what is not refused on purpose is raised."""
    return CliRunner().invoke(
        main, [str(word) for word in words], prog_name="annatac", catch_exceptions=False
    )


def done(*words: Any) -> Result:
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    return result


def refusal(*words: Any) -> str:
    """The one line that a command is refused with."""
    result = run(*words)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("annatac: error: ")
    assert not any("error" in line or "Traceback" in line for line in before)
    return last.removeprefix("annatac: error: ")


def strict_json(text: str) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def draw_cells() -> tuple[np.ndarray, pd.DataFrame]:
    """Counts [cells, peaks] and obs of three types that have peaks of their own."""
    rng = np.random.default_rng(0)
    types = np.array(TYPES)[np.arange(N_CELLS) % 3]
    chance = np.full((N_CELLS, N_PEAKS), 0.1)
    for number, name in enumerate(TYPES):
        chance[types == name, number * 20 : (number + 1) * 20] = 0.7
    counts = rng.integers(1, 9, chance.shape) * (rng.random(chance.shape) < chance)
    obs = pd.DataFrame(
        {"cell_type": types, "donor": [f"D{i % 4}" for i in range(N_CELLS)]},
        index=pd.Index([f"c{i:03d}" for i in range(N_CELLS)], name="barcode"),
    )
    return counts, obs


class Atlas:
    """A folder with the inputs, and the paths of what commands make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts, self.obs = draw_cells()
        self.h5ad = folder / "cells.h5ad"
        self.fragments = folder / "fragments.tsv.gz"
        self.cells = folder / "cells.tsv"
        self.sizes = folder / "toy.sizes"
        self.sizes.write_text("chr1\t400000\nchr2\t50000\n")
        var = pd.DataFrame(index=[f"chr1:{i * 5000 + 100}-{i * 5000 + 600}" for i in range(N_PEAKS)])
        matrix = sparse.csr_matrix(self.counts.astype(np.int32))
        anndata.AnnData(matrix, obs=self.obs, var=var).write_h5ad(self.h5ad)
        self.obs.to_csv(self.cells, sep="\t")
        self._write_fragments()
        self.store, self.other = folder / "atlas.zarr", folder / "other.zarr"
        self.pretrained, self.finetuned = folder / "pre", folder / "fine"
        self.model, self.typer = self.pretrained / "model", self.finetuned / "model"
        self.labels = folder / "labels"
        self.toy = ("--assembly", "toy", "--chrom-sizes", self.sizes, "--select", "all")

    def _write_fragments(self) -> None:
        """A fragment of 100 bp for each count, within its peak."""
        cells, peaks = np.nonzero(self.counts)
        lines = [
            f"chr1\t{peak * 5000 + 100 + i}\t{peak * 5000 + 200 + i}\t{self.obs.index[cell]}\t1\n"
            for cell, peak in zip(cells, peaks, strict=True)
            for i in range(self.counts[cell, peak])
        ]
        self.fragments.write_bytes(gzip.compress("".join(lines).encode()))

    def fine_tuning(self) -> tuple[Any, ...]:
        """Words of the command that fine-tunes."""
        return (
            "finetune", self.store, "--model", self.model, "--labels", "cell_type", "--out", self.finetuned,
            "--epochs", 12, "--set", "train.learning_rate=1e-2", "--set", "train.patience=12",
        )  # fmt: skip

    def file(self, name: str, text: str = "not what it should be\n") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path


def files_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

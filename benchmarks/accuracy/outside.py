"""Peers, each in an environment of its own (peers/make_env.sh), given a problem and asked for types through files."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from baselines import Predicted, inner_folds
from genes import gene_scores, gene_table
from protocol import Problem
from scipy import sparse
from sets import SETS, Stores

from annatac_scale.baseline import Tuned
from annatac_scale.errors import InputError

HERE = Path(__file__).parent / "peers"
LIMIT_S = 3 * 3600
"""Seconds after which a peer is stopped."""


@dataclass(frozen=True)
class Peer:
    """env: name of its environment; reads: "islands", or "genes", which wants the peaks of a labelled file."""

    env: str
    script: str
    package: str
    reads: str = "islands"

    @property
    def version(self) -> str:
        """Its package and version, as pinned; the package alone where no registry has it."""
        lines = (HERE / f"{self.env}.txt").read_text().splitlines()
        return next(
            (line for line in lines if line.lower().startswith(f"{self.package.lower()}==")), self.package
        )


PEERS = {
    "Cellcano": Peer("cellcano", "run_cellcano.py", "Cellcano", "genes"),
    "SingleR": Peer("singler", "run_singler.py", "singler", "genes"),
    "CellTypist": Peer("celltypist", "run_celltypist.py", "celltypist"),
    "SCANVI": Peer("scvi", "run_scanvi.py", "scvi-tools"),
    "PEAKVI, then kNN": Peer("scvi", "run_peakvi.py", "scvi-tools"),
    "RAINBOW": Peer("rainbow", "run_rainbow.py", "scrainbow"),
    "EpiAnno": Peer("epianno", "run_epianno.py", "EpiAnno"),
}


class CouldNotRunError(Exception):
    """A peer that gave no answer, with what it or its installation said."""


def tell_outside(problem: Problem, config: Mapping[str, Any], stores: Stores, envs: Path) -> Predicted:
    """The types that a peer tells. Raises CouldNotRunError, with the reason, where it does not."""
    peer = PEERS[config["model"]]
    python = envs / peer.env / "bin" / "python"
    if not (envs / peer.env / ".ready").is_file():
        raise CouldNotRunError(_why_there_is_none(peer.env, envs))
    folder = Path(tempfile.mkdtemp(prefix="peer-", dir=stores.work))
    try:
        classes = _write(problem, peer, config, stores, folder)
        output = folder / "output"
        with output.open("w") as file:
            try:
                done = subprocess.run(
                    [python, HERE / peer.script, folder],
                    env={
                        **os.environ,
                        "PYTHONPATH": "",
                        "CUDA_VISIBLE_DEVICES": "",
                        "NUMBA_NUM_THREADS": "1",
                    },
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise CouldNotRunError(f"stopped after {LIMIT_S} seconds") from error
        if done.returncode != 0:
            raise CouldNotRunError(f"exit {done.returncode}: {_last_line(output)}")
        with np.load(folder / "told.npz", allow_pickle=False) as arrays:
            codes = arrays["codes"]
        chosen = json.loads((folder / "told.json").read_text())["chosen"]
        return Predicted(np.array(classes)[codes], Tuned(chosen, 0.0, None))
    finally:
        shutil.rmtree(folder)


def _write(
    problem: Problem, peer: Peer, config: Mapping[str, Any], stores: Stores, folder: Path
) -> list[str]:
    """Write what the peer is given; returns the classes that codes stand for."""
    rows, columns = problem.levels, np.arange(problem.levels.shape[1]).astype(str)
    if peer.reads == "genes":
        rows, columns = _genes(problem, config, stores)
    rows = sparse.csr_matrix(rows)
    classes, codes = np.unique(problem.types[problem.train], return_inverse=True)
    inner = np.zeros(len(codes), np.int64)
    for number, (_, outer) in enumerate(inner_folds(problem.types[problem.train])):
        inner[outer] = number
    np.savez(folder / "rows.npz", data=rows.data, indices=rows.indices, indptr=rows.indptr, shape=rows.shape)
    np.savez(
        folder / "cells.npz",
        train=problem.train,
        codes=codes,
        test=problem.test,
        groups=_codes_of_groups(problem, config),
        inner=inner,
    )
    told = {"classes": classes.tolist(), "columns": columns.tolist(), "seed": problem.seed}
    (folder / "task.json").write_text(json.dumps(told))
    return [str(name) for name in classes]


def _genes(
    problem: Problem, config: Mapping[str, Any], stores: Stores
) -> tuple[sparse.csr_matrix, np.ndarray]:
    if config["set"] not in SETS:
        raise CouldNotRunError(
            "gene scores want the peaks of a labelled h5ad file, and a store has islands alone"
        )
    data_set = SETS[config["set"]]
    data = anndata.read_h5ad(stores.data / data_set.file)
    order = data.obs_names.get_indexer(problem.barcodes)
    if (order < 0).any():
        raise InputError(f"{data_set.file}: its barcodes are not those of the store; make the store again")
    counts = sparse.csr_matrix(data.X)[order].astype(np.int64)
    return gene_scores(counts, data.var, gene_table(data_set.assembly))


def _codes_of_groups(problem: Problem, config: Mapping[str, Any]) -> np.ndarray:
    """Donor or library of each cell as a number: what methods that correct for batches are told."""
    column = {"granja": "donor", "snareseq": "batch"}.get(config["set"], config.get("own", {}).get("group"))
    if not column:
        return np.zeros(len(problem.types), np.int64)
    groups = problem.store.obs([column])[column].astype(object).fillna("").to_numpy(str)
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _why_there_is_none(env: str, envs: Path) -> str:
    log = envs / f"{env}.log"
    made = f"peers/make_env.sh {env} {envs}"
    return f"no environment: {_last_line(log)} ({made})" if log.is_file() else f"no environment: run {made}"


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"

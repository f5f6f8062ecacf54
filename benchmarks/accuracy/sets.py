"""The labelled sets: their stores, made once and kept, and which of their cells train and test.

cerebellum, bm0828   five stratified folds (column ``fold``), whose held-out cells are pooled
granja               donor D6 trains and D5 tests (column ``donor``); 8 and 16 types
snareseq             libraries 09A to 09H train and 09I to 09L test (column ``batch``); 15 and 23 types
granja_d6, granja_d5, snareseq_ah, hg19
                     unlabelled, to pretrain on: one donor, the libraries that train, and D6 together with bm0828
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.model_selection import StratifiedKFold

import annatac_scale as ats
from annatac_scale.errors import InputError
from annatac_scale.store.store import IslandStore

FOLDS = 5
SEED = 0
"""Of the folds and of the draws of few labels, in all rows the same."""
DRAWS = 5
CELLS_A_TYPE = 10
TRAIN_DONOR, TEST_DONOR = "D6", "D5"
OWN = "own:"
"""Before the path of a store of one's own, where a name of a store is asked for."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DataSet:
    """A labelled file.

    labels: its columns of types; holdout: column and values that are held out in turn, "a+b" being two at once
    """

    name: str
    file: str
    assembly: str
    labels: tuple[str, ...]
    holdout: tuple[str, tuple[str, ...]]


_FOLDS = ("fold", tuple(map(str, range(FOLDS))))
SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet("cerebellum", "cusanovich2018_cerebellum_801.h5ad", "mm9", ("cell_type",), _FOLDS),
        DataSet("bm0828", "buenrostro2018_BM0828_533.h5ad", "hg19", ("cell_type",), _FOLDS),
        DataSet(
            "granja",
            "granja2019_bmmc_14k.h5ad",
            "hg19",
            ("cell_type", "coarse_label"),
            ("donor", (TEST_DONOR,)),
        ),
        DataSet(
            "snareseq",
            "snareseq_mouse_cortex_10k.h5ad",
            "mm10",
            ("cell_type", "orig_label"),
            ("batch", ("09I+09J+09K+09L",)),
        ),
    )
}
PARTS = {
    "granja_d6": ("granja", (TRAIN_DONOR,)),
    "granja_d5": ("granja", (TEST_DONOR,)),
    "snareseq_ah": ("snareseq", tuple(f"09{letter}" for letter in "ABCDEFGH")),
}
"""Unlabelled stores: the cells of a set with these values in the column that is held out by."""
PRETRAINING = {
    "cerebellum": "cerebellum",
    "bm0828": "bm0828",
    "granja": "granja_d6",
    "snareseq": "snareseq_ah",
}
"""The store that models of a set are pretrained on: granja's and snareseq's hold no cell that tests."""


@contextmanager
def alone(file: Path, made: Path) -> Iterator[None]:
    """Wait, unless ``made`` is there, until no other row makes it: rows run side by side on the same stores and models.

    file: is locked; whoever holds it looks for ``made`` once more
    """
    if made.exists():
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back with the file, also by a process that is killed
        yield


@dataclass(frozen=True)
class Stores:
    """Where the labelled files are, and the stores made of them."""

    data: Path
    work: Path

    def check(self, names: list[str]) -> None:
        """Raise InputError where the file of a set is missing."""
        missing = [SETS[name].file for name in names if not (self.data / SETS[name].file).is_file()]
        if missing:
            raise InputError(
                f"--data {self.data}: found no {', '.join(missing)}; expected the labelled h5ad files that "
                "benchmarks/README.md names; nothing is fetched: give the folder that holds them"
            )

    def open(self, name: str, select: str) -> IslandStore:
        """The store of a set, of unlabelled cells or of one's own, converted where it is not there yet."""
        if name.startswith(OWN):
            return IslandStore.open(Path(name.removeprefix(OWN)))
        path = self.work / "stores" / f"{name}-{select}.zarr"
        done = path.with_suffix(".done")
        with alone(self.work / "stores.lock", done):
            if not done.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _convert(self, name, select, path)
                done.touch()
        return IslandStore.open(path)


def _convert(stores: Stores, name: str, select: str, path: Path) -> None:
    if name in SETS:
        data_set = SETS[name]
        cells = _cells(anndata.read_h5ad(stores.data / data_set.file).obs, data_set)
        obs = None
        if cells.shape[1] > 1:
            obs = stores.work / "stores" / f"{name}.tsv"
            cells.to_csv(obs, sep="\t", index=False)
        ats.convert(
            stores.data / data_set.file,
            assembly=data_set.assembly,
            select=select,
            obs=obs,
            out=path,
            qc=False,
        )
        return
    part = "granja_d6" if name == "hg19" else name
    inputs = [_part(stores, part)]
    if name == "hg19":
        inputs.append(stores.data / SETS["bm0828"].file)
    ats.convert(inputs, assembly=SETS[PARTS[part][0]].assembly, select=select, out=path, qc=False)


def _part(stores: Stores, name: str) -> Path:
    """Some of a set's cells as a file of their own."""
    path = stores.work / "stores" / f"{name}.h5ad"
    if not path.exists():
        data_set, values = SETS[PARTS[name][0]], PARTS[name][1]
        whole = anndata.read_h5ad(stores.data / data_set.file)
        aside = path.with_suffix(".part")
        whole[whole.obs[data_set.holdout[0]].isin(values)].copy().write_h5ad(aside)
        aside.rename(path)
    return path


def _cells(obs: pd.DataFrame, data_set: DataSet) -> pd.DataFrame:
    """Columns that the file lacks, by barcode: folds, or the draws of few labels."""
    table = pd.DataFrame({"barcode": obs.index.astype(str)})
    if data_set.holdout == _FOLDS:
        types = obs["cell_type"].to_numpy(str)
        table["fold"] = 0
        splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
        for number, (_, test) in enumerate(splitter.split(types, types)):
            table.loc[test, "fold"] = number
        return table
    if "donor" not in obs:
        return table
    donor = obs["donor"].to_numpy(str)
    for column in data_set.labels:
        for draw in range(DRAWS):
            table[few_labels(column, draw)] = _drawn(obs[column].to_numpy(str), donor, draw)
    return table


def few_labels(column: str, draw: int) -> str:
    """Name of the column that keeps the labels of a few training cells, and of all that test."""
    return f"few_{column}_{draw}"


def _drawn(types: NDArray[np.str_], donor: NDArray[np.str_], draw: int) -> NDArray[np.object_]:
    rng = np.random.default_rng([SEED, draw])
    kept = donor == TEST_DONOR
    for name in np.unique(types):
        of_type = np.flatnonzero((types == name) & (donor == TRAIN_DONOR))
        kept[rng.choice(of_type, min(CELLS_A_TYPE, len(of_type)), replace=False)] = True
    return np.where(kept, types.astype(object), "")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Cells of a store with their types.

    levels: uint8 CSR [n_cells, islands that are open in some cell]; types: str [n_cells], "" where there is none
    groups: str [n_cells], the column that is held out by
    """

    levels: sparse.csr_matrix
    types: NDArray[np.str_]
    groups: NDArray[np.str_]

    @classmethod
    def of(cls, store: IslandStore, data_set: DataSet, column: str) -> "Labelled":
        obs = store.obs([column, data_set.holdout[0]])
        levels = store.read(np.arange(store.n_cells)).to_csr(store.n_islands)
        levels = levels[:, np.unique(levels.indices)]
        types = obs[column].astype(object).fillna("").to_numpy(str)
        return cls(levels, types, obs[data_set.holdout[0]].to_numpy(str))

    def splits(self, data_set: DataSet) -> Iterator[tuple[str, Ints, Ints]]:
        """Each value that is held out, its training and its test cells."""
        known = self.types != ""
        for value in data_set.holdout[1]:
            test = np.isin(self.groups, value.split("+"))
            yield value, np.flatnonzero(known & ~test), np.flatnonzero(known & test)

"""The problems of PROTOCOL.md: which cells train and test, and what an experiment changes in the labels.

Whatever is drawn is drawn by a hash of the barcode, so that it does not depend on the order of the cells. The types of
the cells that test are not in a problem: no method can look at them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sets import FOLDS, SETS, DataSet, Ints, Labelled, Stores

from annatac_scale.errors import InputError
from annatac_scale.store.store import IslandStore

MOST_GROUPS = 5
"""Groups of one's own set that are held out in turn: the largest."""

DIGESTS: Mapping[str, str] = {
    "cerebellum/cell_type/0": "35e2b3b269bd",
    "cerebellum/cell_type/1": "5bae638191a3",
    "cerebellum/cell_type/2": "7d2c2e665702",
    "cerebellum/cell_type/3": "8498f3e0fbb3",
    "cerebellum/cell_type/4": "e999d7bd03b3",
    "bm0828/cell_type/0": "9341d48bd214",
    "bm0828/cell_type/1": "f35fcf64941e",
    "bm0828/cell_type/2": "7c0fe9bd3ca2",
    "bm0828/cell_type/3": "d6c011a185ac",
    "bm0828/cell_type/4": "0417f1431797",
    "granja/cell_type/D5": "d695060a76c6",
    "granja/cell_type/D6": "237c4a459e6c",
    "granja/coarse_label/D5": "0aba2786c822",
    "granja/coarse_label/D6": "ddf885e44ed2",
    "snareseq/cell_type/09I+09J+09K+09L": "c0f64c53ef01",
    "snareseq/orig_label/09I+09J+09K+09L": "0a22ed8eda5a",
}
"""Of the splits that PROTOCOL.md fixed: set / column of types / what is held out."""

Texts = NDArray[np.str_]
Change = Mapping[str, Any]
"""What an experiment does to the labels of the training cells: "noise", "share" or "few" with a "draw", or "leave"."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a method is given. Cells are numbered as in the store.

    levels: uint8 CSR [n_cells, islands that are open in some cell]
    types: str [n_cells], "" for all cells but those of ``train``
    train: labelled cells to learn from; test: cells to tell the type of
    seen: all cells that may be looked at without labels, those of ``train`` among them
    """

    store: IslandStore
    levels: sparse.csr_matrix
    types: Texts
    barcodes: Texts
    train: Ints
    test: Ints
    seen: Ints
    seed: int


@dataclass(frozen=True, eq=False)
class Split:
    """A problem, the value that is held out, and the truth of its test cells: types and groups, [n_test]."""

    value: str
    problem: Problem
    truth: Texts
    groups: Texts


class Relabelled(IslandStore):
    """A store with one more column of obs in memory: str [n_cells], "" for no value."""

    def __init__(self, store: IslandStore, name: str, values: Texts) -> None:
        super().__init__(store.path, store.attributes, store._index, store._cache)
        self._extra = {name: values}

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """One row a cell, as of the store."""
        kept = None if columns is None else [name for name in columns if name not in self._extra]
        return super().obs(kept).assign(**self._extra)


def splits(config: Mapping[str, Any], stores: Stores) -> Iterator[Split]:
    """The problems of a row: each value that it holds out in turn.

    config: "set" (or "own": one's own), "select", "labels", "seed"; "held": other values than the set's; "change"
    """
    store, data_set, labelled = opened(config, stores)
    barcodes = store.obs(["barcode"])["barcode"].to_numpy(str)
    values = tuple(config.get("held", data_set.holdout[1]))
    for value, train, test in labelled.splits(replace(data_set, holdout=(data_set.holdout[0], values))):
        learnt, kept = changed(labelled.types, train, barcodes, config.get("change", {}))
        types = np.where(np.isin(np.arange(len(learnt)), kept), learnt, "")
        problem = Problem(store, labelled.levels, types, barcodes, kept, test, train, config.get("seed", 0))
        yield Split(value, problem, labelled.types[test], labelled.groups[test])


def opened(config: Mapping[str, Any], stores: Stores) -> tuple[IslandStore, DataSet, Labelled]:
    """The store of a row, its set, and its cells with their types."""
    if "own" not in config:
        data_set = SETS[config["set"]]
        store = stores.open(config["set"], config["select"])
        return store, data_set, Labelled.of(store, data_set, config["labels"])
    own = config["own"]
    store = IslandStore.open(Path(own["store"]))
    column = own["group"] or "fold"
    if not own["group"]:
        types = store.obs([own["labels"]])[own["labels"]].astype(object).fillna("").to_numpy(str)
        barcodes = store.obs(["barcode"])["barcode"].to_numpy(str)
        store = Relabelled(store, column, folds(types, barcodes).astype(str))
    groups = store.obs([column])[column].astype(object).fillna("").to_numpy(str)
    counts = pd.Series(groups[groups != ""]).value_counts()
    if len(counts) < 2:
        raise InputError(f"--set {config['set']}: {column} has {len(counts)} values; expected at least 2")
    held = tuple(sorted(counts.index[:MOST_GROUPS]))
    data_set = DataSet(config["set"], str(own["store"]), "", (own["labels"],), (column, held))
    return store, data_set, Labelled.of(store, data_set, own["labels"])


def folds(types: Texts, barcodes: Texts, number: int = FOLDS) -> Ints:
    """The fold of each cell, [n_cells]: the cells of a type are dealt in the order of their hashes."""
    fold = np.zeros(len(types), np.int64)
    for name in np.unique(types):
        members = np.flatnonzero(types == name)
        fold[members[by_hash(barcodes[members], "fold")]] = np.arange(len(members)) % number
    return fold


def changed(types: Texts, train: Ints, barcodes: Texts, change: Change) -> tuple[Texts, Ints]:
    """Types as a method learns them, [n_cells], and the training cells that keep a label.

    noise: that share of the training cells gets another of the types; share: so much of each type is kept, at least
    one cell; few: so many of each type; leave: the cells of that type are left out
    """
    if "noise" in change:
        return noisy(types, train, barcodes, change["noise"], change["draw"]), train
    if "leave" in change:
        return types, train[types[train] != change["leave"]]
    if not change:
        return types, train
    kept = []
    for name in np.unique(types[train]):
        members = train[types[train] == name]
        few = max(1, round(change["share"] * len(members))) if "share" in change else change["few"]
        kept.append(members[by_hash(barcodes[members], f"kept {change['draw']}")[:few]])
    return types, np.sort(np.concatenate(kept))


def noisy(types: Texts, train: Ints, barcodes: Texts, share: float, draw: int) -> Texts:
    """The types, of which exactly round(share x training cells) are another one: a larger share holds a smaller."""
    known = np.unique(types[train])
    wrong = train[by_hash(barcodes[train], f"noise {draw}")[: round(share * len(train))]]
    steps = 1 + hashes(barcodes[wrong], f"to {draw}") % np.uint64(max(len(known) - 1, 1))
    learnt = types.copy()
    learnt[wrong] = known[(np.searchsorted(known, types[wrong]) + steps.astype(np.int64)) % len(known)]
    return learnt


def by_hash(barcodes: Sequence[str] | Texts, key: str) -> Ints:
    """An order of the barcodes that follows from them and the key alone."""
    return np.argsort(hashes(barcodes, key), kind="stable")


def hashes(barcodes: Sequence[str] | Texts, key: str) -> NDArray[np.uint64]:
    """A number for each barcode, uint64 [n]."""
    found = [hashlib.blake2b(f"{key}\t{one}".encode(), digest_size=8).digest() for one in barcodes]
    return np.frombuffer(b"".join(found), ">u8").astype(np.uint64)


def digest_of(split: Split) -> str:
    """What tells the split from another one: of the barcodes that train with their labels, and of those that test."""
    problem = split.problem
    lines = [f"{problem.barcodes[cell]}\t{problem.types[cell]}" for cell in problem.train]
    lines += [f"{problem.barcodes[cell]}\ttest" for cell in problem.test]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]

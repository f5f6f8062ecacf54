"""Which labelled cells train, validate, calibrate and test; written as split.parquet.

train: gradients; val: early stopping and the temperature; calib: thresholds; test: figures, never anything else.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.model.labels import label_texts
from annatac_scale.store.store import IslandStore

SPLITS = ("train", "val", "calib", "test")
SPLIT_FILE = "split.parquet"
"""Name of the file, in the folder of a fine-tuning run."""
STORE_DIGESTS = b"store_digests"
"""Key of the schema metadata that holds, as JSON, the x_sha256 of each sample."""
FEWEST_TRAIN_TYPES = 2
_VALUES_SHOWN = 10

Texts = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The labelled cells of a store and their splits.

    cells: int64 cell ids, increasing; split: object, one of SPLITS
    codes: int64, index into ``types``; below 0, a number for each, where a type has no training cells
    types: the cell types that have training cells, sorted
    n_without_label: cells of the store without a label
    strangers: the types without training cells, sorted: that of code -1, -2, ...
    """

    cells: NDArray[np.int64]
    codes: NDArray[np.int64]
    split: Texts
    types: tuple[str, ...]
    n_without_label: int
    strangers: tuple[str, ...] = ()

    def of(self, split: str) -> NDArray[np.int64]:
        """Cell ids of a split."""
        return self.cells[self.split == split]

    def codes_of(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Codes of the given labelled cells."""
        return self.codes[np.searchsorted(self.cells, cells)]

    def names_of(self, codes: NDArray[np.int64]) -> Texts:
        """The types that codes stand for."""
        names = np.array([*self.types, *reversed(self.strangers)], object)
        return names[codes]

    @property
    def sizes(self) -> dict[str, int]:
        """Cells of each split."""
        return {name: int((self.split == name).sum()) for name in SPLITS}


@dataclass(frozen=True)
class SplitRule:
    """How labelled cells are split.

    holdout: share of each type's cells that test, or "column=value": all cells with that value (a donor, a fold)
    validation_share, calibration_share: of the cells that do not test
    """

    holdout: float | str
    validation_share: float
    calibration_share: float
    seed: int

    @property
    def group(self) -> tuple[str, str] | None:
        """Column and value of the cells that test, None where a share of all cells does."""
        column, equals, value = str(self.holdout).partition("=")
        return (column.strip(), value.strip()) if equals else None

    @property
    def described(self) -> str:
        """``holdout`` in one spelling: 0.20 is 0.2."""
        return "=".join(self.group) if self.group else f"{self.test_share:g}"

    @property
    def test_share(self) -> float:
        """Share of each type's cells that test. Raises InputError where ``holdout`` is none."""
        if self.group:
            return 0.0
        try:
            share = float(self.holdout)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise InputError(
                f"--holdout {self.holdout}: expected a share from 0 up to 1, or column=value; give one of these"
            )
        return share


def split_cells(store: IslandStore, labels: str, rule: SplitRule) -> LabelledCells:
    """Split the labelled cells of a store, type by type; ``labels``: obs column with the cell types.

    Cells of a type are dealt in the order of a hash of (seed, sample, barcode): a cell's split does not depend on the
    order of samples. A type with few cells trains before it validates, calibrates or tests.
    Raises InputError when fewer than two types are left to train on.
    """
    group = rule.group
    columns = [labels] if group is None else [labels, group[0]]
    obs = store.obs(list(dict.fromkeys(columns)))
    text = label_texts(obs[labels])
    cells = np.flatnonzero(text != "")
    split = np.full(store.n_cells, "train", object)
    if group is not None:
        split[_held_out(store, rule, label_texts(obs[group[0]]), cells)] = "test"
    by_hash = cells[np.argsort(_hashes(obs.iloc[cells], rule.seed), kind="stable")]
    by_hash = by_hash[split[by_hash] == "train"]
    for _, members in pd.Series(by_hash).groupby(text[by_hash]):
        split[members] = _dealt(len(members), rule)
    types = sorted(set(text[cells][split[cells] == "train"]))
    if len(types) < FEWEST_TRAIN_TYPES:
        raise InputError(
            f"--labels {labels}: {len(types)} cell types have training cells ({', '.join(types)}), expected at least "
            f"{FEWEST_TRAIN_TYPES}; label more cells or hold out fewer"
        )
    codes = _codes(text[cells], types)
    strangers = tuple(sorted(set(text[cells]) - set(types)))
    return LabelledCells(
        cells, codes, split[cells], tuple(types), store.n_cells - len(cells), strangers=strangers
    )


def _held_out(
    store: IslandStore, rule: SplitRule, values: Texts, cells: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Labelled cells with the value that is held out."""
    assert rule.group is not None
    column, value = rule.group
    held_out = cells[values[cells] == value]
    if not len(held_out):
        there = sorted(set(values[cells]) - {""})
        more = f" and {len(there) - _VALUES_SHOWN} more" if len(there) > _VALUES_SHOWN else ""
        raise InputError(
            f"--holdout {rule.holdout}: no labelled cell of {store.path} has {column} {value!r}; "
            f"there are {', '.join(there[:_VALUES_SHOWN]) or 'no values'}{more}"
        )
    return held_out


def _dealt(n: int, rule: SplitRule) -> list[str]:
    """Splits of ``n`` cells of one type: test, val, calib by their rounded shares, at least one cell left to train."""
    rest = 1 - rule.test_share
    shares = {
        "test": rule.test_share,
        "val": rule.validation_share * rest,
        "calib": rule.calibration_share * rest,
    }
    given: list[str] = []
    for name, share in shares.items():
        given += [name] * min(int(share * n + 0.5), n - 1 - len(given))
    return given + ["train"] * (n - len(given))


def _codes(text: Texts, types: list[str]) -> NDArray[np.int64]:
    code = {name: number for number, name in enumerate(types)}
    strangers = sorted(set(text) - code.keys())
    code |= {name: -1 - number for number, name in enumerate(strangers)}
    return np.array([code[name] for name in text], np.int64)


def _hashes(obs: pd.DataFrame, seed: int) -> NDArray[np.uint64]:
    cells = zip(obs["sample"], obs["barcode"], strict=True)
    digests = [hashlib.blake2b(f"{seed}\t{s}\t{b}".encode(), digest_size=8).digest() for s, b in cells]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def write_split(path: Path, store: IslandStore, labelled: LabelledCells) -> None:
    """Write sample, barcode, split of every labelled cell, with the samples' X digests in the metadata."""
    obs = store.obs([]).iloc[labelled.cells]
    table = pa.table(
        {
            "sample": obs["sample"].astype(str),
            "barcode": obs["barcode"].astype(str),
            "split": labelled.split.astype(str),
        }
    )
    digests = {name: sample.x_sha256 for name, sample in store.samples.items()}
    aside = path.with_name(f".{path.name}.part")
    pq.write_table(table.replace_schema_metadata({STORE_DIGESTS: json.dumps(digests)}), aside)
    aside.replace(path)

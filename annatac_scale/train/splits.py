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
FEWEST_TRAIN_TYPES = 2


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The labelled cells of a store and their splits.

    cells: int64 cell ids; codes: int64, index into ``types``; split: object, one of SPLITS
    types: the cell types that have training cells, sorted
    n_without_label: cells of the store without a label
    """

    cells: NDArray[np.int64]
    codes: NDArray[np.int64]
    split: NDArray[np.object_]
    types: tuple[str, ...]
    n_without_label: int

    def of(self, split: str) -> NDArray[np.int64]:
        """Cell ids of a split."""
        return self.cells[self.split == split]

    def codes_of(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Codes of the given cells, -1 for a type without training cells."""
        order = np.argsort(self.cells)
        return self.codes[order[np.searchsorted(self.cells, cells, sorter=order)]]


def split_cells(
    store: IslandStore,
    labels: str,
    holdout: float | str,
    validation_share: float,
    calibration_share: float,
    seed: int,
) -> LabelledCells:
    """Split the labelled cells of a store.

    labels: obs column with the cell types
    holdout: share of each type's cells that test, or "column=value": all cells with that value (a donor, a fold)
    The other cells are split by type too. Cells are ordered by a hash of (seed, sample, barcode): a cell's split does
    not depend on the order of samples. A type with few cells trains before it validates, calibrates or tests.
    Raises InputError when nothing is left to train on.
    """
    group, _, value = holdout.partition("=") if isinstance(holdout, str) else ("", "", "")
    obs = store.obs([labels, *([group] if group and group != labels else [])])
    text = pd.Series(label_texts(obs[labels]), index=obs.index)
    known = text != ""
    rank = pd.Series(_hashes(obs, seed), index=obs.index)[known].sort_values().index
    split = pd.Series("train", index=rank)
    if group:
        values = pd.Series(label_texts(obs[group]), index=obs.index)
        held_out = values[rank] == value
        if not held_out.any():
            raise InputError(
                f"--holdout {holdout}: no labelled cell of {store.path} has {group} {value!r}; "
                f"there are {', '.join(sorted(set(values))[:10])}"
            )
        split[held_out] = "test"
        shares = (0.0, validation_share, calibration_share)
    else:
        share = float(holdout)
        if not 0 <= share < 1:
            raise InputError(f"--holdout {holdout}: expected a share from 0 up to 1, or column=value")
        rest = 1 - share
        shares = (share, validation_share * rest, calibration_share * rest)
    for _, members in split[split == "train"].groupby(text[rank]):
        split[members.index] = _dealt(len(members), shares)
    types = tuple(sorted(set(text[rank][split == "train"])))
    if len(types) < FEWEST_TRAIN_TYPES:
        raise InputError(
            f"--labels {labels}: {len(types)} cell types have training cells ({', '.join(types)}), expected at least "
            f"{FEWEST_TRAIN_TYPES}; label more cells or hold out fewer"
        )
    cells = np.sort(rank.to_numpy(np.int64))
    code = {name: i for i, name in enumerate(types)}
    codes = text[cells].map(lambda name: code.get(name, -1)).to_numpy(np.int64)
    return LabelledCells(cells, codes, split[cells].to_numpy(object), types, int((~known).sum()))


def _dealt(n: int, shares: tuple[float, float, float]) -> list[str]:
    """Splits of ``n`` cells of one type: test, val, calib by their rounded shares, at least one cell left to train."""
    given: list[str] = []
    for name, share in zip(("test", "val", "calib"), shares, strict=True):
        given += [name] * min(int(share * n + 0.5), n - 1 - len(given))
    return given + ["train"] * (n - len(given))


def _hashes(obs: pd.DataFrame, seed: int) -> list[str]:
    cells = zip(obs["sample"], obs["barcode"], strict=True)
    return [hashlib.blake2b(f"{seed}\t{s}\t{b}".encode(), digest_size=8).hexdigest() for s, b in cells]


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
    pq.write_table(table.replace_schema_metadata({"store_digests": json.dumps(digests)}), aside)
    aside.replace(path)

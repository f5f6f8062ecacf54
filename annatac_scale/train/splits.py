"""Which labelled cells train, validate, calibrate and test; written as split.parquet.

train: gradients; val: early stopping and the temperature; calib: thresholds; test: figures, never anything else.
Cells are dealt one by one, or by whole groups (donors, batches), so that figures are those of groups never trained on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import shown
from annatac_scale.model.labels import OWN_LABELS, label_text, label_texts
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.groups import chosen_groups, group_table, testing_groups
from annatac_scale.train.label_map import LabelMap

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
    n_without_label: cells of the store without a label, apart from those whose label the label map drops
    n_dropped: those
    strangers: the types without training cells, sorted: that of code -1, -2, ...
    groups: object, the group of each cell, where groups are kept whole; else None
    whole: the splits that consist of whole groups; the rest is dealt among the cells of the groups that train
    n_without_group: cells with a label that are in no split because nobody knows their group
    n_without_value: others that are in none because nobody knows whether they have the value that is held out
    beside: int64 ids, increasing, of the cells in no split that may be looked at without labels: none that have, or may
        have, the value that is held out, and, where groups are kept whole, those of groups that train alone
    """

    cells: NDArray[np.int64]
    codes: NDArray[np.int64]
    split: Texts
    types: tuple[str, ...]
    n_without_label: int
    n_dropped: int = 0
    strangers: tuple[str, ...] = ()
    groups: Texts | None = None
    whole: tuple[str, ...] = ()
    n_without_group: int = 0
    n_without_value: int = 0
    beside: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

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

    def groups_of(self, split: str) -> list[str]:
        """The groups that have cells in a split, sorted; none where there are no groups."""
        return [] if self.groups is None else sorted(set(self.groups[self.split == split]))

    def with_val_training(self) -> "LabelledCells":
        """The same, but that the val cells train."""
        return replace(self, split=np.where(self.split == "val", "train", self.split).astype(object))

    @property
    def sizes(self) -> dict[str, int]:
        """Cells of each split."""
        return {name: int((self.split == name).sum()) for name in SPLITS}


@dataclass(frozen=True)
class SplitRule:
    """How labelled cells are split.

    holdout: share of the cells that test, or "column=value": all cells with that value (a donor, a fold), where cells
        without a value are left out
    validation_share, calibration_share: of the cells that do not test
    group: obs column, or "sample", whose cells of one value (a donor) keep together; None: cells are dealt type by type
    """

    holdout: float | str
    validation_share: float
    calibration_share: float
    seed: int
    group: str | None = None

    @property
    def held_out(self) -> tuple[str, str] | None:
        """Column and value, read as labels are, of the cells that test, None where a share of all cells does.

        Raises InputError where one of the two is empty: cells without a value may have any.
        """
        column, equals, value = str(self.holdout).partition("=")
        if not equals:
            return None
        named = column.strip(), label_text(value)
        if not all(named):
            which = "value" if named[0] else "column"
            raise InputError(
                f"--holdout {self.holdout}: found no {which}; expected column=value, as donor=D5, or a share; name it"
            )
        return named

    @property
    def described(self) -> str:
        """``holdout`` in one spelling: 0.20 is 0.2."""
        return "=".join(self.held_out) if self.held_out else f"{self.test_share:g}"

    @property
    def test_share(self) -> float:
        """Share of the cells that test. Raises InputError where ``holdout`` is none."""
        if self.held_out:
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

    @property
    def other_shares(self) -> dict[str, float]:
        """Of the cells that do not test."""
        return {"val": self.validation_share, "calib": self.calibration_share}

    @property
    def shares(self) -> dict[str, float]:
        """Of all cells, where none tests yet."""
        rest = 1 - self.test_share
        return {"test": self.test_share, **{name: share * rest for name, share in self.other_shares.items()}}


def split_cells(
    store: IslandStore,
    labels: str,
    rule: SplitRule,
    label_map: LabelMap | None = None,
    progress: Progress | None = None,
) -> LabelledCells:
    """Split the labelled cells of a store; ``labels``: obs column with the cell types.

    label_map: what they become before anything else; a value that ``rule`` holds out is one of the store

    Without groups, type by type: cells are dealt in the order of a hash of (seed, sample, barcode), so that a cell's
    split does not depend on the order of samples. A type with few cells trains before it validates, calibrates or
    tests. Where a value is held out, cells without one are left out: they may be of any donor.

    With groups, whole groups test, at least one, and whole groups validate and calibrate where enough are left
    (``train.groups``); else cells of the groups that train do, type by type. Cells without a group are left out: they
    may be of any.

    Raises InputError when fewer than two types are left to train on, the groups cannot be kept whole, a type is called
    as cells of no known type are, or the map has a label that no cell has.
    """
    columns = [labels, rule.group, rule.held_out[0] if rule.held_out else None]
    obs = store.obs([name for name in dict.fromkeys(columns) if name not in (None, "sample")])
    text = given = label_texts(obs[labels])
    if label_map is not None:
        label_map.check(labels, given)
        (progress or Silent()).say(label_map.described(given))
        text = label_map.applied(given)
    labelled = text != ""
    groups = None if rule.group is None else _groups(store, labels, rule.group, obs, labelled)
    grouped = labelled if groups is None else labelled & (groups != "")
    values = None if rule.held_out is None else label_texts(obs[rule.held_out[0]])
    taking_part = grouped if values is None else grouped & (values != "")
    cells = np.flatnonzero(taking_part)
    split = np.full(store.n_cells, "train", object)
    beside = ~taking_part
    if values is not None and rule.held_out is not None:
        split[_held_out(store, rule, values, cells)] = "test"
        beside &= (values != rule.held_out[1]) & (values != "")
    shares: Mapping[str, float] = rule.shares
    whole: tuple[str, ...] = ()
    if groups is not None:
        own, whole = _split_groups(store, rule, groups[cells], text[cells], split[cells])
        split[cells] = own
        shares = {name: 0.0 if name in whole else share for name, share in rule.other_shares.items()}
    by_hash = cells[np.argsort(cell_hashes(obs.iloc[cells], rule.seed), kind="stable")]
    by_hash = by_hash[split[by_hash] == "train"]
    for _, members in pd.Series(by_hash).groupby(text[by_hash]):
        split[members] = _dealt(len(members), shares)
    if groups is not None:
        beside &= pd.Series(groups).isin(set(groups[cells][split[cells] == "train"])).to_numpy()
    types = sorted(set(text[cells][split[cells] == "train"]))
    n_without_value = int(grouped.sum()) - len(cells)
    if len(types) < FEWEST_TRAIN_TYPES:
        without = f", where {n_without_value:,} cells without a value are left out" if n_without_value else ""
        raise InputError(
            f"--labels {labels} --holdout {rule.holdout}: {len(types)} cell types have training cells "
            f"({', '.join(types)}){without}, expected at least {FEWEST_TRAIN_TYPES}; label more cells or hold out fewer"
        )
    taken = [name for name in types if name in OWN_LABELS]
    if taken:
        raise InputError(
            f"--labels {labels}: found cells labelled {shown(taken[0])}, which is what prediction calls cells of no "
            "known type; expected types; drop or rename it with --label-map"
        )
    strangers = sorted(set(text[cells]) - set(types))
    return LabelledCells(
        cells,
        _codes(text[cells], types, strangers),
        split[cells],
        tuple(types),
        n_without_label=int((given == "").sum()),
        n_dropped=int(((given != "") & ~labelled).sum()),
        strangers=tuple(strangers),
        groups=None if groups is None else groups[cells],
        whole=whole,
        n_without_group=int((labelled & ~grouped).sum()),
        n_without_value=n_without_value,
        beside=np.flatnonzero(beside),
    )


def _groups(
    store: IslandStore, labels: str, group: str, obs: pd.DataFrame, labelled: NDArray[np.bool_]
) -> Texts:
    """The group of each cell, "" where it has none. group: the column"""
    groups = label_texts(obs[group])
    n_groups = len(set(groups[labelled]) - {""})
    if group == labels or n_groups < 2:
        found = "the column of the labels"
        if group != labels:
            found = f"{n_groups} groups among the labelled cells of {store.path}"
        raise InputError(
            f"--group {group}: found {found}, expected a column with two donors or batches at least; "
            "give another one, or leave it out"
        )
    return groups


def _split_groups(
    store: IslandStore, rule: SplitRule, groups: Texts, types: Texts, split: Texts
) -> tuple[Texts, tuple[str, ...]]:
    """Splits of the labelled cells, "train" or that of their group, and which splits are of whole groups.

    split: "test" for cells that are held out by a value
    """
    tests = split == "test"
    torn = sorted(set(groups[tests]) & set(groups[~tests]))
    if torn:
        raise InputError(
            f"--holdout {rule.holdout} --group {rule.group}: {_some(torn)} have cells that test and cells that do not; "
            f"hold out whole groups (--holdout {rule.group}={torn[0]}, or a share), or leave --group out"
        )
    table = group_table(groups[~tests], types[~tests], rule.seed)
    split_of = dict.fromkeys(testing_groups(table, rule.test_share), "test")
    others = chosen_groups(table.drop(index=list(split_of)), rule.other_shares)
    split_of |= {name: which for which, names in (others or {}).items() for name in names}
    found = np.array([split_of.get(name, own) for name, own in zip(groups, split, strict=True)], object)
    whole = [name for name in SPLITS if name in (others or {}) or (name == "test" and (found == name).any())]
    return found, tuple(whole)


def _held_out(
    store: IslandStore, rule: SplitRule, values: Texts, cells: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Labelled cells with the value that is held out."""
    assert rule.held_out is not None
    column, value = rule.held_out
    held_out = cells[values[cells] == value]
    if not len(held_out):
        there = sorted(set(values[cells]) - {""})
        raise InputError(
            f"--holdout {rule.holdout}: no labelled cell of {store.path} has {column} {value!r}; "
            f"there are {_some(there) or 'no values'}"
        )
    return held_out


def _some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _VALUES_SHOWN} more" if len(names) > _VALUES_SHOWN else ""
    return f"{', '.join(names[:_VALUES_SHOWN])}{more}"


def _dealt(n: int, shares: Mapping[str, float]) -> list[str]:
    """Splits of ``n`` cells of one type by their rounded shares, at least one cell left to train."""
    given: list[str] = []
    for name, share in shares.items():
        given += [name] * min(int(share * n + 0.5), n - 1 - len(given))
    return given + ["train"] * (n - len(given))


def _codes(text: Texts, types: list[str], strangers: list[str]) -> NDArray[np.int64]:
    code = {name: number for number, name in enumerate(types)}
    code |= {name: -1 - number for number, name in enumerate(strangers)}
    return np.array([code[name] for name in text], np.int64)


def cell_hashes(obs: pd.DataFrame, seed: int) -> NDArray[np.uint64]:
    """A hash of (seed, sample, barcode) for each row of ``obs``, uint64 [n]: no order of samples changes it."""
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

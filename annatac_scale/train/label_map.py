"""A label map: a table of two columns that renames, merges and drops labels before anything is made of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import complaint, shown
from annatac_scale.ingest.tables import some
from annatac_scale.model.pairs import near_misses, read_pairs
from annatac_scale.store.place import Location

OPTION = "--label-map"
HEADER = ("from", "to")

Texts = NDArray[np.object_]


@dataclass(frozen=True)
class LabelMap:
    """Labels and what they become, "" for those that are dropped; a label that it does not name stays what it is.

    It is applied once: with T to B and B to T the two names change places.
    """

    path: Location
    to: Mapping[str, str]

    @classmethod
    def read(cls, location: Location) -> "LabelMap":
        """Read a table of from and to, separated by tabs or commas; an empty (or missing, as NA) to drops the label.

        Raises InputError where it cannot be read, where a ``from`` is empty or comes twice.
        """
        to: dict[str, str] = {}
        for number, name, becomes in read_pairs(location, OPTION, HEADER):
            if not name:
                raise complaint(
                    str(location),
                    number,
                    "no label in from",
                    "one; cells without a label stay out",
                    "remove it",
                )
            if name in to:
                raise complaint(
                    str(location),
                    number,
                    f"{shown(name)} again",
                    "each label once in from",
                    "remove one line",
                )
            to[name] = becomes
        return cls(location, to)

    @property
    def sha256(self) -> str:
        """sha256 (hex) of what it says, whatever the order of its rows and the form of its file."""
        return hashlib.sha256(json.dumps(sorted(self.to.items())).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a model keeps of it."""
        return {"sha256": self.sha256, "to": dict(sorted(self.to.items()))}

    def applied(self, labels: Texts) -> Texts:
        """Labels [n], as ``label_texts`` makes them, after the map; "" where a label was missing or is dropped."""
        codes, found = pd.factorize(labels)
        return np.array([self.to.get(label, label) for label in found], object)[codes]

    def unknown(self, labels: Texts) -> list[str]:
        """Labels of the map's ``from`` that none of ``labels`` is, sorted."""
        return sorted(self.to.keys() - set(labels))

    def check(self, column: str, labels: Texts) -> None:
        """Raise InputError, naming them, where the map has labels that no cell has. column: of obs, for the message"""
        unknown = self.unknown(labels)
        if unknown:
            there = set(labels) - {""}
            raise InputError(
                f"{OPTION} {self.path}: found labels that no cell has in {column}: {near_misses(unknown, there)}; "
                f"expected those of its {len(there):,} labels; mend these names or remove their lines"
            )

    def described(self, labels: Texts) -> str:
        """What the map does to cells with these labels [n], in a line."""
        known = labels[labels != ""]
        after = self.applied(known)
        dropped, before, left = after == "", set(known), set(after) - {""}
        kept = sorted(before - self.to.keys())
        n_changed = int(((after != known) & ~dropped).sum())
        return (
            f"label map {self.path}: {len(before):,} labels become {len(left):,}; "
            f"{n_changed:,} cells get another label, {int(dropped.sum()):,} are dropped; "
            f"{len(kept):,} labels are not in the map and stay what they are"
            + (f": {some(kept)}" if kept else "")
        )

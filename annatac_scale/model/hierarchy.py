"""What lies above the cell types of a model: a graph without circles, and how deep in it predictions can be trusted."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.genome.rows import shown
from annatac_scale.model.pairs import near_misses

DEFAULT_THRESHOLD = 0.8
_ROUNDING = 1e-6
"""What a sum of float32 probabilities may lack."""


@dataclass(frozen=True)
class Hierarchy:
    """The labels of a model and all that lies above them; made by ``Hierarchy.of``.

    labels: in the order of the logits; nodes: the labels and their ancestors, sorted; parents: of each node, sorted,
    none for a root. A node may have several parents, and a label may lie above others.
    """

    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    parents: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, labels: Sequence[str], parents: Mapping[str, Iterable[str]], place: str) -> "Hierarchy":
        """The hierarchy of some labels; the rest of the graph is left out.

        parents: names, and those directly above each; who only stands above others is a root. place: for messages.
        Raises InputError, naming them, for labels that the graph does not have, and for a cycle.
        """
        graph: dict[str, set[str]] = {}
        for name, above in parents.items():
            graph.setdefault(name, set()).update(above)
            for parent in graph[name]:
                graph.setdefault(parent, set())
        unknown = [label for label in labels if label not in graph]
        if unknown:
            raise InputError(
                f"{place}: found no line for {near_misses(unknown, graph)}; expected all labels; add them, with an "
                "empty parent for one that nothing lies above, or rename labels with --label-map"
            )
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycle = " -> ".join(shown(name) for name in error.args[1])
            raise InputError(
                f"{place}: found a circle, in which each lies above the next: {cycle}; expected none; take one line "
                "of it out"
            ) from error
        kept: set[str] = set()
        todo = list(labels)
        while todo:
            name = todo.pop()
            if name not in kept:
                kept.add(name)
                todo += graph[name]
        nodes = tuple(sorted(kept))
        return cls(tuple(labels), nodes, tuple(tuple(sorted(graph[name])) for name in nodes))

    def to_json(self) -> dict[str, Any]:
        """The parents of each node, from which ``of`` makes the same hierarchy again."""
        return {name: list(above) for name, above in zip(self.nodes, self.parents, strict=True)}

    @property
    def sha256(self) -> str:
        """sha256 (hex) of labels and graph."""
        return hashlib.sha256(json.dumps([self.labels, self.to_json()]).encode()).hexdigest()

    @cached_property
    def depth(self) -> NDArray[np.int64]:
        """Of each node the longest way to it from a root, in steps, int64 [nodes]; 0 for a root."""
        depth: dict[str, int] = {}
        graph = dict(zip(self.nodes, self.parents, strict=True))
        for name in TopologicalSorter(graph).static_order():
            depth[name] = 1 + max((depth[parent] for parent in graph[name]), default=-1)
        return np.array([depth[name] for name in self.nodes], np.int64)

    @cached_property
    def above(self) -> NDArray[np.bool_]:
        """Whether the row's node is the column's node or lies above it, bool [nodes, nodes]."""
        number = {name: i for i, name in enumerate(self.nodes)}
        above = np.eye(len(self.nodes), dtype=bool)
        for node in np.argsort(self.depth, kind="stable"):
            for parent in self.parents[node]:
                above[:, node] |= above[:, number[parent]]
        return above

    @cached_property
    def members(self) -> NDArray[np.bool_]:
        """Whether the column's label is the row's node or lies below it, bool [nodes, labels]."""
        number = {name: i for i, name in enumerate(self.nodes)}
        return self.above[:, [number[label] for label in self.labels]]

    def deepest(
        self, chances: NDArray[np.floating], threshold: float
    ) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """The deepest node of each cell that is likely enough: names [n], and their probabilities, float32 [n].

        chances: [n, labels], a probability of each label. That of a node is the sum over the labels at or below it,
        each taken once. Of the nodes with ``threshold`` and more, the one farthest from a root (``depth``); of equally
        deep ones the likelier, then the first by name. "" and 0 where not even a root has that much. Takes about 30
        bytes a cell and node. Raises ConfigError for a threshold that is not above 0 and up to 1.
        """
        check_threshold(threshold)
        sums = np.minimum(chances.astype(np.float64) @ self.members.T.astype(np.float64), 1.0)
        enough = sums >= threshold - _ROUNDING
        names = np.full(len(chances), "", object)
        found = np.zeros(len(chances), np.float32)
        nodes = np.array(self.nodes, object)
        left = np.arange(len(chances))
        for level in range(int(self.depth.max(initial=-1)), -1, -1):
            here = np.flatnonzero(self.depth == level)
            likely = np.where(enough[np.ix_(left, here)], sums[np.ix_(left, here)], -1.0)
            # Of equal ones argmax takes the first, and nodes are sorted by name.
            best = likely.argmax(axis=1)
            chance = likely[np.arange(len(left)), best]
            settled = chance >= 0
            names[left[settled]] = nodes[here[best[settled]]]
            found[left[settled]] = chance[settled]
            left = left[~settled]
        return names, found


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless 0 < threshold <= 1."""
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"--hierarchy-threshold: found {threshold}, expected a probability above 0 and up to 1, as 0.8"
        )

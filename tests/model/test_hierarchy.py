"""Depth, sums and the deepest node against networkx and plain recursion."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import HEADS, LABELS, toy_model

from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.model.folder import read_model, write_model
from annatac_scale.model.hierarchy import Hierarchy

# A piece of the Cell Ontology: CD4 and CD8 T cells lie below two parents each.
BLOOD = {
    "CD4 T": ["T cell"],
    "CD8 T": ["T cell", "cytotoxic cell"],
    "NK": ["lymphocyte", "cytotoxic cell"],
    "T cell": ["lymphocyte"],
    "B cell": ["lymphocyte"],
    "lymphocyte": ["leukocyte"],
    "cytotoxic cell": ["leukocyte"],
    "monocyte": ["leukocyte"],
    "leukocyte": [],
    "neuron": ["neural cell"],
}
TYPES = ("B cell", "CD4 T", "CD8 T", "NK", "T cell", "monocyte", "neuron")


def blood(labels: tuple[str, ...] = TYPES) -> Hierarchy:
    return Hierarchy.of(labels, BLOOD, "blood")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Graphs without circles, each node below some of those before it, and some of the nodes as labels."""
    n = draw(st.integers(1, 9))
    names = draw(st.permutations([f"n{i}" for i in range(n)]))
    parents = {
        names[i]: draw(st.lists(st.sampled_from(names[:i]), unique=True, max_size=3)) if i else []
        for i in range(n)
    }
    labels = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    return parents, tuple(labels)


def networkx_of(parents: dict[str, list[str]], labels: tuple[str, ...]) -> nx.DiGraph:
    """Edges from parent to child, of the labels and their ancestors."""
    graph = nx.DiGraph([(parent, child) for child, above in parents.items() for parent in above])
    graph.add_nodes_from(parents)
    return graph.subgraph(set(labels).union(*(nx.ancestors(graph, label) for label in labels)))


def longest_way(graph: nx.DiGraph, node: str) -> int:
    roots = [other for other in graph if graph.in_degree(other) == 0]
    ways = (len(way) - 1 for root in roots for way in nx.all_simple_paths(graph, root, [node]))
    return 0 if node in roots else max(ways)


def chance_of(parents: dict[str, list[str]], node: str, chances: dict[str, float]) -> float:
    """Sum over the labels that have the node above them, by plain recursion from each label upwards."""

    def reaches(name: str) -> bool:
        return name == node or any(reaches(parent) for parent in parents.get(name, []))

    return sum(chance for label, chance in chances.items() if reaches(label))


@given(graphs())
def test_nodes_depth_and_what_lies_above_are_those_of_networkx(drawn) -> None:
    parents, labels = drawn
    found, graph = Hierarchy.of(labels, parents, "toy"), networkx_of(parents, labels)
    assert found.nodes == tuple(sorted(graph))
    for i, node in enumerate(found.nodes):
        assert found.parents[i] == tuple(sorted(graph.predecessors(node)))
        assert found.depth[i] == longest_way(graph, node)
        below = nx.descendants(graph, node) | {node}
        assert found.above[i].tolist() == [other in below for other in found.nodes]
        assert found.members[i].tolist() == [label in below for label in labels]


@given(graphs(), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]))
def test_the_deepest_node_is_that_of_looking_at_all(drawn, seed: int, threshold: float) -> None:
    parents, labels = drawn
    hierarchy, graph = Hierarchy.of(labels, parents, "toy"), networkx_of(parents, labels)
    # Sixteenths add up without rounding, and ties are frequent.
    chances = np.random.default_rng(seed).multinomial(16, np.full(len(labels), 1 / len(labels)), 20) / 16
    names, found = hierarchy.deepest(chances.astype(np.float32), threshold)
    assert (names.dtype, found.dtype) == (object, np.float32)
    for row, name, chance in zip(chances, names, found, strict=True):
        of_label = dict(zip(labels, row.tolist(), strict=True))
        sums = {node: chance_of(parents, node, of_label) for node in graph}
        enough = [node for node in graph if sums[node] >= threshold]
        best = min(enough, key=lambda node: (-longest_way(graph, node), -sums[node], node), default="")
        assert (name, chance) == (best, sums.get(best, 0.0))


@pytest.mark.parametrize(
    ("chances", "threshold", "expected"),
    [
        ({"CD4 T": 0.9, "B cell": 0.1}, 0.8, ("CD4 T", 0.9)),
        ({"CD4 T": 0.5, "CD8 T": 0.4, "B cell": 0.1}, 0.8, ("T cell", 0.9)),
        ({"CD4 T": 0.4, "T cell": 0.5, "B cell": 0.1}, 0.8, ("T cell", 0.9)),
        ({"CD4 T": 0.4, "B cell": 0.4, "NK": 0.2}, 0.9, ("lymphocyte", 1.0)),
        ({"CD8 T": 0.5, "NK": 0.4, "neuron": 0.1}, 0.8, ("cytotoxic cell", 0.9)),
        ({"monocyte": 0.5, "neuron": 0.5}, 0.8, ("", 0.0)),
        ({"monocyte": 0.5, "neuron": 0.5}, 0.5, ("monocyte", 0.5)),
        ({"neuron": 1.0}, 1.0, ("neuron", 1.0)),
    ],
    ids=str,
)
def test_a_prediction_is_as_deep_as_it_is_sure(
    chances: dict[str, float], threshold: float, expected: tuple[str, float]
) -> None:
    row = np.array([[chances.get(label, 0.0) for label in TYPES]], np.float32)
    names, found = blood().deepest(row, threshold)
    assert names[0] == expected[0]
    assert found[0] == pytest.approx(expected[1])


def test_probabilities_that_add_up_to_1_but_for_rounding_are_enough_for_1() -> None:
    hierarchy = Hierarchy.of(["a", "b", "c"], {name: ["root"] for name in "abc"}, "toy")
    chances = np.random.default_rng(0).dirichlet(np.ones(3), 1000).astype(np.float32)
    assert (chances.astype(np.float64).sum(axis=1) < 1).any()
    names, found = hierarchy.deepest(chances, 1.0)
    assert set(names) == {"root"}
    assert found.max() <= 1


def test_no_cells_give_no_lineages() -> None:
    names, found = blood().deepest(np.empty((0, len(TYPES)), np.float32), 0.8)
    assert (len(names), len(found)) == (0, 0)


@given(st.integers(0, 2**32 - 1))
def test_a_lower_threshold_is_never_less_deep(seed: int) -> None:
    hierarchy = blood()
    chances = np.random.default_rng(seed).dirichlet(np.full(len(TYPES), 0.3), 50).astype(np.float32)
    depth = dict(zip(hierarchy.nodes, hierarchy.depth.tolist(), strict=True)) | {"": -1}
    before = None
    for threshold in (0.2, 0.4, 0.6, 0.8, 1.0):
        depths = np.array([depth[name] for name in hierarchy.deepest(chances, threshold)[0]])
        assert before is None or (depths <= before).all()
        before = depths


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"--hierarchy-threshold: found .*, expected a probability above 0"):
        blood().deepest(np.ones((1, len(TYPES)), np.float32), threshold)


def test_what_no_label_lies_below_is_left_out() -> None:
    assert blood(("B cell", "neuron")).nodes == ("B cell", "leukocyte", "lymphocyte", "neural cell", "neuron")


def test_a_circle_is_refused_by_name() -> None:
    with pytest.raises(
        InputError,
        match=r"toy: found a circle.*: '(b' -> 'c' -> 'a' -> 'b|c' -> 'a' -> 'b' -> 'c|a' -> 'b' -> 'c' -> 'a)'",
    ):
        Hierarchy.of(["x"], {"x": ["a"], "a": ["c"], "b": ["a"], "c": ["b"]}, "toy")
    with pytest.raises(InputError, match=r"found a circle.*: 'a' -> 'a'"):
        Hierarchy.of(["a"], {"a": ["a"]}, "toy")


def test_labels_that_it_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(
        InputError,
        match=r"blood: found no line for 'T cel' \(did you mean 'T cell'\?\), 'glia'; expected all labels",
    ):
        blood(("B cell", "T cel", "glia"))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        blood().nodes = ()  # type: ignore[misc]
    assert isinstance(blood().parents[0], tuple)


@given(graphs())
def test_its_json_makes_it_again(drawn) -> None:
    parents, labels = drawn
    hierarchy = Hierarchy.of(labels, parents, "toy")
    again = Hierarchy.of(labels, json.loads(json.dumps(hierarchy.to_json())), "toy")
    assert again == hierarchy
    assert again.sha256 == hierarchy.sha256


def test_its_digest_changes_with_graph_and_labels() -> None:
    other = Hierarchy.of(TYPES, {**BLOOD, "NK": ["lymphocyte"]}, "blood")
    assert len({blood().sha256, blood(TYPES[::-1]).sha256, other.sha256}) == 3


ABOVE_TOY = {"B cell": ["lymphocyte"], "T cell": ["lymphocyte"], "été": []}


def test_a_model_folder_keeps_it_beside_the_labels(tmp_path: Path) -> None:
    model = toy_model(HEADS[1])
    hierarchy = Hierarchy.of(LABELS, ABOVE_TOY, "toy")
    write_model(tmp_path / "with", replace(model, info=replace(model.info, hierarchy=hierarchy)), "card")
    write_model(tmp_path / "without", model, "card")
    with_it, without = read_model(tmp_path / "with"), read_model(tmp_path / "without")
    assert with_it.info.hierarchy == hierarchy
    assert without.info.hierarchy is None
    assert (with_it.info.labels, without.info.labels) == (LABELS, LABELS)
    assert with_it.digest != without.digest
    said = json.loads((tmp_path / "with/labels.json").read_text())
    assert said["parents"] == {
        "B cell": ["lymphocyte"],
        "T cell": ["lymphocyte"],
        "lymphocyte": [],
        "été": [],
    }
    config = json.loads((tmp_path / "with/config.json").read_text())
    assert not {"labels", "hierarchy"} & config.keys()


def test_a_model_folder_with_a_circle_is_no_model(tmp_path: Path) -> None:
    model = toy_model(HEADS[1])
    circle = Hierarchy(LABELS, ("B cell", "T cell", "été"), (("T cell",), ("B cell",), ()))
    write_model(tmp_path / "model", replace(model, info=replace(model.info, hierarchy=circle)), "card")
    with pytest.raises(ModelError, match=r"not a whole model folder .*found a circle"):
        read_model(tmp_path / "model")

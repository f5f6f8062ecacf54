"""A label map against a plain loop; and fine-tuning through it."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import Lines, small_finetuning

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.folder import read_model
from annatac_scale.train.finetune import finetune
from annatac_scale.train.label_map import LabelMap
from annatac_scale.train.splits import SplitRule, split_cells

NAMES = ["A", "B", "C", "d e", "é"]
RULE = SplitRule(0.2, 0.1, 0.1, 0)


def table(path, *rows):
    path.write_text("".join(f"{left}\t{right}\n" for left, right in rows))
    return path


@given(
    st.lists(st.sampled_from([*NAMES, ""]), max_size=30),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NAMES, "new", ""])),
)
def test_each_label_becomes_what_its_line_says_and_all_others_stay(labels, to):
    given_labels = np.array(labels, object)
    found = LabelMap("map", to).applied(given_labels)
    assert found.tolist() == [to.get(label, label) for label in labels]
    assert LabelMap("map", to).unknown(given_labels) == sorted(name for name in to if name not in labels)


def test_names_that_change_places_do_so_once():
    assert LabelMap("map", {"A": "B", "B": "C", "C": "A"}).applied(
        np.array(["A", "B", "C"], object)
    ).tolist() == [
        "B",
        "C",
        "A",
    ]


def test_its_digest_is_of_what_it_says_not_of_how(tmp_path):
    one = LabelMap.read(table(tmp_path / "a.tsv", ("from", "to"), ("A", "x"), ("B", "")))
    (tmp_path / "b.csv").write_text("B,NA\nA, x \n")
    assert LabelMap.read(tmp_path / "b.csv").sha256 == one.sha256
    for rows in ([("A", "x")], [("A", "x"), ("B", "x")], [("A", "B"), ("x", "")]):
        assert LabelMap.read(table(tmp_path / "c.tsv", *rows)).sha256 != one.sha256


def test_what_it_does_is_told_in_cells(tmp_path):
    mapping = LabelMap(tmp_path / "map", {"A": "x", "B": "x", "C": "", "D": "D"})
    labels = np.array(["A", "A", "B", "C", "C", "C", "D", "E", ""], object)
    assert mapping.described(labels).endswith(
        "map: 5 labels become 3; 3 cells get another label, 3 are dropped; 1 labels are not in the map and stay what "
        "they are: 'E'"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("A", "x"), ("A", "x")], r"map.tsv, line 2: found 'A' again; expected each label once in from"),
        ([("A", "x"), ("", "y")], r"map.tsv, line 2: found no label in from"),
    ],
    ids=["twice", "empty"],
)
def test_lines_that_cannot_be_followed_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        LabelMap.read(table(tmp_path / "map.tsv", *rows))


def test_fine_tuning_renames_merges_and_drops_before_anything_else(atlas, pretrained, tmp_path):
    mapping = table(tmp_path / "map.tsv", ("from", "to"), ("D1", "both"), ("D2", "both"), ("D3", "third"))
    lines = Lines()
    config = small_finetuning(epochs=1)
    report = finetune(atlas, pretrained, "donor", tmp_path / "run", config, progress=lines, label_map=mapping)
    assert report.types == ("both", "third")
    donors = atlas.obs(["donor"])["donor"].to_numpy(object)
    facts = read_model(report.model).info.provenance
    split = pq.read_table(tmp_path / "run/split.parquet").to_pandas()
    rows = atlas.obs(["donor"]).merge(split, on=["sample", "barcode"])
    training = rows[rows["split"] == "train"]["donor"]
    assert facts["training_cells_per_type"] == {
        "both": int(training.isin(["D1", "D2"]).sum()),
        "third": int((training == "D3").sum()),
    }
    assert facts["label_map"]["to"] == {"D1": "both", "D2": "both", "D3": "third"}
    assert facts["label_map"]["sha256"] == LabelMap.read(mapping).sha256
    assert (
        f"- label map: 3 labels named, 0 cells dropped, sha256 {LabelMap.read(mapping).sha256}"
        in (report.model / "README.md").read_text()
    )
    assert any(
        "3 labels become 2; 400 cells get another label, 0 are dropped" in line for line in lines.lines
    )
    assert len(split) == len(donors)


def test_dropped_cells_are_counted_apart_from_those_without_a_label(atlas, pretrained, tmp_path):
    mapping = table(tmp_path / "map.tsv", ("D3", ""))
    lines = Lines()
    config = small_finetuning(epochs=1)
    report = finetune(atlas, pretrained, "donor", tmp_path / "run", config, progress=lines, label_map=mapping)
    n_third = int((atlas.obs(["donor"])["donor"] == "D3").sum())
    assert (report.n_dropped, report.n_without_label, report.types) == (n_third, 0, ("D1", "D2"))
    assert sum(report.split.values()) == 400 - n_third
    assert any(f"0 cells without a label, {n_third} dropped by the label map" in line for line in lines.lines)


def test_a_run_goes_on_with_the_same_map_alone(atlas, pretrained, tmp_path):
    config = small_finetuning(epochs=1)
    mapping = table(tmp_path / "map.tsv", ("D1", "a"), ("D2", "b"))
    finetune(atlas, pretrained, "donor", tmp_path / "run", config, label_map=mapping)
    rewritten = tmp_path / "map.csv"
    rewritten.write_text("from,to\nD2,b\nD1,a\n")
    finetune(atlas, pretrained, "donor", tmp_path / "run", config, label_map=rewritten)
    for other in (None, table(tmp_path / "other.tsv", ("D1", "a"), ("D2", "b"), ("D3", "D3"))):
        with pytest.raises(ConfigError):
            finetune(atlas, pretrained, "donor", tmp_path / "run", config, label_map=other)


class FakeStore:
    path = "toy.zarr"

    def __init__(self, labels):
        barcodes = [f"c{i}" for i in range(len(labels))]
        self._obs = pd.DataFrame(
            {"sample": "s", "barcode": barcodes, "label": pd.Series(labels, dtype=object)}
        )
        self.n_cells = len(labels)

    def obs(self, columns):
        return self._obs[["sample", "barcode", *columns]]


def test_labels_that_no_cell_has_are_refused_with_what_was_meant():
    store = FakeStore(["T cell"] * 9 + ["B cell"] * 9)
    mapping = LabelMap("map.tsv", {"T cel": "T", "B cell": "B"})
    with pytest.raises(
        InputError,
        match=r"--label-map map.tsv: found labels that no cell has in label: 'T cel' \(did you mean 'T cell'\?\); "
        r"expected those of its 2 labels",
    ):
        split_cells(store, "label", RULE, mapping)


def test_a_type_that_is_called_as_novel_cells_are_is_refused_unless_it_is_mapped():
    store = FakeStore(["T"] * 9 + ["B"] * 9 + ["Novel_cell_type"] * 9)
    with pytest.raises(InputError, match=r"found cells labelled 'Novel_cell_type'.*with --label-map"):
        split_cells(store, "label", RULE)
    labelled = split_cells(store, "label", RULE, LabelMap("map", {"Novel_cell_type": ""}))
    assert (labelled.types, labelled.n_dropped, labelled.n_without_label) == (("B", "T"), 9, 0)


def test_a_held_out_value_is_one_of_the_store_whatever_the_map_makes_of_it():
    store = FakeStore(["T"] * 9 + ["B"] * 9 + ["odd"] * 9)
    rule = SplitRule("label=odd", 0.1, 0.1, 0)
    labelled = split_cells(store, "label", rule, LabelMap("map", {"odd": "T"}))
    assert labelled.of("test").tolist() == list(range(18, 27))
    assert labelled.codes_of(labelled.of("test")).tolist() == [labelled.types.index("T")] * 9


def test_the_facts_of_a_map_are_json():
    facts = LabelMap("map", {"B": "", "A": "é"}).facts
    assert json.loads(json.dumps(facts))["to"] == {"A": "é", "B": ""}

"""Labels of every kind go the whole road unchanged: fine-tuning, model folder, prediction, tables, evaluation."""

import json
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import draw_cells, small_finetuning, write_store

from annatac_scale.annotate.evaluate import evaluate
from annatac_scale.annotate.predict import predict
from annatac_scale.model.folder import read_model
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs
from annatac_scale.train.finetune import finetune

ODD = [
    "T\tcell",
    "CD4+ αβ T (naïve), |x|",
    "細胞 \U0001f9ec",
    'a "quoted", label',
    "line\nbreak",
    "../up",
    "x" * 3000,
    "na",
    "-1",
    "1e1",
]


def relabelled(atlas, path, labels):
    """A store like ``atlas`` with the column ``odd``, values [400]."""
    samples, start = {}, 0
    rows = atlas.read(np.arange(atlas.n_cells)).to_csr(atlas.n_islands).toarray()
    for name, sample in atlas.samples.items():
        n, obs = sample.n_cells, sample.obs()
        new = obs.assign(odd=labels[start : start + n])
        samples[name] = replace(draw_cells(1), levels=rows[start : start + n], obs=new)
        start += n
    return write_store(path, samples)


def walk(store, pretrained, folder, expected):
    """The whole road; ``expected``: the text of each cell's label, "" where it has none."""
    expected = np.array(expected, object)
    types = tuple(sorted(set(expected) - {""}))
    report = finetune(store, pretrained, "odd", folder / "run", small_finetuning(epochs=1))
    assert report.types == types
    assert report.n_without_label == int((expected == "").sum())
    assert sum(report.split.values()) == int((expected != "").sum())
    assert read_model(report.model).info.labels == types
    card = (report.model / "README.md").read_text()
    rows = [
        line for line in card.splitlines() if line.startswith("| ") and not line.startswith("| cell type")
    ]
    assert len(rows) == len(types)
    assert all(re.fullmatch(r"\| ([^|]|\\\|)+( \| [-\d,.]+){5} \|", row) for row in rows)
    predict(store, report.model, folder / "labels")
    table = pd.concat(
        [pq.read_table(file).to_pandas() for file in sorted((folder / "labels").glob("*.parquet"))]
    )
    assert set(table["best"]) <= set(types)
    found = evaluate(folder / "labels", store, "odd", cells="all")
    joined = store.obs([]).assign(truth=expected).merge(table, on=["sample", "barcode"])
    known = joined["truth"] != ""
    assert found.evaluation.n_cells == int(known.sum())
    assert found.evaluation.n_without_truth == int((~known).sum())
    assert found.best.accuracy == pytest.approx((joined["truth"] == joined["best"])[known].mean())
    assert found.unknown_types == {}
    json.dumps(found.to_dict(), allow_nan=False)
    return found


def test_odd_texts_stay_what_they_are(atlas, pretrained, tmp_path):
    texts = np.array(ODD, object)[np.arange(400) % len(ODD)]
    given_labels = texts.copy()
    given_labels[::9] = [f"\u00a0{text} \n" for text in texts[::9]]  # blanks around a label say nothing
    for first, missing in zip((5, 15, 25, 35), ("", " ", "nan", None), strict=True):
        given_labels[first::40] = missing
    expected = texts.copy()
    expected[5::10] = ""
    walk(relabelled(atlas, tmp_path / "a.zarr", given_labels), pretrained, tmp_path, expected)


TYPE = np.arange(400) % 3
GAPS = np.arange(400) % 7 == 0


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (TYPE, ["0", "1", "2"]),
        (np.where(GAPS, np.nan, TYPE + 0.5), ["0.5", "1.5", "2.5"]),
        (np.where(GAPS, np.nan, TYPE), ["0", "1", "2"]),
        (TYPE > 0, ["False", "True", "True"]),
        (pd.array(np.where(GAPS, None, TYPE > 0), "boolean"), ["False", "True", "True"]),
        (pd.array(np.where(GAPS, None, TYPE), "Int64"), ["0", "1", "2"]),
        (
            pd.Categorical(
                np.where(GAPS, None, np.array(["c", "b", "a"])[TYPE]), ["unused", "a", "b", "c", "never"]
            ),
            ["c", "b", "a"],
        ),
    ],
    ids=["integers", "floats", "integers with gaps", "truth", "truth with gaps", "nullable", "categories"],
)
def test_labels_that_are_no_texts_are_read_as_texts(atlas, pretrained, tmp_path, labels, texts):
    has_gaps = bool(pd.isna(labels).any())
    expected = np.array(texts, object)[TYPE]
    if has_gaps:
        expected[GAPS] = ""
    walk(relabelled(atlas, tmp_path / "a.zarr", labels), pretrained, tmp_path, expected)


@pytest.mark.parametrize(
    ("first", "texts"),
    [
        (np.array(["T", "B", "1"])[TYPE], ["T", "B", "1"]),
        (TYPE + 0.0, ["0", "1", "2"]),
        (TYPE > 0, ["0", "1", "1"]),
    ],
    ids=["texts", "floats", "truth, which the store makes 0 and 1"],
)
def test_labels_of_two_kinds_in_two_samples_are_read_as_texts(atlas, pretrained, tmp_path, first, texts):
    store = relabelled(atlas, tmp_path / "a.zarr", TYPE)
    replace_obs(store.path, "s0", store.samples["s0"].obs().assign(odd=first[:300]))
    expected = [texts[number] for number in TYPE[:300]] + [str(number) for number in TYPE[300:]]
    walk(IslandStore.open(store.path), pretrained, tmp_path, expected)


NAMES = st.text(max_size=8).map(str.strip).filter(lambda name: not name.endswith(".0"))


@settings(max_examples=6)
@given(st.lists(NAMES, min_size=2, max_size=4, unique=True))
def test_any_texts_go_the_whole_road(atlas, pretrained, tmp_path_factory, names):
    missing = {"", "NA", "NaN", "nan", "<NA>", "None"}
    texts = ["T cell", "B cell", *names]
    read = [unicodedata.normalize("NFC", name).strip() for name in texts]
    expected = np.array(["" if text in missing else text for text in read], object)[
        np.arange(400) % len(texts)
    ]
    folder = tmp_path_factory.mktemp("road")
    labels = np.array(texts, object)[np.arange(400) % len(texts)]
    walk(relabelled(atlas, folder / "a.zarr", labels), pretrained, folder, expected)

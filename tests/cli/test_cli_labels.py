"""A label map and a hierarchy on the command line."""

from pathlib import Path

import pandas as pd
import pytest
from command_line import Atlas, done, refusal, strict_json

from annatac_scale.model.folder import read_model

MAP = "from\tto\nB cell\tB\nNK\tNK\nT cell\tT\n"
ABOVE = "child,parent\nB,lymphocyte\nT,T or NK\nNK,T or NK\nT or NK,lymphocyte\n"


@pytest.fixture(scope="module")
def labelled(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of renamed types below others, and its labels."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "map.tsv").write_text(MAP)
    (folder / "above.csv").write_text(ABOVE)
    words = ("--label-map", folder / "map.tsv", "--hierarchy", folder / "above.csv", "--out", folder / "fine")
    result = done(*atlas.fine_tuning(), *words)
    assert "3 labels become 3; 80 cells get another label, 0 are dropped" in result.stderr
    model = ("--model", folder / "fine/model", "--out", folder / "labels")
    done("predict", atlas.store, *model, "--hierarchy-threshold", "0.6")
    return folder


def test_the_model_has_the_new_names_and_what_lies_above_them(labelled: Path) -> None:
    info = read_model(labelled / "fine/model").info
    assert info.labels == ("B", "NK", "T")
    assert info.hierarchy is not None
    assert info.hierarchy.nodes == ("B", "NK", "T", "T or NK", "lymphocyte")
    assert "- hierarchy: 5 nodes below lymphocyte\n" in (labelled / "fine/model/README.md").read_text()


def test_lineages_stand_beside_the_labels_and_are_evaluated(atlas: Atlas, labelled: Path) -> None:
    table = pd.read_parquet(labelled / "labels")
    assert set(table["lineage"]) <= {"B", "NK", "T", "T or NK", "lymphocyte"}
    assert (table["lineage_confidence"] >= 0.6 - 1e-6).all()
    words = ("evaluate", labelled / "labels", "--store", atlas.store, "--truth", "cell_type")
    mapped = strict_json(done(*words, "--label-map", labelled / "map.tsv", "--json").stdout)
    names = {"B cell": "B", "NK": "NK", "T cell": "T"}
    test = table[table["split"] == "test"]
    truth = atlas.obs["cell_type"].loc[test["barcode"]].map(names).to_numpy()
    assert mapped["best_accuracy"] == pytest.approx((test["best"].to_numpy() == truth).mean())
    assert mapped["lineage"]["exact"] == mapped["best_accuracy"]
    assert (mapped["lineage"]["n_cells"], mapped["lineage"]["n_outside"]) == (24, 0)
    plain = strict_json(done(*words, "--json").stdout)
    assert plain["unknown_types"] == {"B cell": 8, "T cell": 8}
    assert plain["lineage"]["n_outside"] == 16


def test_mistakes_with_labels_are_told_in_one_line(atlas: Atlas, labelled: Path, tmp_path: Path) -> None:
    mapping, above = tmp_path / "map.tsv", tmp_path / "above.tsv"
    mapping.write_text("T cels\tT\n")
    above.write_text("B cell\tlymphocyte\nT cell\tlymphocyte\n")
    words = (*atlas.fine_tuning(), "--out", tmp_path / "run")
    line = refusal(*words, "--label-map", mapping)
    assert "map.tsv: found labels that no cell has in cell_type: 'T cels' (did you mean 'T cell'?)" in line
    assert "above.tsv: found no line for 'NK'" in refusal(*words, "--hierarchy", above)
    assert "nosuch: cannot be read" in refusal(*words, "--hierarchy", tmp_path / "nosuch")
    assert "--hierarchy s3://b/x.obo: found an URL" in refusal(*words, "--hierarchy", "s3://b/x.obo")
    assert not (tmp_path / "run").exists()
    words = ("predict", atlas.store, "--model", atlas.typer, "--out", tmp_path / "labels")
    assert "has no hierarchy; leave it out" in refusal(*words, "--hierarchy-threshold", "0.7")
    words = ("predict", atlas.store, "--model", labelled / "fine/model", "--out", tmp_path / "labels")
    assert "--hierarchy-threshold: found 0.0, expected" in refusal(*words, "--hierarchy-threshold", "0")

"""The report of a fine-tuning says what its held-out cells say; pictures are read from the figures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from scipy.stats import binomtest

from annatac_scale.errors import InputError
from annatac_scale.model.calibration import expected_calibration_error
from annatac_scale.report.finetuning import PICTURES, read_finetuning, write_finetuning_report
from annatac_scale.report.finetuning_pictures import draw_accuracy, draw_confusion, draw_reliability

CLASSES = ["A", "B", "C"]


def draw_cells(n: int, split: str, seed: int = 0, stranger: str | None = None) -> pd.DataFrame:
    """Cells whose truth follows the probabilities; the last type has three cells, in which nothing is right."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet([0.5, 0.5, 0.01], n).astype(np.float32)
    truth = np.array(
        [rng.choice(CLASSES[:2], p=row[:2] / row[:2].sum()) for row in chances.astype(float)], object
    )
    truth[:3] = "C"
    if stranger is not None:
        truth[3:8] = stranger
    return pd.DataFrame(
        {
            "sample": "s",
            "barcode": [f"{split}{i}" for i in range(n)],
            "split": split,
            "truth": truth,
            "best": np.array(CLASSES, object)[chances.argmax(axis=1)],
            "confidence": chances.max(axis=1),
            "probabilities": list(chances),
        }
    )


def write_run(path: Path, *parts: pd.DataFrame, holdout: str = "0.2", group: str = "") -> pd.DataFrame:
    path.mkdir(parents=True, exist_ok=True)
    cells = pd.concat(parts, ignore_index=True)
    table = pa.Table.from_pandas(cells, preserve_index=False)
    metadata = {"classes": json.dumps(CLASSES)}
    pq.write_table(table.replace_schema_metadata(metadata), path / "heldout.parquet")
    (path / "run.json").write_text(json.dumps({"labels": "cell_type", "holdout": holdout, "group": group}))
    return cells


def test_figures_are_those_of_scikit_learn_on_the_test_cells(tmp_path: Path) -> None:
    write_run(tmp_path, draw_cells(50, "val", 1), draw_cells(50, "calib", 2), draw_cells(400, "test"))
    report, cells = read_finetuning(tmp_path), draw_cells(400, "test")
    assert (report.split, report.labels, report.evaluation.n_cells) == ("test", "cell_type", 400)
    assert report.evaluation.accuracy == pytest.approx(sk.accuracy_score(cells["truth"], cells["best"]))
    for row in report.evaluation.per_type.itertuples():
        own = cells["truth"] == row.cell_type
        right = int((cells["best"] == row.cell_type)[own].sum())
        ends = binomtest(right, int(own.sum())).proportion_ci(0.95, "exact")
        assert report.recall[row.cell_type] == (pytest.approx(ends.low), pytest.approx(ends.high))
    codes = cells["truth"].map(CLASSES.index).to_numpy()
    expected = expected_calibration_error(np.stack(cells["probabilities"].to_list()), codes)
    assert report.calibration.error == pytest.approx(expected, rel=1e-5)
    assert report.confusions.too_few == {"C": 3}


@pytest.mark.parametrize(
    ("splits", "chosen", "said"),
    [
        (("val", "calib", "test"), "test", "test cells, which fine-tuning never saw"),
        (("val", "calib"), "calib", "calib cells, which did not train"),
        (("val", "train"), "val", "so that the figures are better than on new cells"),
        (("train",), "train", "each as judged by a fit that left it out"),
    ],
)
def test_the_most_honest_cells_there_are_are_taken_and_named(
    tmp_path: Path, splits: tuple[str, ...], chosen: str, said: str
) -> None:
    write_run(tmp_path, *(draw_cells(30 + i, split, i) for i, split in enumerate(splits)))
    report = read_finetuning(tmp_path)
    assert report.split == chosen
    n = 30 + splits.index(chosen)
    assert f"Of {n} {'training' if chosen == 'train' else chosen} cells, " in report.markdown()
    assert said in report.markdown()


def test_whole_groups_that_tested_are_named_and_cells_of_others_are_not_called_new(tmp_path: Path) -> None:
    write_run(tmp_path / "test", draw_cells(50, "test"), group="donor")
    text = read_finetuning(tmp_path / "test").markdown()
    assert "Held out: `--holdout 0.2 --group donor`." in text
    assert "No cell of their groups (`donor`) trained." in text
    assert "expect less on a new donor" not in text
    write_run(tmp_path / "calib", draw_cells(50, "calib"), group="donor", holdout="0")
    text = read_finetuning(tmp_path / "calib").markdown()
    assert "No cell of their groups" not in text
    assert "expect less on a new donor" in text


def test_a_type_is_one_field_of_the_table_whatever_it_is_called(tmp_path: Path) -> None:
    write_run(tmp_path, draw_cells(50, "test", stranger="A|B\nC"))
    report = read_finetuning(tmp_path)
    assert report.unknown_types == {"A|B\nC": 5}
    assert "\n| A\\|B C | 5 | 0.000 | " in report.markdown()


def test_the_files_say_the_same_and_repeat(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, draw_cells(300, "test"), holdout="donor=D5")
        report = write_finetuning_report(tmp_path / name)
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert files == {"heldout.parquet", "run.json", "report.json", "report.md", *PICTURES}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    values = json.loads((tmp_path / "one" / "report.json").read_text())
    assert values["accuracy"] == report.evaluation.accuracy
    assert values["calibration"]["error"] == report.calibration.error
    assert values["confusions"]["sentences"] == report.confusions.sentences
    text = (tmp_path / "one" / "report.md").read_text()
    low, high = report.intervals["accuracy"]
    assert f"| accuracy | {report.evaluation.accuracy:.4f} | {low:.3f} to {high:.3f} |" in text
    for name in PICTURES:
        assert f"({name})" in text
        assert (tmp_path / "one" / name).read_bytes()[:4] == b"\x89PNG"
    for sentence in report.confusions.sentences:
        assert f"- {sentence}" in text
    assert "expect less on a new donor" not in text
    assert "--holdout donor=D5" in text


def test_types_that_the_model_does_not_know_are_named_and_not_calibrated(tmp_path: Path) -> None:
    write_run(tmp_path, draw_cells(200, "test", stranger="glia"))
    report = read_finetuning(tmp_path)
    assert report.unknown_types == {"glia": 5}
    assert report.calibration.n_cells == 195
    assert "all of theirs are errors: glia (5 cells)" in report.markdown()
    assert "expect less on a new donor" in report.markdown()


def test_without_any_cell_of_a_known_type_there_is_no_reliability(tmp_path: Path) -> None:
    cells = draw_cells(20, "test").assign(truth="glia")
    write_run(tmp_path, cells)
    report = write_finetuning_report(tmp_path)
    assert report.calibration is None
    assert not (tmp_path / "report-reliability.png").exists()
    assert "reliability" not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["calibration"] is None


def test_bars_and_dots_are_recall_and_precision_with_their_intervals(tmp_path: Path) -> None:
    write_run(tmp_path, draw_cells(300, "test"))
    report = read_finetuning(tmp_path)
    table = report.evaluation.per_type
    (ax,) = draw_accuracy(report).axes
    assert [bar.get_width() for bar in ax.patches] == table["recall"].tolist()
    (dots,) = [line for line in ax.lines if line.get_label() == "precision"]
    assert list(dots.get_xdata()) == table["precision"].tolist()
    (errors,) = [one for one in ax.collections if len(one.get_segments()) == len(table)]
    for segment, name in zip(errors.get_segments(), table["cell_type"], strict=True):
        assert segment[:, 0] == pytest.approx(report.recall[name])
    assert [one.get_text() for one in ax.get_yticklabels()] == [
        f"{row.cell_type} ({row.n})" for row in table.itertuples()
    ]


def test_the_reliability_picture_has_a_point_and_a_band_for_each_bin(tmp_path: Path) -> None:
    write_run(tmp_path, draw_cells(300, "test"))
    found = read_finetuning(tmp_path).calibration
    top, bottom = draw_reliability(found).axes
    (points,) = [line for line in top.lines if line.get_label() == "this model"]
    assert (
        np.column_stack(points.get_data()).tolist() == found.bins[["confidence", "right"]].to_numpy().tolist()
    )
    bands = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in top.patches]
    assert np.array(bands) == pytest.approx(found.bins[["band_low", "band_high"]].to_numpy())
    assert [bar.get_height() for bar in bottom.patches] == found.bins["n"].tolist()


def test_the_confusion_picture_shows_shares_of_rows() -> None:
    confusion = pd.DataFrame([[8, 2, 0], [0, 0, 5]], index=["A", "B"], columns=["A", "B", "N"])
    ax = draw_confusion(confusion).axes[0]
    assert ax.images[0].get_array().tolist() == [[0.8, 0.2, 0], [0, 0, 1]]
    assert [text.get_text() for text in ax.texts] == ["80%", "20%", "100%"]
    many = pd.DataFrame(np.eye(30), index=[f"t{i}" for i in range(30)], columns=[f"t{i}" for i in range(30)])
    assert not draw_confusion(many).axes[0].texts


def test_a_folder_without_held_out_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"heldout\.parquet: cannot be read .*run `annatac finetune` again"):
        read_finetuning(tmp_path)
    write_run(tmp_path, draw_cells(20, "val")[:0])
    with pytest.raises(InputError, match="found no held-out cell"):
        read_finetuning(tmp_path)
    (tmp_path / "heldout.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        read_finetuning(tmp_path)

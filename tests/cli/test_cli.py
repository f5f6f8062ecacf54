"""The command line: the whole road on a small atlas, and its help."""

import json
from pathlib import Path
from typing import Any

import anndata
import click
import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from command_line import EPOCHS, N_CELLS, N_PEAKS, Atlas, done, files_below, run, strict_json

from annatac_scale.cli import main
from annatac_scale.model.novelty import SCORES
from annatac_scale.store.store import IslandStore


def test_results_stand_on_standard_output_and_progress_on_standard_error(
    atlas: Atlas, said: dict[str, Result]
) -> None:
    assert said["convert"].stdout.splitlines() == ["converted: cells", str(atlas.store)]
    assert "120 cells" in said["convert"].stderr
    assert said["pretrain"].stdout.startswith(f"{atlas.model}: 114 cells, 80 islands, ")
    assert "epoch 1:" in said["pretrain"].stderr
    assert said["finetune"].stdout.splitlines()[0].startswith(f"{atlas.typer}: 3 types, ")
    assert said["finetune"].stdout.splitlines()[1].startswith("held-out cells (24): ")
    assert said["predict"].stdout.startswith(f"{atlas.labels}: 120 cells, ")
    for result in said.values():
        assert "epoch" not in result.stdout
        assert not set(result.stdout.splitlines()) & set(result.stderr.splitlines())


def test_an_h5ad_and_its_fragments_become_the_islands_of_their_counts(atlas: Atlas) -> None:
    matrix, fragments = IslandStore.open(atlas.store), IslandStore.open(atlas.other)
    for store in (matrix, fragments):
        order = [list(atlas.obs.index).index(barcode) for barcode in store.obs(["sample"])["barcode"]]
        levels = store.read(np.arange(N_CELLS)).to_csr(store.n_islands).toarray()
        peaks_of_island = np.minimum(atlas.counts[order], 5)  # one peak in each of the first 80 bins
        assert np.array_equal(levels[:, :N_PEAKS], peaks_of_island)
        assert not levels[:, N_PEAKS:].any()


def test_info_says_the_same_as_text_and_as_json(atlas: Atlas) -> None:
    text, result = done("info", atlas.store), done("info", atlas.store, "--json")
    assert result.stderr == text.stderr == ""
    values = strict_json(result.stdout)
    assert (values["assembly"], values["n_cells"], values["n_islands"]) == ("toy", N_CELLS, 90)
    assert values["n_open"] == np.count_nonzero(atlas.counts)
    assert [sample["name"] for sample in values["samples"]] == ["cells"]
    assert f"{values['n_open']:,}" in text.stdout
    assert str(atlas.h5ad) in text.stdout


def test_finetune_says_what_it_cannot_tell_apart_and_where_the_report_is(
    atlas: Atlas, said: dict[str, Result]
) -> None:
    values = strict_json((atlas.finetuned / "report.json").read_text())
    lines = said["finetune"].stderr.splitlines()
    assert lines[-1] == f"report: {atlas.finetuned / 'report.md'}"
    n_said = len(values["confusions"]["sentences"])
    assert lines[-1 - n_said : -1] == values["confusions"]["sentences"]
    assert values["n_cells"] == 24


def test_evaluate_agrees_with_the_tables_on_disk(atlas: Atlas) -> None:
    result = done("evaluate", atlas.labels, "--store", atlas.store, "--truth", "cell_type", "--json")
    assert result.stderr == ""
    values = strict_json(result.stdout)
    table = pd.read_parquet(atlas.labels)
    test = table[table["split"] == "test"]
    right = test["label"].to_numpy() == atlas.obs["cell_type"].loc[test["barcode"]].to_numpy()
    assert (values["cells"], values["n_cells"]) == ("test", 24)
    assert values["accuracy"] == pytest.approx(right.mean())
    everything = ("--cells", "all", "--json")
    values = strict_json(
        done("evaluate", atlas.labels, "--store", atlas.store, "--truth", "cell_type", *everything).stdout
    )
    right = table["label"].to_numpy() == atlas.obs["cell_type"].loc[table["barcode"]].to_numpy()
    assert (values["n_cells"], values["accuracy"]) == (N_CELLS, pytest.approx(right.mean()))
    text = done("evaluate", atlas.labels, "--store", atlas.store, "--truth", "cell_type").stdout
    assert "held-out test cells: 24 of 120" in text


def test_evaluate_of_types_that_the_model_does_not_know_is_still_json(atlas: Atlas) -> None:
    result = done("evaluate", atlas.labels, "--store", atlas.store, "--truth", "donor", "--json")
    table = pd.read_parquet(atlas.labels)
    donors = atlas.obs["donor"].loc[table["barcode"][table["split"] == "test"]]
    values = strict_json(result.stdout)
    assert values["unknown_types"] == donors.value_counts().to_dict()
    assert (values["accuracy"], values["calibration_error"]) == (0, None)


def test_report_sums_up_what_predict_wrote(atlas: Atlas, tmp_path: Path) -> None:
    values = strict_json(done("report", atlas.labels, "--json").stdout)
    table = pd.read_parquet(atlas.labels)
    assert {one["name"]: one["n_cells"] for one in values["by_label"]} == table[
        "label"
    ].value_counts().to_dict()
    assert [(one["name"], one["n_cells"]) for one in values["by_sample"]] == [("cells", len(table))]
    result = done("report", atlas.labels, "--out", tmp_path / "report.html")
    assert result.stdout.startswith(f"{atlas.labels}: {len(table)} cells of 1 sample")
    assert "<h2>Prediction sets</h2>" in (tmp_path / "report.html").read_text()


def test_evaluate_compares_the_labels_of_any_tool_with_those_of_predict(atlas: Atlas, tmp_path: Path) -> None:
    file = tmp_path / "tool.csv"
    said = atlas.obs["cell_type"].where(np.arange(N_CELLS) % 5 > 0, "B cell")
    said.rename("tool").to_csv(file)
    truth = ("--truth-file", atlas.cells, "--truth", "cell_type")
    alone = strict_json(done("evaluate", file, "--labels-column", "tool", *truth, "--json").stdout)
    right = (said == atlas.obs["cell_type"]).mean()
    assert (alone["cells"], alone["n_cells"], alone["accuracy"]) == ("all", N_CELLS, pytest.approx(right))
    beside = ("--against", file, "--against-column", "tool", "--json")
    values = strict_json(done("evaluate", atlas.labels, *truth, *beside).stdout)
    table = pd.read_parquet(atlas.labels)
    test = table["barcode"][table["split"] == "test"]
    assert values["against"]["test"]["n_cells"] == len(test) == 24
    assert values["against"]["accuracy"] == pytest.approx((said == atlas.obs["cell_type"])[test].mean())
    assert values["against"]["test"]["accuracy"]["first"] == values["accuracy"]


def test_a_novel_threshold_of_0_names_no_cell_novel_and_an_h5ad_carries_the_labels(atlas: Atlas) -> None:
    out, h5ad = atlas.folder / "labels_0", atlas.folder / "labelled.h5ad"
    words = ("--model", atlas.typer, "--out", out, "--novel-threshold", 0, "--write-h5ad", h5ad)
    assert ", 0 named Novel_cell_type" in done("predict", atlas.store, *words).stdout
    table = pd.read_parquet(out).set_index("barcode")
    assert (table["label"] == table["best"]).all()
    obs = anndata.read_h5ad(h5ad).obs
    assert obs["annatac_label"].astype(str).tolist() == table["label"].loc[obs.index].astype(str).tolist()


def test_a_chosen_rate_sets_and_low_depth_are_asked_for_on_the_command_line(atlas: Atlas) -> None:
    out = atlas.folder / "labels_rate"
    store = IslandStore.open(atlas.store)
    half = int(np.median(store.read(np.arange(N_CELLS)).n_open))
    words = (
        "--model",
        atlas.typer,
        "--out",
        out,
        "--coverage",
        0.5,
        "--coverage-per-class",
        "--min-open",
        half,
    )
    asked = (*words, "--novelty", "knn", "--novel-rate", 0.5, "--novel-adapt")
    said = done("predict", atlas.store, *asked).stdout
    table = pd.read_parquet(out)
    shallow = table["n_open"] < half
    assert 0 < shallow.sum() < N_CELLS
    assert f" named Novel_cell_type, {shallow.sum()} Unassigned_low_depth" in said
    assert ((table["label"] == "Unassigned_low_depth") == shallow).all()
    assert table["set_size"].tolist() == [len(types) for types in table["set"]]
    assert table["novelty_p"].between(0, 1).all()


def test_the_novelty_scores_of_the_command_line_are_those_that_there_are() -> None:
    (option,) = [option for option in main.commands["predict"].params if option.name == "novelty"]
    assert tuple(option.type.choices) == SCORES


def test_labels_are_joined_to_a_store_without_inputs(atlas: Atlas, tmp_path: Path) -> None:
    path = tmp_path / "atlas.zarr"
    done("convert", atlas.fragments, *atlas.toy, "--min-fragments", 1, "--sample", "one", "--out", path)
    before = IslandStore.open(path).samples["one"].x_sha256
    result = done("convert", "--obs", atlas.cells, "--out", path)
    assert result.stdout.splitlines() == ["relabelled: one", str(path)]
    assert "120 of 120 cells have labels" in result.stderr
    store = IslandStore.open(path)
    obs = store.obs(["cell_type", "donor"]).set_index("barcode")[["cell_type", "donor"]]
    assert obs.to_dict() == atlas.obs.loc[obs.index].to_dict()
    assert store.samples["one"].x_sha256 == before
    done("convert", "--obs", atlas.cells, "--out", path, "--assembly", "toy")


def test_cells_are_exported_as_anndata(atlas: Atlas, tmp_path: Path) -> None:
    store = IslandStore.open(atlas.store)
    expected = store.read(np.arange(N_CELLS)).to_csr(store.n_islands)
    for out, read in ((tmp_path / "x.h5ad", anndata.read_h5ad), (tmp_path / "x.zarr", anndata.io.read_zarr)):
        result = done("export", atlas.store, "--out", out, "--samples", "cells")
        assert result.stdout.startswith(f"{out}: 120 cells of 1 samples x 90 islands, ")
        assert result.stderr == ""
        written = read(out)
        assert (expected != written.X).nnz == 0
        assert written.obs["cell_type"].tolist() == atlas.obs["cell_type"].loc[written.obs_names].tolist()


def test_islands_shows_the_first_ones_or_writes_all(atlas: Atlas) -> None:
    lines = done("islands", *atlas.toy).stdout.splitlines()
    assert lines[0].startswith("90 islands of toy, selection all, sha256 ")
    assert [line.split("\t")[0] for line in lines[1:3]] == ["chr1:0-5000", "chr1:5000-10000"]
    out = atlas.folder / "islands.tsv.gz"
    assert done("islands", *atlas.toy, "--out", out).stdout.splitlines() == lines[:1]
    assert len(pd.read_csv(out, sep="\t", comment="#")) == 90


def test_running_any_command_again_changes_nothing(atlas: Atlas) -> None:
    again: dict[Path, tuple[Any, ...]] = {
        atlas.store: ("convert", atlas.h5ad, *atlas.toy, "--out", atlas.store),
        atlas.model: ("pretrain", atlas.store, "--out", atlas.pretrained, "--preset", "tiny", *EPOCHS),
        atlas.typer: atlas.fine_tuning(),
        atlas.labels: ("predict", atlas.store, "--model", atlas.typer, "--out", atlas.labels),
    }
    for folder, words in again.items():
        before = files_below(folder)
        result = done(*words)
        assert "epoch 1:" not in result.stderr
        assert files_below(folder) == before, words[0]
    assert done(*again[atlas.store]).stdout.splitlines()[0] == "skipped: cells"


def test_settings_stand_over_the_file_and_the_file_over_the_preset(atlas: Atlas) -> None:
    file = atlas.file("some.toml", "[train]\nepochs = 7\nseed = 5\n[encoder]\nlayers = 1\n")
    out = atlas.folder / "configured"
    words = ("--config", file, "--set", "train.seed=6", "--set", "encoder.width=8", "--epochs", 1)
    done("pretrain", atlas.store, "--out", out, *words)
    made = json.loads((out / "model" / "config.json").read_text())
    assert (made["encoder"]["layers"], made["encoder"]["width"], made["encoder"]["heads"]) == (1, 8, 2)
    assert made["provenance"]["seed"] == 6
    assert "epochs = 1\n" in (out / "config.toml").read_text()


def test_commands_stand_in_the_order_of_the_work() -> None:
    names = [
        "islands",
        "convert",
        "info",
        "pretrain",
        "finetune",
        "predict",
        "evaluate",
        "report",
        "export",
        "demo",
    ]
    assert list(main.commands) == names
    text = done("--help").stdout
    assert sorted(names, key=lambda name: text.index(f"\n  {name} ")) == names
    assert "..." not in text.split("Commands:")[1]


def test_no_words_at_all_show_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert "annatac: error" not in result.stderr


def test_convert_has_the_options_that_were_agreed_on() -> None:
    agreed = (
        "assembly out peaks sample select counting barcodes min-fragments layer use-raw workers obs sheet "
        "chrom-sizes tss gtf min-tsse qc on-invalid dask scratch range-bytes dry-run json"
    )
    options = {option for parameter in main.commands["convert"].params for option in parameter.opts}
    assert {f"--{name}" for name in agreed.split()} == options - {"inputs"}


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_every_option_is_explained_and_its_default_shown(command: click.Command) -> None:
    text = " ".join(done(command.name, "--help").stdout.split())
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            assert parameter.make_metavar(click.Context(command)).strip("[].") in text
            continue
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name
        assert parameter.help[0].isupper() or parameter.help.split()[0] in ("hg38,", "obs"), parameter.help
        if parameter.required:
            assert "[required]" in text
        elif not parameter.is_flag and not parameter.multiple and isinstance(parameter.default, int | str):
            assert f"[default: {parameter.default}" in text

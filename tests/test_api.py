"""The functions behind the commands: one for each, with the same options and defaults, silent, raising our errors."""

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import anndata
import click
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import annatac_scale as ats
import annatac_scale.train.finetune
from annatac_scale import api
from annatac_scale.annotate.confidence import ConfidenceOptions
from annatac_scale.cli import main
from annatac_scale.errors import AnnatacError, ConfigError, InputError, StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.convert import ConvertOptions
from annatac_scale.store.store import IslandStore
from annatac_scale.train.run_options import RunOptions

COMMANDS = [
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


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    path = tmp_path / "toy.sizes"
    path.write_text("chr1\t100000\n")
    return path


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """20 cells, each with one open peak in every fourth of 20 islands."""
    matrix = np.zeros((20, 20), np.int32)
    for cell in range(20):
        matrix[cell, cell % 4 :: 4] = 1 + cell % 3
    obs = pd.DataFrame({"cell_type": ["B", "T"] * 10}, index=[f"c{i}" for i in range(20)])
    var = pd.DataFrame(index=[f"chr1:{i * 5000}-{i * 5000 + 500}" for i in range(20)])
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(sparse.csr_matrix(matrix), obs=obs, var=var).write_h5ad(path)
    return path


def convert(inputs: Any, sizes: Path, out: Any, **options: Any) -> Any:
    return ats.convert(inputs, assembly="toy", chrom_sizes=sizes, select="all", out=out, **options)


def test_there_is_one_function_a_command() -> None:
    assert sorted(name for name in ats.__all__ if hasattr(api, name)) == sorted(COMMANDS)
    assert list(main.commands) == COMMANDS
    for name in COMMANDS:
        assert getattr(ats, name) is getattr(api, name)
        assert getattr(ats, name).__doc__


def test_the_parts_for_programs_of_ones_own_are_there() -> None:
    for name in set(ats.__all__) - set(COMMANDS):
        assert getattr(ats, name).__name__ == name
        assert getattr(ats, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ats.nothing


def defaults_of(name: str) -> dict[str, Any]:
    """Options of an API function and their defaults."""
    parameters = inspect.signature(getattr(api, name)).parameters.values()
    given = {parameter.name: parameter.default for parameter in parameters}
    if name == "convert":
        given |= {field.name: field.default for field in dataclasses.fields(ConvertOptions)}
    if name == "pretrain":
        given |= {field.name: field.default for field in dataclasses.fields(RunOptions)}
    if name == "predict":
        given |= {field.name: field.default for field in dataclasses.fields(ConfidenceOptions)}
    return given


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_function_have_the_same_options_and_defaults(name: str) -> None:
    command = main.commands[name]
    needed = [parameter for parameter in command.params if parameter.required]
    options = [[*p.opts, "x"] if isinstance(p, click.Option) else ["x"] for p in needed]
    words = list(itertools.chain(*options))
    given = command.make_context(name, words).params
    library = defaults_of(name)
    assert given.keys() - {"as_json"} == library.keys() - {"progress", "options"}
    for parameter in needed:
        assert library[parameter.name] is inspect.Parameter.empty, parameter.name
    for option in given.keys() - {"as_json"} - {parameter.name for parameter in needed}:
        assert str(given[option]) == str(library[option]), option


def test_inputs_are_a_text_a_path_or_several(cells: Path, sizes: Path, tmp_path: Path) -> None:
    digests = set()
    for number, inputs in enumerate([str(cells), cells, [cells], (str(cells),)]):
        out = tmp_path / f"{number}.zarr"
        report = convert(inputs, sizes, str(out) if number else out)
        assert report.store == out
        assert list(report.converted) == ["cells"]
        digests.add(IslandStore.open(out).samples["cells"].digest)
    assert len(digests) == 1


def test_labels_are_joined_without_inputs(cells: Path, sizes: Path, tmp_path: Path) -> None:
    store, table = tmp_path / "atlas.zarr", tmp_path / "t.tsv"
    convert([cells], sizes, store, sample=["one"])
    cells.rename(tmp_path / "another.h5ad")
    convert(tmp_path / "another.h5ad", sizes, store)
    table.write_text("sample\tbarcode\tage\n" + "".join(f"one\tc{i}\t{i}\n" for i in range(20)))
    report = ats.convert(out=str(store), obs=str(table))
    assert (list(report.converted), report.skipped, report.relabelled) == ([], [], ["one"])
    age = IslandStore.open(store).obs(["age"]).set_index("sample")["age"]
    assert age["one"].tolist() == list(range(20))
    assert age["another"].isna().all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"workers": 2}, "--workers"),
        ({"min_fragments": 0}, "--min-fragments"),
        ({"chrom_sizes": "x"}, "--chrom-sizes"),
        ({"sample": ["x"]}, "--sample"),
        ({"assembly": "hg38"}, "--assembly"),
    ],
)
def test_joining_refuses_what_only_inputs_can_have(
    options: dict[str, Any], named: str, cells: Path, sizes: Path, tmp_path: Path
) -> None:
    store, table = tmp_path / "atlas.zarr", tmp_path / "t.tsv"
    convert(cells, sizes, store)
    table.write_text("barcode\tage\nc1\t3\n")
    digest = IslandStore.open(store).samples["cells"].digest
    with pytest.raises(InputError, match=f"^{named}: found without inputs"):
        ats.convert(out=store, obs=table, **options)
    assert IslandStore.open(store).samples["cells"].digest == digest


def test_an_unknown_option_is_a_mistake_of_the_program(cells: Path, sizes: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        convert(cells, sizes, tmp_path / "a.zarr", colour="red")
    with pytest.raises(TypeError, match="out"):
        ats.convert(cells, assembly="toy")


def test_islands_are_returned_and_written(sizes: Path, tmp_path: Path) -> None:
    out = tmp_path / "islands.tsv.gz"
    space = ats.islands("toy", chrom_sizes=sizes, select="all", out=str(out))
    assert (len(space), space.names()[-1]) == (20, "chr1:95000-100000")
    assert IslandSpace.read(out).sha256 == space.sha256
    tss = tmp_path / "tss.tsv"
    tss.write_text("chrom\ttss0\tstrand\tgene\ttype\nchr1\t7000\t+\tABC\tprotein_coding\n")
    assert ats.islands("toy", chrom_sizes=sizes, tss=tss).names() == ["chr1:5000-10000"]
    with pytest.raises(InputError, match="leave out --tss or --gtf"):
        ats.islands("toy", chrom_sizes=sizes, tss=tss, gtf=tss)


def test_functions_are_silent_and_return_what_they_did(
    cells: Path, sizes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "atlas.zarr"
    convert(cells, sizes, store)
    found = ats.info(str(store))
    assert (found.n_cells, found.n_open) == (20, 100)
    small = ["encoder.width=8", "encoder.layers=1", "min_cells=1"]
    made = ats.pretrain(str(store), out=str(tmp_path / "run"), epochs=1, settings=small)
    assert made.model == tmp_path / "run" / "model"
    assert (made.n_cells, made.n_islands) == (19, 20)
    assert capfd.readouterr() == ("", "")


def test_errors_are_of_one_tree(tmp_path: Path, cells: Path, sizes: Path) -> None:
    with pytest.raises(StoreError) as no_store:
        ats.info(tmp_path / "nosuch")
    with pytest.raises(InputError) as no_file:
        convert("nosuch.h5ad", sizes, tmp_path / "a.zarr")
    with pytest.raises(ConfigError) as no_preset:
        ats.pretrain(tmp_path, out=tmp_path, preset="huge")
    assert all(isinstance(error.value, AnnatacError) for error in (no_store, no_file, no_preset))
    assert all(isinstance(error.value, ValueError) for error in (no_file, no_preset))


def test_flags_win_over_settings_and_these_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text(
        '[encoder]\nattend = "all"\nk = 4\n[train]\nepochs = 7\nlearning_rate = 0.5\n'
    )
    seen = []
    monkeypatch.setattr("annatac_scale.store.store.IslandStore.open", lambda path: path)
    monkeypatch.setattr(
        "annatac_scale.train.pretrain.pretrain", lambda store, out, config, *rest: seen.append(config)
    )
    options = {
        "out": tmp_path / "run",
        "config": tmp_path / "c.toml",
        "settings": ["train.learning_rate=0.25"],
    }
    api.pretrain("x", **options)
    api.pretrain("x", attend="open", epochs=2, **options)
    assert [(c.encoder.attend, c.encoder.k, c.train.epochs, c.train.learning_rate) for c in seen] == [
        ("all", 4, 7, 0.25),
        ("open", 4, 2, 0.25),
    ]


def test_asking_for_attention_trains_the_linformer_whatever_the_preset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("annatac_scale.store.store.IslandStore.open", lambda path: path)
    monkeypatch.setattr(
        "annatac_scale.train.pretrain.pretrain", lambda store, out, config, *rest: seen.append(config)
    )
    api.pretrain("x", out="y")
    api.pretrain("x", out="y", attend="open")
    api.pretrain("x", out="y", attend="all", settings="reads=gate+sum")
    assert [(config.reads, config.encoder.attend, config.runs_encoder) for config in seen] == [
        ("none", "open", False),
        ("gate", "open", True),
        ("gate+sum", "all", True),
    ]
    with pytest.raises(ConfigError, match="--attend open: --config or --set says reads = none"):
        api.pretrain("x", out="y", attend="open", settings="reads=none")


def test_a_head_that_the_settings_contradict_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = type("Info", (), {"preset": "tiny", "pooled_layer": None})()
    monkeypatch.setattr(
        "annatac_scale.model.folder.read_model", lambda path: type("Model", (), {"info": info})()
    )
    (tmp_path / "c.toml").write_text('[head]\nkind = "cnn"\n')
    with pytest.raises(ConfigError, match="--head pooled: --config or --set says 'cnn'; give one of them"):
        api.finetune("x", model="m", labels="l", out=tmp_path, head="pooled", config=tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="--head subtype"):
        api.finetune("x", model="m", labels="l", out=tmp_path, head="subtype", settings="head.kind=pooled")

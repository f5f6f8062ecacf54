"""What a user may get wrong: exit code 2 and one line that names the place, the finding and the remedy."""

import errno
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import Atlas, refusal

from annatac_scale import api
from annatac_scale.cli import TerminalProgress, main

CONVERT = "convert {h5ad} {toy} --out {new}"
PRETRAIN = "pretrain {store} --epochs 1 --out {new}"
FINETUNE = "finetune {store} --model {model} --labels cell_type --epochs 1 --out {new}"
PREDICT = "predict {store} --model {typer} --out {new}"
EVALUATE = "evaluate {labels} --store {store} --truth cell_type"

NO_STORE = ("nosuch: no island store here", "`annatac convert`")
NO_MODEL = ("nosuch: no model folder here", "give the folder with config.json")

# Click takes the last of an option that is given twice: so --out and --model are replaced below.
MISTAKES = {
    # convert
    "input that is missing": ("convert no.h5ad {toy} --out {new}", "no.h5ad: found no such file", "check the path"),
    "peaks that are missing": ("convert {fragments} {toy} --out {new} --peaks nosuch", "nosuch: found no such file"),
    "table of labels that is missing": (f"{CONVERT} --obs nosuch", "nosuch: found no such file", "check the path"),
    "sheet that is missing": ("convert --sheet nosuch {toy} --out {new}", "nosuch: cannot be read", "check the path"),
    "sizes that are missing": (
        "convert {h5ad} --assembly toy --chrom-sizes nosuch --out {new}", "nosuch: cannot be read", "check the path",
    ),
    "unknown assembly": (
        "convert {h5ad} --assembly hg99 --out {new}",
        "found 'hg99'", "expected one of hg38, hg19, mm10, mm9", "give its chrom.sizes",
    ),
    "no assembly": (
        "convert {h5ad} --out {new}", "--assembly: found none", "expected hg38", "name the assembly",
    ),
    "no inputs": ("convert {toy} --out {new}", "inputs: found none", "expected at least one", "--sheet FILE"),
    "labels for a store that is not there": (
        "convert --obs {cells} --out {new}", "new: found no store to join", "give the inputs",
    ),
    "option of inputs without any": (
        "convert --obs {cells} --out {other} --peaks {sizes}",
        "--peaks: found without inputs", "expected --out and --obs alone", "leave it out",
    ),
    "another assembly than the store's": (
        "convert --obs {cells} --out {other} --assembly hg38", "--assembly: found without inputs",
    ),
    "labels of no cell": (
        "convert --obs {strangers} --out {other}",
        "strangers.tsv: found barcodes such as 'nobody'", "expected barcodes such as 'c000'", "write them as in",
    ),
    "file in the store's place": (f"{CONVERT} --out {{sizes}}", "toy.sizes: exists and is not", "another --out"),
    "something else in the store's place": (f"{CONVERT} --out {{full}}", "full: exists and is not", "another --out"),
    "store of another counting": (
        f"{CONVERT} --sample more --out {{other}}", "'fragment'", "'insertion' was asked for", "another --out",
    ),
    "too few fragments": (
        "convert {fragments} {toy} --out {new}",
        "no barcode with 1,000 fragments", "expected at least one cell", "give --min-fragments",
    ),
    # info
    "info of no store": ("info nosuch", *NO_STORE),
    "info of a file": ("info {h5ad}", "cells.h5ad: no island store here"),
    # pretrain
    "pretraining on no store": ("pretrain nosuch --out {new}", *NO_STORE),
    "pretraining on a file": ("pretrain {h5ad} --out {new}", "cells.h5ad: no island store here"),
    "unknown setting": (f"{PRETRAIN} --set train.speed=3", "--set train.speed: no such setting", "learning_rate"),
    "setting of another type": (f"{PRETRAIN} --set train.seed=x", "--set train.seed: found 'x'", "expected"),
    "setting without a value": (f"{PRETRAIN} --set seed", "--set 'seed'", "expected key=value"),
    "setting out of range": (f"{PRETRAIN} --set encoder.attend=closed", "'closed'", "expected all or open"),
    "settings that are missing": (f"{PRETRAIN} --config nosuch", "nosuch: cannot be read"),
    "settings that are no TOML": (f"{PRETRAIN} --config {{cells}}", "cells.tsv: cannot be read as TOML"),
    "run into something else": (f"{PRETRAIN} --out {{full}}", "full: exists and holds no run", "another --out"),
    "run with other settings": (
        f"{PRETRAIN} --set train.seed=3 --out {{pretrained}}",
        "pre: holds a run with other settings", "train.seed 0 (now 3)", "another --out",
    ),
    # finetune
    "fine-tuning on no store": ("finetune nosuch --model {model} --labels x --out {new}", *NO_STORE),
    "fine-tuning of no model": (f"{FINETUNE} --model nosuch", *NO_MODEL),
    "fine-tuning of a run, not its model": (f"{FINETUNE} --model {{pretrained}}", "pre: no model folder here"),
    "fine-tuning of a foreign model": (
        f"{FINETUNE} --model {{foreign}}", "foreign/config.json: format None", "expected annatac_scale.model",
    ),
    "fine-tuning on other islands": (
        "finetune {other} --model {model} --labels cell_type --out {new}",
        "other.zarr does not fit the model", "counting: store fragment, model insertion (differs);",
        "convert the cells anew, with `annatac convert",
    ),
    "labels that are no column": (f"{FINETUNE} --labels celltype", "no obs column 'celltype'", "cell_type, donor"),
    "holdout that is no share": (f"{FINETUNE} --holdout abc", "--holdout abc: expected a share", "or column=value"),
    "holdout of more than all": (f"{FINETUNE} --holdout 1.5", "--holdout 1.5: expected a share from 0 up to 1"),
    "holdout of nobody": (f"{FINETUNE} --holdout donor=D9", "--holdout donor=D9", "D0, D1, D2, D3"),
    "holdout of no column": (f"{FINETUNE} --holdout nosuch=1", "no obs column 'nosuch'", "there are"),
    "fine-tuning into something else": (f"{FINETUNE} --out {{full}}", "full: exists and holds no run"),
    "fine-tuning into the pretraining": (f"{FINETUNE} --out {{pretrained}}", "pre: holds a run with other settings"),
    "fine-tuning into object storage": (
        f"{FINETUNE} --out s3://b/run", "--out s3://b/run: found an URL", "expected a path on a disk", "then copy it",
    ),
    # predict
    "prediction of no store": ("predict nosuch --model {typer} --out {new}", *NO_STORE),
    "prediction with no model": (f"{PREDICT} --model nosuch", *NO_MODEL),
    "prediction with a foreign model": (f"{PREDICT} --model {{foreign}}", "foreign/config.json: format None"),
    "prediction without a head": (
        f"{PREDICT} --model {{model}}", "pre/model: a pretrained model that knows no cell types", "`annatac finetune`",
    ),
    "prediction of other islands": (
        "predict {other} --model {typer} --out {new}",
        "other.zarr does not fit the model", "counting: store fragment, model insertion (differs);",
    ),
    "prediction into something else": (f"{PREDICT} --out {{full}}", "full: found 'notes.txt'", "another --out"),
    "prediction into other labels": (
        f"{PREDICT} --novel-threshold 0.9 --out {{labels}}",
        "labels: holds labels made with novel_threshold 0.5, now asked for 0.9", "another --out",
    ),
    "labelled cells into object storage": (
        f"{PREDICT} --write-h5ad s3://b/x.h5ad", "--write-h5ad s3://b/x.h5ad: found an URL", "a path on a disk",
    ),
    "threshold out of range": (f"{PREDICT} --novel-threshold 1.5", "1.5", "expected"),
    "threshold and rate": (
        f"{PREDICT} --novel-threshold 0.5 --novel-rate 0.1", "--novel-threshold 0.5", "--novel-rate was given too",
    ),
    "coverage out of range": (f"{PREDICT} --coverage 90", "found 90.0", "above 0 and below 1"),
    # evaluate
    "evaluation of no labels": (
        "evaluate nosuch --store {store} --truth cell_type", "nosuch: found no", "`annatac predict`",
    ),
    "evaluation with no store": (f"{EVALUATE} --store nosuch", *NO_STORE),
    "evaluation with another store": (
        f"{EVALUATE} --store {{other}}", "labels: found 24 of 24 cells that", "give the store that was predicted",
    ),
    "evaluation without a truth": (
        "evaluate {labels} --truth cell_type", "found neither a store nor a file", "give --store or --truth-file",
    ),
    "evaluation of a file without its column": (
        "evaluate {cells} --store {store} --truth cell_type", "cells.tsv: found a file", "--labels-column COLUMN",
    ),
    "truth that is no column": (f"{EVALUATE} --truth celltype", "no obs column 'celltype'", "cell_type, donor"),
    # report
    "report of no labels": ("report nosuch", "nosuch: found no", "`annatac predict`"),
    "report into object storage": ("report {labels} --out s3://b/r.html", "--out s3://b/r.html: found an URL"),
    # export
    "export of no store": ("export nosuch --out {new}.h5ad", *NO_STORE),
    "export into what is no ending": ("export {store} --out {new}", "found the ending ''", "expected .h5ad or .zarr"),
    "export over a file": ("export {store} --out {h5ad}", "cells.h5ad: found it there", "--overwrite"),
    "export over the store": ("export {store} --out {store} --overwrite", "atlas.zarr: found within the store"),
    "export of no sample": (
        "export {store} --out {new}.h5ad --samples cells,heart", "found no sample 'heart'", "expected some of cells",
    ),
    "export into object storage": ("export {store} --out s3://b/x.zarr", "expected a path on a disk", "then copy it"),
    # demo
    "islands into object storage": (
        "islands --assembly hg38 --out s3://b/i.tsv.gz", "--out s3://b/i.tsv.gz: found an URL", "a path on a disk",
    ),
    "picture in object storage": (
        "info {store} --qc --plot s3://b/q.png", "--plot s3://b/q.png: found an URL", "a path on a disk",
    ),
    "demo in object storage": ("demo --out s3://b/demo", "--out s3://b/demo: found an URL", "a path on a disk"),
    # islands
    "islands of two tables": ("islands {toy} --tss {sizes} --gtf {sizes}", "expected one", "leave out --tss or --gtf"),
    "islands into a folder": ("islands {toy} --out {full}", "full"),
    "islands into no folder": ("islands {toy} --out nosuch/x.gz", "nosuch/", "check the path"),
    # words
    "no such command": ("annotate", "No such command 'annotate'; see `annatac --help`"),
    "no such option": ("--csv info", "No such option '--csv'; see `annatac --help`"),
    "no such option of a command": ("info --parquet {store}", "No such option '--parquet'; see `annatac info --help`"),
    "option that is missing": ("predict {store} --out x", "Missing option '--model'; see `annatac predict --help`"),
    "one store too many": ("info {store} {other}", "unexpected extra argument", "`annatac info --help`"),
    "no such preset": (f"{PRETRAIN} --preset huge", "'huge' is not one of 'tiny', 'small', 'paper'"),
    "no epochs": (f"{PRETRAIN} --epochs 0", "'--epochs': 0 is not in the range x>=1"),
    "fewer than no workers": (f"{PRETRAIN} --workers -1", "--workers -1: expected N or MIN:MAX"),
    "no time between checkpoints": (f"{PRETRAIN} --checkpoint-minutes 0", "--checkpoint-minutes 0.0: expected more"),
    "no checkpoint kept": (f"{PRETRAIN} --keep 0", "--keep 0: expected at least 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(atlas: Atlas) -> dict[str, str]:
    """What stands in braces above."""
    return {
        **{name: str(value) for name, value in vars(atlas).items() if isinstance(value, Path)},
        "toy": shlex.join(map(str, atlas.toy)),
        "full": str(atlas.file("full/notes.txt", "mine\n").parent),
        "foreign": str(
            atlas.file("foreign/config.json", '{"model_type": "bert", "hidden_size": 768}').parent
        ),
        "strangers": str(atlas.file("strangers.tsv", "barcode\tcell_type\nnobody\tB cell\n")),
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(name: str, places: dict[str, str], tmp_path: Path) -> None:
    command, *parts = MISTAKES[name]
    before = set(Path(places["folder"]).iterdir())
    line = refusal(*shlex.split(command.format(**places, new=tmp_path / "new")))
    for part in parts:
        assert part in line
    assert set(Path(places["folder"]).iterdir()) == before
    assert set(tmp_path.iterdir()) <= {tmp_path / "new"}


def test_a_file_that_may_not_be_read_is_told(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(store: str, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{store}/zarr.json")

    monkeypatch.setattr(api, "info", denied)
    line = refusal("info", atlas.store)
    assert line.startswith(f"{atlas.store}/zarr.json: Permission denied; check")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_that_may_not_be_written_is_told(atlas: Atlas) -> None:
    closed = atlas.folder / "closed"
    closed.mkdir(mode=0o555)
    line = refusal("convert", atlas.h5ad, *atlas.toy, "--out", closed / "atlas.zarr")
    assert "closed" in line
    assert "Permission denied" in line


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: str, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(api, "info", full)
    assert refusal("info", "x") == "No space left on device; free some space and run the same command again"


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), OSError("no path"), ValueError("ours"), MemoryError()]
)
def test_our_own_mistakes_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(api, "info", fail)
    result = CliRunner().invoke(main, ["info", "x"])
    assert result.exception is error
    assert result.exit_code == 1
    assert "annatac: error" not in result.stderr


def test_a_message_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: str, **options: object) -> None:
        raise api.InputError("first\n  second\tthird")

    monkeypatch.setattr(api, "info", fail)
    assert refusal("info", "x") == "first second third"


def test_lines_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "a [bold]b[/bold] :100: chr1:smile: " + "long " * 40
    TerminalProgress().say(line)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")

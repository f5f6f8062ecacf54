"""The road on stores and models in object storage: real cells, and the same results as from a disk."""

from importlib.resources import as_file, files
from pathlib import Path

import anndata
import pandas as pd
import pytest
from command_line import EPOCHS, done, files_below, refusal, strict_json
from object_storage import ObjectStorage

import annatac_scale as ats
from annatac_scale.store.place import place_of

FINETUNE = ("--labels", "cell_type", "--set", "train.learning_rate=1e-2", "--epochs", 6)


def copied(url: str, folder: Path) -> Path:
    """All objects below a URL, as files."""
    for name in place_of(url).names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(place_of(url).read(name))
    return folder


def put(s3: ObjectStorage, folder: Path, url: str) -> None:
    for name, data in files_below(folder).items():
        s3.put(f"{url}/{name}", data)


@pytest.fixture(scope="module")
def cerebellum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """801 cells of mouse cerebellum, as the package ships them."""
    path = tmp_path_factory.mktemp("cells") / "cerebellum.h5ad"
    with as_file(files("annatac_scale") / "data" / path.name) as shipped:
        path.write_bytes(shipped.read_bytes())
    return path


@pytest.mark.slow
def test_stores_and_models_by_url_give_what_those_on_a_disk_give(
    s3: ObjectStorage, tmp_path: Path, cerebellum: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket = s3.bucket()
    store, pretrained, run = f"{bucket}/atlas.zarr", f"{bucket}/runs/pre", f"{bucket}/runs/fine"
    done("convert", cerebellum, "--assembly", "mm9", "--out", store)
    done("pretrain", store, "--out", pretrained, "--preset", "tiny", *EPOCHS)
    local, model = copied(store, tmp_path / "atlas.zarr"), copied(f"{pretrained}/model", tmp_path / "pre")

    said = done("finetune", store, "--model", f"{pretrained}/model", "--out", "fine", *FINETUNE)
    assert said.stdout.startswith("fine/model: 4 types, ")
    done("finetune", local, "--model", model, "--out", "fine_local", *FINETUNE)
    for name in ("model", "split.parquet"):
        assert files_below(Path("fine") / name) == files_below(Path("fine_local") / name)

    put(s3, Path("fine"), run)
    words = ("--model", f"{run}/model", "--out", "labels", "--write-h5ad", "labelled.h5ad")
    assert done("predict", store, *words).stdout.startswith("labels: 801 cells, ")
    done("predict", local, "--model", "fine/model", "--out", "labels_local")
    parts = [
        {n: d for n, d in files_below(Path(f)).items() if n[0] != "_"} for f in ("labels", "labels_local")
    ]
    assert parts[0] == parts[1]
    assert set(pd.read_parquet("labels")["split"]) == {"train", "val", "calib", "test"}
    assert "annatac_label" in anndata.read_h5ad("labelled.h5ad").obs

    truth = ("--truth", "cell_type", "--json")
    remote = strict_json(done("evaluate", "labels", "--store", store, *truth).stdout)
    here = strict_json(done("evaluate", "labels_local", "--store", local, *truth).stdout)
    assert {**remote, "labels": ""} == {**here, "labels": ""}
    assert (remote["cells"], remote["n_cells"]) == ("test", remote["n_by_split"]["test"])
    assert remote["best_accuracy"] > 0.8

    for words in ((), ("--qc",), ("--digest",)):
        values = [done("info", place, *words, "--json").stdout for place in (store, local)]
        assert values[0].replace(store, "") == values[1].replace(str(local), "")
    assert ats.read_model(f"{run}/model").digest == ats.read_model("fine/model").digest == remote["model"]
    # A Path of a URL would make a folder "s3:" here.
    made = {"atlas.zarr", "pre", "fine", "fine_local", "labels", "labels_local", "labelled.h5ad"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_what_is_not_there_is_told_by_its_url(s3: ObjectStorage, tmp_path: Path) -> None:
    nothing, out = f"{s3.bucket()}/nothing", tmp_path / "out"
    no_store = f"{nothing}: no island store here"
    no_model = f"{nothing}: no model folder here (found no config.json"
    for words in (
        ("info", nothing),
        ("pretrain", nothing, "--out", out),
        ("predict", nothing, "--model", nothing, "--out", out),
        ("export", nothing, "--out", tmp_path / "x.h5ad"),
    ):
        assert refusal(*words).startswith(no_store)
    line = refusal("finetune", nothing, "--model", nothing, "--labels", "x", "--out", out)
    assert line.startswith(no_model)
    assert list(tmp_path.iterdir()) == []

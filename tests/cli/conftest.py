"""The road: every command run once on a small atlas."""

import pytest
from click.testing import Result
from command_line import EPOCHS, Atlas, done


@pytest.fixture(scope="session")
def said() -> dict[str, Result]:
    return {}


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory, said: dict[str, Result]) -> Atlas:
    """All commands of the road, run once."""
    a = Atlas(tmp_path_factory.mktemp("atlas"))
    said["convert"] = done("convert", a.h5ad, *a.toy, "--out", a.store)
    said["other"] = done(
        "convert", a.fragments, *a.toy, "--out", a.other, "--counting", "fragment", "--min-fragments", 1,
        "--obs", a.cells,
    )  # fmt: skip
    said["pretrain"] = done("pretrain", a.store, "--out", a.pretrained, "--preset", "tiny", *EPOCHS)
    said["finetune"] = done(*a.fine_tuning())
    said["predict"] = done("predict", a.store, "--model", a.typer, "--out", a.labels)
    return a

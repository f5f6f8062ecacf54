"""A store to write into."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_stores import SPACE

from annatac_scale.store.writer import create_store


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    return path


@pytest.fixture
def path(_empty_store: Path, tmp_path: Path) -> Path:
    """An empty store."""
    return shutil.copytree(_empty_store, tmp_path / "atlas.zarr")


@pytest.fixture(scope="module", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Waiting for the disk is most of the time of these tests; test_writing.py looks that it would be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield

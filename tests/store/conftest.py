"""A store to write into."""

import shutil
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

"""A small store, and a model of it."""

from pathlib import Path

import pytest
from predicted import SIZES
from small_atlas import SmallSample, draw_sample, small_model, small_store

from annatac_scale.store.store import IslandStore


@pytest.fixture(scope="session")
def samples() -> dict[str, SmallSample]:
    return {name: draw_sample(n, seed) for seed, (name, n) in enumerate(SIZES.items())}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, SmallSample]) -> IslandStore:
    return small_store(tmp_path_factory.mktemp("predict") / "atlas.zarr", samples)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_model(tmp_path / "model")
    return tmp_path / "model"

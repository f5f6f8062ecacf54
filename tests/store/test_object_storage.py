"""A store in object storage, over HTTP: the same cells and digests as on a disk, whole or invisible."""

from pathlib import Path

import numpy as np
import pytest
from object_storage import ObjectStorage
from random_stores import MEASURED, SPACE, random_cells, random_obs, write_sample

from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs


@pytest.fixture
def url(s3: ObjectStorage) -> str:
    """An empty store in a bucket of its own."""
    url = f"{s3.bucket()}/some/atlas.zarr"
    create_store(url, SPACE, "insertion")
    return url


def test_a_store_in_object_storage_is_the_one_on_disk(s3: ObjectStorage, url: str, path: Path) -> None:
    first, second = random_cells(4321, 1), random_cells(3, 2)
    for store in (path, url):
        write_sample(store, "first", first)
        write_sample(store, "second", second)
        replace_obs(store, "second", random_obs(3, 5).assign(donor="D5"))
    here, there = IslandStore.open(path), IslandStore.open(url)
    assert there.digest == here.digest
    assert (
        there.read(np.arange(4324)).to_csr(len(SPACE)) != here.read(np.arange(4324)).to_csr(len(SPACE))
    ).nnz == 0
    assert there.obs().equals(here.obs())
    assert there.space.sha256 == SPACE.sha256
    np.testing.assert_array_equal(there.samples["first"].measured, MEASURED)
    assert s3.keys(url) == sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock"
    )
    infos = [describe(store).to_dict() | {"path": ""} for store in (here, there)]
    assert infos[0] == infos[1]

import pytest
import torch
from planted import draw_cells, small_pretraining, write_store

from annatac_scale.train.pretrain import pretrain


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Additions in one order: equal seeds give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def atlas(tmp_path_factory):
    """400 cells of two types in two samples, all levels."""
    cells = {"s0": draw_cells(300), "s1": draw_cells(100, seed=1)}
    return write_store(tmp_path_factory.mktemp("atlas") / "atlas.zarr", cells)


@pytest.fixture(scope="session")
def pretrained(atlas, tmp_path_factory):
    """A pretrained model of ``atlas``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report = pretrain(atlas, tmp_path_factory.mktemp("pretrained") / "run", small_pretraining())
    torch.set_num_threads(threads)
    return report.model

import numpy as np
import pandas as pd
import pytest
from planted import Cells, Lines, write_store
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from threadpoolctl import threadpool_limits

from annatac_scale.errors import ConfigError
from annatac_scale.progress import Advance
from annatac_scale.stream.cell_matrix import CellMatrix
from annatac_scale.stream.vocabulary import Vocabulary
from annatac_scale.train import positions
from annatac_scale.train.positions import (
    inverse_document_frequency,
    position_table,
    truncated_svd,
)

N_CELLS, N_ISLANDS, RANK = 620, 90, 6


def store_of(path, levels):
    obs = pd.DataFrame(index=pd.Index([f"c{i}" for i in range(len(levels))], name="barcode"))
    half = len(levels) // 2
    samples = {"s0": Cells(levels[:half], obs[:half]), "s1": Cells(levels[half:], obs[half:])}
    return write_store(path, samples)


def draw_levels(n_cells=N_CELLS, n_islands=N_ISLANDS, seed=0):
    """Cells of seven groups of falling size, each with islands of its own: singular values well apart."""
    rng = np.random.default_rng(seed)
    group = rng.choice(7, n_cells, p=np.array([28, 19, 13, 9, 6, 4, 3]) / 82)
    favoured = np.arange(n_islands) * 7 // n_islands
    chance = np.where(favoured == group[:, None], 0.85, 0.03)
    opened = rng.random((n_cells, n_islands)) < chance
    return (opened * rng.integers(1, 6, (n_cells, n_islands))).astype(np.uint8)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    levels = draw_levels()
    store = store_of(tmp_path_factory.mktemp("positions") / "a.zarr", levels)
    cells = np.sort(np.random.default_rng(1).choice(N_CELLS, 500, replace=False))
    return store, levels, cells, Vocabulary.fit(store, cells, min_cells=3)


def values_of(levels, cells, vocabulary, idf):
    """The matrix that is decomposed, dense and in float64."""
    rows = levels[cells][:, vocabulary.islands].astype(np.float64)
    if idf is None:
        return rows
    rows = (rows > 0) * idf.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def idf_of(levels, cells, vocabulary):
    counts = (levels[cells][:, vocabulary.islands] > 0).sum(axis=0)
    return inverse_document_frequency(counts, len(cells))


def with_largest_positive(components):
    columns = np.arange(components.shape[1])
    return components * np.sign(components[np.abs(components).argmax(axis=0), columns])


@pytest.mark.parametrize("kind", positions.VALUES)
def test_singular_vectors_are_those_of_numpy_and_of_scikit_learn(atlas, kind):
    store, levels, cells, vocabulary = atlas
    idf = None if kind == "levels" else idf_of(levels, cells, vocabulary)
    svd = truncated_svd(CellMatrix(store, vocabulary, cells, idf), RANK, seed=3)
    dense = values_of(levels, cells, vocabulary, idf)
    _, singular_values, rows = np.linalg.svd(dense, full_matrices=False)
    sklearn = TruncatedSVD(RANK, algorithm="arpack").fit(sparse.csr_matrix(dense))
    assert svd.components.shape == (len(vocabulary), RANK)
    np.testing.assert_allclose(svd.singular_values, singular_values[:RANK], rtol=1e-4)
    np.testing.assert_allclose(svd.singular_values, sklearn.singular_values_, rtol=1e-4)
    np.testing.assert_allclose(svd.components, with_largest_positive(rows[:RANK].T), atol=2e-3)
    np.testing.assert_allclose(svd.components, with_largest_positive(sklearn.components_.T), atol=2e-3)


def test_idf_is_the_formula_and_counts_an_island_never_open_as_open_once():
    idf = inverse_document_frequency(np.array([0, 1, 4, 10]), 10)
    np.testing.assert_allclose(idf, np.log([11, 11, 3.5, 2]), rtol=1e-6)
    assert idf.dtype == np.float32


def test_vectors_are_orthonormal_and_each_has_its_largest_entry_positive(atlas):
    store, _, cells, vocabulary = atlas
    components = truncated_svd(CellMatrix(store, vocabulary, cells), 30, seed=0).components
    np.testing.assert_allclose(components.T @ components, np.eye(30), atol=1e-5)
    largest = components[np.abs(components).argmax(axis=0), np.arange(30)]
    assert (largest > 0).all()


@pytest.mark.parametrize("kind", positions.VALUES)
def test_products_are_those_of_the_dense_matrix(tmp_path, kind):
    # More islands than a band of the kernel has, cells of two samples, some of them left out, one all closed.
    levels = draw_levels(700, 1_300)
    levels[5] = 0
    store = store_of(tmp_path / "a.zarr", levels)
    cells = np.delete(np.arange(700), [3, 4, 260, 699])
    vocabulary = Vocabulary.fit(store, cells, min_cells=45)
    assert 512 < len(vocabulary) < 1_300
    idf = None if kind == "levels" else idf_of(levels, cells, vocabulary)
    dense = values_of(levels, cells, vocabulary, idf)
    basis = np.random.default_rng(0).standard_normal((len(vocabulary), 21), dtype=np.float32)
    matrix = CellMatrix(store, vocabulary, cells, idf)
    total, counted = np.ones_like(basis), Counted()
    parts = matrix.parts(300)
    assert len(parts) == 2
    for part in parts:
        matrix.add_products(part, basis, total, counted)
    expected = 1 + dense.T @ (dense @ basis)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert counted.n == len(cells)


class Counted(Advance):
    def __init__(self):
        self.n = 0

    def __call__(self, n, lines=0, sample=""):
        self.n += n


@pytest.mark.parametrize("kind", positions.VALUES)
def test_any_number_of_workers_gives_the_same_bits(atlas, monkeypatch, kind):
    store, levels, cells, vocabulary = atlas
    monkeypatch.setattr(positions, "CELLS_PER_TASK", 90)
    monkeypatch.setattr(positions, "ROWS_PER_TASK", 20)
    idf = None if kind == "levels" else idf_of(levels, cells, vocabulary)
    matrix = CellMatrix(store, vocabulary, cells, idf)
    one, three = (truncated_svd(matrix, RANK, 0, workers=n) for n in (1, 3))
    with threadpool_limits(2, "blas"):
        again = truncated_svd(matrix, RANK, 0, workers=2)
    for other in (three, again):
        assert one.components.tobytes() == other.components.tobytes()
        assert one.singular_values.tobytes() == other.singular_values.tobytes()


@pytest.mark.parametrize(
    ("workers", "tables", "n_held"), [(1, 9, 1), (3, 9, 3), (9, 9, 4), (3, 2, 2), (3, 0, 1)]
)
def test_there_are_never_more_products_than_workers_parts_and_room(
    atlas, monkeypatch, workers, tables, n_held
):
    store, _, cells, vocabulary = atlas
    held, add_products = set(), CellMatrix.add_products

    def watched(self, part, basis, total, advance):
        held.add(total.ctypes.data)
        add_products(self, part, basis, total, advance)

    monkeypatch.setattr(CellMatrix, "add_products", watched)
    monkeypatch.setattr(positions, "CELLS_PER_TASK", 60)
    monkeypatch.setattr(positions, "MOST_BYTES", tables * len(vocabulary) * (RANK + 10) * 4)
    matrix = CellMatrix(store, vocabulary, cells)
    assert len(matrix.parts(60)) == 4
    truncated_svd(matrix, RANK, 0, workers=workers)
    assert len(held) == n_held


def test_rows_made_orthonormal_in_blocks_give_the_same_vectors(atlas, monkeypatch):
    store, _, cells, vocabulary = atlas
    matrix = CellMatrix(store, vocabulary, cells)
    whole = truncated_svd(matrix, RANK, 0)
    monkeypatch.setattr(positions, "ROWS_PER_TASK", 20)
    blocks = truncated_svd(matrix, RANK, 0)
    np.testing.assert_allclose(blocks.singular_values, whole.singular_values, rtol=1e-5)
    np.testing.assert_allclose(blocks.components, whole.components, atol=1e-4)


class Passes(Lines):
    """Keeps the names of tasks."""

    def task(self, name, total, unit, samples=None):
        self.say(name)
        return super().task(name, total, unit, samples)


def test_passes_end_when_the_values_are_found_and_at_the_latest_after_five(atlas):
    store, _, cells, vocabulary = atlas
    matrix = CellMatrix(store, vocabulary, cells)
    few, many = Passes(), Passes()
    truncated_svd(matrix, 2, 0, progress=few)
    truncated_svd(matrix, 40, 0, progress=many)
    assert len(few.lines) < 5
    assert [line.split(",")[1] for line in many.lines] == [f" pass {n} of at most 5" for n in range(1, 6)]


def test_a_flat_tail_is_found_as_well_as_by_scikit_learn(atlas):
    # Beyond the seven groups singular values are those of noise, and hardly fall: no few passes find them exactly.
    store, levels, cells, vocabulary = atlas
    dense = values_of(levels, cells, vocabulary, None)
    exact = np.linalg.svd(dense, compute_uv=False)[:40]
    found = truncated_svd(CellMatrix(store, vocabulary, cells), 40, 0)
    sklearn = TruncatedSVD(40, n_iter=5, random_state=0).fit(sparse.csr_matrix(dense))
    captured = np.linalg.norm(dense @ found.components) ** 2
    assert captured >= 0.999 * np.linalg.norm(dense @ sklearn.components_.T) ** 2
    assert captured >= 0.99 * (exact**2).sum()
    np.testing.assert_allclose(found.singular_values, exact, rtol=0.06)


def test_the_seed_decides_the_bits_and_next_to_nothing_else(atlas):
    store, _, cells, vocabulary = atlas
    matrix = CellMatrix(store, vocabulary, cells)
    first, again, other = (truncated_svd(matrix, RANK, seed) for seed in (0, 0, 1))
    assert first.components.tobytes() == again.components.tobytes()
    assert first.components.tobytes() != other.components.tobytes()
    np.testing.assert_allclose(first.components, other.components, atol=2e-3)


@pytest.mark.parametrize(("n_cells", "n_islands"), [(5, 40), (40, 5)], ids=["few_cells", "few_islands"])
def test_rank_is_that_of_cells_and_islands_where_they_are_fewer_than_the_width(tmp_path, n_cells, n_islands):
    levels = np.random.default_rng(0).integers(0, 6, (n_cells, n_islands)).astype(np.uint8)
    store = store_of(tmp_path / "a.zarr", levels)
    vocabulary = Vocabulary.fit(store, None, min_cells=1)
    svd = truncated_svd(CellMatrix(store, vocabulary, np.arange(n_cells)), 16, seed=0)
    _, singular_values, rows = np.linalg.svd(levels[:, vocabulary.islands].astype(float), full_matrices=False)
    assert svd.components.shape == (len(vocabulary), 5)
    np.testing.assert_allclose(svd.singular_values, singular_values, rtol=1e-4)
    np.testing.assert_allclose(svd.components, with_largest_positive(rows.T), atol=2e-3)
    table = position_table(svd, 16, rms=1.0)
    assert table.shape == (len(vocabulary), 16)
    assert table.dtype == np.float32
    assert not table[:, 5:].any()


def test_the_table_has_the_wanted_root_mean_square_and_the_directions_of_the_vectors(atlas):
    store, _, cells, vocabulary = atlas
    svd = truncated_svd(CellMatrix(store, vocabulary, cells), RANK, seed=0)
    table = position_table(svd, 10, rms=0.7)
    assert np.sqrt(np.mean(table.astype(np.float64) ** 2)) == pytest.approx(0.7, rel=1e-6)
    scale = table[:, :RANK] / svd.components
    np.testing.assert_allclose(scale, scale[0, 0], rtol=1e-5)


def test_more_vectors_than_the_width_are_refused(atlas):
    store, _, cells, vocabulary = atlas
    svd = truncated_svd(CellMatrix(store, vocabulary, cells), RANK, seed=0)
    with pytest.raises(ConfigError, match="6 singular vectors do not fit a width of 4"):
        position_table(svd, 4, rms=1.0)


def test_closed_cells_are_no_trouble(tmp_path):
    levels = draw_levels(60, 20)
    levels[::7] = 0
    store = store_of(tmp_path / "a.zarr", levels)
    vocabulary = Vocabulary.fit(store, None, min_cells=1)
    for idf in (None, np.ones(len(vocabulary), np.float32)):
        svd = truncated_svd(CellMatrix(store, vocabulary, np.arange(60), idf), 4, seed=0)
        expected = np.linalg.svd(values_of(levels, np.arange(60), vocabulary, idf), compute_uv=False)
        np.testing.assert_allclose(svd.singular_values, expected[:4], rtol=1e-3)

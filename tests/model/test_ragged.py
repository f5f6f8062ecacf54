import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged_cells import draw_islands, offsets_of, relative_error
from torch import Tensor

from annatac_scale.model.ragged import SHORTEST_IN_BUCKET, Cells, project, segment_matmul, table_rows

CPU = torch.device("cpu")

N, K, D, M = 9, 3, 4, 5
COUNTS = [3, 0, 1, 9, 0]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def project_token_by_token(rows: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    cells = []
    for b in range(len(offsets) - 1):
        z = torch.zeros(rows.shape[1], x.shape[1], dtype=x.dtype)
        for i in range(offsets[b], offsets[b + 1]):
            z = z + torch.outer(rows[i], x[i])
        cells.append(z)
    return torch.stack(cells)


def multiply_token_by_token(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    cell_of = [b for b, count in enumerate(offsets.diff().tolist()) for _ in range(count)]
    return torch.stack([row @ matrices[b] for row, b in zip(x, cell_of, strict=True)])


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def agree(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    """Values and the gradients of all leaves."""
    assert relative_error(found, expected) < tolerance
    cotangent = torch.randn_like(found)
    for ours, plain in zip(
        torch.autograd.grad(found, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert relative_error(ours, plain) < tolerance


@pytest.fixture(params=[False, True], ids=["looped", "packed"])
def cells(request) -> Cells:
    torch.manual_seed(0)
    return Cells(offsets_of(COUNTS), CPU, packed=request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_sums_outer_products_of_each_cell(cells, dtype):
    rows, x = leaf(sum(COUNTS), K, dtype=dtype), leaf(sum(COUNTS), D, dtype=dtype)
    found, expected = project(rows, x, cells), project_token_by_token(rows, x, cells.offsets)
    agree(found, expected, (rows, x), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_matmul_multiplies_each_row_by_its_cells_matrix(cells, dtype):
    x, matrices = leaf(sum(COUNTS), D, dtype=dtype), leaf(len(COUNTS), D, M, dtype=dtype)
    found, expected = segment_matmul(x, matrices, cells), multiply_token_by_token(x, matrices, cells.offsets)
    agree(found, expected, (x, matrices), TOLERANCE[dtype])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_packed_products_are_those_of_the_loop(counts):
    rows, x, matrices = leaf(sum(counts), K), leaf(sum(counts), D), leaf(len(counts), D, M)
    looped, packed = (Cells(offsets_of(counts), CPU, packed=packed) for packed in (False, True))
    agree(project(rows, x, packed), project(rows, x, looped), (rows, x), 1e-12)
    agree(segment_matmul(x, matrices, packed), segment_matmul(x, matrices, looped), (x, matrices), 1e-12)


@given(st.lists(st.integers(0, 5_000), max_size=30))
def test_buckets_hold_each_token_once_and_little_padding(counts):
    packing = Cells(offsets_of(counts), CPU).packing
    n_tokens, n_places = sum(counts), len(packing.token)
    assert torch.equal(packing.token[packing.place], torch.arange(n_tokens))
    assert int((~packing.padded).sum()) == n_tokens
    assert n_tokens >= SHORTEST_IN_BUCKET * n_places
    assert sum(n * width for n, width in packing.buckets) == n_places
    own = torch.cat(
        [torch.full((width,), cell) for cell, width in _cells_and_widths(packing)] or [torch.empty(0)]
    )
    cell_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    assert torch.equal(cell_of[packing.token], own.long())


def _cells_and_widths(packing):
    widths = [width for n, width in packing.buckets for _ in range(n)]
    return list(zip(packing.order.tolist(), widths, strict=True))


def test_small_cells_are_packed_in_bf16_alone():
    def packed(count: int, dtype: torch.dtype) -> bool:
        return Cells(offsets_of([count] * 4), CPU).are_packed(torch.empty(4 * count, 32, dtype=dtype), 32)

    assert [packed(100, torch.bfloat16), packed(600, torch.bfloat16), packed(100, torch.float32)] == [
        True,
        False,
        False,
    ]


def test_gradients_agree_with_finite_differences(cells):
    x = leaf(sum(COUNTS), D)
    assert torch.autograd.gradcheck(lambda r, x: project(r, x, cells), (leaf(sum(COUNTS), K), x))
    assert torch.autograd.gradcheck(
        lambda x, m: segment_matmul(x, m.transpose(1, 2), cells), (x, leaf(len(COUNTS), M, D))
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counts", [[0, 0], []])
def test_cells_without_tokens_give_zero_and_take_zero_gradients(counts, packed):
    rows, x, matrices = leaf(0, K), leaf(0, D), leaf(len(counts), D, M)
    cells = Cells(offsets_of(counts), CPU, packed)
    z, y = project(rows, x, cells), segment_matmul(x, matrices, cells)
    assert z.shape == (len(counts), K, D)
    assert y.shape == (0, M)
    assert not z.any()
    (z.sum() + y.sum()).backward()
    for tensor in (rows, x, matrices):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_only_the_gradients_asked_for_are_formed(cells):
    rows, x, matrices = leaf(sum(COUNTS), K), leaf(sum(COUNTS), D), leaf(len(COUNTS), D, M)
    project(rows.detach(), x, cells).sum().backward()
    segment_matmul(x.detach(), matrices, cells).sum().backward()
    assert rows.grad is None
    assert x.grad is not None
    assert matrices.grad is not None


def test_autocast_multiplies_in_bf16_and_keeps_the_rows_gradient_in_fp32(cells):
    rows, x = leaf(sum(COUNTS), K, dtype=torch.float32), leaf(sum(COUNTS), D, dtype=torch.float32)
    matrices = leaf(len(COUNTS), D, M, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, y = project(rows, x, cells), segment_matmul(x, matrices, cells)
    assert z.dtype == y.dtype == torch.bfloat16
    assert relative_error(z.float(), project_token_by_token(rows, x, cells.offsets)) < 2e-2
    assert relative_error(y.float(), multiply_token_by_token(x, matrices, cells.offsets)) < 2e-2
    (z.float().sum() + y.float().sum()).backward()
    assert rows.grad.dtype == x.grad.dtype == matrices.grad.dtype == torch.float32


def large_table() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    counts = [400, 300, 500]
    islands = draw_islands(counts, 600)
    return torch.randn(600, 16, requires_grad=True), islands, torch.randn(len(islands), 16)


def test_table_rows_add_their_gradient_into_the_one_that_is_there():
    table, islands, cotangent = large_table()
    added = torch.zeros_like(table).index_add(0, islands, cotangent).detach()
    assert torch.equal(table_rows(table, islands), table[islands])
    table_rows(table, islands).backward(cotangent)
    grad = table.grad
    assert relative_error(grad, added) < 1e-6
    (table_rows(table, islands) * cotangent).sum().backward()
    (table_rows(table, islands) + table_rows(table, islands)).backward(cotangent)
    assert table.grad is grad
    assert not grad.is_sparse
    assert relative_error(grad, 4 * added) < 1e-6


def test_rows_and_the_whole_table_may_be_used_at_once():
    table, islands, cotangent = large_table()
    table.grad = torch.zeros_like(table)
    ((table_rows(table, islands) * cotangent).sum() + 3 * table.sum()).backward()
    added = 3 + torch.zeros_like(table).index_add(0, islands, cotangent).detach()
    assert not table.grad.is_sparse
    assert relative_error(table.grad, added) < 1e-6


def test_the_gradient_is_handed_on_as_its_rows_alone_where_there_is_one_to_add_it_to():
    table, islands, cotangent = large_table()
    table.grad = torch.zeros_like(table)
    (handed,) = torch.autograd.grad(table_rows(table, islands), table, cotangent)
    assert handed.is_sparse
    assert handed._values().shape == cotangent.shape
    assert not table.grad.any()


def test_rows_of_what_is_no_leaf_have_dense_gradients():
    table, islands, cotangent = large_table()
    table.grad = torch.zeros_like(table)
    table_rows(2 * table, islands).backward(cotangent)
    assert (
        relative_error(table.grad, torch.zeros_like(table).index_add(0, islands, 2 * cotangent).detach())
        < 1e-6
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_same_backward_twice_gives_the_same_bits(n_threads, packed):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        table, islands, _ = large_table()
        table.grad = torch.zeros_like(table)
        x = torch.randn(len(islands), 8, requires_grad=True)
        cells = Cells(offsets_of([400, 300, 500]), CPU, packed)
        found = []
        for _ in range(2):
            table.grad.zero_()
            x.grad = None
            project(table_rows(table, islands), x, cells).square().sum().backward()
            found.append((table.grad.clone(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])

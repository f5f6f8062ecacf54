import pytest
import torch
from ragged_cells import draw_islands, offsets_of, relative_error
from torch import Tensor

from annatac_scale.model.ragged import gather_project, segment_matmul

N, K, D, M = 9, 3, 4, 5
COUNTS = [3, 0, 1, 9, 0]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def project_token_by_token(table: Tensor, x: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
    cells = []
    for b in range(len(offsets) - 1):
        z = torch.zeros(table.shape[1], x.shape[1], dtype=x.dtype)
        for i in range(offsets[b], offsets[b + 1]):
            z = z + torch.outer(table[islands[i]], x[i])
        cells.append(z)
    return torch.stack(cells)


def multiply_token_by_token(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    cell_of = [b for b, count in enumerate(offsets.diff().tolist()) for _ in range(count)]
    return torch.stack([row @ matrices[b] for row, b in zip(x, cell_of, strict=True)])


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture
def ragged() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return draw_islands(COUNTS, N), offsets_of(COUNTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gather_project_sums_outer_products_of_each_cell(ragged, dtype):
    islands, offsets = ragged
    table, x = leaf(N, K, dtype=dtype), leaf(len(islands), D, dtype=dtype)
    found = gather_project(table, x, islands, offsets)
    expected = project_token_by_token(table, x, islands, offsets)
    cotangent = torch.randn(found.shape, dtype=dtype)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for ours, plain in zip(
        torch.autograd.grad(found, (table, x), cotangent),
        torch.autograd.grad(expected, (table, x), cotangent),
        strict=True,
    ):
        assert relative_error(ours, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_matmul_multiplies_each_row_by_its_cells_matrix(ragged, dtype):
    _, offsets = ragged
    x, matrices = leaf(sum(COUNTS), D, dtype=dtype), leaf(len(COUNTS), D, M, dtype=dtype)
    found = segment_matmul(x, matrices, offsets)
    expected = multiply_token_by_token(x, matrices, offsets)
    cotangent = torch.randn(found.shape, dtype=dtype)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    for ours, plain in zip(
        torch.autograd.grad(found, (x, matrices), cotangent),
        torch.autograd.grad(expected, (x, matrices), cotangent),
        strict=True,
    ):
        assert relative_error(ours, plain) < TOLERANCE[dtype]


def test_gradients_agree_with_finite_differences(ragged):
    islands, offsets = ragged
    x = leaf(len(islands), D)
    assert torch.autograd.gradcheck(lambda t, x: gather_project(t, x, islands, offsets), (leaf(N, K), x))
    assert torch.autograd.gradcheck(
        lambda x, m: segment_matmul(x, m.transpose(1, 2), offsets), (x, leaf(len(COUNTS), M, D))
    )


def test_cells_without_tokens_give_zero_and_take_zero_gradients():
    table, x, matrices = leaf(N, K), leaf(0, D), leaf(2, D, M)
    nothing, offsets = torch.empty(0, dtype=torch.int64), offsets_of([0, 0])
    z, y = gather_project(table, x, nothing, offsets), segment_matmul(x, matrices, offsets)
    assert z.shape == (2, K, D)
    assert y.shape == (0, M)
    assert not z.any()
    (z.sum() + y.sum()).backward()
    for tensor in (table, x, matrices):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_only_the_gradients_asked_for_are_formed(ragged):
    islands, offsets = ragged
    table, x, matrices = leaf(N, K), leaf(len(islands), D), leaf(len(COUNTS), D, M)
    gather_project(table.detach(), x, islands, offsets).sum().backward()
    segment_matmul(x.detach(), matrices, offsets).sum().backward()
    assert table.grad is None
    assert x.grad is not None
    assert matrices.grad is not None


def test_the_same_backward_twice_gives_the_same_bits():
    torch.manual_seed(1)
    counts = [400, 300, 500]
    table, x = torch.randn(600, 16, requires_grad=True), torch.randn(sum(counts), 8, requires_grad=True)
    islands, offsets = draw_islands(counts, 600), offsets_of(counts)
    first, second = (
        torch.autograd.grad(gather_project(table, x, islands, offsets).square().sum(), (table, x))
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_autocast_multiplies_in_bf16_and_keeps_the_tables_gradient_in_fp32(ragged):
    islands, offsets = ragged
    table, x = leaf(N, K, dtype=torch.float32), leaf(len(islands), D, dtype=torch.float32)
    matrices = leaf(len(COUNTS), D, M, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, y = gather_project(table, x, islands, offsets), segment_matmul(x, matrices, offsets)
    assert z.dtype == y.dtype == torch.bfloat16
    assert relative_error(z.float(), project_token_by_token(table, x, islands, offsets)) < 2e-2
    assert relative_error(y.float(), multiply_token_by_token(x, matrices, offsets)) < 2e-2
    (z.float().sum() + y.float().sum()).backward()
    assert table.grad.dtype == x.grad.dtype == matrices.grad.dtype == torch.float32

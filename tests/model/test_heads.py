import itertools
import math

import plain_linformer
import pytest
import torch
from ragged_cells import LargestTensor, draw_islands, offsets_of, relative_error
from torch import Tensor

from annatac_scale.errors import ConfigError
from annatac_scale.model import heads
from annatac_scale.model.heads import (
    SUBTYPE_HIDDEN,
    CnnHead,
    HiddenVectorHead,
    MaskedCellHead,
    MaskedIslandHead,
    PooledHead,
)
from annatac_scale.model.pool import IslandPool

N, WIDTH, N_TYPES = 19, 6, 4
COUNTS = [5, 0, 1, N, 8]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
Cells = tuple[Tensor, Tensor, Tensor]


def cells_of(counts: list[int], lowest: int, highest: int = 5) -> Cells:
    """Tokens, islands, offsets."""
    torch.manual_seed(5)
    return torch.randint(lowest, highest + 1, (sum(counts),)), draw_islands(counts, N), offsets_of(counts)


def scatter(values: Tensor, islands: Tensor, offsets: Tensor) -> Tensor:
    """Values [T, ...] of the tokens as dense [B, N, ...], zero where an island has no token."""
    dense = []
    for start, stop in itertools.pairwise(offsets.tolist()):
        rows = torch.zeros(N, *values.shape[1:], dtype=values.dtype)
        rows[islands[start:stop]] = values[start:stop]
        dense.append(rows)
    return torch.stack(dense)


def assert_same(
    found: Tensor, expected: Tensor, head: torch.nn.Module, weights: plain_linformer.Weights, hidden: Tensor
) -> None:
    """Outputs, and the gradients of all parameters and of the hidden states."""
    tolerance = TOLERANCE[found.dtype]
    assert relative_error(found, expected) < tolerance
    cotangent = torch.randn_like(found)
    hidden.grad = None
    found.backward(cotangent)
    ours, hidden.grad = hidden.grad, None
    expected.backward(cotangent)
    assert relative_error(ours, hidden.grad) < tolerance
    for name, parameter in head.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) < tolerance, name


@DTYPES
@pytest.mark.parametrize("hidden_units", [(7, 5), (9, 8, 7, 6), (5,)], ids=str)
@pytest.mark.parametrize("attend", ["all", "open"])
@pytest.mark.parametrize("factorised", [False, True])
def test_cnn_head_equals_the_dense_layers(monkeypatch, factorised, attend, hidden_units, dtype):
    monkeypatch.setattr(heads, "FACTORISED_ABOVE", N - 1 if factorised else N)
    cells = cells_of([N] * 3, 0) if attend == "all" else cells_of(COUNTS, 1)
    head = CnnHead(N, WIDTH, N_TYPES, hidden_units).to(dtype)
    weights = plain_linformer.leaves(head)
    states = torch.randn(len(cells[0]), WIDTH, dtype=dtype, requires_grad=True)
    listed = scatter(torch.ones(len(cells[0])), *cells[1:]) > 0
    expected = plain_linformer.cnn_logits(
        weights, scatter(states, *cells[1:]), listed, n_layers=len(hidden_units) - 1
    )
    assert head.table.shape == (N, 32 if factorised else hidden_units[0])
    assert_same(head(states, *cells), expected, head, weights, states)


def test_cnn_head_is_factorised_above_32768_islands_only():
    assert CnnHead(32_768, 2, 2, (40, 3)).table.shape == (32_768, 40)
    assert CnnHead(32_769, 2, 2, (40, 3)).table.shape == (32_769, 32)


def test_cnn_head_embeds_a_cell_in_its_last_hidden_layer():
    head = CnnHead(N, WIDTH, N_TYPES, SUBTYPE_HIDDEN)
    cells = cells_of(COUNTS, 1)
    states = torch.randn(len(cells[0]), WIDTH)
    embedded = head.embed(states, *cells)
    assert embedded.shape == (len(COUNTS), 64)
    assert torch.equal(head.classifier(embedded), head(states, *cells))
    with pytest.raises(ValueError, match="hidden must not be None"):
        head.embed(None, *cells)


def pooled_head(dtype: torch.dtype = torch.float64, gate: bool = True, reads: str = "gate") -> PooledHead:
    torch.manual_seed(6)
    head = PooledHead(N, WIDTH, N_TYPES, pooled=5, reads=reads).to(dtype)
    head.pool.initialise(torch.rand(N) + 0.5, torch.randn(N, 5))
    with torch.no_grad():
        head.pool.norm.weight.normal_()
        head.pool.norm.bias.normal_()
        if gate:
            head.pool.gate.weight.normal_(std=0.2)
            head.pool.gate.bias.normal_(std=0.2)
        if head.pool.sum is not None:
            head.pool.sum.weight.normal_()
    return head


@DTYPES
@pytest.mark.parametrize("counts", [COUNTS, [N] * 3], ids=str)
@pytest.mark.parametrize("reads", ["gate", "gate+sum"])
def test_pooled_head_equals_the_dense_formula_and_looks_at_open_islands_only(reads, counts, dtype):
    cells = cells_of(counts, 0, 6)
    head = pooled_head(dtype, reads=reads).eval()
    weights = plain_linformer.leaves(head)
    states = torch.randn(len(cells[0]), WIDTH, dtype=dtype, requires_grad=True)
    dense = scatter(cells[0], *cells[1:])
    expected = plain_linformer.pooled_logits(weights, scatter(states, *cells[1:]), (dense > 0) & (dense < 6))
    assert_same(head(states, *cells), expected, head, weights, states)


def test_pooled_head_starts_as_the_model_without_encoder_to_the_bit():
    cells = cells_of(COUNTS, 0)
    head = pooled_head(gate=False).eval()
    alone = head(None, *cells)
    assert torch.equal(head(torch.randn(len(cells[0]), WIDTH, dtype=torch.float64), *cells), alone)
    dense = scatter(cells[0], *cells[1:]) > 0
    expected = plain_linformer.pooled_logits(plain_linformer.leaves(head), None, dense)
    assert relative_error(alone, expected) < 1e-10


def test_what_reads_the_encoder_in_a_new_pooled_head_still_gets_a_gradient():
    cells = cells_of(COUNTS, 1)
    head = PooledHead(N, WIDTH, N_TYPES, island_dropout=0.0, reads="gate+sum")
    assert not any(parameter.any() for parameter in head.reading_parameters())
    head(torch.randn(len(cells[0]), WIDTH), *cells)[:, 0].sum().backward()
    assert all(parameter.grad.any() for parameter in head.reading_parameters())


def test_a_pooled_head_that_does_not_read_the_encoder_has_nothing_to_read_it_with():
    head = PooledHead(N, WIDTH, N_TYPES, reads="none")
    assert not head.reads_encoder
    assert head.reading_parameters() == []
    cells = cells_of(COUNTS, 1)
    head.eval()
    assert torch.equal(head(torch.randn(len(cells[0]), WIDTH), *cells), head(None, *cells))


def test_pooled_head_without_open_islands_is_finite_and_trains():
    cells = cells_of([3, 0, N], 0, 0)
    head = pooled_head()
    states = torch.randn(len(cells[0]), WIDTH, dtype=torch.float64, requires_grad=True)
    logits = head(states, *cells)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_island_dropout_leaves_out_whole_islands_before_the_norm():
    n_islands, probability = 4000, 0.3
    head = PooledHead(n_islands, WIDTH, N_TYPES, pooled=1, island_dropout=probability).double()
    head.pool.initialise(torch.full((n_islands,), 2.0), torch.ones(n_islands, 1))
    head.pool.norm = torch.nn.Identity()
    cells = torch.ones(n_islands, dtype=torch.int64), torch.arange(n_islands), offsets_of([n_islands])
    torch.manual_seed(7)
    # m equal values of unit norm add up to sqrt(m): the sum tells how many islands were left.
    left = head.embed(None, *cells).item() ** 2
    spread = math.sqrt(n_islands * probability * (1 - probability))
    assert left == pytest.approx(round(left), abs=1e-6)
    assert left == pytest.approx((1 - probability) * n_islands, abs=5 * spread)
    assert head.eval().embed(None, *cells).item() ** 2 == pytest.approx(n_islands)


def test_missing_svd_columns_start_at_zero():
    head = PooledHead(N, WIDTH, N_TYPES, pooled=5)
    idf, components = torch.rand(N), torch.randn(N, 3, dtype=torch.float64)
    head.pool.initialise(idf, components)
    assert torch.equal(head.pool.idf, idf)
    assert torch.equal(head.pool.table.detach(), torch.cat([components.float(), torch.zeros(N, 2)], dim=1))
    assert set(head.state_dict()) >= {"pool.idf", "pool.table"}


@pytest.mark.parametrize(
    ("idf", "components", "message"),
    [
        (torch.ones(N - 1), None, "idf: found shape"),
        (torch.ones(N), torch.ones(N, 6), "components: found shape"),
        (torch.ones(N), torch.ones(N - 1, 5), "components: found shape"),
    ],
)
def test_tables_of_another_shape_are_refused(idf, components, message):
    with pytest.raises(ValueError, match=message):
        PooledHead(N, WIDTH, N_TYPES, pooled=5).pool.initialise(idf, components)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_an_island_dropout_that_is_no_probability_is_refused(value):
    with pytest.raises(ConfigError, match="island_dropout: found"):
        PooledHead(N, WIDTH, N_TYPES, island_dropout=value)


@pytest.mark.parametrize("kind", [CnnHead, PooledHead])
def test_island_tables_are_named_apart_from_the_body(kind):
    head = kind(N, WIDTH, N_TYPES)
    assert head.n_types == N_TYPES
    tables = head.table_parameters()
    assert [len(table) for table in tables] == [N]
    assert {id(table) for table in tables} < {id(parameter) for parameter in head.parameters()}


@pytest.mark.parametrize("kind", [CnnHead, PooledHead])
def test_type_heads_stay_within_two_percent_in_bf16(kind):
    torch.manual_seed(8)
    cells = cells_of(COUNTS, 1)
    head, states = kind(N, WIDTH, N_TYPES).eval(), torch.randn(sum(COUNTS), WIDTH)
    exact = head(states, *cells)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(states.bfloat16(), *cells)
    found.float().sum().backward()
    assert ((found.float() - exact).norm() / exact.norm()).item() < 2e-2


@pytest.mark.parametrize("kind", [CnnHead, PooledHead])
def test_cost_of_a_type_head_follows_the_tokens(kind):
    n_islands, counts = 600_000, [40] * 64
    head = kind(n_islands, WIDTH, N_TYPES)
    tokens, islands = torch.ones(sum(counts), dtype=torch.int64), draw_islands(counts, n_islands)
    states = torch.randn(sum(counts), WIDTH)
    with LargestTensor() as largest:
        head(states, tokens, islands, offsets_of(counts)).sum().backward()
    assert largest.entries == head.table_parameters()[0].numel()
    with torch.no_grad(), LargestTensor() as largest:
        head(states, tokens, islands, offsets_of(counts))
    assert largest.entries < n_islands


def loop_losses(logits: Tensor, targets: list[int]) -> tuple[float, int, int]:
    """Summed cross-entropy, targets that count and right answers, one target at a time."""
    total, count, correct = 0.0, 0, 0
    for row, target in zip(logits.tolist(), targets, strict=True):
        if target == -100:
            continue
        total += math.log(sum(math.exp(value) for value in row)) - row[target]
        count += 1
        correct += max(range(len(row)), key=row.__getitem__) == target
    return total, count, correct


def test_masked_losses_are_sums_over_the_targets_that_count():
    torch.manual_seed(9)
    head = MaskedIslandHead(WIDTH, "level+open").double()
    hidden = torch.randn(6, WIDTH, dtype=torch.float64)
    level_targets, open_targets = [0, 4, -100, 2, -100, 0], [1, 1, 0, -100, 0, 1]
    losses = head.masked_losses(
        hidden, torch.tensor(level_targets, dtype=torch.int16), torch.tensor(open_targets, dtype=torch.int16)
    )
    levels, opened = head(hidden)
    against_closed = torch.stack([torch.zeros_like(opened), opened], dim=1)
    assert levels.shape == (6, 5)
    for name, logits, targets in (
        ("level", levels, level_targets),
        ("open", against_closed, open_targets),
    ):
        total, count, correct = loop_losses(logits, targets)
        assert losses[name].sum.item() == pytest.approx(total, rel=1e-10)
        assert losses[name].count.item() == count
        assert losses[name].correct.item() == correct


def test_masked_losses_without_targets_are_zero_with_a_gradient():
    head = MaskedIslandHead(WIDTH, "level+open")
    hidden = torch.empty(0, WIDTH, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int16)
    losses = head.masked_losses(hidden, nothing, nothing)
    sum(loss.sum for loss in losses.values()).backward()
    assert all(loss.sum.item() == loss.count.item() == loss.correct.item() == 0 for loss in losses.values())
    assert not any(parameter.grad.any() for parameter in head.parameters())


def test_losses_are_taken_in_fp32_under_autocast():
    head = MaskedIslandHead(WIDTH, "level+open")
    ones = torch.ones(3, dtype=torch.int16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.masked_losses(torch.randn(3, WIDTH), ones, ones)
    assert {loss.sum.dtype for loss in losses.values()} == {torch.float32}


def test_the_level_objective_has_no_open_logit():
    head = MaskedIslandHead(WIDTH, "level")
    targets = torch.tensor([0, 1])
    assert head(torch.randn(2, WIDTH))[1] is None
    assert set(head.masked_losses(torch.randn(2, WIDTH), targets, targets)) == {"level"}
    assert set(MaskedIslandHead(WIDTH, "open").masked_losses(torch.randn(2, WIDTH), targets, targets)) == {
        "open"
    }
    assert MaskedIslandHead(WIDTH, "cell").masked_losses(torch.randn(2, WIDTH), targets, targets) == {}


def test_the_cell_loss_asks_each_hidden_island_of_its_cells_vector():
    torch.manual_seed(10)
    head = MaskedCellHead(N, 5).double()
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    islands, cells, targets = [4, 7, 0, 7, 18], [0, 0, 2, 2, 2], [1, 0, 1, -100, 0]
    loss = head(z, torch.tensor(islands), torch.tensor(cells), torch.tensor(targets))
    total, correct = 0.0, 0
    for island, cell, target in zip(islands, cells, targets, strict=True):
        if target == -100:
            continue
        inner = z[cell] @ head.inner.weight.T + head.inner.bias
        bent = torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner.tolist()])
        asking = torch.cat([z[cell], bent]) @ head.outer.weight.T + head.outer.bias
        logit = (head.table[island] @ asking + head.bias[island]).item()
        total += math.log1p(math.exp(-logit if target else logit))
        correct += (logit > 0) == bool(target)
    assert loss.sum.item() == pytest.approx(total, rel=1e-6)
    assert (loss.count.item(), loss.correct.item()) == (4, correct)
    loss.sum.backward()
    assert not z.grad[1].any()
    assert z.grad[0].any()


def plain_vector(pool, islands):
    """The pooled vector of open islands, without an encoder, one island at a time."""
    norm = math.sqrt(sum(pool.idf[i].item() ** 2 for i in islands)) or 1.0
    z = sum((pool.idf[i].item() / norm * pool.table[i].detach() for i in islands), torch.zeros(5).double())
    z = z - z.mean()
    return z / (z.square().mean() + 1e-5).sqrt()


def test_the_vector_loss_is_the_distance_to_what_the_pooled_layer_gave_for_the_hidden_islands_at_the_start():
    torch.manual_seed(11)
    pool = IslandPool(N, WIDTH, 5, reads="none").double()
    pool.initialise(torch.rand(N) + 0.5, torch.randn(N, 5))
    head, mean = HiddenVectorHead(N, 5).double(), torch.randn(5, dtype=torch.float64)
    head.start_from(pool, mean)
    with torch.no_grad():
        pool.table.normal_()
    z = torch.randn(4, 5, dtype=torch.float64)
    hidden = [[3, 9], [], [18], [0, 1, 2]]
    flat, offsets = (
        torch.tensor([*itertools.chain(*hidden)]),
        offsets_of([len(islands) for islands in hidden]),
    )
    with torch.no_grad():
        head.outer.weight.zero_()
    sighted = torch.tensor([True, True, False, True])
    loss = head(z, flat, offsets, sighted)
    cosines = [
        torch.cosine_similarity(z[cell] - mean, plain_vector(head.answer, hidden[cell]) - mean, dim=0)
        for cell in (0, 3)
    ]
    assert loss.sum.item() == pytest.approx(sum(1 - c.item() for c in cosines), rel=1e-6)
    assert loss.count.item() == 2
    assert loss.correct.item() == sum(c.item() > 0.5 for c in cosines)


def test_the_answers_of_the_vector_loss_are_not_trained():
    head = HiddenVectorHead(N, 5)
    z, everywhere = torch.randn(2, 5, requires_grad=True), torch.tensor([True, True])
    head(z, torch.tensor([1, 2]), offsets_of([1, 1]), everywhere).sum.backward()
    assert z.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in head.answer.parameters())


def test_objectives_are_checked():
    for text in ("opened", "level+level", "", "level+"):
        with pytest.raises(
            ConfigError, match=r"objective: found .*, expected level, open, cell, vector, or some of them"
        ):
            MaskedIslandHead(WIDTH, text)
    head = MaskedIslandHead(WIDTH, "level+open")
    with pytest.raises(ValueError, match="needs open_targets"):
        head.masked_losses(torch.randn(1, WIDTH), torch.tensor([0]))

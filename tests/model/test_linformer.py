import itertools
from typing import Any

import plain_linformer
import pytest
import torch
from ragged_cells import LargestTensor, draw_islands, offsets_of, relative_error
from torch import Tensor

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model import linformer
from annatac_scale.model.linformer import N_TOKENS, EncoderConfig, Linformer

N = 23
COUNTS = {"all": [N, N, N], "open": [6, 0, 1, N, 11]}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def config_of(**values: Any) -> EncoderConfig:
    sizes = {"width": 12, "layers": 3, "heads": 3, "head_dim": 5, "k": 4, "ff": 17}
    choices = {"attend": "open", "norm": "post", "positions": "frozen"}
    return EncoderConfig(**(sizes | choices | values))


def encoder_of(dtype: torch.dtype = torch.float32, n_islands: int = N, **values: Any) -> Linformer:
    """An encoder whose biases and scales all differ from their neutral start, so that none is forgotten."""
    torch.manual_seed(2)
    config = config_of(**values)
    encoder = Linformer(config, n_islands, torch.randn(n_islands, config.width)).to(dtype)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def cells_of(attend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, islands and offsets: closed, open and masked islands in "all", the latter two in "open"."""
    torch.manual_seed(3)
    counts = COUNTS[attend]
    lowest = 0 if attend == "all" else 1
    return torch.randint(lowest, N_TOKENS, (sum(counts),)), draw_islands(counts, N), offsets_of(counts)


def reference(
    weights: plain_linformer.Weights, config: EncoderConfig, tokens: Tensor, islands: Tensor, offsets: Tensor
) -> Tensor:
    """States of the listed islands of each cell; all others are closed and masked out."""
    states = []
    for start, stop in itertools.pairwise(offsets.tolist()):
        listed = islands[start:stop]
        dense = torch.zeros(N, dtype=torch.int64)
        dense[listed] = tokens[start:stop]
        mask = torch.zeros(N, dtype=torch.bool)
        mask[listed] = True
        states.append(plain_linformer.encode(weights, config, dense, mask)[listed])
    return torch.cat(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("trimmed", [False, True], ids=["every token", "queries"])
@pytest.mark.parametrize("positions", ["frozen", "learned"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("attend", ["all", "open"])
def test_states_and_all_gradients_equal_the_plain_formula(attend, norm, positions, trimmed, dtype):
    encoder = encoder_of(dtype, attend=attend, norm=norm, positions=positions)
    weights = plain_linformer.leaves(encoder)
    cells = cells_of(attend)
    queries = torch.arange(len(cells[0]))[1::3] if trimmed else None

    found = encoder(*cells, queries)
    expected = reference(weights, encoder.config, *cells)
    expected = expected if queries is None else expected[queries]
    assert relative_error(found, expected) < TOLERANCE[dtype]

    cotangent = torch.randn(found.shape, dtype=dtype)
    found.backward(cotangent)
    expected.backward(cotangent)
    assert ("positions" in dict(encoder.named_parameters())) == (positions == "learned")
    for name, parameter in encoder.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("trimmed", [False, True], ids=["every token", "queries"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("closed", ["first", "every"])
def test_closed_islands_are_seen_with_the_state_they_start_from(closed, norm, trimmed, dtype):
    encoder = encoder_of(
        dtype, closed=closed, norm=norm, positions="learned", depth=True, tokens_per_cell=7.0
    )
    with torch.no_grad():
        encoder.depth.normal_()
    weights = plain_linformer.leaves(encoder)
    cells = cells_of("open")
    queries = torch.arange(len(cells[0]))[1::3] if trimmed else None
    found = encoder(*cells, queries)
    expected = reference(weights, encoder.config, *cells)
    expected = expected if queries is None else expected[queries]
    assert relative_error(found, expected) < TOLERANCE[dtype]
    cotangent = torch.randn(found.shape, dtype=dtype)
    found.backward(cotangent)
    expected.backward(cotangent)
    for name, parameter in encoder.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) < TOLERANCE[dtype], name


def test_seeing_closed_islands_in_one_layer_is_attending_to_all_of_them():
    torch.manual_seed(4)
    dense = torch.randint(0, 6, (4, N)) * (torch.rand(4, N) < 0.4)
    opened = dense > 0
    partial = encoder_of(torch.float64, closed="first", layers=1)
    whole = encoder_of(torch.float64, attend="all", layers=1)
    found = partial(dense[opened], opened.nonzero()[:, 1], offsets_of(opened.sum(1).tolist()))
    expected = whole(dense.flatten(), torch.arange(N).repeat(4), offsets_of([N] * 4))
    assert relative_error(found, expected[opened.flatten()]) < 1e-10


@pytest.mark.parametrize("n_tokens", [*range(70), 1000, 11_265, 12_288])
@pytest.mark.parametrize("training", [True, False])
def test_layers_see_few_numbers_of_tokens_and_at_most_an_eighth_or_sixteenth_more(
    n_tokens, training, monkeypatch
):
    encoder = encoder_of(n_islands=12_288)
    seen: list[int] = []
    encoder.layers[1].feed_forward.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    cells = (torch.ones(n_tokens, dtype=torch.int64), torch.arange(n_tokens), torch.tensor([0, n_tokens]))
    with torch.set_grad_enabled(training):
        found = encoder(*cells)
        monkeypatch.setattr(linformer, "_rounded_up", lambda *cells: cells)
        expected = encoder(*cells)
    assert relative_error(found, expected) < 1e-6
    rounded, alone = seen
    assert alone == n_tokens
    share, digits = (8, 4) if training else (16, 5)
    assert n_tokens <= rounded <= n_tokens * (share + 1) / share
    assert rounded % 2 ** max(rounded.bit_length() - digits, 0) == 0


class SavedEntries(torch.autograd.graph.saved_tensors_hooks):
    """Counts the entries of all tensors that a forward keeps for its backward."""

    def __init__(self):
        self.entries = 0
        super().__init__(self.count, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def count(self, tensor):
        self.entries += tensor.numel()
        return tensor


@pytest.mark.parametrize("attend", ["all", "open"])
def test_computing_activations_again_changes_no_bit_and_keeps_fewer_of_them(attend):
    kept = {}
    for checkpoint in (False, True):
        encoder = encoder_of(attend=attend, positions="learned", checkpoint=checkpoint)
        with SavedEntries() as saved:
            hidden = encoder(*cells_of(attend))
        hidden.square().sum().backward()
        kept[checkpoint] = saved.entries, [hidden.detach(), *(p.grad for p in encoder.parameters())]
    assert kept[True][0] < kept[False][0] / 3
    assert all(torch.equal(*pair) for pair in zip(kept[False][1], kept[True][1], strict=True))


def test_attending_to_all_with_closed_islands_masked_is_attending_to_open():
    encoder = encoder_of(torch.float64)
    weights = plain_linformer.leaves(encoder)
    torch.manual_seed(4)
    dense = torch.randint(0, 6, (4, N)) * (torch.rand(4, N) < 0.4)
    opened = dense > 0
    found = encoder(dense[opened], opened.nonzero()[:, 1], offsets_of(opened.sum(1).tolist()))
    expected = torch.cat(
        [plain_linformer.encode(weights, encoder.config, cell, cell != 0)[cell != 0] for cell in dense]
    )
    assert relative_error(found, expected) < 1e-10


def test_a_cell_does_not_see_the_other_cells_of_its_batch():
    encoder = encoder_of(torch.float64)
    tokens, islands, offsets = cells_of("open")
    together = encoder(tokens, islands, offsets)
    for start, stop in itertools.pairwise(offsets.tolist()):
        alone = encoder(tokens[start:stop], islands[start:stop], offsets_of([stop - start]))
        assert relative_error(together[start:stop], alone) < 1e-12


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_batches_without_a_token_have_no_states_and_zero_gradients(counts):
    encoder = encoder_of(positions="learned")
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = encoder(nothing, nothing, offsets_of(counts))
    assert hidden.shape == (0, 12)
    hidden.sum().backward()
    assert not any(parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_rank_without_queries_still_has_a_zero_gradient_for_every_parameter(norm):
    encoder = encoder_of(norm=norm, positions="learned")
    hidden = encoder(*cells_of("open"), torch.empty(0, dtype=torch.int64))
    hidden.sum().backward()
    assert hidden.shape == (0, 12)
    assert not any(parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("attend", ["all", "open"])
def test_bf16_autocast_stays_within_two_percent_of_fp32(attend, norm):
    encoder = encoder_of(attend=attend, norm=norm, width=32, head_dim=16)
    cells = cells_of(attend)
    exact = encoder(*cells)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(*cells)
    found.float().square().sum().backward()
    assert ((found.float() - exact).norm() / exact.norm()).item() < 2e-2
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_cost_follows_the_open_islands_and_not_the_genome():
    n_islands, counts = 600_000, [40] * 64
    config = config_of(width=8, k=4, layers=2)
    encoder = Linformer(config, n_islands, torch.zeros(n_islands, 8))
    tokens, islands = torch.ones(sum(counts), dtype=torch.int64), draw_islands(counts, n_islands)
    with LargestTensor() as largest:
        encoder(tokens, islands, offsets_of(counts)).square().sum().backward()
    gradient_of_projection = n_islands * config.k
    assert largest.entries == gradient_of_projection
    with torch.no_grad(), LargestTensor() as largest:
        encoder(tokens, islands, offsets_of(counts))
    assert largest.entries < n_islands


def test_projection_starts_at_the_scale_of_the_tokens_a_cell_is_expected_to_have():
    few = Linformer(config_of(k=50, tokens_per_cell=25.0), 1000)
    every = Linformer(config_of(k=50), 1000)
    for encoder, tokens in ((few, 25), (every, 1000)):
        bound = tokens**-0.5
        assert encoder.projection.abs().max().item() <= bound
        assert encoder.projection.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert encoder.projection_bias.abs().max().item() <= bound


def test_frozen_positions_are_saved_and_not_trained():
    given = torch.randn(N, 12)
    encoder = Linformer(config_of(), N, given)
    assert "positions" not in dict(encoder.named_parameters())
    assert torch.equal(encoder.state_dict()["positions"], given)
    restored = Linformer(config_of(), N)
    restored.load_state_dict(encoder.state_dict())
    assert torch.equal(restored(*cells_of("open")), encoder(*cells_of("open")))
    restored.positions.zero_()
    assert given.any()


def test_learned_positions_start_where_they_are_given():
    given = torch.randn(N, 12)
    encoder = Linformer(config_of(positions="learned"), N, given)
    assert torch.equal(dict(encoder.named_parameters())["positions"], given)
    assert Linformer(config_of(positions="learned"), N).positions.any()


def test_token_rms_is_that_of_the_embedding():
    encoder = Linformer(config_of(), N)
    with torch.no_grad():
        encoder.token_embedding.weight.fill_(-3.0)
    assert encoder.token_rms == pytest.approx(3.0)


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"found shape \(22, 12\), expected \(23, 12\)"):
        Linformer(config_of(), N, torch.zeros(N - 1, 12))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0),
        ("layers", -1),
        ("heads", 2.5),
        ("k", True),
        ("attend", "closed"),
        ("norm", "none"),
        ("positions", "random"),
        ("tokens_per_cell", -1.0),
        ("tokens_per_cell", float("nan")),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"encoder {name}: found"):
        config_of(**{name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_states_and_gradients_of_the_cpu():
    tokens, islands, offsets = cells_of("open")
    queries = torch.arange(len(tokens))[::2]
    on_cpu, on_gpu = encoder_of(torch.float64), encoder_of(torch.float64).cuda()
    expected = on_cpu(tokens, islands, offsets, queries)
    found = on_gpu(tokens.cuda(), islands.cuda(), offsets, queries.cuda())
    assert relative_error(found.cpu(), expected) < 1e-10
    expected.square().sum().backward()
    found.square().sum().backward()
    for ours, plain in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert relative_error(ours.grad.cpu(), plain.grad) < 1e-10

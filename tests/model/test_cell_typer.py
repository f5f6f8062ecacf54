import numpy as np
import pytest
import torch
from model_folders import LABELS, toy_batch, toy_model

from annatac_scale.errors import ConfigError
from annatac_scale.model.cell_typer import HEADS, HeadConfig, build_head
from annatac_scale.model.encoder import batch_tokens
from annatac_scale.model.heads import CnnHead, LinearHead, PooledHead
from annatac_scale.stream.batch import Batch

ONE_OF_EACH = pytest.mark.parametrize("kind", HEADS)


@ONE_OF_EACH
def test_logits_of_a_batch_are_those_of_its_cells_one_by_one(kind: str) -> None:
    typer = toy_model(HeadConfig(kind)).typer.eval()
    batch = toy_batch()
    found = typer.predict(batch)
    assert found.dtype == np.float32
    assert found.shape == (4, len(LABELS))
    for cell in range(4):
        own = slice(batch.offsets[cell], batch.offsets[cell + 1])
        tokens = torch.tensor(batch.tokens[own], dtype=torch.int64)
        islands = torch.tensor(batch.islands[own], dtype=torch.int64)
        offsets = torch.tensor([0, len(tokens)])
        with torch.no_grad():
            hidden = typer.linformer(tokens, islands, offsets)
            expected = typer.head(hidden, tokens, islands, offsets)[0]
        np.testing.assert_allclose(found[cell], expected.numpy(), rtol=1e-5, atol=1e-5)


@ONE_OF_EACH
def test_the_embedding_is_what_the_last_layer_makes_the_logits_of(kind: str) -> None:
    typer = toy_model(HeadConfig(kind)).typer.eval()
    batch = toy_batch()
    logits, embedding = typer.predict_with_embedding(batch)
    np.testing.assert_array_equal(logits, typer.predict(batch))
    weight, bias = (tensor.detach().numpy() for tensor in typer.head.classifier.parameters())
    tokens = batch_tokens(batch, torch.device("cpu"))
    beside = typer.head.beside(*tokens)
    assert (beside is not None) == (kind == "linear")
    of_embedding = logits if beside is None else logits - beside.detach().numpy()
    np.testing.assert_allclose(embedding @ weight.T + bias, of_embedding, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = typer.head.embed(typer.linformer(*tokens), *tokens)
        np.testing.assert_array_equal(logits, typer(*tokens).numpy())
    np.testing.assert_array_equal(embedding, expected.numpy())
    assert embedding.dtype == np.float32


@ONE_OF_EACH
def test_cells_without_tokens_and_batches_without_cells_have_logits(kind: str) -> None:
    typer = toy_model(HeadConfig(kind)).typer
    closed = typer.predict(toy_batch((0, 0)))
    assert np.isfinite(closed).all()
    np.testing.assert_array_equal(closed[0], closed[1])
    assert typer.predict(toy_batch(())).shape == (0, len(LABELS))


@pytest.mark.parametrize("reads", ["none", "gate"])
def test_a_linear_head_is_linear_in_the_direction_of_z_from_the_centre_and_in_the_islands(reads: str) -> None:
    typer = toy_model(HeadConfig("linear", pooled=5, reads=reads)).typer
    head = typer.head
    assert isinstance(head, LinearHead)
    generator = torch.Generator().manual_seed(0)
    centre, bias = torch.randn(5, generator=generator), torch.randn(len(LABELS), generator=generator)
    weight = torch.randn(len(LABELS), 5, generator=generator)
    per_island = torch.randn(head.n_islands, len(LABELS), generator=generator)
    head.take_over(centre, weight, bias, per_island)
    batch = toy_batch()
    z = typer.pooled(batch)
    assert z.shape == (4, 5)
    moved = z.astype(float) - centre.numpy()
    direction = moved / np.sqrt((moved**2).sum(1, keepdims=True))
    idf, rows = head.pool.idf.numpy().astype(float), np.zeros((4, head.n_islands))
    for cell in range(4):
        own = slice(batch.offsets[cell], batch.offsets[cell + 1])
        opened = batch.islands[own][batch.tokens[own] > 0]
        rows[cell, opened] = idf[opened] / max(np.sqrt((idf[opened] ** 2).sum()), 1e-12)
    np.testing.assert_allclose(typer.unit_rows(batch).toarray(), rows, rtol=1e-6)
    of_vectors = direction @ weight.numpy().T + bias.numpy()
    logits, embedding = typer.predict_with_embedding(batch)
    np.testing.assert_allclose(logits, of_vectors + rows @ per_island.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedding, direction, rtol=1e-4, atol=1e-6)
    head.per_island = None
    np.testing.assert_allclose(typer.predict(batch), of_vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_predict_drops_nothing_and_leaves_the_mode_as_it_was(training: bool) -> None:
    typer = toy_model(HeadConfig("pooled", island_dropout=0.9)).typer.train(training)
    np.testing.assert_array_equal(typer.predict(toy_batch()), typer.predict(toy_batch()))
    assert typer.training == training
    assert typer.head.training == training
    broken = Batch(np.arange(1), np.array([0, 1]), np.array([99], np.int32), np.array([1], np.uint8))
    with pytest.raises(IndexError):
        typer.predict(broken)
    assert typer.training == training


def test_tokens_of_a_batch_are_its_arrays_as_whole_numbers() -> None:
    batch = toy_batch()
    tokens, islands, offsets = batch_tokens(batch, torch.device("cpu"))
    assert {tokens.dtype, islands.dtype, offsets.dtype} == {torch.int64}
    assert tokens.tolist() == batch.tokens.tolist()
    assert islands.tolist() == batch.islands.tolist()
    assert offsets.tolist() == batch.offsets.tolist()


def test_the_configured_head_is_built() -> None:
    encoder = toy_model(None).info.encoder
    pooled = build_head(HeadConfig("pooled", pooled=12, island_dropout=0.2), encoder, 20, 3)
    assert isinstance(pooled, PooledHead)
    assert pooled.pool.table.shape == (20, 12)
    assert pooled.pool.island_dropout == 0.2
    sizes = {"cnn": (512, 128), "subtype": (512, 256, 128, 64)}
    for kind, hidden in sizes.items():
        head = build_head(HeadConfig(kind), encoder, 20, 3)
        assert isinstance(head, CnnHead)
        assert tuple(layer.out_features for layer in head.layers) == hidden[1:]
        assert head.table.shape == (20, hidden[0])
    own = build_head(HeadConfig("cnn", hidden=(7,)), encoder, 20, 3)
    assert own.classifier.in_features == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mean"}, "head kind: found 'mean', expected pooled, linear, cnn, subtype"),
        ({"reads": "all"}, r"head reads: found 'all', expected none, gate, gate\+sum"),
        ({"pooled": 0}, "head sizes"),
        ({"hidden": (5, 0)}, "head sizes"),
    ],
)
def test_heads_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadConfig(**values)

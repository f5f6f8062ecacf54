"""Heads as sums over open islands: against the formula in float64, and the head itself on tokens."""

import numpy as np
import pytest
import torch
from model_folders import LABELS, toy_batch, toy_model
from torch import nn

from annatac_scale.model.cell_typer import HeadConfig
from annatac_scale.model.heads import LinearHead, PooledHead
from annatac_scale.model.island_sums import SummedHead, sum_over_islands
from annatac_scale.store.open_islands import OpenIslands

HEADS = [
    HeadConfig("pooled", pooled=5, reads="none"),
    HeadConfig("linear", pooled=5, reads="none"),
    HeadConfig("linear", pooled=5, reads="none", per_island=False),
]
ONE_OF_EACH = pytest.mark.parametrize("config", HEADS, ids=["pooled", "linear", "vector alone"])


def drawn_head(config: HeadConfig) -> PooledHead:
    """A head none of whose weights is as it starts."""
    head = toy_model(config).typer.eval().head
    assert isinstance(head, PooledHead)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        if isinstance(head, LinearHead):
            head.centre.copy_(torch.randn(5, generator=generator))
    return head


def cells(counts: tuple[int, ...] = (5, 0, 20, 1)) -> OpenIslands:
    batch = toy_batch(counts)
    return OpenIslands(batch.offsets, batch.islands, batch.tokens)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def by_formula(head: PooledHead, opened: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and embedding of one cell, written out."""
    idf, table = numbers(head.pool.idf), numbers(head.pool.table)
    weights = {i: idf[i] / np.sqrt(sum(idf[j] ** 2 for j in opened)) for i in opened}
    z = sum((weight * table[i] for i, weight in weights.items()), np.zeros(5))
    norm = head.pool.norm
    z = (z - z.mean()) / np.sqrt(z.var() + norm.eps) * numbers(norm.weight) + numbers(norm.bias)
    if isinstance(head, LinearHead):
        z = (z - numbers(head.centre)) / np.linalg.norm(z - numbers(head.centre))
    logits = numbers(head.classifier.weight) @ z + numbers(head.classifier.bias)
    if isinstance(head, LinearHead) and head.per_island is not None:
        logits = logits + sum((w * numbers(head.per_island)[i] for i, w in weights.items()), np.zeros(3))
    return logits, z


@ONE_OF_EACH
def test_logits_and_embedding_are_those_of_the_formula(config: HeadConfig) -> None:
    head, batch = drawn_head(config), cells()
    logits, embedding = SummedHead(head)(batch)
    assert (logits.dtype, embedding.dtype) == (np.float32, np.float32)
    for cell in range(4):
        opened = batch.islands[batch.offsets[cell] : batch.offsets[cell + 1]].tolist()
        expected = by_formula(head, opened)
        np.testing.assert_allclose(logits[cell], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(embedding[cell], expected[1], rtol=1e-4, atol=1e-5)


@ONE_OF_EACH
def test_it_says_what_the_head_says_of_tokens(config: HeadConfig) -> None:
    model = toy_model(config)
    logits, embedding = SummedHead(model.typer.head)(cells())
    expected = model.typer.predict_with_embedding(toy_batch())
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedding, expected[1], rtol=1e-4, atol=1e-5)


@ONE_OF_EACH
def test_what_is_said_of_a_cell_does_not_depend_on_the_cells_beside_it(config: HeadConfig) -> None:
    summed, batch = SummedHead(drawn_head(config)), cells()
    together = summed(batch)
    for cell in range(4):
        for found, expected in zip(summed(batch[cell : cell + 1]), together, strict=True):
            np.testing.assert_allclose(found[0], expected[cell], rtol=1e-6, atol=1e-6)


@ONE_OF_EACH
def test_closed_cells_and_none_at_all_have_logits(config: HeadConfig) -> None:
    summed = SummedHead(drawn_head(config))
    logits, _ = summed(cells((0, 0)))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[0], logits[1])
    logits, embedding = summed(cells(()))
    assert (logits.shape, embedding.shape) == ((0, len(LABELS)), (0, 5))


@ONE_OF_EACH
def test_a_head_of_half_precision_is_summed_in_full(config: HeadConfig) -> None:
    head = drawn_head(config)
    for found, expected in zip(
        SummedHead(head.bfloat16())(cells()), SummedHead(head.float())(cells()), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("config", [HeadConfig("linear", reads="gate"), HeadConfig("cnn")])
def test_a_head_that_reads_the_encoder_is_refused(config: HeadConfig) -> None:
    head = toy_model(config).typer.head
    assert not SummedHead.can_be(head)
    with pytest.raises(ValueError, match="reads the encoder"):
        SummedHead(head)


def test_islands_beyond_the_table_are_an_error() -> None:
    beyond = OpenIslands(np.array([0, 1]), np.array([20], np.int32), np.array([1], np.uint8))
    with pytest.raises((IndexError, RuntimeError)):
        sum_over_islands(nn.Linear(3, 20).weight.detach(), beyond)

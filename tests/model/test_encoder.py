import numpy as np
import pytest
import torch
from model_folders import randomise, toy_batch, toy_model

from annatac_scale.errors import ModelError
from annatac_scale.model.cell_typer import HeadConfig
from annatac_scale.model.encoder import Encoder, batch_tokens
from annatac_scale.model.pool import IslandPool
from annatac_scale.stream.batch import Batch

COUNTS = (5, 0, 20, 1)


def encoder_with(reads: str | None, attend: str = "open") -> Encoder:
    encoder = toy_model(None, attend=attend).encoder
    if reads is not None:
        encoder.pool = IslandPool(20, 8, 6, reads=reads)
    randomise(encoder)
    return encoder.eval()


def with_closed_and_masked(batch: Batch) -> Batch:
    """The batch with tokens for all 20 islands, and every third of the open ones hidden."""
    tokens = batch.tokens.copy()
    tokens[::3] = 6
    hidden = Batch(batch.cell_ids, batch.offsets, batch.islands, tokens)
    return hidden.with_closed([np.arange(20, dtype=np.int32)], np.zeros(len(batch), np.int64))


@pytest.mark.parametrize("attend", ["open", "all"])
def test_states_are_the_linformers_at_the_open_islands(attend: str) -> None:
    encoder = encoder_with("gate", attend)
    batch = toy_batch(COUNTS) if attend == "open" else with_closed_and_masked(toy_batch(COUNTS))
    hidden, embedding = encoder(batch)
    opened = (batch.tokens > 0) & (batch.tokens < 6)
    tokens = batch_tokens(batch, torch.device("cpu"))
    expected = encoder.linformer(*tokens)[torch.from_numpy(opened)]
    torch.testing.assert_close(hidden, expected)
    assert embedding.shape == (4, 6)
    torch.testing.assert_close(embedding, encoder.pool(encoder.linformer(*tokens), *tokens))


def test_without_a_pooled_layer_the_embedding_is_the_mean_state() -> None:
    hidden, embedding = encoder_with(None)(toy_batch(COUNTS))
    assert embedding.shape == (4, 8)
    start = 0
    for cell, count in enumerate(COUNTS):
        mean = hidden[start : start + count].mean(0) if count else torch.zeros(8)
        torch.testing.assert_close(embedding[cell], mean)
        start += count


def test_a_linformer_that_was_not_trained_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_with("none")
    assert encoder(toy_batch(COUNTS)).hidden.shape == (26, 8)
    encoder.linformer_trained = False
    monkeypatch.setattr(encoder.linformer, "forward", None)
    hidden, embedding = encoder(toy_batch(COUNTS))
    assert hidden is None
    assert embedding.shape == (4, 6)


def test_gradients_reach_every_part_that_is_read() -> None:
    encoder = encoder_with("gate+sum").train()
    encoder(toy_batch(COUNTS)).embedding.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.pool.sum.weight.grad.any()
    assert encoder.linformer.projection.grad.any()


def test_a_batch_without_closed_tokens_is_refused_where_all_islands_are_attended_to() -> None:
    encoder = encoder_with("gate", "all")
    with pytest.raises(ModelError, match=r"lists none that is closed; .* model.lister\(store\)"):
        encoder(toy_batch(COUNTS))
    assert len(encoder(toy_batch(())).embedding) == 0


def test_loops_that_drop_gradients_between_forward_and_backward_train() -> None:
    encoder = encoder_with("gate+sum").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    for _ in range(3):
        loss = encoder(toy_batch(COUNTS)).embedding.square().sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        assert not any(p.grad.is_sparse for p in encoder.parameters())


def test_a_fine_tuned_model_gives_the_embedding_that_its_logits_are_linear_in() -> None:
    model = toy_model(HeadConfig("pooled", pooled=6))
    model.typer.eval()
    embedding = model.encoder(toy_batch(COUNTS)).embedding
    logits = model.typer.head.classifier(embedding)
    np.testing.assert_allclose(model.typer.predict(toy_batch(COUNTS)), logits.detach().numpy(), rtol=1e-5)


def test_a_batch_without_cells_has_no_states_and_no_embeddings() -> None:
    for reads in (None, "none", "gate"):
        assert len(encoder_with(reads)(toy_batch(())).embedding) == 0

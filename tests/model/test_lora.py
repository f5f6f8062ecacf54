import copy

import pytest
import torch

from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.lora import PROJECTIONS, add_adapters, merge_adapters

CONFIG = EncoderConfig(
    width=12, layers=2, heads=2, head_dim=5, k=4, ff=16, attend="open", norm="pre", positions="frozen"
)
BATCH = (
    torch.tensor([1, 5, 2, 3, 3]),
    torch.tensor([0, 7, 9, 2, 8]),
    torch.tensor([0, 3, 5]),
)


def linformer(dtype=torch.float64):
    torch.manual_seed(0)
    return Linformer(CONFIG, 10, torch.randn(10, 12)).to(dtype)


def adapted(rank=3):
    made = linformer()
    add_adapters(made, rank)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return made


def test_adapters_start_as_the_model_was():
    plain, made = linformer(), linformer()
    add_adapters(made, 4)
    assert torch.equal(made(*BATCH), plain(*BATCH))


def test_merged_the_model_is_the_adapted_one_and_has_the_tensors_of_any_other():
    made = adapted()
    expected = made(*BATCH)
    assert not torch.allclose(expected, linformer()(*BATCH))
    merge_adapters(made)
    torch.testing.assert_close(made(*BATCH), expected, rtol=1e-12, atol=1e-12)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in linformer().state_dict().items()
    }
    again = Linformer(CONFIG, 10).double()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(*BATCH), made(*BATCH))


def test_a_merged_weight_is_the_weight_and_the_product_of_its_adapter():
    made = adapted(rank=2)
    attention = made.layers[1].attention
    adapter = attention.value.parametrizations.weight[0]
    expected = linformer().layers[1].attention.value.weight + adapter.outer @ adapter.inner
    assert torch.linalg.matrix_rank(adapter.outer @ adapter.inner) == 2
    merge_adapters(made)
    torch.testing.assert_close(made.layers[1].attention.value.weight, expected)


def test_adapters_alone_are_trained():
    made = linformer()
    before = copy.deepcopy(made.state_dict())
    add_adapters(made, 3)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * CONFIG.layers * len(PROJECTIONS)
    assert {min(parameter.shape) for parameter in trained} == {3}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        made(*BATCH).square().sum().backward()
        optimizer.step()
    merge_adapters(made)
    changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"layers.{n}.attention.{name}.weight" for n in range(2) for name in PROJECTIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_have_the_numbers_of_the_weights(dtype):
    made = linformer(dtype)
    add_adapters(made, 2)
    assert made(*BATCH).dtype == dtype


def test_a_model_without_adapters_is_merged_already():
    made = linformer()
    merge_adapters(made)
    assert torch.equal(made(*BATCH), linformer()(*BATCH))

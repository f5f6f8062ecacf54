"""Which head a model is fine-tuned with; by how many cells train: test_linear_head.py."""

import pytest
from planted import small_pretraining

from annatac_scale import api
from annatac_scale.model.folder import read_model
from annatac_scale.train.pretrain import pretrain


@pytest.mark.parametrize(
    ("asked", "head", "expected"),
    [
        ({"objective": "vector", "reads": "none", "pooled": 6}, None, ("linear", 6, "none")),
        ({"objective": "vector", "reads": "gate+sum", "pooled": 7}, None, ("linear", 7, "gate+sum")),
        ({"objective": "vector", "reads": "gate+sum", "pooled": 7}, "pooled", ("pooled", 7, "gate+sum")),
        ({"objective": "open"}, None, ("linear", 64, "none")),
        ({"objective": "open"}, "pooled", ("pooled", 64, "gate")),
    ],
    ids=str,
)
def test_a_head_takes_over_what_the_model_has_whatever_its_preset(atlas, tmp_path, asked, head, expected):
    model = pretrain(atlas, tmp_path / "pre", small_pretraining(1, mask_fraction=0.5, **asked)).model
    how = {"labels": "cell_type", "head": head, "epochs": None if head is None else 1}
    report = api.finetune(atlas.path, model=model, out=tmp_path / "run", **how)
    made = read_model(report.model).info.head
    assert (made.kind, made.pooled, made.reads) == expected
    again = api.finetune(atlas.path, model=report.model, out=tmp_path / "again", **how)
    assert read_model(again.model).info.head == made

import math

import numpy as np
import pytest

from annatac_scale.annotate.confidence import NOVEL, name_novel
from annatac_scale.errors import ConfigError


def test_cells_below_the_threshold_are_named_novel() -> None:
    best, confidence = np.array(["B", "T", "B", "Mono"]), np.array([0.49999, 0.5, 0.9, 0.0])
    assert name_novel(best, confidence, 0.5).tolist() == [NOVEL, "T", "B", NOVEL]
    assert name_novel(best.tolist(), confidence, 1.0).tolist() == [NOVEL] * 4
    assert best.tolist() == ["B", "T", "B", "Mono"]


def test_a_threshold_of_0_names_no_cell_novel() -> None:
    assert name_novel(np.array(["B", "T"], object), np.array([0.0, 1.0]), 0).tolist() == ["B", "T"]
    assert name_novel([], [], 0.5).tolist() == []


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="novel threshold: found"):
        name_novel(["B"], [0.5], threshold)

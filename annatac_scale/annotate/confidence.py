"""Which cells a model does not know: the rule that names novel cells."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annatac_scale.errors import ConfigError

NOVEL = "Novel_cell_type"


def name_novel(best: ArrayLike, confidence: ArrayLike, threshold: float) -> NDArray[np.object_]:
    """The best type of each cell, or NOVEL where its confidence is below the threshold: annATAC's rule.

    best: str [n]; confidence: float [n], the largest probability; threshold: 0 to 1, where 0 leaves every
    best type as it is. Returns object [n]. Raises ConfigError for another threshold.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"novel threshold: found {threshold}; expected a probability from 0 to 1; 0 names no cell novel"
        )
    labels = np.array(best, object)
    labels[np.asarray(confidence) < threshold] = NOVEL
    return labels

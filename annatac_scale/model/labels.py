"""Labels as text: one reading of a column of cell types, for training and for evaluation."""

from collections.abc import Hashable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


def label_texts(labels: ArrayLike) -> NDArray[np.object_]:
    """Labels as text without surrounding blanks, object [n]; "" where one is missing (None, NaN, blank).

    Whole numbers read back as floats, from a column with gaps, are whole numbers again: 3.0 is the label 3.
    """
    codes, values = pd.factorize(pd.Series(labels))
    # A missing value has the code -1 and so takes the last text.
    return np.array([*map(_text, values), ""], object)[codes]


def _text(value: Hashable) -> str:
    whole = isinstance(value, float | np.floating) and value.is_integer()
    return (f"{value:.0f}" if whole else str(value)).strip()

"""Labels as text: one reading of a column of cell types, for training, for evaluation and for files about labels."""

import unicodedata
from collections.abc import Hashable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annatac_scale.ingest.tables import MISSING

_MISSING = frozenset({*MISSING, "<NA>", "None"})
"""Missing values as tables write them, and as pandas turns them into text: no cell type is called so."""

NOVEL = "Novel_cell_type"
LOW_DEPTH = "Unassigned_low_depth"
"""Label of a cell with too few open islands to say anything of: an abstention, not a type."""
OWN_LABELS = (NOVEL, LOW_DEPTH)
"""Labels that prediction gives to cells of no known type, so that no type of a model can be called so."""


def label_texts(labels: ArrayLike) -> NDArray[np.object_]:
    """Labels as text, object [n]; "" where one is missing.

    Missing are None, NaN, NA and blanks, and the texts that stand for them: NA, NaN, nan, <NA>, None. Other texts lose
    the blanks around them and are composed (NFC), so that labels which look alike are alike. Whole numbers read back
    as floats, from a column with gaps, are whole numbers again: 3.0 is the label 3, also as the text that such a
    column becomes in a file. Texts that write a number in another way, as 1e1, 03 or 3.00, stay what they are. Bytes
    are UTF-8.
    """
    values = pd.Series(labels)
    if values.dtype == object and pd.api.types.infer_dtype(values) != "string":
        # Python takes True for 1, and pandas would make one value of them.
        values = values.map(lambda value: str(value) if isinstance(value, bool | np.bool_) else value)
    codes, found = pd.factorize(values)
    # A missing value has the code -1 and so takes the last text.
    return np.array([*map(label_text, found), ""], object)[codes]


def label_text(value: Hashable) -> str:
    """One label as ``label_texts`` writes it; ``value`` is not None, NaN or NA."""
    if isinstance(value, float | np.floating) and value.is_integer():
        return _whole(value)
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    text = unicodedata.normalize("NFC", text).strip()
    if text in _MISSING:
        return ""
    try:
        number = float(text)
    except ValueError:
        return text
    return _whole(number) if number.is_integer() and str(number) == text else text


def _whole(number: float | np.floating) -> str:
    return f"{number + 0.0:.0f}"  # which makes -0.0 the 0


def in_table(label: str) -> str:
    """A label as one field of a table in Markdown."""
    return " ".join(label.split()).replace("|", "\\|")

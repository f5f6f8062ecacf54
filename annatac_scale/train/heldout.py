"""What a fine-tuning says of labelled cells that its fit did not see; written as heldout.parquet.

Those are the val, calib and test cells, and, where a linear head has no val cells, training cells ("train"), each as
judged by a fit that left it out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from annatac_scale.store.store import IslandStore
from annatac_scale.train.confusions import confusion_table, confusions_of, per_type_figures
from annatac_scale.train.splits import LabelledCells

HELDOUT_FILE = "heldout.parquet"
"""Name of the file, in the folder of a fine-tuning run."""
HELDOUT_SPLITS = ("val", "calib", "test")
CLASSES = b"classes"
"""Key of the schema metadata that holds, as JSON, the cell types in the order of ``probabilities``."""

Ints = NDArray[np.int64]


def write_heldout(
    path: Path,
    store: IslandStore,
    labelled: LabelledCells,
    told: Mapping[str, tuple[Ints, NDArray[np.floating]]],
) -> None:
    """Write sample, barcode, split, truth, best, confidence and probabilities of cells.

    told: cells, int64 [n] ids, and their probabilities, float [n, types], by split
    truth may be a type that the model does not know, best never is.
    """
    obs = store.obs([])
    parts = [
        _table(obs.iloc[cells], split, labelled, labelled.codes_of(cells), chances)
        for split, (cells, chances) in told.items()
    ]
    table = pa.concat_tables(parts).replace_schema_metadata({CLASSES: json.dumps(labelled.types)})
    aside = path.with_name(f".{path.name}.part")
    pq.write_table(table, aside)
    aside.replace(path)


def _table(
    obs: pd.DataFrame, split: str, labelled: LabelledCells, codes: Ints, chances: NDArray[np.floating]
) -> pa.Table:
    rounded = chances.astype(np.float32)
    n = len(rounded)
    return pa.table(
        {
            "sample": pa.array(obs["sample"].astype(str), pa.string()),
            "barcode": pa.array(obs["barcode"].astype(str), pa.string()),
            "split": pa.array([split] * n, pa.string()),
            "truth": pa.array(labelled.names_of(codes), pa.string()),
            "best": pa.array(labelled.names_of(chances.argmax(axis=1)), pa.string()),
            "confidence": rounded.max(axis=1, initial=0),
            "probabilities": pa.FixedSizeListArray.from_arrays(rounded.ravel(), len(labelled.types)),
        }
    )


def facts_of_test(labelled: LabelledCells, scores: NDArray[np.floating], codes: Ints) -> dict[str, Any]:
    """What the test cells tell of each type and of confusions, for the model card; empty without any.

    scores: [n, types], the largest of the best type; codes: the true types, as in ``labelled``
    """
    if not len(codes):
        return {"test_types": [], "confusions": []}
    confusion = confusion_table(labelled.names_of(codes), labelled.names_of(scores.argmax(axis=1)))
    return {
        "test_types": per_type_figures(confusion).to_dict("records"),
        "confusions": confusions_of(confusion).sentences,
    }

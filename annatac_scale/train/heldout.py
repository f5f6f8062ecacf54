"""What a fine-tuned model says of the labelled cells that it was not trained on; written as heldout.parquet."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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


def write_heldout(
    path: Path,
    store: IslandStore,
    labelled: LabelledCells,
    probabilities: Mapping[str, NDArray[np.floating]],
) -> None:
    """Write sample, barcode, split, truth, best, confidence and probabilities of the cells that did not train.

    probabilities: float [n, types] of each of HELDOUT_SPLITS, in order of the ids of its cells
    truth may be a type that the model does not know, best never is.
    """
    obs = store.obs([])
    parts = [
        _table(obs.iloc[labelled.of(split)], split, labelled, probabilities[split])
        for split in HELDOUT_SPLITS
    ]
    table = pa.concat_tables(parts).replace_schema_metadata({CLASSES: json.dumps(labelled.types)})
    aside = path.with_name(f".{path.name}.part")
    pq.write_table(table, aside)
    aside.replace(path)


def _table(obs: Any, split: str, labelled: LabelledCells, chances: NDArray[np.floating]) -> pa.Table:
    rounded = chances.astype(np.float32)
    n = len(rounded)
    return pa.table(
        {
            "sample": pa.array(obs["sample"].astype(str), pa.string()),
            "barcode": pa.array(obs["barcode"].astype(str), pa.string()),
            "split": pa.array([split] * n, pa.string()),
            "truth": pa.array(labelled.names_of(labelled.codes_of(labelled.of(split))), pa.string()),
            "best": pa.array(labelled.names_of(chances.argmax(axis=1)), pa.string()),
            "confidence": rounded.max(axis=1, initial=0),
            "probabilities": pa.FixedSizeListArray.from_arrays(rounded.ravel(), len(labelled.types)),
        }
    )


def facts_of_test(
    labelled: LabelledCells, logits: NDArray[np.float32], codes: NDArray[np.int64]
) -> dict[str, Any]:
    """What the test cells tell of each type and of confusions, for the model card; empty without any.

    logits: [n, types]; codes: the true types, as in ``labelled``
    """
    if not len(codes):
        return {"test_types": [], "confusions": []}
    confusion = confusion_table(labelled.names_of(codes), labelled.names_of(logits.argmax(axis=1)))
    return {
        "test_types": per_type_figures(confusion).to_dict("records"),
        "confusions": confusions_of(confusion).sentences,
    }

"""The columns of the labels data set, and how the logits of some cells become rows of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.annotate.confidence import name_novel
from annatac_scale.model.calibration import probabilities
from annatac_scale.model.hierarchy import DEFAULT_THRESHOLD, Hierarchy, check_threshold


@dataclass(frozen=True)
class LabelRule:
    """How logits become labels.

    classes: cell types in the order of the logits; temperature: that they are divided by; novel_threshold: confidence
    below which a cell is Novel_cell_type; hierarchy: what lies above the classes, hierarchy_threshold: the probability
    that a lineage needs. Raises ConfigError for a threshold that is not from 0 to 1.
    """

    classes: tuple[str, ...]
    temperature: float
    novel_threshold: float
    hierarchy: Hierarchy | None = None
    hierarchy_threshold: float = DEFAULT_THRESHOLD

    def __post_init__(self) -> None:
        name_novel([], [], self.novel_threshold)
        check_threshold(self.hierarchy_threshold)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table.

        sample, barcode: which cell
        best: the type with the highest probability; label: the same, or Novel_cell_type; confidence: its probability
        second, second_confidence: the next type, null where the model knows but one
        probabilities: of all classes, in their order
        n_open: open islands of the cell that the model has a token for
        split: train, val, calib or test in the model's fine-tuning, null for a cell that was not in it
        lineage, lineage_confidence: the deepest node of the hierarchy that is likely enough, and its probability, null
        where none is; these columns are there where the model has a hierarchy
        """
        lineage = {"lineage": pa.string(), "lineage_confidence": pa.float32()}
        return pa.schema(
            {
                "sample": pa.string(),
                "barcode": pa.string(),
                "best": pa.string(),
                "label": pa.string(),
                "confidence": pa.float32(),
                "second": pa.string(),
                "second_confidence": pa.float32(),
                "probabilities": pa.list_(pa.float32(), len(self.classes)),
                "n_open": pa.int32(),
                "split": pa.string(),
                **({} if self.hierarchy is None else lineage),
            }
        )

    def table(
        self,
        sample: str,
        barcodes: NDArray[np.object_],
        logits: NDArray[np.float32],
        n_open: NDArray[np.int64],
        split: NDArray[np.object_],
    ) -> pa.Table:
        """The rows of ``n`` cells of a sample.

        barcodes: str [n]; logits: float32 [n, C]; n_open: [n]; split: str or None [n]. Of equal logits the class that
        comes first is the better one. Raises ModelError for logits that are not finite.
        """
        # Rounded first, so that all columns agree with the probabilities that are written.
        chances = probabilities(logits, self.temperature).astype(np.float32)
        order = np.argsort(-logits, axis=1, kind="stable")
        names = np.array(self.classes, object)
        ranked = np.take_along_axis(chances, order, axis=1)
        best, confidence = names[order[:, 0]], ranked[:, 0]
        one_class = len(self.classes) == 1
        columns = {
            "sample": pa.repeat(pa.scalar(sample), len(barcodes)),
            "barcode": barcodes,
            "best": best,
            "label": name_novel(best, confidence.astype(np.float64), self.novel_threshold),
            "confidence": confidence,
            "second": pa.nulls(len(barcodes)) if one_class else names[order[:, 1]],
            "second_confidence": pa.nulls(len(barcodes)) if one_class else ranked[:, 1],
            "probabilities": pa.FixedSizeListArray.from_arrays(chances.ravel(), len(self.classes)),
            "n_open": n_open,
            "split": split,
            **self._lineage(chances),
        }
        return pa.table(columns, schema=self.schema)

    def _lineage(self, chances: NDArray[np.float32]) -> dict[str, Any]:
        if self.hierarchy is None:
            return {}
        names, found = self.hierarchy.deepest(chances, self.hierarchy_threshold)
        none = names == ""
        names[none] = None
        return {"lineage": names, "lineage_confidence": pa.array(found, mask=none)}

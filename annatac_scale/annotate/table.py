"""The columns of the labels data set, and how what the model says of some cells becomes rows of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.annotate.confidence import ConfidenceRule, named
from annatac_scale.model.calibration import Scaling
from annatac_scale.model.conformal import exceeds, p_values, set_thresholds
from annatac_scale.model.hierarchy import DEFAULT_THRESHOLD, Hierarchy, check_threshold
from annatac_scale.model.novelty import KnownCells, Outputs, plain_score

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LabelRule:
    """How what the model says becomes labels.

    classes: cell types in the order of the logits; scaling: of the logits; rule: what is asked for
    known: what the model keeps of its known cells, if it does
    hierarchy: what lies above the classes; hierarchy_threshold: the probability that a lineage needs
    probabilities: whether those of all classes are a column

    Raises ConfigError for a hierarchy threshold that is not from 0 to 1.
    """

    classes: tuple[str, ...]
    scaling: Scaling
    rule: ConfidenceRule
    known: KnownCells | None
    hierarchy: Hierarchy | None = None
    hierarchy_threshold: float = DEFAULT_THRESHOLD
    probabilities: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.hierarchy_threshold)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table.

        sample, barcode: which cell
        best: the type with the highest probability; label: the same, or Novel_cell_type, or Unassigned_low_depth;
            confidence: its probability
        second, second_confidence: the next type, null where the model knows but one
        novel: whether the rule calls the cell novel; novelty_score: the larger, the more novel; novelty_p: its
            conformal p-value, the share of known cells, none of low depth, that score as high, null where the model
            has no calib cells
        set, set_size: the prediction set, the likeliest first, and its types; null where the model has no calib cells
        probabilities: of all classes, in their order; where they are asked for
        n_open: open islands of the cell that the model has a token for
        split: train, val, calib or test in the model's fine-tuning, null for a cell that was not in it
        lineage, lineage_confidence: the deepest node of the hierarchy that is likely enough, and its probability, null
        where none is; these columns are there where the model has a hierarchy
        """
        every = {"probabilities": pa.list_(pa.float32(), len(self.classes))}
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
                "novel": pa.bool_(),
                "novelty_score": pa.float32(),
                "novelty_p": pa.float32(),
                "set": pa.list_(pa.string()),
                "set_size": pa.int32(),
                **(every if self.probabilities else {}),
                "n_open": pa.int32(),
                "split": pa.string(),
                **({} if self.hierarchy is None else lineage),
            }
        )

    def novelty_scores(self, outputs: Outputs) -> Floats:
        """The rule's novelty score of n cells, float32 [n]."""
        chances = self._chances(outputs)
        if self.known is None:
            return plain_score(self.rule.novelty, outputs, chances, self.scaling.temperature)
        return self.known.score(self.rule.novelty, outputs, chances, self.scaling.temperature)

    def table(
        self,
        sample: str,
        barcodes: pa.StringArray,
        outputs: Outputs,
        split: NDArray[np.object_],
        shift: float = 0.0,
    ) -> pa.Table:
        """The rows of ``n`` cells of a sample.

        barcodes: [n]; split: str or None [n]; shift: to take off the novelty scores. Of equally likely classes the
        one that comes first is the better one. Raises ModelError for logits that are not finite.
        """
        n, one_class = len(barcodes), len(self.classes) == 1
        chances = self._chances(outputs)
        order = np.argsort(-self.scaling.scaled(outputs.logits), axis=1, kind="stable")
        names = np.array(self.classes, object)
        ranked = np.take_along_axis(chances, order, axis=1)
        best, confidence = names[order[:, 0]], ranked[:, 0]
        scores = self.novelty_scores(outputs) - np.float32(shift)
        low_depth = outputs.n_open < self.rule.min_open
        novel = self._novel(confidence, scores) & ~low_depth
        sets, sizes = self._sets(chances, order, names)
        columns = {
            "sample": pa.repeat(pa.scalar(sample), n),
            "barcode": barcodes,
            "best": best,
            "label": named(best, novel, low_depth),
            "confidence": confidence,
            "second": pa.nulls(n) if one_class else names[order[:, 1]],
            "second_confidence": pa.nulls(n) if one_class else ranked[:, 1],
            "novel": novel,
            "novelty_score": scores,
            "novelty_p": pa.nulls(n) if self._limits is None else p_values(scores, self._limits),
            "set": sets,
            "set_size": sizes,
            **self._every(chances),
            "n_open": outputs.n_open,
            "split": split,
            **self._lineage(chances),
        }
        return pa.table(columns, schema=self.schema)

    def _every(self, chances: Floats) -> dict[str, Any]:
        if not self.probabilities:
            return {}
        return {"probabilities": pa.FixedSizeListArray.from_arrays(chances.ravel(), len(self.classes))}

    def _lineage(self, chances: NDArray[np.float32]) -> dict[str, Any]:
        if self.hierarchy is None:
            return {}
        names, found = self.hierarchy.deepest(chances, self.hierarchy_threshold)
        none = names == ""
        names[none] = None
        return {"lineage": names, "lineage_confidence": pa.array(found, mask=none)}

    def _chances(self, outputs: Outputs) -> Floats:
        # Rounded first, so that all columns agree with the probabilities that are written.
        return self.scaling.probabilities(outputs.logits).astype(np.float32)

    @cached_property
    def calib(self) -> KnownCells | None:
        """The known cells with those calib cells that are not of low depth; None where the model has no calib cells.

        Limits of shallow cells, which are mostly less sure, would be too wide for the cells that get a label.
        """
        if self.known is None or not self.known.n_calib:
            return None
        return self.known.of_depth(self.rule.min_open)

    @cached_property
    def _limits(self) -> Floats | None:
        """The calib cells' scores, increasing."""
        return None if self.calib is None else np.sort(self.calib.scores[self.rule.novelty])

    @cached_property
    def _thresholds(self) -> Floats | None:
        """Probability from which each class is in the set."""
        if self.calib is None or self.rule.coverage is None:
            return None
        calib, per_class = self.calib, self.rule.coverage_per_class
        return set_thresholds(
            calib.chances, calib.codes, len(self.classes), self.rule.coverage, per_class=per_class
        )

    def _novel(self, confidence: Floats, scores: Floats) -> NDArray[np.bool_]:
        if self.rule.novel_threshold is not None:
            below: NDArray[np.bool_] = confidence.astype(np.float64) < self.rule.novel_threshold
            return below
        assert self._limits is not None  # as ConfidenceRule.of makes sure
        assert self.rule.novel_rate is not None
        return exceeds(scores, self._limits, self.rule.novel_rate)

    def _sets(
        self, chances: Floats, order: NDArray[np.int64], names: NDArray[np.object_]
    ) -> tuple[pa.Array, pa.Array]:
        if self._thresholds is None:
            return pa.nulls(len(chances), pa.list_(pa.string())), pa.nulls(len(chances), pa.int32())
        inside = np.take_along_axis(chances >= self._thresholds, order, axis=1)
        sizes = inside.sum(axis=1)
        offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(sizes, dtype=np.int32)])
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(names[order][inside], pa.string())
        ), pa.array(sizes.astype(np.int32))

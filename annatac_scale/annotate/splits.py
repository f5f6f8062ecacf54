"""Which part of fine-tuning a cell was in: split.parquet, which ``finetune`` writes beside its model folder.

Columns sample, barcode, split (train, val, calib or test). The schema metadata key ``store_digests`` holds, as JSON,
the x_sha256 of each sample as it was in fine-tuning: the split is said of those very cells and of no others.
"""

import hashlib
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from annatac_scale.errors import ModelError
from annatac_scale.store.place import Location, joined, parent_of, place_of
from annatac_scale.store.store import Sample
from annatac_scale.train.splits import SPLIT_FILE, STORE_DIGESTS


class Splits:
    """The split of a model's fine-tuning; one without a file knows no cell."""

    def __init__(self, file: Location = "", data: bytes | None = None) -> None:
        self._file = file
        self.sha256 = ""
        self._digests: dict[str, str] = {}
        if data is None:
            return
        try:
            self.sha256 = hashlib.sha256(data).hexdigest()
            self._table = pq.read_table(pa.BufferReader(data), columns=["sample", "barcode", "split"])
            self._digests = json.loads(self._table.schema.metadata[STORE_DIGESTS])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file}: cannot be read ({error!r}); expected the split that `annatac finetune` wrote beside the "
                "model; fetch it again, or delete it to predict without"
            ) from error

    @classmethod
    def beside(cls, model: Location | None) -> "Splits":
        """The split beside a model folder, if there is one.

        Raises ModelError where the file is damaged, StoreError where it is there and is not given.
        """
        folder = None if model is None else parent_of(model)
        if folder is None:
            return cls()
        try:
            return cls(joined(folder, SPLIT_FILE), place_of(folder).read(SPLIT_FILE))
        except FileNotFoundError:
            return cls()

    def of(self, sample: Sample, barcodes: pa.StringArray) -> NDArray[np.object_]:
        """The split of a sample's cells, object [n], None for a cell that was not in the fine-tuning."""
        if self._digests.get(sample.name) != sample.x_sha256:
            return np.full(len(barcodes), None, object)
        rows = self._table.filter(pc.equal(self._table["sample"], sample.name))
        split = pd.Series(rows["split"].to_pylist(), rows["barcode"].to_pylist(), object)
        if not split.index.is_unique:
            twice = split.index[split.index.duplicated()][0]
            raise ModelError(
                f"{self._file}: sample {sample.name!r} has cell {twice!r} twice; run finetune again"
            )
        found = split.reindex(barcodes.to_numpy(zero_copy_only=False)).to_numpy(object)
        found[pd.isna(found)] = None
        return found

"""Which islands of a cell become tokens: its open ones, or all that its sample measures."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.vocabulary import Vocabulary


class TokenLister:
    """Lists the tokens that an encoder attends to.

    attend: "open" leaves batches as they are; "all" adds a closed token for every other measured island
    measured: for each sample in the store's order the vocabulary's islands that it measures: int32, increasing; of a
        Projection where the store has other islands; None takes those of the vocabulary's own space

    Raises ModelError, where ``measured`` is None, for a store of other islands than the vocabulary's.
    """

    def __init__(
        self,
        store: IslandStore,
        vocabulary: Vocabulary,
        attend: str,
        measured: Sequence[NDArray[np.int32]] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.measured = vocabulary.measured(store) if measured is None else measured
        self.first_cells = np.array([s.first_cell for s in store.samples.values()], np.int64)
        self._attend = attend

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the tokens to attend to."""
        if self._attend == "open":
            return batch
        sample_of_cell = np.searchsorted(self.first_cells, batch.cell_ids, side="right") - 1
        return batch.with_closed(self.measured, sample_of_cell)

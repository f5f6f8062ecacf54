"""The stream as a torch dataset."""

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import BatchStream


class IslandStream(BatchStream, IterableDataset[Batch]):
    """BatchStream as a torch ``IterableDataset``: for a loop of one's own, or a DataLoader with ``batch_size=None``.

    The stream reads ahead in threads of its own and needs no workers. With N workers, worker ``i`` makes batches ``i``,
    ``i + N``, ...: they come in the same order, but each worker reads all of the rank's cells, and where they are in
    the epoch this object does not know: the state to keep is ``{**stream.state_dict(), "step": batches seen}``.
    """

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        share, shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self._each(self._batch, share, shares)

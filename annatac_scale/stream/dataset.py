"""The stream as a torch dataset."""

from collections.abc import Generator

from torch.utils.data import IterableDataset, get_worker_info

from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import BatchStream


class IslandStream(BatchStream, IterableDataset[Batch]):
    """BatchStream as a torch ``IterableDataset``: for a loop of one's own, or a DataLoader with ``batch_size=None``.

    The stream reads ahead in threads of its own and needs no workers. With N workers, worker ``i`` makes batches ``i``,
    ``i + N``, ...: they come in the same order, but each worker reads all of the rank's cells. Workers have copies of
    the stream, so this object does not know where they are, nor do they see what is called here once they have started:

    - a state to keep is ``{**stream.state_dict(), "step": step}``, step: batches seen since the start of the epoch
    - call ``set_epoch`` before each pass; workers that stay (``persistent_workers``) go on to the next epoch instead,
      also after a pass that was broken off
    """

    _in_epoch = False
    """In a worker: whether a pass was begun and not ended."""

    def __iter__(self) -> Generator[Batch, None, None]:
        worker = get_worker_info()
        if worker is None:
            return super().__iter__()
        return self._of_worker(worker.id, worker.num_workers)

    def _of_worker(self, worker: int, n_workers: int) -> Generator[Batch, None, None]:
        if self._in_epoch:
            # Its batches may have been made but never seen, and other workers may be elsewhere.
            self.set_epoch(self._epoch + 1)
        self._in_epoch = True
        yield from self._each(self._batch, worker, n_workers)
        self._in_epoch = False

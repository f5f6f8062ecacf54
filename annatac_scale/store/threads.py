"""Work done by threads, its results taken in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(works: Iterable[Callable[[], Result]], workers: int) -> Iterator[Result]:
    """The results of ``works``, done by threads, in their order; at most 4 a thread are begun and not taken.

    A work may wait for one before it: they are begun in their order.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for work in works:
                waiting.append(threads.submit(work))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

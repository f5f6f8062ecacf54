"""Parts of a prediction in this process: a few at work, so that one is read and one written while one is computed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from annatac_scale.annotate.labels import LabelsFolder, Part
from annatac_scale.annotate.predictor import IN_FLIGHT, Predictor, StoppedError, one_thread_an_operation


def run_here(
    predictor: Predictor, folder: LabelsFolder, parts: Iterable[Part], done: Callable[[Part], None]
) -> None:
    """Do all parts. done: is told each part that is written, by this thread

    Raises what the first part that failed raised; the others that are at work are left.
    """
    with one_thread_an_operation(), ThreadPoolExecutor(IN_FLIGHT, "parts") as pool:
        try:
            for part in _bounded(pool, lambda part: predictor.run(part, folder), parts):
                done(part)
        except BaseException:
            predictor.stop()
            raise


def _bounded(pool: ThreadPoolExecutor, run: Callable[[Part], None], parts: Iterable[Part]) -> Iterator[Part]:
    """Run parts, IN_FLIGHT at a time, and yield each that is done. Raises what one raised."""
    left, at_work = iter(parts), dict[Future[None], Part]()
    while True:
        while len(at_work) < IN_FLIGHT and (part := next(left, None)) is not None:
            at_work[pool.submit(run, part)] = part
        if not at_work:
            return
        for future in wait(at_work, return_when=FIRST_COMPLETED).done:
            part = at_work.pop(future)
            error = future.exception()
            if error is not None and not isinstance(error, StoppedError):
                raise error
            yield part

"""Checkpoints of a run: written in a thread, whole or not at all, and read with an eye for damage.

A checkpoint is one file, ``step-000001234.pt``: weights, optimizer, and where loop and stream are, as ``torch.save``
writes them and ``torch.load(weights_only=True)`` takes them back. The newest few stay, with the best one of each: its
weights are those that the run would end with.
"""

import io
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from annatac_scale.errors import InputError, ModelError, StoreError
from annatac_scale.store.place import Place

CHECKPOINTS = "checkpoints"
FORMAT = 1
"""Of the state; another number is another format, which this version does not read."""
_NAME = re.compile(r"step-(\d{9})\.pt")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after a step."""
    return f"step-{step:09d}.pt"


def checkpoint_steps(place: Place) -> list[int]:
    """Steps after which there is a checkpoint, increasing."""
    return [int(found[1]) for name in place.names() if (found := _NAME.fullmatch(name))]


class Checkpoints:
    """The checkpoints of a run, for the one process that writes them.

    place: the folder they lie in
    keep: newest ones that stay
    say: takes what the user should know, as that one could not be written
    """

    def __init__(self, place: Place, keep: int, say: Callable[[str], None]) -> None:
        self._place, self._keep, self._say = place, keep, say
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._must_succeed = False

    def save(self, step: int, state: Mapping[str, Any], bests: Sequence[int], needed: bool = False) -> None:
        """Copy the state after a step, and write it in a thread; waits for the one before.

        state: nested dicts and lists of tensors and plain values
        bests: steps at which the run was better than ever before, increasing; ``step`` may be the last of them
        needed: whether the run cannot do without: then a failure is an error, raised when it is next looked at

        Raises StoreError where a needed one before could not be written; of another one the user is told.
        """
        self.settle()
        self._must_succeed = needed
        self._writing = self._writer.submit(self._write, step, _on_cpu(state), list(bests))

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._writing is not None and not self._writing.done()

    def settle(self) -> None:
        """Wait until what was saved is written. Raises StoreError as ``save`` does."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except StoreError as error:
            if self._must_succeed:
                raise
            self._say(f"checkpoint not written, training goes on: {error}")

    def close(self) -> None:
        """Wait for what is being written, and end the thread; errors are no longer of interest."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, state: Any, bests: list[int]) -> None:
        file = io.BytesIO()
        torch.save({**state, "format": FORMAT}, file)
        self._place.write(checkpoint_name(step), file.getbuffer(), wait=True)
        try:
            self._drop_old(bests)
        except (OSError, StoreError) as error:
            self._say(f"an old checkpoint could not be removed, training goes on: {_one_line(error)}")

    def _drop_old(self, bests: list[int]) -> None:
        there = checkpoint_steps(self._place)
        newest = there[-self._keep :]
        stay = {
            *newest,
            *(best for step in newest if (best := best_until(step, bests)) is not None),
        }
        for step in there:
            if step not in stay:
                self._place.remove(checkpoint_name(step))

    def newest(self) -> bytes | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Those that are damaged are removed, saying so. Raises ModelError where all of them are damaged, InputError where
        one is of another format.
        """
        damaged: list[int] = []
        for step in reversed(checkpoint_steps(self._place)):
            try:
                data = self.read(step)
                state_of(data, self._path(step))
            except ModelError as error:
                self._say(f"{error}; going back to the checkpoint before it")
                damaged.append(step)
                continue
            # They would take the places of newer ones, as training comes to their steps again.
            for broken in damaged:
                self._place.remove(checkpoint_name(broken))
            return data
        if damaged:
            raise ModelError(
                f"{self._place.location}: none of {len(damaged)} checkpoints is whole; remove this folder to train "
                "from the start, or choose another --out"
            )
        return None

    def has_whole(self, step: int) -> bool:
        """Whether the checkpoint after a step is there and whole."""
        try:
            state_of(self.read(step), self._path(step))
        except ModelError:
            return False
        return True

    def read(self, step: int) -> bytes:
        """The bytes of a checkpoint. Raises ModelError when it is damaged or gone."""
        try:
            data = self._place.read(checkpoint_name(step))
            # torch does not look at the sums that it writes.
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, FileNotFoundError) as error:
            raise ModelError(f"{self._path(step)}: damaged ({_one_line(error)})") from error
        return data

    def _path(self, step: int) -> str:
        return f"{self._place.location}/{checkpoint_name(step)}"


def state_of(data: bytes, path: str = "checkpoint") -> dict[str, Any]:
    """The state in a checkpoint's bytes, its tensors on the CPU. Raises ModelError if damaged, InputError if of
    another format, both naming ``path``.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
        raise ModelError(f"{path}: damaged ({_one_line(error)})") from error
    # Whole, so that nothing is to be passed over or removed for it.
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path}: found format {found}, expected {FORMAT}; go on with the version of annatac_scale that wrote it, "
            "or choose another --out"
        )
    return state


def best_until(step: int, bests: Sequence[int]) -> int | None:
    """The last of ``bests`` that is not after ``step``."""
    return max((best for best in bests if best <= step), default=None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _on_cpu(value: Any) -> Any:
    """The value with a copy of each of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value

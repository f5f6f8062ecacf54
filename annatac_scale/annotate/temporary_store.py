"""Cells that are in no store yet: converted for a prediction into one that goes when all of them have labels."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from annatac_scale.errors import InputError, NoRoomError, StoreError
from annatac_scale.model.folder import ModelInfo
from annatac_scale.progress import Progress
from annatac_scale.store.locks import try_folder_lock
from annatac_scale.store.place import Location, is_url, parent_of, place_of
from annatac_scale.store.store import IslandStore

_STORE = ".cells.zarr"
"""Its name in the data set's folder: readers of Parquet pass over names that begin with a dot."""
_LOCK = ".cells.lock"


def store_given(inputs: Sequence[Location]) -> Location | None:
    """The island store that the inputs of a prediction are, None where they are files to convert.

    What is not there at all is taken for a store, which then says so.
    """
    if len(inputs) != 1:
        return None
    (given,) = inputs
    if place_of(given).size("zarr.json") is not None or not _is_there(given):
        return given
    return None


def _is_there(given: Location) -> bool:
    if not is_url(given):
        return Path(given).exists()
    folder, name = parent_of(given), str(given).rstrip("/").rpartition("/")[2]
    return folder is not None and (place_of(folder).size(name) is not None or bool(place_of(given).folders()))


@contextmanager
def temporary_store(
    inputs: Sequence[Location], info: ModelInfo, out: Location, options: Mapping[str, Any], progress: Progress
) -> Iterator[IslandStore]:
    """A store of h5ad, 10x and fragment files, with the islands and counting of a model.

    out: the data set. On a disk the store lies in it, for a prediction that is stopped to go on with, and goes when the
    context ends without an error; for one in object storage it lies among the temporary files, and always goes.
    options: fields of ingest.convert.ConvertOptions, but for the counting, which is the model's

    Raises InputError for whatever is wrong with the inputs, and where another process predicts files into ``out``.
    """
    from annatac_scale.ingest.convert import convert

    select = options.get("select") or _selection(info)
    chosen = {**options, "select": select, "counting": info.counting}
    with _place(out) as path:
        try:
            convert(list(inputs), assembly=info.assembly, out=path, progress=progress, **chosen)
        except NoRoomError:
            raise
        except StoreError:  # what an earlier run left is of other inputs or options; nobody else is in there
            if not path.exists():
                raise
            shutil.rmtree(path)
            convert(list(inputs), assembly=info.assembly, out=path, progress=progress, **chosen)
        yield IslandStore.open(path)


@contextmanager
def _place(out: Location) -> Iterator[Path]:
    if is_url(out):
        with tempfile.TemporaryDirectory(prefix="annatac-") as folder:
            yield Path(folder) / _STORE
        return
    path = Path(out) / _STORE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = try_folder_lock(out, _LOCK)
    if lock is None:
        raise InputError(
            f"{out}: another process is predicting files into it; wait for it, stop it or choose another --out"
        )
    try:
        yield path
        shutil.rmtree(path, ignore_errors=True)
    finally:
        lock.release()


def _selection(info: ModelInfo) -> str:
    if info.selection in ("tss", "all"):
        return info.selection
    raise InputError(
        f"the model's islands are the windows of a BED file; expected it, as --select FILE; or give an island store of "
        f"{info.assembly} that was converted with it"
    )

"""Create an island store, or remove one that came to nothing.

On a local disk a store is made aside and renamed. In object storage its root is put last: what has no root is no store.
"""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pandas as pd

from annatac_scale.errors import StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.draft import sweep
from annatac_scale.store.files import INCOMING, as_store_error, move
from annatac_scale.store.frames import Files, frame_files, group_file
from annatac_scale.store.locks import STORE_LOCK, creation_lock, store_lock
from annatac_scale.store.metadata import read_index, read_root, root_attributes
from annatac_scale.store.place import Location, Place, is_url, place_of

_SAME = ("assembly", "width_bp", "islands_sha256", "counting")
_ROOT = "zarr.json"


def create_store(path: Location, space: IslandSpace, counting: str) -> None:
    """Create an empty island store, or check that an existing one has the same islands and counting.

    A store without samples gives way to one of other islands. Several processes may create the same store at once.
    Of an existing one, drafts are removed that runs left which were killed right after their commit.
    Raises StoreError when ``path`` holds something else, or a store of other islands, counting or major version.
    """
    attributes = root_attributes(space, counting)
    if _is_same(path, attributes):
        sweep(path)
        return
    if is_url(path):
        _create_objects(str(path), attributes, space)
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with creation_lock(path):
            if not _is_same(path, attributes):  # no other process was faster
                _make_way(path, attributes)
                _create_folder(path, _files(attributes, space))
    except OSError as error:
        raise as_store_error(error, path, "written") from error


def _files(attributes: dict[str, Any], space: IslandSpace) -> Files:
    """A store without samples, its root last."""
    return {
        **frame_files(schema.ISLANDS, islands_frame(space)),
        f"{schema.SAMPLES}/{_ROOT}": group_file({schema.INDEX: []}),
        _ROOT: group_file(attributes),
    }


def _create_folder(path: Path, files: Files) -> None:
    aside = _name_aside(path)
    try:
        place_of(aside).write_all(files)
        move(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _create_objects(path: str, attributes: dict[str, Any], space: IslandSpace) -> None:
    place = place_of(path)
    with store_lock(path):
        if _is_same(path, attributes):
            return
        if place.size(_ROOT) is not None:
            _check_may_go(path, attributes)
            _remove_objects(place)
        ours = (f"{schema.ISLANDS}/", f"{schema.SAMPLES}/", f"{INCOMING}/", STORE_LOCK)
        other = [name for name in place.names() if not name.startswith(ours)]
        if other:
            raise StoreError(f"{path}: holds {other[0]} and is not an island store; choose another --out")
        files = _files(attributes, space)
        root = files.pop(_ROOT)
        place.write_all(files)
        place.write(_ROOT, root)


def _is_same(path: Location, attributes: dict[str, Any]) -> bool:
    """Whether a store of these islands and counting is there."""
    if place_of(path).size(_ROOT) is None:
        return False
    try:
        found = read_root(path)
    except StoreError:
        return False
    return all(found[key] == attributes[key] for key in _SAME)


def _make_way(path: Path, attributes: dict[str, Any]) -> None:
    """Remove a store without samples, left by a conversion that failed. Raises StoreError for anything else."""
    if not (path / _ROOT).exists():
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StoreError(f"{path}: exists and is not an island store; choose another --out")
        return
    read_root(path)  # nothing, not even a lock, is put into what is no store of ours
    with store_lock(path):
        _check_may_go(path, attributes)
        old = _name_aside(path)
        move(path, old)
    shutil.rmtree(old)


def _check_may_go(path: Location, attributes: dict[str, Any]) -> None:
    """Raise StoreError for a store of other islands that holds a sample, or in which one was begun."""
    found = read_root(path)
    key = next(key for key in _SAME if found[key] != attributes[key])
    differs = f"{path}: holds {key} {found[key]!r}, but {attributes[key]!r} was asked for"
    if read_index(path):
        raise StoreError(f"{differs}; use the store's own, or another --out")
    if _has_drafts(path):
        # What was counted may be hours of work: whoever asks for something else has to say that it may go.
        raise StoreError(
            f"{differs}; it has no sample yet, but what a run put down that was stopped or is still at work; give the "
            "command of that run again, or remove the store to begin anew"
        )


def _has_drafts(path: Location) -> bool:
    """Whether a sample is being written, or was when its writer was stopped."""
    if is_url(path):
        return bool(place_of(path).names(INCOMING))
    return os.path.exists(os.path.join(path, INCOMING))


def _name_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def islands_frame(space: IslandSpace) -> pd.DataFrame:
    """The islands as a data frame indexed by name, columns chrom (categorical), start, end, genes."""
    return pd.DataFrame(
        {
            "chrom": pd.Categorical.from_codes(space.chrom, categories=list(space.chromosomes)),
            "start": space.start,
            "end": space.end,
            "genes": space.genes.astype(object),
        },
        index=pd.Index(space.names(), name="island"),
    )


def remove_empty(path: Location) -> None:
    """Remove the store at ``path``, unless it holds a sample or a draft, or it is gone or damaged."""
    with contextlib.suppress(FileNotFoundError, StoreError):
        read_root(path)  # not even a lock is put into what is no store of ours
        with store_lock(path):
            if read_index(path) or _has_drafts(path):
                return
            if is_url(path):
                _remove_objects(place_of(path))
                return
            aside = _name_aside(Path(path))
            move(Path(path), aside)  # others see a whole store or none
        shutil.rmtree(aside)


def _remove_objects(place: Place) -> None:
    """Remove a store from object storage, unless a sample is begun meanwhile; the caller holds its lock."""
    root = place.read(_ROOT)
    place.remove(_ROOT)
    if place.names(INCOMING):  # its writer saw the root, or will miss it and give up
        place.write(_ROOT, root)
        return
    for folder in (schema.SAMPLES, schema.ISLANDS):
        place.remove(folder)

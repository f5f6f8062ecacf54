"""Writing a labels data set, by one process or by many at once: begun, gone on with, ended; and its rows written anew.

Locks keep two processes from the same work, and the manifest from being changed by two at once. That nothing is spoiled
does not rest on them: parts are written whole or not at all, and whoever makes a part makes the same one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annatac_scale.annotate.labels import (
    EMBEDDINGS,
    MANIFEST,
    Consensus,
    LabelsFolder,
    Manifest,
    Part,
    SampleRecord,
    read_manifest,
)
from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.store.leases import REFRESH_S, STALE_S, Lease
from annatac_scale.store.locks import FileLock, folder_lock, try_folder_lock
from annatac_scale.store.place import PARTIAL, Location, is_url, place_of

_MANIFEST_LOCK = ".manifest.lock"
_LOOK_EVERY_S = 5.0
_PATIENCE_S = STALE_S + 2 * REFRESH_S + 3 * _LOOK_EVERY_S
"""Seconds after which a lease of whoever is dead was taken over."""


@dataclass(frozen=True)
class Share:
    """The parts of one of several processes over one data set: share ``number``, from 1 on, ``of`` so many."""

    number: int = 1
    of: int = 1

    @classmethod
    def parsed(cls, text: str) -> "Share":
        """From "3/64". Raises ConfigError for anything else."""
        number, slash, of = text.partition("/")
        if slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number), int(of))
        raise ConfigError(f"--part {text}: expected K/N, as 3/64, K from 1 to N")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def of_parts(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of this share: those that follow each other, as one sample's labels need its obs only once."""
        cut = [len(parts) * number // self.of for number in (self.number - 1, self.number)]
        return list(parts[cut[0] : cut[1]])

    @property
    def said(self) -> str:
        """What it is a share of, in words."""
        return "labels" if self.of == 1 else f"part {self}"

    @property
    def lock(self) -> str:
        """The name of its lock."""
        return f".part-{self.number}-of-{self.of}.lock"


def _silent(_line: str) -> None:
    pass


@contextmanager
def labels_writer(
    location: Location, manifest: Manifest, share: Share, say: Callable[[str], None] = _silent
) -> Iterator[LabelsFolder]:
    """The data set of a manifest at ``location``, to write a share of it.

    A new one gets the manifest, not yet complete. One that holds parts of the same data set is gone on with, samples
    that are new to it are added. say: is told where it has to wait. Raises InputError where there is something else,
    labels of other samples or options, or another process writes the same share; ModelError where there are labels of
    another model.
    """
    if not is_url(location):
        _make_folder(Path(location))
    with _only_writer(location, share, say):
        with folder_lock(location, _MANIFEST_LOCK):
            folder = _begun(location, manifest)
            _remove_left(location, share)
        yield folder


@contextmanager
def rewriting(folder: LabelsFolder) -> Iterator[None]:
    """Be alone with a complete data set, whose manifest is read anew, to write the rows of its parts anew.

    Raises InputError where another process writes here, or parts are missing by now.
    """
    location, share = folder.location, Share()
    with _only_writer(location, share):
        with folder_lock(location, _MANIFEST_LOCK):
            folder.manifest = _same_and_complete(folder)
            _remove_left(location, share)
        yield


def note_consensus(folder: LabelsFolder, consensus: Consensus | None) -> None:
    """Note in the manifest of a complete data set the consensus that all of its parts have, or that some may lack it.

    Raises InputError where samples were added, or parts went missing meanwhile.
    """
    with folder_lock(folder.location, _MANIFEST_LOCK):
        _same_and_complete(folder)
        folder.write_manifest(complete=True, consensus=consensus)


def _same_and_complete(folder: LabelsFolder) -> Manifest:
    there = read_manifest(folder.location)
    if not there.complete or there.samples != folder.manifest.samples:
        raise InputError(
            f"{folder.location}: found {'other samples' if there.complete else 'parts missing'} now, expected the "
            "complete data set that it was before; run `annatac predict` again when no other process writes here"
        )
    return there


@contextmanager
def _only_writer(location: Location, share: Share, say: Callable[[str], None] = _silent) -> Iterator[None]:
    lock = _try_share(location, share)
    if lock is None and is_url(location):
        # A process that was killed on another machine looks alive until its lease is old.
        say(
            f"{location}: another process writes {share.said} here, or was killed; looking for up to "
            f"{_PATIENCE_S:.0f} s whether it lives"
        )
        until = time.monotonic() + _PATIENCE_S
        while lock is None and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
            lock = _try_share(location, share)
    if lock is None:
        raise InputError(
            f"{location}: another process is writing {share.said} here; wait for it, stop it or choose another --out; "
            "--part K/N shares the work among processes"
        )
    try:
        yield
    finally:
        lock.release()


def _try_share(location: Location, share: Share) -> "FileLock | Lease | None":
    if is_url(location):
        return try_folder_lock(location, share.lock)
    # Whoever removes what was left looks whether shares are held: it must not hold one for the time of a look.
    with folder_lock(location, _MANIFEST_LOCK):
        return try_folder_lock(location, share.lock)


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: found a file, expected a folder for labels; choose another --out")
    path.mkdir(parents=True, exist_ok=True)


def _begun(location: Location, manifest: Manifest) -> LabelsFolder:
    folder = LabelsFolder(location, manifest)
    if folder.place.size(MANIFEST) is None:
        _check_empty(location)
        folder.write_manifest(complete=False)
        return folder
    there = read_manifest(location)
    _check_same(location, there, manifest)
    if len(there.samples) == len(manifest.samples):
        folder.manifest = there
    else:
        folder.write_manifest(complete=False)
    return folder


def finish(folder: LabelsFolder, share: Share) -> bool:
    """Note that the data set is complete, where all of its parts are there; returns whether it is.

    share: that this process has written
    """
    with folder_lock(folder.location, _MANIFEST_LOCK):
        # Another share may have added samples that came to the store meanwhile.
        folder.manifest = read_manifest(folder.location)
        if folder.manifest.complete:
            return True
        names = set(place_of(folder.location).names())
        parts = folder.manifest.parts
        if not names.issuperset(part.file for part in parts) or folder.missing(parts):
            return False
        folder.write_manifest(complete=True)
        _remove_left(folder.location, share)
        return True


def reopen(folder: LabelsFolder) -> None:
    """Note that parts are missing again, as a disk lost them: for the time in which they are made anew."""
    if folder.manifest.complete:
        with folder_lock(folder.location, _MANIFEST_LOCK):
            folder.manifest = read_manifest(folder.location)
            folder.write_manifest(complete=False)


def _remove_left(location: Location, share: Share) -> None:
    """Remove what processes that were killed left, unless others are writing; the caller holds the manifest's lock."""
    if is_url(location):  # where nothing lies aside
        return
    for file in Path(location).glob(".part-*-of-*.lock"):
        if file.name != share.lock:
            lock = try_folder_lock(location, file.name)
            if lock is None:
                return
            lock.release()
    aside = f".*{PARTIAL}"
    for left in [*Path(location).glob(aside), *(Path(location) / EMBEDDINGS).rglob(aside)]:
        left.unlink(missing_ok=True)


def _check_empty(location: Location) -> None:
    others = sorted(name for name in place_of(location).names() if not name.startswith("."))
    if others:
        raise InputError(
            f"{location}: found {others[0]!r}, expected a new folder or one of labels; choose another --out"
        )


def _check_same(location: Location, there: Manifest, now: Manifest) -> None:
    """Raise unless the parts that are there belong to the data set that is asked for now."""
    if there.model != now.model:
        raise ModelError(
            f"{location}: holds labels of model {there.model[:12]}, now asked for model {now.model[:12]}; "
            "choose another --out or use that model"
        )
    before, after = there.options, now.options
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            raise InputError(
                f"{location}: holds labels made with {name} {_said(before.get(name))}, now asked for "
                f"{_said(after.get(name))}; choose another --out"
            )
    _check_same_samples(location, there.samples, now.samples)


def _said(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text or "none"


def _check_same_samples(
    location: Location, there: Mapping[str, SampleRecord], now: Mapping[str, SampleRecord]
) -> None:
    for name, record in there.items():
        if name not in now or now[name].x_sha256 != record.x_sha256:
            found = "no such sample" if name not in now else "other cells under that name"
            raise InputError(
                f"{location}: holds labels of sample {name!r}, but the store has {found}; choose another --out"
            )

"""Small files and matrices from object storage, as files on disk for as long as they are read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from annatac_scale.errors import InputError
from annatac_scale.store.place import Location, blob_of, is_url

_PIECE_BYTES = 16 << 20


@contextmanager
def local_copy(location: Location, folder: Path | None = None) -> Iterator[Path]:
    """A path that holds what a location does: the path itself, or a copy of an object, removed in the end.

    folder: where copies are made, by default the system's for temporary files. InputErrors about the copy name the URL.
    """
    if not is_url(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="annatac-", dir=folder) as temporary:
        path = Path(temporary, str(location).rsplit("/", 1)[-1])
        download(location, path)
        try:
            yield path
        except InputError as error:
            raise InputError(str(error).replace(str(path), str(location))) from error


def download(location: Location, path: Path) -> None:
    """Copy an object into a file, whole or not at all."""
    blob = blob_of(location)
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "wb") as file:
        for start in range(0, blob.size, _PIECE_BYTES):
            file.write(blob.read(start, min(_PIECE_BYTES, blob.size - start)))
    aside.replace(path)

"""Small files from object storage, as files on disk for as long as they are read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from annatac_scale.errors import InputError
from annatac_scale.store.place import Location, blob_of, is_url

_PIECE_BYTES = 16 << 20


@contextmanager
def local_copy(location: Location) -> Iterator[Path]:
    """A path that holds what a location does: the path itself, or a copy of an object, removed in the end.

    InputErrors about the copy name the URL.
    """
    if not is_url(location):
        yield Path(location)
        return
    blob = blob_of(location)
    with tempfile.TemporaryDirectory(prefix="annatac-") as folder:
        path = Path(folder, str(location).rsplit("/", 1)[-1])
        with open(path, "wb") as file:
            for start in range(0, blob.size, _PIECE_BYTES):
                file.write(blob.read(start, min(_PIECE_BYTES, blob.size - start)))
        try:
            yield path
        except InputError as error:
            raise InputError(str(error).replace(str(path), str(location))) from error

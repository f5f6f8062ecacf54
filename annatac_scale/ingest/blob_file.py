"""A blob as the file that HDF5 reads from: object storage is read in pieces, of which a few are kept."""

import io
from functools import lru_cache

from annatac_scale.store.place import Blob

_PIECE_BYTES = 1 << 20
_PIECES_KEPT = 32


class BlobFile(io.RawIOBase):
    """A blob, opened for reading."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self.blob = blob
        self._at = 0
        self._piece = lru_cache(_PIECES_KEPT)(self._read_piece)

    def _read_piece(self, number: int) -> bytes:
        return self.blob.read(number * _PIECE_BYTES, _PIECE_BYTES)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the beginning, from here or from the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.blob.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill a buffer; fewer bytes only at the end. What is longer than a piece is read as it is."""
        view = memoryview(buffer).cast("B")
        n = min(len(view), max(0, self.blob.size - self._at))
        if n > _PIECE_BYTES:
            view[:n] = self.blob.read(self._at, n)
        else:
            done = 0
            while done < n:
                number, start = divmod(self._at + done, _PIECE_BYTES)
                part = self._piece(number)[start : start + n - done]
                view[done : done + len(part)] = part
                done += len(part)
        self._at += n
        return n

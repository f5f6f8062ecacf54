"""gzip of one or many members, and BGZF, as the bytes of their texts.

BGZF (SAM specification, section 4.1) is gzip of small members that tell their own size, so that reading may begin at
any of them; its last member is empty, and a file without that one was cut off. Members are inflated by ISA-L, which
takes a third of zlib's time, and releases the GIL.
"""

import re
import struct
from collections.abc import Callable, Iterator
from typing import cast

from isal import isal_zlib

from annatac_scale.store.place import Blob

READ_BYTES = 1 << 20
GZIP = b"\x1f\x8b"
EOF_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")

BLOCK_HEAD = re.compile(rb"\x1f\x8b\x08\x04.{6}\x06\x00BC\x02\x00", re.DOTALL)
"""How the blocks begin that ``find_block`` finds: they have no extra field but their size."""
_HEAD_BYTES = 18
# Its type hints call it an exception, not a class of them.
_IsalError = cast("type[Exception]", isal_zlib.error)
_MOST_BLOCK_BYTES = 1 << 16


class BrokenTextError(Exception):
    """The file's text cannot be read on; the message says what was found and what was expected."""


class Bytes:
    """A file's bytes from ``start`` on, read as they are needed; ``data[at:]`` is what was read and not yet taken.

    tell: is given each piece that was read, with its place in the file
    """

    def __init__(self, blob: Blob, start: int, tell: Callable[[int, bytes], None]) -> None:
        self.blob = blob
        self.tell = tell
        self.data = b""
        self.at = 0
        self.n_read = start

    @property
    def place(self) -> int:
        """The place as a byte of the file."""
        return self.n_read - len(self.data) + self.at

    def hold(self, n_bytes: int) -> bool:
        """Read on until ``n_bytes`` lie ahead; False where the file ends before."""
        while len(self.data) - self.at < n_bytes:
            more = self.blob.read(self.n_read, max(READ_BYTES, n_bytes))
            if not more:
                return False
            self.tell(self.n_read, more)
            self.data = self.data[self.at :] + more
            self.at = 0
            self.n_read += len(more)
        return True

    def take(self) -> bytes:
        """All that was read and not yet taken."""
        piece = self.data[self.at :]
        self.at = len(self.data)
        return piece


def block_size(source: Bytes) -> int | None:
    """Bytes of the BGZF block that begins here, None where the member is none."""
    source.hold(12)
    head = source.data[source.at : source.at + 12]
    if len(head) < 12 or not head.startswith(GZIP) or not head[3] & 4:
        return None
    n_extra = struct.unpack_from("<H", head, 10)[0]
    source.hold(12 + n_extra)
    extra = source.data[source.at + 12 : source.at + 12 + n_extra]
    at = 0
    while at + 4 <= len(extra):
        name, length = extra[at : at + 2], struct.unpack_from("<H", extra, at + 2)[0]
        if name == b"BC" and length == 2 and at + 6 <= len(extra):
            return int(struct.unpack_from("<H", extra, at + 4)[0]) + 1
        at += 4 + length
    return None


def find_block(source: Bytes) -> bool:
    """Go on to the first BGZF block that begins here or later; False where the file ends before.

    Its head alone may come about in compressed data once in 10^24 places, so the head of the block after it is looked
    for as well.
    """
    while True:
        held = source.hold(2 * _MOST_BLOCK_BYTES + _HEAD_BYTES)
        for found in BLOCK_HEAD.finditer(source.data, source.at):
            size = struct.unpack_from("<H", source.data, found.start() + 16)[0] + 1
            after = found.start() + size
            is_last = not held and after == len(source.data)
            if is_last or BLOCK_HEAD.match(source.data, after):
                source.at = found.start()
                return True
        if not held:
            return False
        source.at = max(source.at, len(source.data) - _HEAD_BYTES)


def inflate_block(source: Bytes, size: int) -> bytes:
    """The text of the BGZF block of ``size`` bytes that begins here."""
    place = source.place
    if not source.hold(size):
        raise BrokenTextError(f"the end of the file within the BGZF block at byte {place:,}: it was cut off")
    block = memoryview(source.data)[source.at : source.at + size]
    source.at += size
    try:
        return isal_zlib.decompress(block, 16 + isal_zlib.MAX_WBITS, _MOST_BLOCK_BYTES)
    except _IsalError as error:
        raise BrokenTextError(f"damaged data in the BGZF block at byte {place:,} ({error})") from error


def inflate(source: Bytes) -> Iterator[bytes]:
    """The texts of all gzip members from here to the file's end."""
    cut_off = False
    while source.hold(1):
        size = block_size(source)
        if size is not None:
            text = inflate_block(source, size)
            cut_off = bool(text)
            yield text
        elif source.data.startswith(GZIP, source.at):
            cut_off = False
            yield from _inflate_member(source)
        else:
            _skip_padding(source)
    if cut_off:
        raise BrokenTextError(
            f"the end of the file at byte {source.place:,} without BGZF's empty last block: it was cut off"
        )


def _inflate_member(source: Bytes) -> Iterator[bytes]:
    place = source.place
    inflater = isal_zlib.decompressobj(16 + isal_zlib.MAX_WBITS)
    while not inflater.eof:
        if not source.hold(1):
            raise BrokenTextError(
                f"the end of the file within the gzip data that begin at byte {place:,}: it was cut off"
            )
        ahead = source.data[source.at :]
        try:
            text = inflater.decompress(ahead, 4 * READ_BYTES)
        except _IsalError as error:
            raise BrokenTextError(f"damaged gzip data after byte {source.place:,} ({error})") from error
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        source.at += len(ahead) - len(left)
        yield text


def _skip_padding(source: Bytes) -> None:
    """Zeros may follow the last member (gzip's own rule); anything else may not."""
    place = source.place
    while source.hold(1):
        if source.take().strip(b"\0"):
            raise BrokenTextError(f"bytes that are not gzip data at byte {place:,}")

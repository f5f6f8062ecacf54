"""The text of a fragment file in large pieces, whether plain, gzip of one or many members, or BGZF.

BGZF (SAM specification, section 4.1) is gzip of small members that tell their own size; its last member is empty, and
a file without that one was cut off.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path

READ_BYTES = 1 << 20
TEXT_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 20

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x89HDF": "HDF5",
}


class BrokenTextError(Exception):
    """The file's text cannot be read on; the message says what was found and what was expected."""


def whole_lines(path: Path, advance: Callable[[int], None], text_bytes: int = TEXT_BYTES) -> Iterator[bytes]:
    """The decompressed text in buffers of about ``text_bytes``, each of whole lines that end with a newline.

    advance: told how many bytes of the file were read. A byte order mark is left out; a missing last newline is
    added. Raises BrokenTextError, after all whole lines before the damage were given out, and InputError for a
    file that cannot be opened or is of another format.
    """
    held: list[bytes] = []
    n_held = 0
    try:
        for piece in _pieces(path, advance):
            held.append(piece)
            n_held += len(piece)
            if n_held >= text_bytes:
                text, rest = _cut(held)
                if len(rest) > MAX_LINE_BYTES:
                    raise BrokenTextError(
                        f"a line of over {MAX_LINE_BYTES:,} bytes; expected a text file of fragments"
                    )
                if text:
                    yield text
                held, n_held = [rest], len(rest)
    except BrokenTextError:
        text, _ = _cut(held)
        if text:
            yield text
        raise
    text, rest = _cut(held)
    if text or rest:
        yield text + (rest + b"\n" if rest else b"")


def _cut(held: list[bytes]) -> tuple[bytes, bytes]:
    """The whole lines of the held pieces, and the rest."""
    text = b"".join(held)
    end = text.rfind(b"\n") + 1
    return text[:end], text[end:]


def _pieces(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            source = _Source(file, advance)
            source.hold(len(_BOM) + 3)
            for magic, kind in _FOREIGN.items():
                if source.data.startswith(magic):
                    raise InputError(
                        f"{path}: found {kind} data; expected fragments as text, plain or gzip; check the path, "
                        "or decompress it first"
                    )
            texts = filter(None, _inflate(source) if source.data.startswith(_GZIP) else source.rest())
            first = next(texts, b"")
            # Members may be tiny: a mark is looked for in the first bytes, not in the first member alone.
            while len(first) < len(_BOM) and (more := next(texts, b"")):
                first += more
            yield first.removeprefix(_BOM)
            yield from texts
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


class _Source:
    """A file's bytes with a place in them; ``data[at:]`` is what was read and not yet taken."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self.file = file
        self.advance = advance
        self.data = b""
        self.at = 0
        self.n_read = 0

    @property
    def place(self) -> int:
        """The place as a byte of the file."""
        return self.n_read - len(self.data) + self.at

    def hold(self, n_bytes: int) -> bool:
        """Read on until ``n_bytes`` lie ahead; False where the file ends before."""
        while len(self.data) - self.at < n_bytes:
            more = self.file.read(max(READ_BYTES, n_bytes))
            if not more:
                return False
            self.data = self.data[self.at :] + more
            self.at = 0
            self.n_read += len(more)
            self.advance(len(more))
        return True

    def rest(self) -> Iterator[bytes]:
        """All bytes from here on."""
        while self.hold(1):
            piece = self.data[self.at :]
            self.at = len(self.data)
            yield piece


def _inflate(source: _Source) -> Iterator[bytes]:
    """The texts of all gzip members."""
    cut_off = False
    while source.hold(1):
        size = _bgzf_block_size(source)
        if size is not None:
            text = _inflate_block(source, size)
            cut_off = bool(text)
            yield text
        elif source.data.startswith(_GZIP, source.at):
            cut_off = False
            yield from _inflate_member(source)
        else:
            _skip_padding(source)
    if cut_off:
        raise BrokenTextError(
            f"the end of the file at byte {source.place:,} without BGZF's empty last block: it was cut off"
        )


def _bgzf_block_size(source: _Source) -> int | None:
    """Bytes of the BGZF block that begins here, None where the member is none."""
    source.hold(12)
    head = source.data[source.at : source.at + 12]
    if len(head) < 12 or not head.startswith(_GZIP) or not head[3] & 4:
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


def _inflate_block(source: _Source, size: int) -> bytes:
    place = source.place
    if not source.hold(size):
        raise BrokenTextError(f"the end of the file within the BGZF block at byte {place:,}: it was cut off")
    block = memoryview(source.data)[source.at : source.at + size]
    source.at += size
    head = 12 + struct.unpack_from("<H", block, 10)[0]
    try:
        text = zlib.decompress(block[head : size - 8], -zlib.MAX_WBITS)
    except zlib.error as error:
        raise BrokenTextError(f"damaged data in the BGZF block at byte {place:,} ({error})") from error
    if (zlib.crc32(text), len(text)) != struct.unpack_from("<II", block, size - 8):
        raise BrokenTextError(f"a wrong checksum in the BGZF block at byte {place:,}: the data are damaged")
    return text


def _inflate_member(source: _Source) -> Iterator[bytes]:
    place = source.place
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    while not inflater.eof:
        if not source.hold(1):
            raise BrokenTextError(
                f"the end of the file within the gzip data that begin at byte {place:,}: it was cut off"
            )
        ahead = source.data[source.at :]
        try:
            text = inflater.decompress(ahead, TEXT_BYTES)
        except zlib.error as error:
            raise BrokenTextError(f"damaged gzip data after byte {source.place:,} ({error})") from error
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        source.at += len(ahead) - len(left)
        yield text


def _skip_padding(source: _Source) -> None:
    """Zeros may follow the last member (gzip's own rule); anything else may not."""
    place = source.place
    if any(piece.strip(b"\0") for piece in source.rest()):
        raise BrokenTextError(f"bytes that are not gzip data at byte {place:,}")

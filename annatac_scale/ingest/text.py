"""The text of a fragment file, plain, gzip, BGZF or zstd, in buffers of whole lines.

BGZF and plain text are cut into ranges of equal size that are read independently of each other; a line belongs to the
range that its first byte lies in, except that one that begins where a range ends belongs to that range. gzip and zstd
can only be read from their beginning: they are one range.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from annatac_scale.errors import InputError
from annatac_scale.ingest.bgzf import (
    BLOCK_HEAD,
    EOF_BLOCK,
    GZIP,
    READ_BYTES,
    BrokenTextError,
    Bytes,
    block_size,
    find_block,
    inflate,
    inflate_block,
)
from annatac_scale.store.place import Blob, Location, blob_of

RANGE_BYTES = 32 << 20
TEXT_BYTES = 1 << 20
"""Text that is worked on at a time: it stays in a core's cache."""
MAX_LINE_BYTES = 1 << 20

BGZF, PLAIN_GZIP, ZSTD, PLAIN = "BGZF", "gzip", "zstd", "text"

_BOM = b"\xef\xbb\xbf"
_ZSTD = b"\x28\xb5\x2f\xfd"
_FOREIGN = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x89HDF": "HDF5", b"PAR1": "Parquet"}


@dataclass(frozen=True)
class TextFile:
    """A file of text and how it is read.

    stamp: changes when the file does; form: BGZF, PLAIN_GZIP, ZSTD or PLAIN; range_bytes: size of a range, in bytes of
    the file
    """

    location: Location
    size: int
    stamp: int | str
    form: str
    range_bytes: int

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read from its beginning."""
        return self.form in (PLAIN_GZIP, ZSTD)

    @property
    def n_ranges(self) -> int:
        """Ranges that the file is cut into."""
        return max(1, -(-self.size // self.range_bytes)) if not self.is_stream else 1

    def bytes_of_range(self, number: int) -> int:
        """Size of a range in the file."""
        if self.n_ranges == 1:
            return self.size
        return min(self.range_bytes, self.size - number * self.range_bytes)

    def opened(self) -> Blob:
        """The file, for reading. Raises InputError where it is not what was looked at any more."""
        blob = blob_of(self.location)
        if (blob.size, blob.stamp) != (self.size, self.stamp):
            raise InputError(
                f"{self.location}: changed since the work on it began ({blob.size:,} bytes, {self.size:,} before); "
                "run the same command again when it is whole"
            )
        return blob


def look_at(location: Location, range_bytes: int = RANGE_BYTES) -> TextFile:
    """Tell a file's form by its first bytes.

    Raises InputError for a file that cannot be opened or is of another format, and for BGZF that was cut off.
    """
    blob = blob_of(location)
    head = blob.read(0, 4096)
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(
                f"{location}: found {kind} data; expected fragments as text, plain, gzip or zstd; check the path, "
                "or decompress it first"
            )
    if head.startswith(_ZSTD):
        form = ZSTD
    elif not head.startswith(GZIP):
        form = PLAIN
    else:
        form = PLAIN_GZIP
        if block_size(Bytes(blob, 0, _ignore)) is not None:
            form = _form_of_blocks(location, blob, bool(BLOCK_HEAD.match(head)))
    return TextFile(location, blob.size, blob.stamp, form, range_bytes)


def _form_of_blocks(location: Location, blob: Blob, usual: bool) -> str:
    """BGZF, or PLAIN_GZIP for BGZF that other gzip data follow or whose blocks cannot be found, not being ``usual``.

    Raises InputError where it was cut off.
    """
    if usual and blob.read(max(0, blob.size - len(EOF_BLOCK)), len(EOF_BLOCK)) == EOF_BLOCK:
        return BGZF
    n_lines = 0
    try:
        for text in inflate(Bytes(blob, 0, _ignore)):
            n_lines += text.count(b"\n")
    except BrokenTextError as error:
        raise cut_off(location, n_lines, error) from error
    return PLAIN_GZIP


def cut_off(location: Location, n_lines: int, error: BrokenTextError) -> InputError:
    """What to tell of a file whose text ends after ``n_lines`` lines."""
    return InputError(
        f"{location}, after line {n_lines}: found {error}; expected a whole file; copy or make it again"
    )


def _ignore(place: int, piece: bytes) -> None:
    pass


@dataclass
class RangeReader:
    """Reads one range.

    advance: told how many bytes of the range were read
    first_block, end: after reading, the first byte of the range's own BGZF blocks and the first byte after them, both
    -1 where it has none
    """

    file: TextFile
    number: int
    advance: Callable[[int], None] = lambda _: None
    text_bytes: int = TEXT_BYTES
    first_block: int = -1
    end: int = -1
    _digests: dict[int, Any] = field(default_factory=dict)

    def buffers(self) -> Iterator[bytes]:
        """The lines of the range, in buffers of about ``text_bytes`` that end with a newline.

        A byte order mark is left out; a missing last newline is added. Raises BrokenTextError, after all whole lines
        before the damage were given out, and InputError for a file that has changed.
        """
        source = Bytes(self.file.opened(), self.number * self.file.range_bytes, self._tell)
        own, beyond = {
            BGZF: lambda: self._blocks(source),
            PLAIN_GZIP: lambda: (inflate(source), iter(())),
            ZSTD: lambda: (zstd_texts(source), iter(())),
            PLAIN: lambda: (self._plain(source), _rest(source)),
        }[self.file.form]()
        buffers = whole_lines(own, beyond, self.number == 0, self.text_bytes)
        return _without_mark(buffers) if self.number == 0 else buffers

    def digest(self) -> bytes:
        """sha256 of the range's bytes; of a file of one range, of the sha256 of each ``range_bytes`` of it."""
        return (
            b"".join(digest.digest() for _, digest in sorted(self._digests.items()))
            or hashlib.sha256().digest()
        )

    def _tell(self, place: int, piece: bytes) -> None:
        """Take note of bytes that were read, as far as they are the range's own."""
        size = self.file.range_bytes
        first = self.number * size
        stop = first + self.file.bytes_of_range(self.number)
        view = memoryview(piece)[: max(0, stop - place)]
        self.advance(len(view))
        while len(view):
            n = min(len(view), size - place % size)
            self._digests.setdefault(place // size, hashlib.sha256()).update(view[:n])
            view, place = view[n:], place + n

    def _blocks(self, source: Bytes) -> tuple[Iterator[bytes], Iterator[bytes]]:
        """The texts of the range's blocks, and of those after them."""
        stop = (self.number + 1) * self.file.range_bytes

        def own() -> Iterator[bytes]:
            if self.number and not find_block(source):
                return
            while source.place < stop and source.hold(1):
                if self.first_block < 0:
                    self.first_block = source.place
                yield _next_block(source)
                self.end = source.place

        def beyond() -> Iterator[bytes]:
            while source.hold(1):
                yield _next_block(source)

        return own(), beyond()

    def _plain(self, source: Bytes) -> Iterator[bytes]:
        stop = (self.number + 1) * self.file.range_bytes
        while source.place < stop and source.hold(1):
            n = min(len(source.data) - source.at, stop - source.place)
            source.at += n
            yield source.data[source.at - n : source.at]


def _next_block(source: Bytes) -> bytes:
    size = block_size(source)
    if size is None:
        raise BrokenTextError(
            f"bytes at byte {source.place:,} that are no BGZF block, as those before them are; compress the text anew "
            "with bgzip or gzip"
        )
    return inflate_block(source, size)


def _rest(source: Bytes) -> Iterator[bytes]:
    while source.hold(1):
        yield source.take()


class _Readable:
    """Bytes as the file that pyarrow reads from."""

    closed = False

    def __init__(self, source: Bytes) -> None:
        self.source = source

    def read(self, n_bytes: int) -> bytes:
        """Up to ``n_bytes``."""
        self.source.hold(1)
        piece = self.source.data[self.source.at : self.source.at + n_bytes]
        self.source.at += len(piece)
        return piece

    def close(self) -> None:
        """Nothing is open."""


def zstd_texts(source: Bytes) -> Iterator[bytes]:
    """The texts of all zstd frames from here to the file's end."""
    try:
        with pa.CompressedInputStream(pa.PythonFile(_Readable(source), mode="r"), "zstd") as stream:
            while piece := stream.read(READ_BYTES):
                yield piece
    except OSError as error:
        raise BrokenTextError(
            f"damaged or cut off zstd data before byte {source.place:,} ({error})"
        ) from error


def _without_mark(buffers: Iterator[bytes]) -> Iterator[bytes]:
    for first in itertools.islice(buffers, 1):
        yield first.removeprefix(_BOM)
    yield from buffers


def whole_lines(
    own: Iterator[bytes], beyond: Iterator[bytes], first: bool, text_bytes: int
) -> Iterator[bytes]:
    """The whole lines of a range from the pieces of its text and of the text beyond it.

    A range that is not the first leaves out its first line, which the range before has read to its end.
    """
    held: list[bytes] = []
    n_held, skipping = 0, not first
    try:
        for piece in own:
            if skipping:
                after = piece.find(b"\n") + 1
                skipping, piece = not after, piece[after:] if after else b""
            held.append(piece)
            n_held += len(piece)
            if n_held >= text_bytes:
                text, rest = _cut(held)
                if text:
                    yield text
                held, n_held = [rest], len(rest)
                _check_line(n_held)
        if skipping:
            return
        for piece in beyond:
            held.append(piece[: piece.find(b"\n") + 1] or piece)
            n_held += len(held[-1])
            if held[-1].endswith(b"\n"):
                break
            _check_line(n_held)
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


def _check_line(n_bytes: int) -> None:
    if n_bytes > MAX_LINE_BYTES + READ_BYTES:
        raise BrokenTextError(f"a line of over {MAX_LINE_BYTES:,} bytes; expected a text file of fragments")


def n_lines_before(file: TextFile, number: int) -> int:
    """Lines in all ranges before one, for messages. Raises InputError where they are damaged themselves."""
    n_lines = 0
    try:
        for i in range(number):
            for text in RangeReader(file, i).buffers():
                n_lines += text.count(b"\n")
    except BrokenTextError as error:
        raise cut_off(file.location, n_lines, error) from error
    return n_lines


def digest_of_parts(parts: Iterable[bytes]) -> str:
    """The sha256 (hex) of a file of one piece from that of the piece, else that of the sha256 of all pieces."""
    whole = b"".join(parts)
    return whole.hex() if len(whole) == hashlib.sha256().digest_size else hashlib.sha256(whole).hexdigest()


def digest_of_pieces(location: Location, piece_bytes: int) -> str:
    """The digest of a file in pieces of ``piece_bytes``, as it is made while ranges are read."""
    blob = blob_of(location)

    def piece(first: int) -> bytes:
        digest = hashlib.sha256()
        for start in range(first, min(first + piece_bytes, blob.size), READ_BYTES):
            digest.update(blob.read(start, min(READ_BYTES, first + piece_bytes - start)))
        return digest.digest()

    return digest_of_parts(piece(first) for first in range(0, max(1, blob.size), piece_bytes))

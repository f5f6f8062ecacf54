"""The same bytes as plain text, gzip of one and of many members, BGZF and zstd."""

import gzip
import struct
import zlib

import pyarrow as pa

END_OF_BGZF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzf(data: bytes, block: int = 100, end: bytes = END_OF_BGZF) -> bytes:
    """The SAM specification's blocked gzip, written from its text."""
    return b"".join(bgzf_block(data[i : i + block]) for i in range(0, len(data), block)) + end


def bgzf_block(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    size = 12 + 6 + len(packed) + 8
    head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H2sHH", 6, b"BC", 2, size - 1)
    return head + packed + struct.pack("<II", zlib.crc32(data), len(data))


def many_members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[i : i + 37]) for i in range(0, len(data), 37))


def zstd(data: bytes) -> bytes:
    """Two frames: as concatenated files have them."""
    half = len(data) // 2
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


FORMS = {"plain": bytes, "gzip": gzip.compress, "many members": many_members, "bgzf": bgzf, "zstd": zstd}

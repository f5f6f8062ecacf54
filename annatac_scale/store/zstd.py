"""What the head of a zstd frame says, before anything of it is decompressed (RFC 8878, 3.1.1)."""

_MAGIC = 0xFD2FB528


def content_size(frame: bytes | memoryview) -> int | None:
    """The size of a frame's content, as its head says it; None where it does not, or is no head."""
    if len(frame) < 6 or int.from_bytes(frame[:4], "little") != _MAGIC:
        return None
    descriptor = frame[4]
    is_one_segment = descriptor >> 5 & 1
    start = 5 + (1 - is_one_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (is_one_segment, 2, 4, 8)[descriptor >> 6]
    if not width or len(frame) < start + width:
        return None
    return int.from_bytes(frame[start : start + width], "little") + 256 * (width == 2)

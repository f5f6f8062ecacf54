"""A blob read as a file, against io.BytesIO."""

import io
import random
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.ingest import blob_file
from annatac_scale.ingest.blob_file import BlobFile

DATA = random.Random(3).randbytes(1000)


@dataclass(frozen=True)
class Memory:
    """A blob in memory."""

    location: str = "memory"
    size: int = len(DATA)
    stamp: int = 0

    def read(self, start: int, length: int) -> bytes:
        return DATA[start : start + length]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 400)),
        st.tuples(st.just("seek"), st.tuples(st.integers(-1200, 1200), st.sampled_from([0, 1, 2]))),
    ),
    max_size=30,
)


@given(steps=STEPS, piece_bytes=st.integers(1, 1500))
def test_a_blob_reads_as_a_file_in_memory(steps: list[tuple[str, object]], piece_bytes: int) -> None:
    with patch.object(blob_file, "_PIECE_BYTES", piece_bytes):
        found, expected = BlobFile(Memory()), io.BytesIO(DATA)
        for step, value in steps:
            if step == "read":
                assert found.read(value) == expected.read(value)  # type: ignore[call-overload]
            else:
                offset, whence = value  # type: ignore[misc]
                start = {0: 0, 1: expected.tell(), 2: len(DATA)}[whence]
                expected.seek(max(0, start + offset))
                assert found.seek(offset, whence) == expected.tell()
            assert found.tell() == expected.tell()

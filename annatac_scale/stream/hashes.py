"""Hashes that stay what they are: on any machine, with any library, in any order of samples. NumPy, no loop over cells.

splitmix64 (Steele, Lea, Flood 2014): number i of a key is mix(key + (i + 1) * GOLDEN).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def mixed(numbers: Hashes) -> Hashes:
    """What splitmix64 makes of numbers, uint64 [n]: one to one."""
    mixed = numbers.copy()
    for shift, factor in _STEPS:
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed


def numbers_of(key: np.uint64, which: NDArray[np.int64]) -> Hashes:
    """The random numbers ``which`` (0 and on) of a key, uint64 [n]."""
    numbers = which.astype(np.uint64)
    numbers += np.uint64(1)
    numbers *= _GOLDEN
    numbers += key
    return mixed(numbers)


def text_hashes(texts: "pa.StringArray | Sequence[str]", seed: int) -> Hashes:
    """A hash of each text and the seed, uint64 [n]; texts are hashed side by side, byte by byte."""
    import pyarrow as pa

    if not isinstance(texts, pa.StringArray):
        texts = pa.array(texts, pa.string())
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    lengths, starts = np.diff(starts), starts[:-1]
    letters = np.frombuffer(data or b"", np.uint8).astype(np.uint64)
    key = mixed(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    hashes = mixed(key ^ lengths.astype(np.uint64))
    by_length = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[by_length]
    for place in range(int(lengths.max(initial=0))):
        longer = by_length[np.searchsorted(sorted_lengths, place, side="right") :]
        hashes[longer] = mixed((hashes[longer] ^ letters[starts[longer] + place]) + _GOLDEN)
    return hashes

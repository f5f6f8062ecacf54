"""A hash table from byte strings to the numbers 0, 1, 2 ... for use inside numba kernels, without Python objects."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

ABSENT = -1
NO_ROOM = -2

_PRIME = np.uint64(0x100000001B3)
_BASIS = np.uint64(0xCBF29CE484222325)
_HALF = np.uint64(32)


class KeyTable(NamedTuple):
    """Keys in order of arrival; key ``i`` is ``arena[ends[i]:ends[i + 1]]``.

    slots: int32 [a power of 2, at least twice the keys it may hold], the number of a key, or ABSENT
    hashes: uint64 [room]; ends: int64 [room + 1]; arena: uint8 [bytes]; size: int64 [1], keys held
    """

    slots: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    ends: NDArray[np.int64]
    arena: NDArray[np.uint8]
    size: NDArray[np.int64]

    @property
    def room(self) -> int:
        """Keys that the table can hold."""
        return len(self.hashes)

    def key(self, number: int) -> bytes:
        """The key of a number."""
        return self.arena[self.ends[number] : self.ends[number + 1]].tobytes()

    def all_keys(self) -> list[bytes]:
        """All keys by number."""
        ends = self.ends[: self.size[0] + 1].tolist()
        arena = self.arena[: ends[-1]].tobytes()
        return [arena[a:b] for a, b in pairwise(ends)]


def empty_table(room: int = 1 << 10, key_bytes: int = 32) -> KeyTable:
    """A table with room for ``room`` keys (rounded up to a power of 2) of ``key_bytes`` on average."""
    room = 1 << (room - 1).bit_length()
    return KeyTable(
        np.full(2 * room, ABSENT, np.int32),
        np.zeros(room, np.uint64),
        np.zeros(room + 1, np.int64),
        np.zeros(room * key_bytes, np.uint8),
        np.zeros(1, np.int64),
    )


def grown(table: KeyTable, key_bytes: int) -> KeyTable:
    """The same keys in a table of twice the room, with space for one more key of ``key_bytes`` at least."""
    room = 2 * table.room
    n = int(table.size[0])
    larger = KeyTable(
        np.full(2 * room, ABSENT, np.int32),
        np.zeros(room, np.uint64),
        np.zeros(room + 1, np.int64),
        np.zeros(2 * len(table.arena) + key_bytes, np.uint8),
        table.size.copy(),
    )
    larger.hashes[:n] = table.hashes[:n]
    larger.ends[: n + 1] = table.ends[: n + 1]
    larger.arena[: table.ends[n]] = table.arena[: table.ends[n]]
    _fill_slots(larger)
    return larger


@njit(nogil=True, cache=True)
def _fill_slots(table):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table.slots) - 1)
    for number in range(table.size[0]):
        table.slots[free_slot(table.slots, mask, table.hashes[number])] = number


@njit(nogil=True, cache=True)
def free_slot(slots, mask, key_hash):  # type: ignore[no-untyped-def]
    """The first free slot for a hash."""
    slot = (key_hash ^ (key_hash >> _HALF)) & mask
    while slots[slot] != ABSENT:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(nogil=True, cache=True)
def same_bytes(x, a, y, b, n):  # type: ignore[no-untyped-def]
    """Whether ``x[a:a + n]`` equals ``y[b:b + n]``."""
    for i in range(n):  # noqa: SIM110  (all() of a generator does not compile)
        if x[a + i] != y[b + i]:
            return False
    return True


@njit(nogil=True, cache=True)
def look_up(table, text, a, b, insert):  # type: ignore[no-untyped-def]
    """The number of the key ``text[a:b]``; a new key is added where ``insert``.

    Returns ABSENT for a key that is not there and not to be added, NO_ROOM where the table has to grow first.
    """
    key_hash = _BASIS
    for i in range(a, b):
        key_hash = (key_hash ^ np.uint64(text[i])) * _PRIME
    mask = np.uint64(len(table.slots) - 1)
    slot = (key_hash ^ (key_hash >> _HALF)) & mask
    while table.slots[slot] != ABSENT:
        number = np.int64(table.slots[slot])
        begin = table.ends[number]
        if (
            table.hashes[number] == key_hash
            and table.ends[number + 1] - begin == b - a
            and same_bytes(table.arena, begin, text, a, b - a)
        ):
            return number
        slot = (slot + np.uint64(1)) & mask
    if not insert:
        return ABSENT
    number = table.size[0]
    begin = table.ends[number]
    if number == len(table.hashes) or begin + b - a > len(table.arena):
        return NO_ROOM
    for i in range(b - a):
        table.arena[begin + i] = text[a + i]
    table.ends[number + 1] = begin + b - a
    table.hashes[number] = key_hash
    table.slots[slot] = number
    table.size[0] = number + 1
    return number

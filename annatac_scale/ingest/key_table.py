"""A hash table from byte strings to the numbers 0, 1, 2 ... for use inside numba kernels, without Python objects."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from annatac_scale.store.compiled import compiled

ABSENT = -1
NO_ROOM = -2

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_TAG = np.uint64(0xFFFFFFFF00000000)
_NUMBER = np.uint64(0x00000000FFFFFFFF)
_FREE = np.uint64(0)
_ONE = np.uint64(1)


class KeyTable(NamedTuple):
    """Keys in order of arrival; key ``i`` is ``arena[ends[i]:ends[i + 1]]``.

    slots: uint64 [a power of 2, at least twice the keys it may hold], the upper half of a key's hash and, in the lower
    half, its number + 1; 0 where free
    hashes: uint64 [room]; ends: int64 [room + 1]; arena: uint8 [bytes]; size: int64 [1], keys held
    """

    slots: NDArray[np.uint64]
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
        np.zeros(2 * room, np.uint64),
        np.zeros(room, np.uint64),
        np.zeros(room + 1, np.int64),
        np.zeros(room * key_bytes, np.uint8),
        np.zeros(1, np.int64),
    )


def table_of(keys: Sequence[bytes]) -> KeyTable:
    """A table of the given keys, which differ, numbered in their order."""
    text = np.frombuffer(b"".join(keys), np.uint8)
    ends = np.cumsum([0, *map(len, keys)])
    # As much as they need: a single long key must not make all of the arena wide.
    table = empty_table(len(keys) + 1, 0)._replace(arena=np.zeros(len(text), np.uint8))
    look_up_all(table, text, ends, np.empty(len(keys), np.int64), 0)
    return table


def copied(table: KeyTable) -> KeyTable:
    """A table of its own with the same keys."""
    return KeyTable(
        table.slots.copy(), table.hashes.copy(), table.ends.copy(), table.arena.copy(), table.size.copy()
    )


def grown(table: KeyTable, key_bytes: int) -> KeyTable:
    """The same keys in a table of twice the room, with space for one more key of ``key_bytes`` at least."""
    room = 2 * table.room
    n = int(table.size[0])
    larger = KeyTable(
        np.zeros(2 * room, np.uint64),
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


@compiled
def _fill_slots(table):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table.slots) - 1)
    for number in range(table.size[0]):
        key_hash = table.hashes[number]
        slot = key_hash & mask
        while table.slots[slot] != _FREE:
            slot = (slot + _ONE) & mask
        table.slots[slot] = (key_hash & _TAG) | np.uint64(number + 1)


@intrinsic
def load_word(typingctx, array, at):  # type: ignore[no-untyped-def]
    """The eight bytes of a uint8 array from ``at`` on as one uint64: a loop over bytes takes five times as long."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(array, types.int64), generate


@compiled
def same_bytes(x, a, y, b, n):  # type: ignore[no-untyped-def]
    """Whether ``x[a:a + n]`` equals ``y[b:b + n]``."""
    if n < 8:
        for i in range(n):  # noqa: SIM110  (all() of a generator does not compile)
            if x[a + i] != y[b + i]:
                return False
        return True
    for i in range(0, n - 8, 8):
        if load_word(x, a + i) != load_word(y, b + i):
            return False
    return load_word(x, a + n - 8) == load_word(y, b + n - 8)


@compiled
def hash_bytes(text, a, b):  # type: ignore[no-untyped-def]
    """A hash, uint64, of ``text[a:b]``."""
    mixed = np.uint64(b - a) * _PRIME
    if b - a < 8:
        word = np.uint64(0)
        for i in range(a, b):
            word = (word << np.uint64(8)) | np.uint64(text[i])
        mixed = (mixed ^ word) * _PRIME
    else:
        for i in range(a, b - 8, 8):
            mixed = (mixed ^ load_word(text, i)) * _PRIME
            mixed ^= mixed >> _HALF
        mixed = (mixed ^ load_word(text, b - 8)) * _PRIME
    return mixed ^ (mixed >> _HALF)


@compiled
def look_up(table, text, a, b, insert):  # type: ignore[no-untyped-def]
    """The number of the key ``text[a:b]``; a new key is added where ``insert``.

    Returns ABSENT for a key that is not there and not to be added, NO_ROOM where the table has to grow first.
    """
    key_hash = hash_bytes(text, a, b)
    mask = np.uint64(len(table.slots) - 1)
    slot = key_hash & mask
    while table.slots[slot] != _FREE:
        found = table.slots[slot]
        if (found ^ key_hash) & _TAG == _FREE:
            number = np.int64(found & _NUMBER) - 1
            begin = table.ends[number]
            if table.ends[number + 1] - begin == b - a and same_bytes(table.arena, begin, text, a, b - a):
                return number
        slot = (slot + _ONE) & mask
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
    table.slots[slot] = (key_hash & _TAG) | np.uint64(number + 1)
    table.size[0] = number + 1
    return number


@compiled
def look_up_all(table, text, ends, numbers, at):  # type: ignore[no-untyped-def]
    """Add the keys ``text[ends[i]:ends[i + 1]]`` from ``at`` on, and put their numbers into ``numbers``.

    Returns how many keys are done: fewer than there are where the table has to grow first.
    """
    while at < len(ends) - 1:
        number = look_up(table, text, ends[at], ends[at + 1], True)
        if number == NO_ROOM:
            break
        numbers[at] = number
        at += 1
    return at

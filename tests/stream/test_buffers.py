import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.stream.buffers import BufferPool


def test_a_buffer_that_was_given_back_is_taken_again():
    pool = BufferPool()
    first = pool.take(1000)
    pool.give_back(first)
    assert pool.take(1000) is first
    assert pool.take(1000) is not first


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_buffers_are_large_enough_and_nobody_has_the_same_one(turns):
    pool, taken = BufferPool(), []
    for gives_back, size in turns:
        if gives_back and taken:
            pool.give_back(taken.pop(size % len(taken)))
        else:
            buffer = pool.take(size)
            assert len(buffer) >= size
            assert all(buffer is not other for other in taken)
            taken.append(buffer)


def test_as_many_buffers_as_are_taken_at_a_time_are_ever_made():
    pool, sizes, seen = BufferPool(), np.random.default_rng(0).integers(900, 1100, 2000), set()
    taken = []
    for size in sizes.tolist():
        taken.append(pool.take(size))
        if len(taken) == 10:
            pool.give_back(taken.pop(0))
    assert len(pool._free) + len(taken) <= 10
    for buffer in [*pool._free, *taken]:
        assert len(buffer) <= 1100 * 33 / 32
        seen.add(id(buffer))
    assert len(seen) == len(pool._free) + len(taken)


def test_threads_never_share_a_buffer():
    pool = BufferPool()

    def turn(number):
        buffer = pool.take(100 + number % 7)
        buffer[:] = number % 251
        whole = bool((buffer == number % 251).all())
        pool.give_back(buffer)
        return whole

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(turn, range(5000)))


def test_a_pickled_pool_is_empty():
    pool = BufferPool()
    pool.give_back(pool.take(10**6))
    assert len(pickle.dumps(pool)) < 1000
    assert pickle.loads(pickle.dumps(pool))._free == []

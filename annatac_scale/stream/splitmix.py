"""Random numbers for kernels: splitmix64 (Steele, Lea, Flood 2014), number i of a key is mix(key + i * GOLDEN)."""

import numpy as np
from numpy.typing import NDArray

from annatac_scale.store.compiled import compiled, inlined

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@inlined
def mix(z):  # type: ignore[no-untyped-def]
    """What splitmix64 makes of a uint64: one to one."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@inlined
def uniform(state):  # type: ignore[no-untyped-def]
    """A multiple of 2^-53 in [0, 1): times an integer below 2^52 it stays below that integer."""
    return np.float64(np.int64(mix(state) >> _S11)) * 2.0**-53


def cell_keys(cell_ids: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.uint64]:
    """Where the random numbers of each cell start, uint64 [B]; they depend on seed, epoch and cell id alone."""
    keys = np.empty(len(cell_ids), np.uint64)
    _write_keys(cell_ids, np.uint64(seed % 2**64), np.uint64(epoch), keys)
    return keys


@compiled
def _write_keys(cell_ids, seed, epoch, keys):  # type: ignore[no-untyped-def]
    base = mix(mix(seed + GOLDEN) ^ (epoch + GOLDEN))
    for i in range(len(cell_ids)):
        keys[i] = mix(base ^ mix(np.uint64(cell_ids[i]) + GOLDEN))

"""How kernels are compiled: to code that holds no lock and counts no references; and bytes and bits for them."""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "_nrt": False}

compiled = njit(**_OPTIONS)
"""For functions that allocate nothing. numba counts references to each array that a function is given or takes out of a
tuple, atomically: that took two thirds of the time of counting fragments, and threads wait for each other in it."""

multiplying = njit(fastmath={"contract"}, **_OPTIONS)
"""For such functions that multiply and add floats: both may be one instruction, which rounds once."""

inlined = njit(forceinline=True, **_OPTIONS)
"""For parts of such a function: a tuple of arrays would be copied, number by number, at each call."""


@intrinsic
def bytes_at(typing_context: Any, address: Any) -> Any:
    """The memory at an address (int64), indexed like an array of uint8. Its bounds are the caller's to keep."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy ``size`` bytes from one address to another (all int64); the two must not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target_pointer, source_pointer = (
            builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2]
        )
        cgutils.raw_memcpy(builder, target_pointer, source_pointer, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def count_ones(typing_context: Any, word: Any) -> Any:
    """How many bits of a uint64 are 1, uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate

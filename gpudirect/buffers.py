"""Finding the memory behind what an application hands over.

Anything with the buffer protocol (numpy, bytearray, mmap, a torch CPU tensor through numpy), or a plain
``(pointer, size)``. Device memory is recognised, so that it is refused by name instead of being read as host
memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from ..rdma.errors import LocalError


@dataclass(frozen=True, slots=True)
class Memory:
    """A span of memory. ``owner`` keeps it alive and where it is (a view: nobody can resize it meanwhile);
    None where the caller has to see to that (pointer and size).
    """

    address: int
    nbytes: int
    writable: bool
    owner: object


def resolve(buffer: Any) -> Memory:
    """The address and length of ``buffer``.

    :param buffer: an object with the buffer protocol (C-contiguous), or ``(pointer, size in bytes)``.
    :raises LocalError: not contiguous, empty, of another kind, or on a GPU.
    """
    if isinstance(buffer, tuple):
        if len(buffer) != 2 or not all(isinstance(x, int) and x > 0 for x in buffer):
            raise LocalError("a raw buffer is (pointer, size in bytes), both positive")
        return Memory(buffer[0], buffer[1], True, None)
    if hasattr(buffer, "__cuda_array_interface__") or getattr(buffer, "is_cuda", False):
        raise LocalError(
            "this buffer is GPU memory, and no device here registers that",
            "register pinned host memory and copy; memkv-node doctor shows the GPU ladder",
        )
    if hasattr(buffer, "numpy") and not hasattr(buffer, "__buffer__"):
        buffer = buffer.numpy()  # a torch CPU tensor
    try:
        view = memoryview(buffer)
    except TypeError:
        raise LocalError(
            f"a {type(buffer).__name__} has no memory that could be registered",
            "numpy array, bytearray, mmap or (pointer, size)",
        ) from None
    if not view.c_contiguous or not view.nbytes:
        raise LocalError("the buffer is empty or not contiguous", "numpy.ascontiguousarray")
    if view.readonly:
        return Memory(_address_readonly(view), view.nbytes, False, view)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view.cast("B") if view.ndim != 1 else view))
    return Memory(address, view.nbytes, True, view)


def _address_readonly(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)

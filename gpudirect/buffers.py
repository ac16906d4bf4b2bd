"""Finding the memory behind what an application hands over, on the host and on GPUs.

Host memory: anything with the buffer protocol (numpy, bytearray, mmap), DLPack (a torch CPU tensor), or a
plain ``(pointer, size)``. GPU memory: see :mod:`.arrays`; a plain pointer is recognised by asking the driver.
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

    The rest is about GPU memory: the device's ordinal (None: host memory), the allocation that the span lies
    in as (start, bytes), CUDA's id of that allocation, and ``reason``: why a NIC cannot be given this memory,
    so that it has to be staged; empty where registering it may be tried. ``stream`` is the one that
    ``__cuda_array_interface__`` asks to wait for.
    """

    address: int
    nbytes: int
    writable: bool
    owner: object
    device: int | None = None
    allocation: tuple[int, int] | None = None
    buffer_id: int = 0
    reason: str = ""
    stream: int | None = None


def resolve(buffer: Any) -> Memory:
    """The address and length of ``buffer``, and on which device it is.

    :param buffer: an object with the buffer protocol, ``__cuda_array_interface__`` or DLPack (C-contiguous),
        or ``(pointer, size in bytes)`` of host or GPU memory.
    :raises LocalError: not contiguous, empty, of another kind, or on a GPU that cannot be used from here.
    """
    from . import arrays  # this module stays light: host memory needs no more of it

    if isinstance(buffer, tuple):
        if len(buffer) != 2 or not all(isinstance(x, int) and x > 0 for x in buffer):
            raise LocalError("a raw buffer is (pointer, size in bytes), both positive")
        return arrays.of_pointer(buffer[0], buffer[1], True, None)
    found = arrays.of_array(buffer)
    if found is not None:
        return found
    if hasattr(buffer, "numpy") and not hasattr(buffer, "__buffer__"):
        buffer = buffer.numpy()  # a torch CPU tensor
    try:
        view = memoryview(buffer)
    except TypeError:
        raise LocalError(
            f"a {type(buffer).__name__} has no memory that could be registered",
            "an array of numpy, CuPy, torch or JAX, a bytearray, mmap or (pointer, size)",
        ) from None
    if not view.c_contiguous or not view.nbytes:
        raise LocalError("the buffer is empty or not contiguous", "numpy.ascontiguousarray")
    if view.readonly:
        return arrays.of_pointer(_address_readonly(view), view.nbytes, False, view)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view.cast("B") if view.ndim != 1 else view))
    return arrays.of_pointer(address, view.nbytes, True, view)  # it may be managed memory


def _address_readonly(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)

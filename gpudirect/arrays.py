"""Arrays of other libraries as memory: ``__cuda_array_interface__`` (2 and 3), DLPack, and bare pointers.

Which of the two an array is asked for: the first; DLPack where that has no answer (bfloat16 in JAX, and in
older versions of torch). Nothing of CuPy, torch or JAX is imported. The array or its capsule is held as the
owner of the memory, so that it stays where it is.

The driver says what kind of memory a pointer is, and so whether a NIC can be given it (:func:`obstacle`):
ordinary ``cudaMalloc`` memory may, memory that moves or that was not made for it may not, and is staged.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..rdma.errors import LocalError
from . import driver
from .buffers import Memory

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
_READ_ONLY, _COPIED = 1, 2  # flags of DLManagedTensorVersioned


def of_array(buffer: Any) -> Memory | None:
    """The memory of an array on a GPU, or of a host array that only speaks DLPack; None for anything else.

    :raises LocalError: it is on a GPU, and not contiguous, empty, or not to be reached.
    """
    if _immutable(buffer):
        buffer.block_until_ready()  # once is enough, since it never changes; JAX has no streams to name
    interface = _cuda_array_interface(buffer)
    if interface is not None:
        return _of_interface(interface, buffer)
    if not hasattr(buffer, "__dlpack_device__") or isinstance(buffer, np.ndarray):
        return None
    kind = int(buffer.__dlpack_device__()[0])
    if kind in (_CUDA, _CUDA_MANAGED):
        return _of_dlpack(buffer, on_gpu=True)
    if kind in (_CPU, _CUDA_HOST):
        try:
            memoryview(buffer)
        except (TypeError, BufferError):
            return _of_dlpack(buffer, on_gpu=False)
        return None  # the buffer protocol says more, and holds it
    raise LocalError(
        f"this array is on a device of DLPack's kind {kind}, of which memkv knows nothing", "CUDA or host"
    )


def of_pointer(
    address: int,
    nbytes: int,
    writable: bool,
    owner: object,
    *,
    on_gpu: bool = False,
    stream: int | None = None,
) -> Memory:
    """Memory by its address; whether it is on a GPU is asked of the driver, where CUDA is in use at all.

    :param on_gpu: the caller says that it is.
    :raises LocalError: it is said to be on a GPU, and there is no CUDA or CUDA does not know it.
    """
    if not on_gpu and not driver.in_use():
        return Memory(address, nbytes, writable, owner)
    try:
        cuda = driver.load()
    except driver.DriverMissing as exc:
        if not on_gpu:
            return Memory(address, nbytes, writable, owner)
        raise LocalError(f"this buffer is GPU memory, and CUDA cannot be used: {exc}") from None
    known = cuda.pointer_attributes(address)
    if known is None or (known.memory_type != driver.DEVICE and not known.managed):
        if on_gpu and known is None:
            raise LocalError(
                f"{address:#x} is said to be GPU memory, and CUDA does not know it", "was it freed?"
            )
        return Memory(address, nbytes, writable, owner)  # pinned memory is host memory
    allocation = _allocation(cuda, known, address)
    return Memory(
        address,
        nbytes,
        writable,
        owner,
        device=known.device,
        allocation=allocation,
        buffer_id=known.buffer_id,
        reason=obstacle(known, address, nbytes, allocation),
        stream=stream,
    )


def _allocation(cuda: driver.Driver, known: driver.Pointer, address: int) -> tuple[int, int] | None:
    try:
        with cuda.on(known.device):
            return cuda.mem_get_address_range(address)
    except driver.DriverError:
        return None


def obstacle(known: driver.Pointer, address: int, nbytes: int, allocation: tuple[int, int] | None) -> str:
    """Why a NIC cannot be given this memory; empty if it may be tried. Decides by what the driver said."""
    if known.managed:
        return "managed memory moves between host and device"
    if known.mempool and not known.gpu_direct:
        return "memory of a stream-ordered pool (cudaMallocAsync) does not support GPUDirect RDMA"
    if not known.legacy_ipc and not known.mapped:
        return "nothing is mapped at this address"
    if not known.legacy_ipc and not known.gpu_direct:
        return (
            "it is mapped by cuMemMap (expandable_segments) without gpuDirectRDMACapable, "
            "or this platform has no GPUDirect RDMA"
        )
    if allocation is None:
        return "the driver does not tell its allocation"
    start, size = allocation
    if address < start or address + nbytes > start + size:
        return "it spans several mappings of physical memory"
    return ""


def _cuda_array_interface(buffer: Any) -> dict[str, Any] | None:
    try:
        found = buffer.__cuda_array_interface__
    except Exception:  # no such attribute; torch: a CPU tensor, sparse, or a dtype that NumPy lacks
        return None
    return found if isinstance(found, dict) else None


def _of_interface(interface: dict[str, Any], owner: object) -> Memory:
    if interface.get("mask") is not None:
        raise LocalError("this GPU array has a mask", "its data array")
    try:
        shape = tuple(int(n) for n in interface["shape"])
        pointer, readonly = interface["data"]
        itemsize = np.dtype(interface["typestr"]).itemsize
    except (KeyError, TypeError, ValueError) as exc:
        raise LocalError(f"this GPU array's __cuda_array_interface__ is incomplete: {exc!r}") from None
    strides = interface.get("strides")
    nbytes = math.prod(shape) * itemsize
    _check(shape, strides, itemsize, nbytes, pointer)
    stream = interface.get("stream") if interface.get("version", 0) >= 3 else None
    if stream is not None and stream < 1:
        raise LocalError("this GPU array names stream 0, which its interface does not allow")
    writable = not readonly and not _immutable(owner)
    return of_pointer(int(pointer), nbytes, writable, owner, on_gpu=True, stream=stream)


def _check(shape: Sequence[int], strides: Sequence[int] | None, step: int, nbytes: int, pointer: int) -> None:
    """:param step: what two neighbours are apart, in the unit of the strides."""
    if not nbytes or not pointer:
        raise LocalError("the buffer is empty")
    if strides is None:
        return
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            raise LocalError(
                f"the array of shape {tuple(shape)} is not C-contiguous: its strides are {tuple(strides)}",
                "a contiguous array; or (pointer, size in bytes) of all its memory, and offsets into that",
            )
        step *= extent


# --- DLPack: the structs of dlpack.h 1.0, of which the unversioned one is older ---


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL: C-contiguous
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_capsule = ctypes.pythonapi
_capsule.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule.PyCapsule_GetPointer.restype = ctypes.c_void_p


def _of_dlpack(buffer: Any, on_gpu: bool) -> Memory:
    """The capsule is looked at and kept, not consumed: it gives the memory back when it is dropped itself."""
    capsule = _export(buffer, on_gpu)
    if _capsule.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        at = _capsule.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        versioned = _Versioned.from_address(at)
        if versioned.major != 1:
            raise LocalError(f"this array speaks DLPack {versioned.major}.{versioned.minor}, memkv speaks 1")
        tensor, flags = versioned.tensor, int(versioned.flags)
    elif _capsule.PyCapsule_IsValid(capsule, b"dltensor"):
        tensor = _Managed.from_address(_capsule.PyCapsule_GetPointer(capsule, b"dltensor")).tensor
        flags = 0
    else:
        raise LocalError(f"a {type(buffer).__name__} gave no DLPack capsule")
    if flags & _COPIED:
        raise LocalError("this array would only hand out a copy of its memory")
    shape = tensor.shape[: tensor.ndim] if tensor.ndim else []
    strides = tensor.strides[: tensor.ndim] if tensor.strides and tensor.ndim else None
    nbytes = -(-math.prod(shape) * tensor.bits * tensor.lanes // 8)
    pointer = (tensor.data or 0) + tensor.byte_offset
    _check(shape, strides, 1, nbytes, tensor.data or 0)
    writable = not flags & _READ_ONLY and not _immutable(buffer)
    return of_pointer(pointer, nbytes, writable, capsule, on_gpu=on_gpu)


def _export(buffer: Any, on_gpu: bool) -> Any:
    """Asks for a capsule without making any stream wait: that is what ``stream=`` of get and put is for.

    JAX takes any number for a stream's handle, so it is given none.
    """
    wish = {"stream": -1} if on_gpu and not _immutable(buffer) else {}
    try:
        try:
            return buffer.__dlpack__(**wish, max_version=(1, 0))
        except TypeError:  # older than DLPack 1.0
            return buffer.__dlpack__(**wish)
    except Exception as exc:  # libraries raise what they please
        raise LocalError(
            f"a {type(buffer).__name__} does not hand out its memory: {exc}",
            "detach() a tensor with gradients, view(torch.uint8) one of a dtype that DLPack lacks",
        ) from None


def _immutable(buffer: Any) -> bool:
    """Whether it is JAX's: others rely on such arrays never changing."""
    return hasattr(buffer, "block_until_ready")

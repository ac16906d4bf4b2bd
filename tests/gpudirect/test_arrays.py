"""Arrays of other libraries as memory: what is taken, what is refused, and why a NIC is not given some of it.

No GPU library is needed: what they hand out is made by hand (dictionaries, capsules), over the stand-in's
memory.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memkv.gpudirect import arrays
from memkv.gpudirect.arrays import _Managed, _Tensor, _Versioned, obstacle
from memkv.gpudirect.buffers import Memory, resolve
from memkv.gpudirect.driver import Pointer
from memkv.rdma.errors import LocalError

from .standin import Standin

NBYTES = 1 << 20


class CudaArray:
    """As CuPy's, numba's or torch's look from outside."""

    def __init__(self, pointer: int, shape: tuple[int, ...], typestr: str = "<f2", **more: Any) -> None:
        base = {"shape": shape, "typestr": typestr, "data": (pointer, False), "version": 3, "strides": None}
        self.__cuda_array_interface__ = {**base, **more}


@pytest.fixture
def pointer(standin: Standin) -> Iterator[int]:
    return standin.alloc(NBYTES, device=1)  # type: ignore[return-value]


# --- __cuda_array_interface__ ---


def test_an_array_and_the_allocation_that_it_lies_in(standin: Standin, pointer: int) -> None:
    array = CudaArray(pointer + 4096, (8, 16, 2))
    memory = resolve(array)
    assert memory == Memory(
        pointer + 4096,
        8 * 16 * 2 * 2,
        True,
        array,
        device=1,
        allocation=(pointer, NBYTES),
        buffer_id=standin.driver.buffer_id(pointer),
    )
    assert standin.depth == 0, "the context is left as it was"


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((8, 16, 2), None),
        ((8, 16, 2), (64, 4, 2)),
        ((1, 16, 2), (999, 4, 2)),  # what is one long has no stride that matters
        ((8, 1, 2), (4, 999, 2)),
        ((256,), (2,)),
    ],
)
def test_contiguous_arrays(pointer: int, shape: tuple[int, ...], strides: Any) -> None:
    assert resolve(CudaArray(pointer, shape, strides=strides)).nbytes == int(np.prod(shape)) * 2


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((8, 16), (2, 16)),  # transposed
        ((8, 16), (64, 2)),  # rows with gaps
        ((8, 16), (0, 2)),  # broadcast
        ((8,), (-2,)),
    ],
)
def test_others_are_refused_with_their_strides(pointer: int, shape: tuple[int, ...], strides: Any) -> None:
    with pytest.raises(LocalError, match="not C-contiguous: its strides are"):
        resolve(CudaArray(pointer, shape, strides=strides))


def test_the_stream_to_wait_for_is_kept(pointer: int) -> None:
    assert resolve(CudaArray(pointer, (4,), stream=7)).stream == 7
    assert resolve(CudaArray(pointer, (4,), stream=None)).stream is None
    assert resolve(CudaArray(pointer, (4,), version=2, stream=7)).stream is None
    with pytest.raises(LocalError, match="stream 0"):
        resolve(CudaArray(pointer, (4,), stream=0))


def test_read_only_arrays(pointer: int) -> None:
    assert not resolve(CudaArray(pointer, (4,), data=(pointer, True))).writable


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"shape": (0, 4)}, "empty"),
        ({"mask": object()}, "mask"),
        ({"typestr": "nonsense"}, "incomplete"),
        ({"data": None}, "incomplete"),
    ],
)
def test_arrays_that_say_too_little(pointer: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalError, match=words):
        resolve(CudaArray(pointer, **{"shape": (4,), **more}))


def test_memory_that_was_freed(standin: Standin) -> None:
    pointer = standin.alloc(4096)
    standin.free(pointer)
    with pytest.raises(LocalError, match="CUDA does not know it"):
        resolve(CudaArray(pointer, (4,)))


def test_without_cuda_an_array_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays.driver, "LIBRARY", "libcuda-of-nobody.so.1")
    with pytest.raises(LocalError, match="is GPU memory, and CUDA cannot be used: libcuda-of-nobody"):
        resolve(CudaArray(4096, (4,)))


def test_an_interface_that_raises_is_no_interface() -> None:
    class Tensor:  # torch raises for CPU tensors, and for gradients
        @property
        def __cuda_array_interface__(self) -> Any:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")

    with pytest.raises(LocalError, match="a Tensor has no memory"):
        resolve(Tensor())


# --- pointers ---


def test_a_device_pointer_is_recognised(pointer: int) -> None:
    memory = resolve((pointer + 100, 50))
    assert (memory.device, memory.allocation, memory.nbytes) == (1, (pointer, NBYTES), 50)


def test_host_memory_stays_host_memory(standin: Standin, pointer: int) -> None:
    data = np.zeros(100, np.uint8)
    for buffer in (data, bytearray(9), (data.ctypes.data, 100)):
        assert resolve(buffer).device is None
    standin.set(pointer, "type", 1)  # pinned
    assert resolve((pointer, 4096)).device is None


def test_managed_memory_is_device_memory_whoever_hands_it_over(standin: Standin, pointer: int) -> None:
    standin.set(pointer, "managed", 1)
    standin.set(pointer, "type", 1)
    view = (ctypes.c_uint8 * 4096).from_address(pointer)
    for buffer in (np.frombuffer(view, np.uint8), CudaArray(pointer, (4,)), (pointer, 4)):
        memory = resolve(buffer)
        assert memory.device == 1
        assert memory.reason == "managed memory moves between host and device"


# --- which memory a NIC can be given ---

PLAIN = Pointer(2, 0, 7, 0x1000, 0x9000, False, True, True, 0, True, 0)
RANGE = (0x1000, 0x9000)


@pytest.mark.parametrize(
    ("change", "allocation", "words"),
    [
        ({}, RANGE, ""),
        ({"gpu_direct": None, "mempool": None, "handle_types": None}, RANGE, ""),  # an old driver
        ({"gpu_direct": False}, RANGE, ""),  # plain memory of a GPU without: the ladder says so, not this
        ({"managed": True}, RANGE, "managed memory"),
        ({"legacy_ipc": False, "mempool": 99, "gpu_direct": False}, RANGE, "cudaMallocAsync"),
        ({"legacy_ipc": False, "mempool": 99, "gpu_direct": None}, RANGE, "cudaMallocAsync"),
        ({"legacy_ipc": False, "mempool": 99, "gpu_direct": True}, RANGE, ""),
        ({"legacy_ipc": False, "gpu_direct": False}, RANGE, "expandable_segments"),
        ({"legacy_ipc": False, "gpu_direct": True}, RANGE, ""),
        ({"legacy_ipc": False, "gpu_direct": True}, (0x1000, 0x1800), "spans several mappings"),
        ({"legacy_ipc": False, "mapped": False}, RANGE, "nothing is mapped"),
        ({}, None, "does not tell"),
    ],
)
def test_obstacles(change: dict[str, Any], allocation: tuple[int, int] | None, words: str) -> None:
    said = obstacle(replace(PLAIN, **change), 0x2000, 0x1000, allocation)
    assert (words in said) if words else said == ""


def test_the_end_of_the_allocation_is_inside_it() -> None:
    assert obstacle(PLAIN, 0x1000, 0x9000, RANGE) == ""
    assert obstacle(PLAIN, 0x1000, 0x9001, RANGE)
    assert obstacle(PLAIN, 0xFFF, 0x10, RANGE)


# --- DLPack ---

CUDA, CPU, ROCM = 2, 1, 10


class Dlpack:
    """An array that speaks DLPack only, as torch's bfloat16 and JAX's do. Counts who holds its memory."""

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        *,
        bits: int = 16,
        kind: int = CUDA,
        offset: int = 0,
        version: int | None = 1,
        flags: int = 0,
    ) -> None:
        self.kind = kind
        self.asked: list[dict[str, Any]] = []
        self.dropped = 0
        self._version = version
        extents = (ctypes.c_int64 * len(shape))(*shape)
        steps = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        tensor = _Tensor(pointer, kind, 0, len(shape), 4, bits, 1)
        tensor.shape = ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64))
        if steps is not None:
            tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
        tensor.byte_offset = offset
        self._keep = extents, steps
        if version is None:
            self._struct: Any = _Managed(tensor=tensor)
        else:
            self._struct = _Versioned(major=version, flags=flags, tensor=tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **wish: Any) -> Any:
        self.asked.append(wish)
        if self._version is None and "max_version" in wish:
            raise TypeError("unexpected keyword argument 'max_version'")
        self._dropped = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._drop)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        name = b"dltensor" if self._version is None else b"dltensor_versioned"
        destructor = ctypes.cast(self._dropped, ctypes.c_void_p)
        return new(ctypes.addressof(self._struct), name, destructor)

    def _drop(self, _: int) -> None:
        self.dropped += 1


@pytest.mark.parametrize("version", [None, 1])
def test_a_capsule_is_read_and_held(pointer: int, version: int | None) -> None:
    array = Dlpack(pointer, (4, 8), (8, 1), offset=256, version=version)
    memory = resolve(array)
    assert (memory.address, memory.nbytes, memory.device) == (pointer + 256, 64, 1)
    assert memory.writable
    assert array.asked[0]["stream"] == -1, "no stream is made to wait"
    assert array.dropped == 0
    del memory
    gc.collect()
    assert array.dropped == 1


@pytest.mark.parametrize(("bits", "nbytes"), [(4, 16), (8, 32), (16, 64), (64, 256)])
def test_elements_of_every_size(pointer: int, bits: int, nbytes: int) -> None:
    assert resolve(Dlpack(pointer, (4, 8), bits=bits)).nbytes == nbytes


def test_strides_of_dlpack_are_in_elements(pointer: int) -> None:
    with pytest.raises(LocalError, match="not C-contiguous"):
        resolve(Dlpack(pointer, (4, 8), (1, 4)))


def test_what_is_read_only_or_a_copy(pointer: int) -> None:
    assert not resolve(Dlpack(pointer, (4,), flags=1)).writable
    with pytest.raises(LocalError, match="only hand out a copy"):
        resolve(Dlpack(pointer, (4,), flags=2))


def test_a_newer_dlpack_and_other_devices_are_refused(pointer: int) -> None:
    with pytest.raises(LocalError, match=r"DLPack 2\.0"):
        resolve(Dlpack(pointer, (4,), version=2))
    with pytest.raises(LocalError, match="kind 10"):
        resolve(Dlpack(pointer, (4,), kind=ROCM))


def test_a_tensor_that_refuses_says_why(pointer: int) -> None:
    class Tensor(Dlpack):
        def __dlpack__(self, **wish: Any) -> Any:
            raise BufferError("Can't export tensors that require gradient")

    with pytest.raises(LocalError, match="require gradient"):
        resolve(Tensor(pointer, (4,)))


def test_jax_is_awaited_has_no_stream_to_name_and_is_never_written(pointer: int) -> None:
    class Array(Dlpack):
        ready = 0

        def block_until_ready(self) -> None:
            self.ready += 1

    class Ready(CudaArray):
        ready = 0

        def block_until_ready(self) -> None:
            self.ready += 1

    other = Ready(pointer, (4,))
    assert not resolve(other).writable
    assert other.ready == 1
    array = Array(pointer, (4,))
    memory = resolve(array)
    assert array.ready == 1
    assert "stream" not in array.asked[0]
    assert not memory.writable


def test_a_host_array_that_speaks_dlpack_only() -> None:
    data = np.arange(64, dtype=np.uint8)
    array = Dlpack(data.ctypes.data, (64,), bits=8, kind=CPU)
    memory = resolve(array)
    assert (memory.address, memory.nbytes, memory.device) == (data.ctypes.data, 64, None)
    assert array.asked == [{"max_version": (1, 0)}]


def test_numpy_is_held_by_its_buffer() -> None:
    data = np.zeros(64, np.uint8)
    memory = resolve(data)
    gone = weakref.ref(data)
    del data
    assert gone() is not None
    assert isinstance(memory.owner, memoryview)


def test_nothing_is_left_holding_the_buffer() -> None:
    data = bytearray(4096)
    gc.disable()
    try:
        memory = resolve(data)
        with pytest.raises(BufferError):
            data.extend(b"x")
        del memory
        data.extend(b"x")
    finally:
        gc.enable()

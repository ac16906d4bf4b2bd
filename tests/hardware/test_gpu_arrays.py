"""Arrays of real libraries on a real GPU: what memkv makes of their memory, and slabs of its own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from memkv.gpudirect import arrays, driver
from memkv.gpudirect.buffers import Memory, resolve
from memkv.gpudirect.ladder import decide
from memkv.gpudirect.order import After, Before
from memkv.gpudirect.probe import ask
from memkv.gpudirect.slabs import Slabs
from memkv.rdma.errors import LocalError
from memkv.rdma.tcp import TcpFabric

NBYTES = 4 << 20


def in_a_thread_without_a_context(buffer: Any) -> Memory:
    """As a peer's own thread is, where nobody has made any context current."""
    found: list[Memory] = []
    thread = threading.Thread(target=lambda: found.append(resolve(buffer)))
    thread.start()
    thread.join()
    assert found, "it raised"
    return found[0]


def test_what_is_found_does_not_depend_on_the_thread_s_context(cupy: Any) -> None:
    array = cupy.zeros(NBYTES, cupy.uint8)
    here, there = resolve(array), in_a_thread_without_a_context(array)
    assert (here.address, here.allocation, here.reason) == (there.address, there.allocation, there.reason)
    raw = in_a_thread_without_a_context((array.data.ptr, NBYTES))
    assert raw.device == here.device == 0


def test_cupy_s_pool_and_its_streams(cupy: Any) -> None:
    with cupy.cuda.Stream(non_blocking=True) as stream:
        array = cupy.zeros((4, 1000), cupy.float16)[1:3]
        memory = resolve(array)
    assert (memory.address, memory.nbytes, memory.writable) == (array.data.ptr, 4000, True)
    assert memory.stream == stream.ptr
    assert memory.reason == ""
    with pytest.raises(LocalError, match="not C-contiguous"):
        resolve(cupy.zeros((4, 1000))[:, 1:3])
    assert resolve((array.data.ptr, 4000)).allocation == memory.allocation


def test_managed_memory_is_staged(cupy: Any) -> None:
    memory = cupy.cuda.ManagedMemory(NBYTES)
    array = cupy.ndarray(NBYTES, cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
    assert resolve(array).reason == "managed memory moves between host and device"
    assert resolve((memory.ptr, NBYTES)).device == 0


def test_memory_of_a_stream_ordered_pool_is_staged(cupy: Any) -> None:
    try:
        pool = cupy.cuda.MemoryAsyncPool()
    except Exception as exc:  # an old driver
        pytest.skip(f"no stream-ordered pools: {exc}")
    with cupy.cuda.using_allocator(pool.malloc):
        memory = resolve(cupy.zeros(NBYTES, cupy.uint8))
    assert memory.device == 0
    assert "cudaMallocAsync" in memory.reason


def test_pinned_memory_is_host_memory(cupy: Any) -> None:
    pinned = cupy.cuda.alloc_pinned_memory(NBYTES)
    array = np.frombuffer(pinned, np.uint8, NBYTES)
    memory = resolve(array)
    assert (memory.device, memory.address) == (None, array.ctypes.data)


def test_cupy_through_dlpack(cupy: Any) -> None:
    class Only:
        """An array that speaks DLPack and nothing else."""

        def __init__(self, array: Any) -> None:
            self.__dlpack__ = array.__dlpack__
            self.__dlpack_device__ = array.__dlpack_device__

    array = cupy.zeros((3, 1024), cupy.float32)
    memory = arrays._of_dlpack(Only(array), on_gpu=True)
    assert (memory.address, memory.nbytes, memory.device) == (array.data.ptr, array.nbytes, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "float32"])
def test_torch(torch: Any, dtype: str) -> None:
    tensor = torch.zeros(8, 1024, dtype=getattr(torch, dtype), device="cuda")[2:]
    memory = resolve(tensor)
    nbytes = tensor.numel() * tensor.element_size()
    assert (memory.address, memory.nbytes, memory.device) == (tensor.data_ptr(), nbytes, 0)
    assert memory.writable
    with pytest.raises(LocalError, match="not C-contiguous"):
        resolve(tensor.t())


def test_torch_on_the_host_and_with_gradients(torch: Any) -> None:
    tensor = torch.zeros(1000, dtype=torch.bfloat16)
    memory = resolve(tensor)
    assert (memory.address, memory.nbytes, memory.device) == (tensor.data_ptr(), 2000, None)
    with pytest.raises(LocalError, match="detach"):
        resolve(torch.zeros(10, device="cuda", requires_grad=True))


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX finds no GPU")
    for dtype in (jax.numpy.float32, jax.numpy.bfloat16):
        array = jax.numpy.ones((16, 1024), dtype)
        memory = resolve(array)
        assert (memory.nbytes, memory.device, memory.writable) == (array.nbytes, 0, False)


# --- memory of our own ---


def test_slabs_are_arrays_of_cupy_and_torch(cupy: Any, request: pytest.FixtureRequest) -> None:
    slabs = Slabs(0, slab_bytes=8 << 20)
    block = slabs.take(NBYTES)
    assert resolve(block).reason == ""
    array = block.array((2, NBYTES // 4), "float16")
    array[:] = 3
    assert int(block.array()[1]) == 0x42
    try:
        torch = request.getfixturevalue("torch")
    except pytest.skip.Exception:
        pass
    else:
        tensor = torch.as_tensor(block, device="cuda")
        assert (tensor.data_ptr(), tensor.dtype) == (block.address, torch.uint8)
        assert float(tensor.view(torch.float16)[-1]) == 3.0
    del array
    stream = cupy.cuda.Stream(non_blocking=True)
    block.close(stream)
    stream.synchronize()
    slabs.close()


# --- order ---


def test_a_stream_is_waited_for(cuda: driver.Driver, cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        a = cupy.random.random((2000, 2000), dtype=cupy.float32)
        for _ in range(20):
            a = a @ a * 1e-3
    with Before(cuda, 0, stream) as before:
        before.wait(60)
    assert stream.done
    after = After(cuda, 0)
    if after.needed != "impossible":
        after.visible()


# --- asking ---


def test_the_machine_answers_and_something_is_decided(cuda: driver.Driver) -> None:
    fabric = TcpFabric(("127.0.0.1", 0))
    try:
        answers = ask(fabric, 0)
    finally:
        fabric.close()
    assert answers.gpu
    assert decide(answers).get.name == "staged"

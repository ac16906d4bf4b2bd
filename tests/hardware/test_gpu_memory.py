"""What the driver says about memory on a GPU, and whether it hands out dma-bufs of it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from memkv.gpudirect import driver
from memkv.gpudirect.buffers import resolve

NBYTES = 4 << 20  # two large pages


def test_facts_are_plausible(cuda: driver.Driver) -> None:
    facts = cuda.facts(0)

    assert facts.name
    assert facts.memory > 1 << 30
    assert facts.capability >= (5, 0)
    assert facts.ordering in (driver.ORDERING_NONE, driver.ORDERING_OWNER, driver.ORDERING_ALL)


def test_an_interior_pointer_leads_to_its_allocation(cuda: driver.Driver, cupy: Any) -> None:
    memory = cupy.cuda.Memory(NBYTES)
    inside = cupy.ndarray(1000, cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 12345))

    found = resolve(inside)

    assert found.address == memory.ptr + 12345
    assert found.nbytes == 1000
    assert found.device == 0
    assert found.allocation == (memory.ptr, NBYTES)
    assert not found.reason


def test_an_allocation_that_was_freed_is_another_one(cuda: driver.Driver) -> None:
    with cuda.on(0):
        first = cuda.mem_alloc(NBYTES)
        before = cuda.buffer_id(first)
        cuda.mem_free(first)
        second = cuda.mem_alloc(NBYTES)
        after = cuda.buffer_id(second)
        cuda.mem_free(second)

    assert before
    assert after
    assert before != after


def test_host_memory_is_host_memory(cuda: driver.Driver) -> None:
    assert cuda.pointer_attributes(id(object())) is None
    assert resolve(bytearray(4096)).device is None


def test_a_dma_buf_is_handed_out_where_the_gpu_says_so(cuda: driver.Driver) -> None:
    says, refusal = cuda.facts(0).dma_buf, ""
    with cuda.on(0):
        memory = cuda.mem_alloc(NBYTES)
        try:
            fd = cuda.export_dma_buf(memory, NBYTES)
        except driver.DriverError as exc:
            refusal = str(exc)
        else:
            name = os.readlink(f"/proc/self/fd/{fd}")
            os.close(fd)
        finally:
            cuda.mem_free(memory)

    if refusal and not says:
        pytest.skip(f"no dma-buf of this GPU's memory: {refusal}")
    assert not refusal, f"the attribute says that it can, the driver refuses: {refusal}"
    assert "dmabuf" in name or "anon_inode" in name


def test_flushing_writes_is_allowed(cuda: driver.Driver) -> None:
    if not cuda.facts(0).flush_options & driver.FLUSH_HOST:
        pytest.skip("this GPU has no flush of GPUDirect writes")
    with cuda.on(0):
        cuda.flush_gpu_direct_rdma_writes()


def test_sync_memops_can_be_set(cuda: driver.Driver) -> None:
    with cuda.on(0):
        memory = cuda.mem_alloc(NBYTES)
        cuda.set_sync_memops(memory)
        cuda.mem_free(memory)

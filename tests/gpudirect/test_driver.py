"""The driver's calls, over a stand-in that records them: names, arguments, errors, contexts."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memkv.gpudirect import driver
from memkv.gpudirect.driver import DriverError, DriverMissing
from memkv.rdma.errors import LocalError

from .standin import Standin, build

# --- absent, old, broken ---


def test_importing_opens_nothing_and_absence_is_told_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    assert not driver.in_use()
    assert driver.available() == "libcuda-of-nobody.so.1 is not installed"
    with pytest.raises(DriverMissing, match="not installed"):
        driver.load()


def test_a_library_without_the_functions_is_no_driver(tmp_path: Path) -> None:
    build()  # skips where there is no gcc
    library = tmp_path / "libempty.so"
    subprocess.run(["gcc", "-shared", "-o", library, "-xc", "/dev/null"], check=True)
    with pytest.raises(DriverMissing, match="is no CUDA driver"):
        driver.load(str(library))


def test_a_driver_without_a_gpu_is_asked_again(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_loaded", {})
    standin.fail("cuInit", 100)
    assert driver.available() == "cuInit: CUDA_ERROR_NO_DEVICE (100)"
    standin.lib.standin_reset()
    assert driver.available() is None


def test_an_old_driver_says_what_it_lacks() -> None:
    standin = Standin(build(old=True))
    pointer = standin.alloc(1 << 20)
    known = standin.driver.pointer_attributes(pointer)
    assert known is not None
    assert (known.gpu_direct, known.mempool, known.handle_types) == (None, None, None)
    with pytest.raises(DriverError, match=r"driver \(11.2\) has no cuMemGetHandleForAddressRange") as caught:
        standin.driver.export_dma_buf(pointer, 4096)
    assert (caught.value.code, caught.value.errno) == (0, errno.ENOSYS)
    assert not standin.driver.has("cuFlushGPUDirectRDMAWrites")
    standin.close()


def test_cuda_that_nobody_has_initialised_is_not_initialised_for_the_asking() -> None:
    """A parent that initialises CUDA breaks it for the children that it forks."""
    program = f"""
import ctypes, numpy
from memkv.gpudirect import driver
from memkv.gpudirect.buffers import resolve
driver.LIBRARY = {build()!r}
lib = ctypes.CDLL(driver.LIBRARY)
resolve(numpy.zeros(9)); resolve((4096, 1))
assert not driver.in_use() and lib.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 3
lib.cuInit(0)
assert driver.in_use()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_errors_carry_cuda_s_number_and_ours(standin: Standin) -> None:
    for rc, code, words in (
        (1, errno.EINVAL, "CUDA_ERROR_INVALID_VALUE"),
        (2, errno.ENOMEM, "error 2"),
        (3, errno.ENODEV, "child of a fork"),
        (801, errno.EOPNOTSUPP, "CUDA_ERROR_NOT_SUPPORTED"),
        (719, errno.EIO, "error 719"),
    ):
        standin.fail("cuMemAlloc", rc)
        with pytest.raises(DriverError, match="cuMemAlloc: ") as caught:
            standin.alloc(4096)
        assert (caught.value.code, caught.value.errno) == (rc, code)
        assert words in str(caught.value)


# --- devices and contexts ---


def test_facts_need_no_context(standin: Standin) -> None:
    for which, value in ((75, 9), (116, 1), (117, 1), (118, 100), (124, 1)):
        standin.attribute(which, value)
    facts = standin.driver.facts(1)
    assert (facts.name, facts.bus, facts.capability) == ("Stand-in 1", "0000:18:00.0", (9, 0))
    assert (facts.dma_buf, facts.gpu_direct, facts.flush_options, facts.ordering) == (True, True, 1, 100)
    assert facts.memory == 80 << 30
    assert standin.log() == []


def test_an_attribute_that_the_driver_does_not_know(standin: Standin) -> None:
    standin.attribute(124, -1)
    assert standin.driver.attribute(0, driver.DMA_BUF_SUPPORTED) is None
    assert standin.driver.facts(0).dma_buf is False


def test_a_device_that_is_not_there(standin: Standin) -> None:
    with pytest.raises(LocalError, match="no cuda:7"):
        standin.driver.on(7)


def test_contexts_nest_and_are_restored_when_something_fails(standin: Standin) -> None:
    cuda = standin.driver
    before = cuda.current_context()
    with cuda.on(0):
        outer = cuda.current_context()
        with cuda.on(1):
            assert cuda.current_context() != outer
        with pytest.raises(DriverError), cuda.on(1):
            cuda.mem_free(12345)
        assert cuda.current_context() == outer
    assert cuda.current_context() == before
    assert standin.depth == 0


# --- memory ---


def test_what_is_known_of_a_pointer(standin: Standin) -> None:
    cuda = standin.driver
    pointer = standin.alloc(10_000, device=1)
    standin.set(pointer, "pool", 0xDEADBEEF00000001)

    known = cuda.pointer_attributes(pointer + 5000)

    assert known is not None
    assert (known.memory_type, known.device, known.managed, known.mapped) == (driver.DEVICE, 1, False, True)
    assert (known.range_start, known.range_size) == (pointer, 10_000)
    assert (known.mempool, known.gpu_direct, known.legacy_ipc) == (0xDEADBEEF00000001, True, True)
    assert known.buffer_id == cuda.buffer_id(pointer + 9999)
    assert cuda.buffer_id(pointer + 10_000) == 0
    assert cuda.pointer_attributes(np.zeros(4).ctypes.data) is None


def test_bytes_go_there_and_back(standin: Standin) -> None:
    cuda = standin.driver
    pointer = standin.alloc(4096)
    data, back = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096].copy(), np.zeros(4096, np.uint8)
    standin.log()
    with cuda.on(0):
        stream = cuda.stream_create()
        cuda.memcpy_htod_async(pointer, data.ctypes.data, 4096, stream)
        cuda.memcpy_dtod_async(pointer, pointer + 2048, 100, stream)
        cuda.memcpy_dtoh_async(back.ctypes.data, pointer, 4096, stream)
        cuda.stream_synchronize(stream)
        assert cuda.stream_query(stream)
        cuda.stream_destroy(stream)
    data[:100] = data[2048:2148]
    assert (data == back).all()
    said = [f"htod 4096 on {stream:#x}", f"dtod 100 on {stream:#x}", f"dtoh 4096 on {stream:#x}"]
    assert standin.log() == ["stream 1", *said, f"synchronize {stream:#x}"]


def test_rows_with_a_pitch(standin: Standin) -> None:
    cuda = standin.driver
    pointer = standin.alloc(4096)
    data, back = np.arange(64, dtype=np.uint8).reshape(8, 8), np.zeros((8, 4), np.uint8)
    with cuda.on(0):
        cuda.memcpy_2d_async(pointer, 16, data.ctypes.data, 8, 4, 8, 0, into_device=True)
        cuda.memcpy_2d_async(back.ctypes.data, 4, pointer, 16, 4, 8, 0, into_device=False)
    assert (back == data[:, :4]).all()
    assert standin.log()[-2:] == ["2d 1>2 on 0", "2d 2>1 on 0"]


def test_pinned_memory_is_for_every_context(standin: Standin) -> None:
    cuda = standin.driver
    with cuda.on(0):
        standin.log()
        pointer = cuda.host_alloc(8192)
        cuda.host_free(pointer)
        cuda.host_register(4096, 8192)
        cuda.host_unregister(4096)
        assert cuda.mem_get_info() == (40 << 30, 80 << 30)
    assert standin.log() == ["host_alloc 8192 1", "host_free", "host_register 8192 1", "host_unregister"]


def test_a_dma_buf_is_exported_with_the_flags_asked_for(standin: Standin) -> None:
    pointer = standin.alloc(1 << 20)
    standin.log()
    standin.fail("cuMemGetHandleForAddressRange", 801)
    for pcie in (False, True):
        with pytest.raises(DriverError) as caught:
            standin.driver.export_dma_buf(pointer, 1 << 20, pcie=pcie)
        assert caught.value.errno == errno.EOPNOTSUPP
    standin.fail("cuMemGetHandleForAddressRange", 0)
    with pytest.raises(DriverError, match="INVALID_VALUE"):
        standin.driver.export_dma_buf(pointer + 4096, 1 << 20, pcie=True)
    assert standin.log() == ["export +0x1000 0x100000 flags 1"]


# --- streams and events ---


def test_events(standin: Standin) -> None:
    cuda = standin.driver
    with cuda.on(0):
        standin.log()
        event = cuda.event_create()
        timed = cuda.event_create(timing=True)
        cuda.event_record(event, 7)
        cuda.stream_wait_event(9, event)
        standin.hold(True)
        assert not cuda.event_query(event)
        standin.hold(False)
        assert cuda.event_query(event)
        assert cuda.event_elapsed_ms(event, timed) == timed - event
        cuda.event_synchronize(event)
        for each in (event, timed):
            cuda.event_destroy(each)
    assert standin.log() == [
        "event 2",
        "event 0",
        "record on 0x7",
        f"wait 0x9 for {event:#x}",
        "event_synchronize",
        "destroy",
        "destroy",
    ]


def test_a_lost_context_is_an_error_not_an_answer(standin: Standin) -> None:
    standin.fail("cuEventQuery", 719)
    with pytest.raises(DriverError, match="cuEventQuery: error 719"):
        standin.driver.event_query(0x1000)


def test_the_context_is_told_to_order_copies_once(standin: Standin) -> None:
    with standin.driver.on(0):
        standin.log()
        standin.driver.ctx_set_sync_memops()
        standin.driver.ctx_set_sync_memops()
    assert standin.log() == ["flags 0x80"]

"""Registrations of GPU memory: shared, counted, addresses right, and found out when the memory was freed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from memkv.gpudirect.arrays import of_pointer
from memkv.gpudirect.buffers import Memory
from memkv.gpudirect.registry import Registry
from memkv.rdma.errors import LocalError, NotRegistered
from memkv.rdma.fabric import Domain, Region, Registered
from memkv.rdma.native._rdma import lib
from memkv.rdma.tcp import TcpFabric

from .standin import Standin

PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20
ZERO_BASED = 0x100000  # what the fake device calls the start of a dma-buf


class Device(Domain):
    """A domain whose device takes dma-bufs, at addresses of its own, on two rails."""

    def __init__(self, fabric: TcpFabric) -> None:
        super().__init__(fabric)
        self.registered: list[tuple[int, int, int, tuple[int, int] | None]] = []
        self.withdrawn = 0
        self.refuse = 0
        self.longest = 1 << 60
        self.tried: list[int] = []

    def _register(self, address: int, length: int, access: int) -> Registered:
        raise NotImplementedError

    def _register_device(
        self, address: int, length: int, access: int, dma_buf: tuple[int, int] | None
    ) -> Registered:
        self.tried.append(length)
        if self.refuse or length > self.longest:
            raise NotRegistered("no", self.refuse or errno.ENOMEM)
        if dma_buf is not None:
            os.fstat(dma_buf[0])  # open still
        self.registered.append((address, length, access, dma_buf))
        n = len(self.registered)
        first = address if dma_buf is None else ZERO_BASED
        return [n], [(first, 10 * n, 10 * n + 1), (first, 10 * n + 2, 10 * n + 3)], 0

    def _unregister(self, region: Region) -> None:
        self.withdrawn += len(region.handles)

    def endpoint(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        for region in list(self.regions.values()):
            region.close()


@pytest.fixture
def device() -> Iterator[Device]:
    fabric = TcpFabric()
    made = Device(fabric)
    yield made
    made.close()
    fabric.close()


@pytest.fixture
def registry(standin: Standin) -> Registry:
    standin.lib.standin_plain(1)
    return Registry(standin.driver)


def part(pointer: int, offset: int, nbytes: int) -> Memory:
    return of_pointer(pointer + offset, nbytes, True, "owner", on_gpu=True)


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_buffers_of_one_allocation_share_a_registration(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(8 * MIB)
    open_before = fds()
    a = registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    b = registry.acquire(device, part(pointer, 3 * MIB + 512, 4096), remote_read=False, way="dma-buf")

    assert device.registered == [(pointer, 8 * MIB, 1, device.registered[0][3])]
    assert a.registration is b.registration
    assert len(registry) == 1
    assert fds() == open_before, "the file descriptor of the export is closed"
    a.close()
    assert device.withdrawn == 0
    b.close()
    b.close()
    assert device.withdrawn == 1
    assert (len(registry), device.regions) == (0, {})


def test_a_window_begins_where_its_buffer_does_on_every_rail(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(8 * MIB)
    window = registry.acquire(device, part(pointer, MIB + 512, 4096), remote_read=False, way="dma-buf")

    region = window.region
    assert (region.address, region.length) == (pointer + MIB + 512, 4096)
    assert region.desc.rails == ((ZERO_BASED + MIB + 512, 11), (ZERO_BASED + MIB + 512, 13))
    entry = lib.mkv_table_at(device.table.ptr, region.id)
    assert (entry.base, entry.length, entry.nrails) == (0, 4096, 2)
    assert (entry.rail[1].iova, entry.rail[1].lkey) == (ZERO_BASED + MIB + 512, 12)


def test_what_others_may_read_is_registered_no_further_than_its_pages(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(8 * MIB)
    memory = part(pointer, MIB + 512, 4096)
    window = registry.acquire(device, memory, remote_read=True, way="dma-buf", region_id=77)
    address, length, access, _ = device.registered[0]
    assert (address, length, access) == (pointer + MIB, 2 * PAGE, 2)
    assert window.region.id == 77
    assert window.region.desc.rails[0][0] == ZERO_BASED + 512


def test_an_allocation_that_is_too_large_is_registered_by_the_pages_of_its_buffers(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(8 * MIB)
    device.longest = 4 * MIB
    a = registry.acquire(device, part(pointer, MIB + 512, 4096), remote_read=False, way="dma-buf")
    again = registry.acquire(device, part(pointer, MIB + 512, 4096), remote_read=False, way="dma-buf")
    assert device.tried == [8 * MIB, 2 * PAGE]
    assert a.registration is again.registration
    assert a.region.desc.rails[0][0] == ZERO_BASED + 512
    with pytest.raises(NotRegistered):
        registry.acquire(device, part(pointer, 0, 6 * MIB), remote_read=False, way="dma-buf")
    with pytest.raises(NotRegistered):
        registry.acquire(device, part(pointer, 0, 8 * MIB), remote_read=False, way="dma-buf")
    assert device.tried[2:] == [8 * MIB, 6 * MIB, 8 * MIB], "the same is not tried twice"


def test_rights_ways_and_domains_are_not_mixed(standin: Standin, registry: Registry, device: Device) -> None:
    pointer = standin.alloc(MIB)
    memory = part(pointer, 0, MIB)
    other = Device(device.fabric)  # type: ignore[arg-type]
    windows = [
        registry.acquire(d, memory, remote_read=r, way=w)  # type: ignore[arg-type]
        for d in (device, other)
        for r in (False, True)
        for w in ("dma-buf", "peermem")
    ]
    assert len(registry) == 8
    assert len({id(w.registration) for w in windows}) == 8
    for window in windows:
        window.close()


def test_by_address_nothing_is_exported(standin: Standin, registry: Registry, device: Device) -> None:
    pointer = standin.alloc(MIB)
    standin.log()
    window = registry.acquire(device, part(pointer, 512, 64), remote_read=False, way="peermem")
    source = registry.acquire(device, part(pointer, 512, 64), remote_read=True, way="peermem")
    assert device.registered == [(pointer, MIB, 1, None), (pointer + 512, 64, 2, None)]
    assert window.region.desc.rails[0][0] == source.region.desc.rails[0][0] == pointer + 512
    assert not any("export" in s for s in standin.log())


def test_an_allocation_of_odd_size_is_exported_in_whole_pages(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(5000)
    standin.log()
    registry.acquire(device, part(pointer, 0, 5000), remote_read=False, way="dma-buf")
    assert f"export +0 {2 * PAGE:#x} flags 0" in standin.log()


# --- order of copies ---


def test_copies_are_ordered_in_the_buffer_s_own_context(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(MIB, device=1)
    standin.log()
    registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    assert "set 6=1 in 0xc1" in standin.log()
    assert standin.depth == 0


def test_memory_that_cannot_be_told_orders_its_whole_context(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(MIB)
    standin.fail("cuPointerSetAttribute", 1)
    standin.log()
    registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    assert "flags 0x80" in standin.log()


def test_without_order_there_is_no_registration(standin: Standin, registry: Registry, device: Device) -> None:
    pointer = standin.alloc(MIB)
    standin.fail("cuPointerSetAttribute", 1)
    standin.fail("cuCtxSetFlags", 1)
    with pytest.raises(NotRegistered, match="does not order its copies"):
        registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    assert len(registry) == 0


# --- refusals leave nothing ---


def test_an_export_that_fails(standin: Standin, registry: Registry, device: Device) -> None:
    pointer = standin.alloc(MIB)
    standin.fail("cuMemGetHandleForAddressRange", 801)
    with pytest.raises(NotRegistered, match=r"exports no dma-buf of it.*NOT_SUPPORTED") as caught:
        registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert (len(registry), device.regions) == (0, {})


def test_a_device_that_refuses(standin: Standin, registry: Registry, device: Device) -> None:
    pointer = standin.alloc(MIB)
    before = fds()
    device.refuse = errno.ENOMEM
    for _ in range(3):
        with pytest.raises(NotRegistered) as caught:
            registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
        assert caught.value.errno == errno.ENOMEM
    assert (len(registry), device.regions, fds()) == (0, {}, before)
    device.refuse = 0
    registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf").close()


def test_a_region_id_that_is_taken_leaves_no_registration(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(MIB)
    memory = part(pointer, 0, MIB)
    first = registry.acquire(device, memory, remote_read=False, way="dma-buf", region_id=5)
    with pytest.raises(LocalError):
        registry.acquire(device, memory, remote_read=True, way="dma-buf", region_id=5)
    assert len(registry) == 1
    first.close()
    assert device.regions == {}


def test_memory_with_an_obstacle_is_not_even_tried(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(MIB)
    standin.set(pointer, "managed", 1)
    with pytest.raises(NotRegistered, match="managed"):
        registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    host = Memory(4096, 4096, True, None)
    with pytest.raises(LocalError, match="host memory"):
        registry.acquire(device, host, remote_read=False, way="dma-buf")
    assert device.registered == []


# --- freed under a registration ---


def test_memory_freed_under_a_registration_is_found(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer, other = standin.alloc(MIB), standin.alloc(MIB)
    a = registry.acquire(device, part(pointer, 0, 512), remote_read=False, way="dma-buf")
    b = registry.acquire(device, part(pointer, 512, 512), remote_read=False, way="dma-buf")
    c = registry.acquire(device, part(other, 0, 512), remote_read=False, way="dma-buf")
    assert registry.stale([a, b, c]) == []
    standin.free(pointer)
    assert registry.stale([a, b, c]) == [a, b]
    assert registry.stale([c]) == []
    assert registry.stale([b]) == [b], "for good"


def test_another_allocation_at_the_same_address_is_another(
    standin: Standin, registry: Registry, device: Device
) -> None:
    pointer = standin.alloc(MIB)
    memory = part(pointer, 0, MIB)
    old = registry.acquire(device, memory, remote_read=False, way="dma-buf")
    standin.set(pointer, "id", 4711)  # freed, and allocated anew at the same place

    assert registry.stale([old]) == [old]
    with pytest.raises(LocalError, match="was freed"):
        registry.acquire(device, memory, remote_read=False, way="dma-buf")
    new = registry.acquire(device, part(pointer, 0, MIB), remote_read=False, way="dma-buf")
    assert new.registration is not old.registration
    old.close()
    assert device.withdrawn == 1
    assert registry.stale([new]) == []
    new.close()
    assert (device.withdrawn, len(registry)) == (2, 0)


def test_one_question_per_registration_whatever_the_number_of_buffers(
    standin: Standin, registry: Registry, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = standin.alloc(MIB)
    windows = [
        registry.acquire(device, part(pointer, i * 512, 512), remote_read=False, way="dma-buf")
        for i in range(100)
    ]
    asked: list[int] = []
    real = standin.driver.buffer_id
    monkeypatch.setattr(standin.driver, "buffer_id", lambda p: asked.append(p) or real(p))
    assert registry.stale(windows) == []
    assert len(asked) == 1


def test_a_window_outside_its_region_is_refused(device: Device) -> None:
    region = device.register_device(0x10000, 4096, dma_buf=None)
    for address, length in ((0xFFFF, 10), (0x10000, 4097), (0x10000 + 4095, 2), (0x10000, 0)):
        with pytest.raises(LocalError, match="inside"):
            device.window(region, address, length)
    assert replace(region.desc, id=0) == replace(device.window(region, 0x10000, 4096).desc, id=0)

"""Asking the machine: READs of our own over both fabrics, and the step down from dma-buf on real verbs.

The GPU is libcuda's stand-in; its memory is this host's, and where /dev/udmabuf is, its dma-bufs are real
ones.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from memkv.gpudirect import driver, probe
from memkv.gpudirect.arrays import of_pointer
from memkv.gpudirect.ladder import Read, Step, decide
from memkv.gpudirect.probe import Side, ask, host_side, timed_read
from memkv.gpudirect.registry import Registry
from memkv.rdma import devices
from memkv.rdma.errors import NotRegistered
from memkv.rdma.fabric import Fabric
from memkv.rdma.tcp import TcpFabric

from .. import udmabuf
from ..conftest import make_fabric
from .standin import Standin

MIB = 1 << 20


@pytest.fixture
def fabric(fabric_name: str) -> Iterator[Fabric]:
    made = make_fabric(fabric_name, listen=True)
    yield made
    made.close()


def test_a_read_from_ourselves_is_timed_and_every_byte_compared(fabric: Fabric) -> None:
    found = timed_read(fabric, host_side(3 * MIB + 12345), host_side(3 * MIB + 12345))
    assert found.ok, found.text
    assert found.gbps > 0.001
    assert found.text == "every byte as it should be"


def test_a_byte_that_arrives_wrong_is_seen(fabric: Fabric) -> None:
    sink = host_side(MIB)

    def spoiled() -> Any:
        data = sink.read().copy()
        data[4097] ^= 1
        return data

    found = timed_read(fabric, host_side(MIB), replace(sink, read=spoiled))
    assert found == Read(False, 0.0, "1 of 1048576 bytes differ, from byte 4097 on")


def test_what_cannot_be_registered_is_an_answer(fabric: Fabric) -> None:
    def refuse(*_: Any) -> Any:
        raise NotRegistered("no room in BAR1", errno.ENOMEM)

    side = host_side(4096)
    assert timed_read(fabric, replace(side, register=refuse), side) == Read(text="no room in BAR1")


def test_a_read_that_the_other_side_refuses_is_an_answer(fabric: Fabric) -> None:
    """As READs out of a BAR fail: after posting, with a code."""
    side = host_side(MIB)

    def shorter(domain: Any, remote_read: bool) -> Any:
        region = side.register(domain, remote_read)
        region.desc = replace(region.desc, length=region.length // 2)
        return region

    found = timed_read(fabric, replace(side, register=shorter), host_side(MIB))
    assert not found.ok
    assert found.text


def test_nothing_of_a_probe_is_left_registered(fabric: Fabric) -> None:
    made: list[Any] = []
    real = fabric.domain

    def domain() -> Any:
        made.append(real())
        return made[-1]

    fabric.domain = domain  # type: ignore[method-assign]
    timed_read(fabric, host_side(MIB), host_side(MIB))
    assert len(made) == 2
    assert all(not d.regions for d in made)


# --- a GPU, as far as a stand-in goes ---


@dataclass
class Nic:
    """A rail of a fabric that says it takes dma-bufs."""

    device: Any


def capable(standin: Standin) -> None:
    for which in (driver.DMA_BUF_SUPPORTED, driver.GPU_DIRECT_RDMA_SUPPORTED):
        standin.attribute(which, 1)
    standin.attribute(driver.GPU_DIRECT_RDMA_WRITES_ORDERING, driver.ORDERING_OWNER)


def test_without_cuda_the_answer_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    answers = ask(None, 0)
    assert answers.cuda_missing == "libcuda-of-nobody.so.1 is not installed"
    assert answers.kernel
    assert decide(answers).put.name == "staged"


def test_over_tcp_nothing_is_allocated_for_a_probe(standin: Standin) -> None:
    capable(standin)
    fabric = TcpFabric(("127.0.0.1", 0))
    answers = ask(fabric, 1)
    assert (answers.gpu, answers.cuda, answers.gpu_dma_buf) == ("Stand-in 1 (cuda:1)", "12.4", True)
    assert decide(answers).get.reason == "the tcp fabric reaches host memory only"
    assert standin.log() == []
    fabric.close()


class Reaching(TcpFabric):
    """A fabric that reaches the stand-in's memory as if it were a NIC given a dma-buf of it."""

    name = "verbs"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0))
        rail = devices.Device("fake0", "fake", (), 1, 1, 1, 1, 1, True, False, {"dma-buf": "takes it"})
        self.rails = [Nic(rail)]
        self.by_address_refused = errno.EFAULT
        self.slow: set[bool] = set()

    def domain(self) -> Any:
        made = super().domain()

        def register_device(
            address: int, length: int, *, dma_buf: Any, remote_read: bool = False, **more: Any
        ):
            if dma_buf is None and self.by_address_refused:
                raise NotRegistered("no module", self.by_address_refused)
            return made.register(address, length, remote_read=remote_read)

        made.register_device = register_device  # type: ignore[method-assign]
        return made


@pytest.fixture
def reaching() -> Iterator[Reaching]:
    made = Reaching()
    yield made
    made.close()


def test_a_way_that_works_is_tried_both_ways_and_taken(standin: Standin, reaching: Reaching) -> None:
    capable(standin)
    standin.lib.standin_plain(1)

    answers = ask(reaching, 0, nbytes=2 * MIB)

    assert answers.host.ok
    assert answers.dma_buf.export == Step(True, 0, "exported")
    assert answers.dma_buf.register == Step(True, 0, "registered")
    assert answers.dma_buf.get.ok, answers.dma_buf.get.text
    assert answers.dma_buf.put.ok, answers.dma_buf.put.text
    assert answers.nics[0].name == "fake0"
    fair = replace(answers, host=Read(True, 1e-6, ""))  # this is a busy machine's loopback, not a NIC
    assert (decide(fair).get.name, decide(fair).put.name) == ("dma-buf", "dma-buf")
    said = standin.log()
    assert said.count("free") == 1, "what was allocated for it is given back"
    assert standin.depth == 0


def test_a_flush_comes_before_the_bytes_are_looked_at(standin: Standin, reaching: Reaching) -> None:
    capable(standin)
    standin.lib.standin_plain(1)
    standin.attribute(driver.GPU_DIRECT_RDMA_WRITES_ORDERING, driver.ORDERING_NONE)
    standin.attribute(driver.GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, driver.FLUSH_HOST)

    ask(reaching, 0, nbytes=MIB)

    said = standin.log()
    flushed = said.index("flush 0 100 in 0xc0")
    assert any(s.startswith("dtoh") for s in said[flushed:])
    assert not any(s.startswith("dtoh") for s in said[:flushed])


def test_an_export_that_fails_is_recorded_and_no_read_is_tried(standin: Standin, reaching: Reaching) -> None:
    capable(standin)
    standin.fail("cuMemGetHandleForAddressRange", 801)
    answers = ask(reaching, 0, nbytes=MIB)
    assert answers.dma_buf.export.errno == errno.EOPNOTSUPP
    assert answers.dma_buf.get == Read()
    assert (
        "exporting failed: cuMemGetHandleForAddressRange: CUDA_ERROR_NOT_SUPPORTED"
        in decide(answers).get.reason
    )


def test_peermem_is_the_next_rung(
    standin: Standin, reaching: Reaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    capable(standin)
    standin.fail("cuMemGetHandleForAddressRange", 801)
    monkeypatch.setattr(probe, "peermem", lambda: "loaded")
    assert ask(reaching, 0, nbytes=MIB).by_peermem.register == Step(False, errno.EFAULT, "no module")
    reaching.by_address_refused = 0
    answers = replace(ask(reaching, 0, nbytes=MIB), host=Read(True, 1e-6, ""))
    assert (decide(answers).get.name, decide(answers).put.name) == ("peermem", "peermem")


def test_whatever_fails_in_the_middle_is_an_answer(standin: Standin, reaching: Reaching) -> None:
    capable(standin)
    standin.lib.standin_plain(1)
    standin.fail("dtoh", 719)
    answers = ask(reaching, 0, nbytes=MIB)
    assert "error 719" in answers.dma_buf.get.text
    standin.fail("cuPointerGetAttributes", 719)
    answers = ask(reaching, 0, nbytes=MIB)
    assert decide(answers).get.reason.startswith("asking failed: cuPointerGetAttributes: error 719")
    assert standin.log().count("free") == 2


def test_a_full_gpu_is_an_answer(standin: Standin, reaching: Reaching) -> None:
    capable(standin)
    standin.fail("cuMemAlloc", 2)
    assert "no memory to try it with: cuMemAlloc" in decide(ask(reaching, 0)).get.reason


# --- real verbs ---


@pytest.fixture
def verbs(fabric: Fabric) -> Fabric:
    if fabric.name != "verbs":
        pytest.skip("for verbs")
    return fabric


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"])
def test_soft_roce_answers_staged_with_the_reason(standin: Standin, verbs: Fabric, fabric_name: str) -> None:
    if not devices.names():
        pytest.skip("no RDMA device here")
    capable(standin)
    standin.log()
    answers = ask(verbs, 0, nbytes=2 * MIB)
    if answers.nics[0].driver != "rxe":
        pytest.skip("this device may take dma-bufs")
    decision = decide(answers)
    assert (decision.get.name, decision.put.name) == ("staged", "staged")
    assert "rxe" in decision.get.reason
    assert "takes none" in decision.get.reason
    assert standin.log() == [], "nothing is allocated where there is nothing to try"


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"])
def test_a_real_dma_buf_is_refused_and_everything_steps_down(
    standin: Standin, verbs: Fabric, fabric_name: str
) -> None:
    """Exported by the driver's call, registered by the registry, refused by the kernel: errno 95."""
    if not devices.names():
        pytest.skip("no RDMA device here")
    if why := udmabuf.missing():
        pytest.skip(why)
    pointer = standin.alloc(2 * MIB)
    memory = of_pointer(pointer, 2 * MIB, True, None, on_gpu=True)
    registry, domain = Registry(standin.driver), verbs.domain()
    for remote_read in (False, True):
        with pytest.raises(NotRegistered, match="takes no dma-buf") as caught:
            registry.acquire(domain, memory, remote_read=remote_read, way="dma-buf")
        assert caught.value.errno == errno.EOPNOTSUPP
    assert (len(registry), domain.regions) == (0, {})
    domain.close()


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"])
def test_by_address_a_nic_reads_into_and_out_of_memory_that_is_not_the_cpu_s(
    standin: Standin, verbs: Fabric, fabric_name: str
) -> None:
    """The peermem rung end to end on real verbs: windows, addresses and keys, both ways; the stand-in's
    memory can be registered by its address without any module.
    """
    if not devices.names():
        pytest.skip("no RDMA device here")
    pointer = standin.alloc(2 * MIB)
    memory = of_pointer(pointer + 4096 + 512, MIB, True, None, on_gpu=True)
    there, here = probe.device_side(standin.driver, memory, "peermem"), host_side(MIB)
    assert timed_read(verbs, there, here).ok
    assert timed_read(verbs, here, there).ok
    assert not np.frombuffer(_bytes(pointer, 4096 + 512), np.uint8).any(), "nothing before it was touched"


def _bytes(address: int, nbytes: int) -> bytes:
    import ctypes

    return ctypes.string_at(address, nbytes)


def test_sides_are_what_they_say() -> None:
    side: Side = host_side(100)
    side.write(np.arange(100, dtype=np.uint8))
    assert (side.read() == np.arange(100)).all()

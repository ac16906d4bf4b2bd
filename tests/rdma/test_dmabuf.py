"""Memory that is not the CPU's: dma-bufs and their addresses, and what a device that cannot take them says.

soft-RoCE takes no dma-buf, which is what a machine without GPUDirect answers, too: the refusal is seen on it
with a real dma-buf.
"""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memkv.rdma import _pv, devices, dmabuf
from memkv.rdma.errors import DeviceError, LocalError, NotRegistered
from memkv.rdma.fabric import Fabric
from memkv.rdma.verbs import VerbsDomain, VerbsFabric

from .. import udmabuf

PAGE = dmabuf.PAGE
BASE = 0x7F1234500000
READ_FLAG, WRITE_FLAG = 4, 1


class Refused(Exception):
    def __init__(self, code: int) -> None:
        self.error_code = code


class Region:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs, self.closed = args, kwargs, False
        self.lkey, self.rkey = 11, 22

    def close(self) -> None:
        self.closed = True


def verbs(**names: Any) -> Any:
    """pyverbs as far as registering goes."""
    known: dict[str, Any] = {
        "MREx": None,
        "DmaBufMR": Region,
        "MR": Region,
        "PyverbsError": Refused,
        "PyverbsRDMAError": Refused,
        "IBV_ACCESS_REMOTE_READ": READ_FLAG,
        "IBV_ACCESS_LOCAL_WRITE": WRITE_FLAG,
    }
    return SimpleNamespace(**{**known, **names})


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(names) -> a domain over two rails of a pyverbs that has these."""

    def make(**names: Any) -> VerbsDomain:
        here = verbs(**names)
        for module in (dmabuf, _pv):
            monkeypatch.setattr(module, "pv", lambda: here)
        monkeypatch.setattr("memkv.rdma.verbs.pv", lambda: here)
        made = VerbsDomain.__new__(VerbsDomain)
        rails = [SimpleNamespace(device=SimpleNamespace(name=f"mlx5_{i}")) for i in range(2)]
        fabric = SimpleNamespace(contexts=[], rails=rails)
        here.PD = lambda ctx: None
        VerbsDomain.__init__(made, fabric)  # type: ignore[arg-type]
        made.pds = ["pd0", "pd1"]
        return made

    return make


# --- ranges and addresses ---


@pytest.mark.parametrize(
    ("address", "length", "start", "size"),
    [
        (BASE, PAGE, BASE, PAGE),
        (BASE, 1, BASE, PAGE),
        (BASE + 512, PAGE, BASE, 2 * PAGE),
        (BASE + PAGE - 1, 2, BASE, 2 * PAGE),
        (BASE + PAGE - 1, 1, BASE, PAGE),
        (BASE + 3 * PAGE + 512, 10 * PAGE - 512, BASE + 3 * PAGE, 10 * PAGE),
    ],
)
def test_whole_pages_around_a_range(address: int, length: int, start: int, size: int) -> None:
    assert dmabuf.span(address, length) == (start, size)


def test_pages_of_64_kib() -> None:
    assert dmabuf.span(0x10001000, 0x10000, page=0x10000) == (0x10000000, 0x20000)


def test_older_pyverbs_has_addresses_from_near_zero(domain: Any) -> None:
    address = BASE + 3 * PAGE + 512

    region = domain().register_device(address, 4096, dma_buf=(9, 3 * PAGE + 512))

    assert region.address == address
    assert region.desc.rails == ((3 * PAGE + 512, 22), (3 * PAGE + 512, 22))
    for pd, mr in zip(("pd0", "pd1"), region.handles, strict=True):
        assert mr.args == (pd, 4096, WRITE_FLAG)
        assert mr.kwargs == {"dmabuf": 9, "offset": 3 * PAGE + 512}


def test_newer_pyverbs_has_the_memory_s_own_addresses(domain: Any) -> None:
    address = BASE + 512

    region = domain(MREx=Region).register_device(address, 4096, dma_buf=(9, 512), remote_read=True)

    assert region.desc.rails == ((address, 22), (address, 22))
    assert region.handles[0].args == ("pd0", 4096, READ_FLAG)
    assert region.handles[0].kwargs == {"iova": address, "fd": 9, "fd_offset": 512}


@pytest.mark.parametrize("refusal", [Refused(errno.EOPNOTSUPP), TypeError("no keyword argument 'iova'")])
def test_new_pyverbs_on_an_old_kernel_falls_back(domain: Any, refusal: Exception) -> None:
    made: list[Any] = []

    class Refusing(Region):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            raise refusal

    region = domain(MREx=Refusing).register_device(BASE + 512, 4096, dma_buf=(9, 512))

    assert region.desc.rails == ((512, 22), (512, 22))
    assert [m.closed for m in made] == [True, True], "one that is only dropped ends the process"


def test_peermem_registers_by_address(domain: Any) -> None:
    region = domain().register_device(BASE + 512, 4096, dma_buf=None)

    assert region.desc.rails == ((BASE + 512, 22), (BASE + 512, 22))
    assert region.handles[1].kwargs == {"address": BASE + 512}


def test_c_never_looks_at_device_memory(domain: Any) -> None:
    from memkv.rdma.native._rdma import lib

    made = domain()
    region = made.register_device(BASE, 4096, dma_buf=(9, 0))

    assert lib.mkv_table_at(made.table.ptr, region.id).base == 0


def test_dma_buf_and_address_must_have_the_same_place_in_their_page(domain: Any) -> None:
    with pytest.raises(LocalError, match="whole pages"):
        domain().register_device(BASE + 512, 4096, dma_buf=(9, 0))


# --- what a refusal says ---


@pytest.mark.parametrize(
    ("dma_buf", "code", "words"),
    [
        ((9, 0), errno.EOPNOTSUPP, "its driver takes no dma-buf"),
        ((9, 0), errno.EPROTONOSUPPORT, "its driver takes no dma-buf"),
        ((9, 0), errno.ENOMEM, "BAR1"),
        ((9, 0), errno.EINVAL, "as a dma-buf: Invalid argument"),
        (None, errno.EFAULT, "modprobe nvidia_peermem"),
    ],
)
def test_refusal_carries_errno_and_reason_and_leaves_nothing(
    domain: Any, dma_buf: tuple[int, int] | None, code: int, words: str
) -> None:
    made: list[Region] = []

    def second_refuses(*args: Any, **kwargs: Any) -> Region:
        if made:
            raise Refused(code)
        made.append(Region(*args, **kwargs))
        return made[0]

    here = domain(MR=second_refuses, DmaBufMR=second_refuses)
    with pytest.raises(NotRegistered, match="mlx5_1") as caught:
        here.register_device(BASE, 4096, dma_buf=dma_buf)

    assert caught.value.errno == code
    assert words in str(caught.value)
    assert made[0].closed
    assert not here.regions


def test_tcp_reaches_host_memory_only() -> None:
    from memkv.rdma.tcp import TcpFabric

    fabric = TcpFabric()
    domain = fabric.domain()
    with pytest.raises(NotRegistered, match="host memory only") as caught:
        domain.register_device(BASE, 4096, dma_buf=(9, 0))
    assert caught.value.errno == errno.EOPNOTSUPP
    domain.close()
    fabric.close()


# --- real verbs ---


@pytest.fixture
def real() -> Any:
    if not devices.names():
        pytest.skip("no RDMA device here: run the tests under script/softroce")
    if _pv.missing():
        pytest.skip(_pv.missing())
    fabric: Fabric = VerbsFabric([devices.select()])
    domain = fabric.domain()
    yield domain
    domain.close()
    fabric.close()


@pytest.mark.verbs
def test_soft_roce_refuses_a_real_dma_buf(real: VerbsDomain) -> None:
    if why := udmabuf.missing():
        pytest.skip(why)
    if real.verbs.rails[0].device.driver != "rxe":
        pytest.skip("this device may take it")
    with udmabuf.stand(1 << 20) as device:
        device.map[:5] = b"hello"
        with pytest.raises(NotRegistered, match="takes no dma-buf") as caught:
            real.register_device(BASE, 1 << 20, dma_buf=(device.fd, 0))
        assert device.map[:5] == b"hello"
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not real.regions
    assert not devices.probe(devices.names()[0]).dma_buf, "the probe and the attempt disagree"


@pytest.mark.verbs
def test_address_that_is_no_memory_of_this_process_is_refused(real: VerbsDomain) -> None:
    with pytest.raises(NotRegistered) as caught:
        real.register_device(0x7F0000000000 - (1 << 30), 1 << 20, dma_buf=None)
    assert caught.value.errno in (errno.EFAULT, errno.ENOMEM)


@pytest.mark.verbs
def test_the_domain_works_on_after_a_refusal(real: VerbsDomain) -> None:
    with Path("/dev/null").open() as nothing, pytest.raises(DeviceError):
        real.register_device(BASE, 4096, dma_buf=(nothing.fileno(), 0))
    view = np.zeros(4096, np.uint8)
    real.register(view.ctypes.data, 4096, owner=view).close()

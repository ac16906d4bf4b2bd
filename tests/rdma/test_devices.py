"""Devices: found, probed and chosen, with reasons; a real device is asked where there is one."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

import pytest

from memkv.rdma import _pv, clock, devices
from memkv.rdma.devices import Device, Port
from memkv.rdma.errors import DeviceError, LocalError
from memkv.rdma.gid import Gid
from tests.conftest import NO_DEVICE

# --- choosing ---


def a_port(address: str = "10.0.0.7", *, number: int = 1, active: bool = True, mtu: int = 4096) -> Port:
    gid = Gid(3, ipaddress.IPv6Address(f"::ffff:{address}"), "RoCE v2", "eth0")
    return Port(number, active, mtu, 5, 1 << 30, 0, "Ethernet", (gid,))


def a_device(name: str, *ports: Port) -> Device:
    return Device(name, "mlx5_core", ports, 16, 16, 32768, 30, 1 << 40, True, True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Device]:
    """A machine with the devices that a test puts into the dict; it carries 10.0.0.7 and 10.0.0.8."""
    found: dict[str, Device] = {}
    monkeypatch.setattr(devices, "names", lambda: sorted(found))
    monkeypatch.setattr(devices, "probe", lambda name: found[name])
    monkeypatch.setattr(devices, "local_addresses", lambda: ["127.0.0.1", "10.0.0.7", "10.0.0.8"])
    return found


def test_no_device_says_how_to_get_one(machine: dict[str, Device]) -> None:
    with pytest.raises(DeviceError, match=r"no RDMA device .*modprobe rdma_rxe"):
        devices.select()


def test_unknown_device_names_those_that_exist(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port())

    with pytest.raises(LocalError, match=r"no RDMA device mlx5_9 .*mlx5_0"):
        devices.select("mlx5_9")


def test_device_that_carries_the_address_goes_first(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port("10.0.0.7"))
    machine["mlx5_1"] = a_device("mlx5_1", a_port("10.0.0.8", mtu=1024))

    assert devices.select(toward="10.0.0.8").device.name == "mlx5_1"
    assert devices.select(toward="10.0.0.7").device.name == "mlx5_0"


def test_address_that_the_machine_carries_goes_before_a_longer_packet(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port("192.0.2.1"))
    machine["mlx5_1"] = a_device("mlx5_1", a_port("10.0.0.8", mtu=1024))

    assert devices.select().device.name == "mlx5_1"


def test_port_that_is_down_is_passed_over(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port(active=False), a_port("10.0.0.8", number=2))

    assert devices.select().port.number == 2


def test_user_takes_device_and_port(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port("10.0.0.7"), a_port("10.0.0.8", number=2))
    machine["mlx5_1"] = a_device("mlx5_1", a_port("10.0.0.7"))

    taken = devices.select("mlx5_0", 2, toward="10.0.0.7")

    assert (taken.device.name, taken.port.number) == ("mlx5_0", 2)
    assert taken.reason.startswith("mlx5_0 port 2: GID index 3, 10.0.0.8 on eth0")


def test_nothing_usable_lists_what_was_looked_at(machine: dict[str, Device]) -> None:
    machine["mlx5_0"] = a_device("mlx5_0", a_port(active=False))
    machine["mlx5_1"] = a_device("mlx5_1", dataclasses.replace(a_port(), gids=()))

    with pytest.raises(DeviceError, match=r"mlx5_0 port 1: not active; mlx5_1 port 1: no GID"):
        devices.select()


def test_without_pyverbs_probing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing", lambda: "pyverbs cannot be used: No module named 'pyverbs'")

    with pytest.raises(DeviceError, match="apt install python3-pyverbs"):
        devices.probe("mlx5_0")


def test_memlock_is_a_limit_and_whether_it_binds() -> None:
    limit, binds = devices.memlock()

    assert limit == -1 or limit >= 0
    assert isinstance(binds, bool)


# --- a real device ---


@pytest.fixture
def name() -> str:
    if not devices.names():
        pytest.skip(NO_DEVICE)
    if _pv.missing():
        pytest.skip(_pv.missing())
    return devices.names()[0]


@pytest.mark.verbs
def test_probe_tells_what_the_device_can_do(name: str) -> None:
    device = devices.probe(name)

    assert device.name == name
    assert device.max_rd_atomic >= 1
    assert device.max_init_rd_atomic >= 1
    assert device.max_qp_wr >= 64
    assert device.max_sge >= 2  # a live line and a payload in one request
    assert device.max_mr >= 1 << 30
    assert set(device.notes) == {"dma-buf", "odp"}
    assert all(device.notes.values())
    port = device.active_port
    assert port is not None
    assert port.mtu in (256, 512, 1024, 2048, 4096)
    assert port.max_msg >= 1 << 20
    assert port.gids
    assert port.link in ("Ethernet", "InfiniBand")


@pytest.mark.verbs
def test_soft_roce_takes_no_dma_buf(name: str) -> None:
    device = devices.probe(name)
    if device.driver != "rxe":
        pytest.skip(f"{name} is a {device.driver}")

    assert not device.dma_buf
    assert "no dma-buf" in device.notes["dma-buf"]


@pytest.mark.verbs
def test_selection_is_on_an_address_of_this_machine(name: str) -> None:
    taken = devices.select()

    assert str(taken.gid.gid.address) in devices.local_addresses()
    assert taken.gid.gid.kind in ("RoCE v2", "IB")
    assert devices.select(toward=str(taken.gid.gid.address)).gid.gid == taken.gid.gid


@pytest.mark.verbs
def test_unknown_gid_index_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match=r"index 9999 \(--gid-index"):
        devices.select(gid_index=9999)


# --- the clock ---

FLAG = "processor : 0\nflags\t\t: fpu vme hypervisor lahf_lm\n"
REAL = "processor : 0\nflags\t\t: fpu vme lahf_lm\n"
ARM = "processor : 0\nFeatures : fp asimd\n"

CLOCKS = [
    ("a real machine", {"proc/cpuinfo": REAL, "sys/class/dmi/id/sys_vendor": "Dell Inc."}, None),
    ("a cloud's real machine", {"proc/cpuinfo": REAL, "sys/class/dmi/id/sys_vendor": "Amazon EC2"}, None),
    ("a flag and no name", {"proc/cpuinfo": FLAG}, "unknown"),
    ("KVM under QEMU", {"proc/cpuinfo": FLAG, "sys/class/dmi/id/sys_vendor": "QEMU"}, "QEMU"),
    ("Hyper-V", {"proc/cpuinfo": FLAG, "sys/class/dmi/id/product_name": "Virtual Machine"}, "Hyper-V"),
    ("Xen", {"proc/cpuinfo": REAL, "sys/hypervisor/type": "xen"}, "Xen"),
    (
        "user-mode Linux",
        {"proc/cpuinfo": "vendor_id : User Mode Linux\nmodel name : UML\n"},
        "User-mode Linux",
    ),
    ("ARM, real", {"proc/cpuinfo": ARM, "sys/class/dmi/id/sys_vendor": "Ampere"}, None),
    ("ARM, a guest by its firmware", {"proc/cpuinfo": ARM, "sys/class/dmi/id/sys_vendor": "QEMU"}, "QEMU"),
    (
        "ARM, a cloud's real machine",
        {
            "proc/cpuinfo": ARM,
            "sys/class/dmi/id/sys_vendor": "Amazon EC2",
            "sys/class/dmi/id/product_name": "c7g.metal",
        },
        None,
    ),
    (
        "ARM, by the device tree",
        {"proc/cpuinfo": ARM, "proc/device-tree/hypervisor/compatible": "linux,kvm\0"},
        "linux,kvm",
    ),
    ("nothing can be read", {}, None),
]


@pytest.mark.parametrize("case", CLOCKS, ids=[c[0] for c in CLOCKS])
def test_hypervisor(case: tuple[str, dict[str, str], str | None], tmp_path: Path) -> None:
    _, files, expected = case
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert clock.hypervisor(tmp_path) == expected

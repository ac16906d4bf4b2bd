"""RDMA devices of this machine: listing, probing, and choosing one with a reason."""

from __future__ import annotations

import ipaddress
import itertools
import os
import resource
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import gid
from ._pv import HINT, missing, pv
from .errors import DeviceError, LocalError

SYS = gid.SYS
MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a device, as the device reports it."""

    number: int
    active: bool
    mtu: int  # bytes of the active path MTU
    mtu_enum: int
    max_msg: int  # longest message, bytes
    lid: int
    link: str  # "Ethernet" or "InfiniBand"
    gids: tuple[gid.Gid, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do. Booleans are the outcome of a probe, with the reason in ``notes``."""

    name: str
    driver: str
    ports: tuple[Port, ...]
    max_rd_atomic: int  # READs that it serves at once for one queue pair
    max_init_rd_atomic: int  # READs that it keeps under way on one queue pair
    max_qp_wr: int
    max_sge: int
    max_mr: int  # bytes
    dma_buf: bool
    odp: bool
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def active_port(self) -> Port | None:
        return next((p for p in self.ports if p.active), None)


def names() -> list[str]:
    """Devices known to the kernel, in order, whether or not pyverbs is there."""
    return sorted(p.name for p in SYS.iterdir()) if SYS.is_dir() else []


def local_addresses() -> list[str]:
    """The IP addresses of this machine's interfaces (from ``ip``; empty if that is not installed)."""
    try:
        out = subprocess.run(
            ["ip", "-o", "addr"], capture_output=True, text=True, timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in out.splitlines():
        words = line.split()
        for kind, value in itertools.pairwise(words):
            if kind in ("inet", "inet6"):
                found.append(value.split("/")[0])
    return found


def probe(name: str) -> Device:
    """Opens a device and asks it everything that memkv wants to know.

    :raises DeviceError: it cannot be opened, or pyverbs is missing.
    """
    if missing():
        raise DeviceError(missing(), 0, HINT)
    try:
        ctx = pv().Context(name=name)
    except pv().PyverbsError as exc:
        raise DeviceError(
            f"device {name} cannot be opened: {exc}",
            getattr(exc, "error_code", 0),
            "apt install ibverbs-providers; is /dev/infiniband/uverbs* there and readable?",
        ) from None
    try:
        attr = ctx.query_device()
        ports = tuple(_port(ctx, name, n) for n in range(1, attr.phys_port_cnt + 1))
        dma_buf, why_dma = _probe_dma_buf(ctx)
        odp, why_odp = _probe_odp(ctx)
        driver = (
            (SYS / name / "device" / "driver").resolve().name if (SYS / name / "device").exists() else "rxe"
        )
        return Device(
            name=name,
            driver=driver,
            ports=ports,
            max_rd_atomic=attr.max_qp_rd_atom,
            max_init_rd_atomic=attr.max_qp_init_rd_atom,
            max_qp_wr=attr.max_qp_wr,
            max_sge=attr.max_sge,
            max_mr=attr.max_mr_size,
            dma_buf=dma_buf,
            odp=odp,
            notes={"dma-buf": why_dma, "odp": why_odp},
        )
    finally:
        ctx.close()


def _port(ctx: object, name: str, number: int) -> Port:
    attr = ctx.query_port(number)  # type: ignore[attr-defined]
    link = (SYS / name / "ports" / str(number) / "link_layer").read_text().strip()
    return Port(
        number=number,
        active=int(attr.state) == int(pv().IBV_PORT_ACTIVE),
        mtu=MTU_BYTES.get(int(attr.active_mtu), 1024),
        mtu_enum=int(attr.active_mtu),
        max_msg=attr.max_msg_sz,
        lid=attr.lid,
        link=link,
        gids=tuple(gid.read_table(name, number)),
    )


def _probe_dma_buf(ctx: object) -> tuple[bool, str]:
    """Registering an invalid file descriptor: EBADF says that the driver got as far as looking at it."""
    try:
        with pv().PD(ctx) as pd:
            pv().DmaBufMR(pd, 4096, int(pv().IBV_ACCESS_LOCAL_WRITE), dmabuf=-1, offset=0).close()
    except pv().PyverbsRDMAError as exc:
        if exc.error_code == 9:
            return True, "the driver takes dma-buf regions"
        return False, f"the driver takes no dma-buf regions ({os.strerror(exc.error_code)})"
    except (pv().PyverbsError, TypeError) as exc:
        return False, f"could not be probed: {exc}"
    return False, "could not be probed"


def _probe_odp(ctx: object) -> tuple[bool, str]:
    try:
        caps = ctx.query_device_ex().odp_caps.general_caps  # type: ignore[attr-defined]
    except pv().PyverbsError as exc:
        return False, f"could not be probed: {exc}"
    has = bool(caps & int(pv().IBV_ODP_SUPPORT))
    return has, "on-demand paging" if has else "no on-demand paging: registered memory is pinned"


def memlock() -> tuple[int, bool]:
    """The soft limit on locked memory in bytes (-1: unlimited), and whether it binds this process at all."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    caps = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            caps = int(line.split()[1], 16)
    return soft, not caps >> 14 & 1  # CAP_IPC_LOCK


@dataclass(frozen=True, slots=True)
class Selection:
    """A device, its port and GID, and why these."""

    device: Device
    port: Port
    gid: gid.Choice
    reason: str


def select(
    device: str | None = None,
    port: int | None = None,
    gid_index: int | None = None,
    toward: str | None = None,
) -> Selection:
    """Chooses device, port and GID; whatever the user names is taken, the rest is ranked.

    :param toward: an address of this machine that the port should carry (the address that the node listens
        on).
    :raises DeviceError: nothing usable, with everything that was looked at in the message.
    :raises LocalError: the user named something that does not exist.
    """
    known = names()
    if device is not None and device not in known:
        raise LocalError(f"there is no RDMA device {device}", f"--device: this machine has {known or 'none'}")
    if not known:
        raise DeviceError(
            "no RDMA device",
            0,
            "soft-RoCE: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev IFACE; or script/softroce",
        )
    addresses = local_addresses()
    carried = {ipaddress.ip_address(a.split("%")[0]) for a in addresses}
    looked: list[str] = []
    found: list[tuple[tuple[int, ...], Selection]] = []
    for name in [device] if device else known:
        info = probe(name)
        for p in info.ports:
            if port is not None and p.number != port:
                continue
            if not p.active or not p.gids:
                looked.append(f"{name} port {p.number}: {'no GID' if p.active else 'not active'}")
                continue
            choice = gid.choose(p.gids, addresses, index=gid_index, toward=toward)
            match = toward is not None and choice.gid.address == ipaddress.ip_address(toward)
            rank = (not match, choice.gid.address not in carried, -p.mtu)
            found.append((rank, Selection(info, p, choice, f"{name} port {p.number}: {choice.reason}")))
    if not found:
        raise DeviceError(
            "no usable RDMA port: " + "; ".join(looked), 0, "ip link set IFACE up; ip addr add …"
        )
    return min(found, key=lambda pair: pair[0])[1]

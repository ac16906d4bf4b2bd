"""The ladders: for everything that a machine may lack, the rungs from best to last, which is taken, and why.

A rung that is not taken says what to do about it: a command or a package to install.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, fields

from ..gpudirect import ladder
from ..gpudirect.ladder import Answers, Direction
from ..rdma import devices
from ..rdma.clock import hypervisor
from ..rdma.memory import HUGE, try_transparent
from ..store.config import NodeConfig
from . import cuda, host

IFACE_MTU = 4200  # an Ethernet MTU that carries 4096-byte packets needs a little more


@dataclass(frozen=True, slots=True)
class Rung:
    """One way of doing something."""

    name: str
    usable: bool
    why: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs from best to last; the first that is usable is taken."""

    name: str
    decides: str
    rungs: tuple[Rung, ...]

    @property
    def taken(self) -> Rung | None:
        return next((r for r in self.rungs if r.usable), None)


# --- fabric ---


def fabric(verbs_why: str, verbs_usable: bool, demanded: str) -> Ladder:
    """:param verbs_why: what choosing a device said, for better or worse."""
    asked = f"--fabric {demanded} was given"
    verbs_usable &= demanded != "tcp"
    do = "" if verbs_usable or demanded == "tcp" else how_to_get_verbs()
    return Ladder(
        "fabric",
        "how bytes move",
        (
            Rung("verbs", verbs_usable, asked if demanded == "tcp" else verbs_why, do),
            Rung(
                "tcp", demanded != "verbs", asked if demanded == "verbs" else "sockets, which work everywhere"
            ),
        ),
    )


def how_to_get_verbs() -> str:
    """The next thing to do on this machine for verbs to work."""
    if not devices.names():
        iface = next(iter(host.interfaces()), "IFACE")
        link = f"rdma link add rxe0 type rxe netdev {iface}"
        state = host.module("rdma_rxe")
        if state == "loaded":
            return f"an RDMA NIC and its driver, or soft-RoCE: {link} (apt install iproute2)"
        if state == "loadable":
            return f"an RDMA NIC and its driver, or soft-RoCE: modprobe rdma_rxe && {link}"
        return (
            f"an RDMA NIC and its driver, or a kernel with soft-RoCE for modprobe rdma_rxe && {link}: "
            f"{platform.release()} has no rdma_rxe (Debian: linux-image-amd64, no cloud flavour; "
            "Ubuntu: linux-modules-extra-$(uname -r)); script/softroce boots one"
        )
    if not host.libibverbs()[0]:
        return "apt install libibverbs1 ibverbs-providers"
    if not host.pyverbs()[0]:
        return "apt install python3-pyverbs; the environment: /usr/bin/python3 -m venv --system-site-packages"
    if not any((host.ROOT / "dev/infiniband").glob("uverbs*")):
        return "modprobe ib_uverbs; containers: --device /dev/infiniband"
    return "see the devices below; ip link set IFACE up, ip addr add ADDRESS dev IFACE"


def device_advice(device: devices.Device) -> list[str]:
    """What would make a usable device faster or surer."""
    out = []
    for port in device.ports:
        where = f"port {port.number}"
        if not port.active:
            out.append(
                f"{where} is not active: ip link set IFACE up; is the cable in, does the switch see it?"
            )
        elif not port.gids:
            out.append(f"{where} has no GID: ip addr add ADDRESS dev IFACE")
        elif port.link == "Ethernet" and port.mtu < 4096:
            nic = next((g.netdev for g in port.gids if g.netdev), "IFACE")
            more = f"ip link set {nic} mtu 9000 (at least {IFACE_MTU})"
            out.append(f"{where} sends packets of {port.mtu} bytes: {more}")
    if device.max_rd_atomic < 16:
        out.append(f"it serves only {device.max_rd_atomic} READs at once per queue pair: more channels help")
    return out


# --- GPU memory ---


def gpu(found: cuda.Cuda) -> tuple[Ladder, Ladder]:
    """For gets (READs into GPU memory) and puts (READs out of it): the first GPU's; the others are listed."""
    answers = found.gpus[0].answers if found.gpus else Answers(cuda_missing=found.why)
    return (
        Ladder("gpu_get", "READs into GPU memory", _gpu_rungs(answers, "get")),
        Ladder("gpu_put", "READs out of GPU memory", _gpu_rungs(answers, "put")),
    )


def _gpu_rungs(answers: Answers, direction: Direction) -> tuple[Rung, ...]:
    nothing = ""
    if answers.cuda_missing and cuda.on_bus():
        nothing = "apt install nvidia-driver (or the CUDA repository's cuda-drivers)"
    do = {"dma-buf": nothing}
    if not answers.cuda_missing and answers.fabric == "verbs":
        if not answers.gpu_dma_buf:
            do["dma-buf"] = "NVIDIA's open kernel modules, driver 515 or later"
        if answers.peermem == "loadable":
            do["peermem"] = "modprobe nvidia_peermem"
    names = {"peermem": "nvidia-peermem", "staged": "pinned staging"}
    rungs = [
        Rung(names.get(name, name), usable, why, "" if usable else do.get(name, ""))
        for name, usable, why in ladder.rungs(answers, direction)
    ]
    return (*rungs, Rung("host memory", True, "blocks move between host memories"))


# --- memory ---


def pages(memory: int, huge: bool | None, try_it: Callable[[], tuple[int, int]] = try_transparent) -> Ladder:
    """For an arena of ``memory`` bytes, and for buffers that peers and benchmarks map.

    :param try_it: (bytes in huge pages, of how many) of a mapping for which they were advised.
    """
    need = -(-memory // HUGE)
    kept = {w[0]: int(w[1]) for w in map(str.split, host.read("proc/meminfo").splitlines()) if len(w) > 1}
    free, total = kept.get("HugePages_Free:", 0), kept.get("HugePages_Total:", 0)
    size_ok = kept.get("Hugepagesize:", 2048) == HUGE >> 10
    enough = free >= need and size_ok and huge is not False
    why = f"{free} of {total} huge pages are free, {memory >> 20} MiB need {need}"
    if not size_ok:
        why = f"the default huge page has {kept.get('Hugepagesize:', 0) >> 10} MiB, not 2"
    if huge is False:
        why = "--huge false was given"
    want = total - free + need + 16
    do = (
        ""
        if enough or huge is False
        else f"sysctl vm.nr_hugepages={want} (early after boot), or hugepages={want}"
    )
    mode = host.read("sys/kernel/mm/transparent_hugepage/enabled")
    offered = "[always]" in mode or "[madvise]" in mode
    other = huge is not True
    thp = f"/sys/kernel/mm/transparent_hugepage/enabled: {mode or 'not there'}"
    if offered and huge is not False:
        given, of = try_it()
        thp += f"; advised for {of >> 20} MiB, {given >> 20} MiB were given"
    return Ladder(
        "pages",
        "the pages of the arena and of buffers",
        (
            Rung("explicit huge pages", enough, why, do),
            Rung(
                "transparent huge pages",
                offered and other and huge is not False,
                "--huge false was given" if huge is False else thp,
                "" if offered or not mode else "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            ),
            Rung(
                "4 KiB pages",
                other,
                "--huge true was given" if huge else "always there; 256 to pin for a MiB",
            ),
        ),
    )


def memlock(memory: int, verbs: bool) -> Ladder:
    """Whether ``memory`` bytes can be registered."""
    limit, binds = devices.memlock()
    if host.user_namespace():
        binds = True  # the kernel asks for the capability outside of it
    shown = "unlimited" if limit < 0 else f"{limit >> 10} KiB"
    free = limit < 0 or not binds
    why = f"the limit is {shown}" + ("" if binds else ", and CAP_IPC_LOCK lifts it")
    do = "ulimit -l unlimited; systemd: LimitMEMLOCK=infinity; containers: --ulimit memlock=-1"
    enough = limit < 0 or limit >= memory
    few = f"{memory >> 20} MiB of memory {'fit' if enough else 'do not fit'} a limit of {shown}"
    few = "there is no limit" if limit < 0 else few
    if not verbs:
        few += "; tcp does not lock memory"
    return Ladder(
        "memlock",
        "how much memory may be registered",
        (
            Rung("unlimited", free, why, "" if free else do),
            Rung("limited", enough or not verbs, few, "" if enough or not verbs else do),
        ),
    )


# --- flash and time ---


def flash() -> Ladder:
    """What a flash tier stands on."""
    usable, why, do = host.io_uring()
    kept = any("flash" in f.name for f in fields(NodeConfig))
    if not (host.ROOT / "usr/include/liburing.h").exists() and not do:
        do = "apt install liburing-dev, then build again"
    return Ladder(
        "flash",
        "how flash is read and written" + ("" if kept else "; this version keeps blocks in memory only"),
        (
            Rung("io_uring", usable, why, do),
            Rung("preadv/pwritev", True, "always there; one system call and one thread per request"),
        ),
    )


def clock() -> Ladder:
    """What a node advises its peers."""
    found = hypervisor()
    return Ladder(
        "clock",
        "how a reader knows that a block was still valid",
        (
            Rung(
                "plain",
                found is None,
                f"under a hypervisor ({found}) a clock may stand still"
                if found
                else "no hypervisor was found",
                "--clock plain, only if this machine is never paused or migrated" if found else "",
            ),
            Rung("strict", True, "readers count the node's epochs: one more READ of 64 bytes a batch"),
        ),
    )

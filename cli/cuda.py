"""GPUs for ``doctor``: what the CUDA driver says of each, and which way blocks would go. No CuPy is
needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..gpudirect import driver, order
from ..gpudirect.ladder import Answers, Decision, decide
from ..gpudirect.probe import ask
from ..rdma.errors import MemKVError
from ..rdma.fabric import Fabric
from . import host


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. ``flush``: what makes a NIC's writes visible to it, see
    :func:`memkv.gpudirect.order.flush`."""

    index: int
    name: str
    bus: str
    dma_buf: bool
    gpu_direct: bool
    flush: str
    answers: Answers
    decision: Decision


@dataclass(frozen=True, slots=True)
class Cuda:
    """The driver: its version and devices, or why there are none."""

    version: str
    gpus: tuple[Gpu, ...]
    why: str


def probe(fabric: Fabric | None = None, at: str = "127.0.0.1") -> Cuda:
    """Loads the driver's library and looks at its devices; never raises.

    :param fabric: over which READs into and out of every GPU are tried where a direct way may be had: that
        takes a context and 16 MiB on it for a few seconds. None: nothing but asking.
    :param at: where the fabric's data connections are taken.
    """
    try:
        cuda = driver.load()
    except driver.DriverMissing as exc:
        seen = on_bus()
        why = str(exc)
        return Cuda("", (), f"{why}, though {seen} NVIDIA GPUs are on the bus" if seen else why)
    version = f"{cuda.version // 1000}.{cuda.version % 1000 // 10}"
    try:
        return Cuda(version, tuple(_gpu(cuda, fabric, i, at) for i in range(cuda.count)), "")
    except MemKVError as exc:
        return Cuda(version, (), str(exc))


def _gpu(cuda: driver.Driver, fabric: Fabric | None, index: int, at: str) -> Gpu:
    facts = cuda.facts(index)
    answers = ask(fabric, index, at)
    return Gpu(
        index,
        facts.name,
        facts.bus,
        facts.dma_buf,
        facts.gpu_direct,
        order.flush(facts.ordering, facts.flush_options),
        answers,
        decide(answers),
    )


def on_bus(root: Path | None = None) -> int:
    """NVIDIA display devices and accelerators on PCI, whether or not a driver is there."""
    base = (root or host.ROOT) / "sys/bus/pci/devices"
    found = 0
    for device in base.iterdir() if base.is_dir() else ():
        kind = host.read("class", device)
        found += host.read("vendor", device) == "0x10de" and kind[:6] in ("0x0300", "0x0302")
    return found

"""What ``memkv-bench gpu`` runs on: a GPU's memory, pinned host memory, and plain copies between them.

Everything here goes through the driver; CuPy is not needed. The tests have a rig of their own, whose GPU is
:class:`memkv.gpudirect.copier_host.HostDevice`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..gpudirect import driver
from ..gpudirect.copier import Device, open_device
from ..rdma.errors import DeviceError, LocalError
from ..rdma.memory import HostMemory
from . import host

Bytes = npt.NDArray[np.uint8]


def index_of(name: str) -> int:
    """The number in ``cuda:N``. :raises LocalError: it is none."""
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise LocalError(f"there is no device {name!r}", "cuda:0, as CUDA counts")
    return int(number)


def check(name: str) -> int:
    """The number of a GPU that is there. :raises DeviceError: it is not, and why."""
    index = index_of(name)
    if why := driver.available():
        raise DeviceError(f"no {name} here: {why}", 0, "memkv-node doctor shows what there is")
    count = driver.load().count
    if index >= count:
        raise DeviceError(f"no {name} here: {count} GPUs are visible", 0, "CUDA_VISIBLE_DEVICES")
    return index


class GpuRig:
    """A GPU. A context manager; memory that it has handed out goes with it."""

    def __init__(self, name: str) -> None:
        self.index = check(name)
        self.device: Device = open_device(name)
        self.cuda = driver.load()
        self._memory: list[int] = []
        with self.cuda.on(self.index):
            self._stream = self.cuda.stream_create(nonblocking=True)

    def alloc(self, nbytes: int) -> int:
        """Device memory, an address. :raises DriverError: there is not so much."""
        with self.cuda.on(self.index):
            self._memory.append(self.cuda.mem_alloc(nbytes))
        return self._memory[-1]

    def fill(self, address: int, data: Bytes) -> None:
        """Writes ``data`` there."""
        with self.cuda.on(self.index):
            self.cuda.memcpy_htod_async(address, data.ctypes.data, data.nbytes, self._stream)
            self.cuda.stream_synchronize(self._stream)

    def read(self, address: int, nbytes: int) -> Bytes:
        """What is there."""
        out = np.empty(nbytes, np.uint8)
        with self.cuda.on(self.index):
            self.cuda.memcpy_dtoh_async(out.ctypes.data, address, nbytes, self._stream)
            self.cuda.stream_synchronize(self._stream)
        return out

    def copies(self, address: int, pinned: HostMemory, size: int, count: int, into: bool) -> int:
        """``count`` asynchronous copies of ``size`` bytes one after the other in one stream, between device
        memory and pinned memory, walking through both; the nanoseconds until all are done.
        """
        places = pinned.nbytes // size
        copy = self.cuda.memcpy_htod_async if into else self.cuda.memcpy_dtoh_async
        with self.cuda.on(self.index):
            start = time.perf_counter_ns()
            for i in range(count):
                device, memory = address + i * size, pinned.address + i % places * size
                copy(*((device, memory) if into else (memory, device)), size, self._stream)
            self.cuda.stream_synchronize(self._stream)
            return time.perf_counter_ns() - start

    def heading(self) -> dict[str, Any]:
        """The GPU, its driver, and the bus between it and the host."""
        facts = self.cuda.facts(self.index)
        version = self.cuda.version
        driver_version = host.read("sys/module/nvidia/version") or "version unknown"
        capability = ".".join(map(str, facts.capability))
        return {
            "gpu": f"{facts.name}, compute capability {capability}, {facts.memory >> 20} MiB",
            "driver": f"{driver_version}, CUDA {version // 1000}.{version % 1000 // 10}",
            "pcie": pcie(facts.bus),
            "gpudirect": f"GPUDirect RDMA {_yes(facts.gpu_direct)}, dma-buf {_yes(facts.dma_buf)}, "
            f"writes ordering {facts.ordering}",
        }

    def close(self) -> None:
        with self.cuda.on(self.index):
            self.cuda.stream_synchronize(self._stream)
            self.cuda.stream_destroy(self._stream)
            while self._memory:
                self.cuda.mem_free(self._memory.pop())

    def __enter__(self) -> GpuRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def pcie(bus: str, root: Path | None = None) -> str:
    """The link of a device by its PCI address: as it is now, and at most."""
    at = (root or host.ROOT) / "sys/bus/pci/devices" / bus
    names = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
    speed, width, most_speed, most_width = (host.read(name, at) for name in names)
    if not speed:
        return f"{bus}: the kernel does not show its link"
    return f"{bus}: {speed} x{width} (at most {most_speed} x{most_width})"

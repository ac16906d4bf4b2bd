"""A CUDA device for the staging pipeline: one stream each way, events without timing, pinned host memory.

Nothing here synchronises a device: lanes ask for events, and a mark is an event on the application's own
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.errors import DeviceError, LocalError
from ..rdma.fabric import Domain, Fabric
from . import checksum, driver, kernels
from .buffers import Memory
from .copier import IN_STREAM, Device, Lane, Mark, Window, Words
from .ladder import Decision, Direction, Ladder
from .native._copier import ffi, lib
from .order import After, Before
from .probe import ask
from .registry import Registry


class _Mark(Mark):
    def __init__(self, cuda: driver.Driver, device: int, stream: Any) -> None:
        self._before = Before(cuda, device, stream)

    def reached(self) -> bool:
        return self._before.reached()

    def close(self) -> None:
        if hasattr(self, "_before"):
            self._before.close()


class CudaDevice(Device):
    """:param index: as CUDA counts, so CUDA_VISIBLE_DEVICES matters. :raises DeviceError: no CUDA here."""

    def __init__(self, index: int) -> None:
        if why := driver.available():
            raise DeviceError(f"cuda:{index} cannot be used: {why}")
        self.name = f"cuda:{index}"
        self.index = index
        self._cuda = driver.load()
        self._ladder: Ladder | None = None
        self._registry = Registry(self._cuda)
        self._after = After(self._cuda, index)
        self._verifying: Any = None  # a stream of CuPy's

    def lane(self, into_device: bool) -> Lane:
        functions = ffi.new("struct mkv_copy_driver *")
        cuda = self._cuda
        if rc := lib.mkv_copy_cuda(functions, cuda.library.encode(), into_device):
            raise DeviceError(f"{cuda.library} has no asynchronous copies", -rc, "a newer NVIDIA driver")
        with cuda.on(self.index):
            context = cuda.current_context()
            stream = cuda.stream_create(nonblocking=True)
            events = [cuda.event_create() for _ in range(IN_STREAM)]

        def release() -> None:
            with cuda.on(self.index):
                for event in events:
                    cuda.event_destroy(event)
                cuda.stream_destroy(stream)

        pointers = [ffi.cast("void *", e) for e in events]
        return Lane(functions, ffi.cast("void *", context), ffi.cast("void *", stream), pointers, release)

    def pin(self, address: int, nbytes: int) -> None:
        with self._cuda.on(self.index):
            self._cuda.host_register(address, nbytes)

    def unpin(self, address: int) -> None:
        with self._cuda.on(self.index):
            self._cuda.host_unregister(address)

    def mark(self, stream: Any) -> Mark:
        return _Mark(self._cuda, self.index, stream)

    def allocation_id(self, address: int) -> int:
        try:
            return self._cuda.buffer_id(address)
        except DeviceError:  # nothing is there any more
            return 0

    def explain(self, rc: int) -> str:
        return self._cuda.error_text(rc)

    # --- without staging ---

    def decide(self, fabric: Fabric, memory: Memory) -> Decision:
        if self._ladder is None:
            self._ladder = Ladder(lambda: ask(fabric, self.index))
        return self._ladder.decision(memory.reason)

    def failed(self, rung: str, direction: Direction, why: str) -> Decision:
        assert self._ladder is not None
        return self._ladder.failed(rung, direction, why)

    def acquire(self, domain: Domain, memory: Memory, remote_read: bool, rung: str, id: int) -> Window:
        way: Any = rung
        return self._registry.acquire(domain, memory, remote_read=remote_read, way=way, region_id=id)

    def stale(self, windows: Sequence[Any]) -> list[Any]:
        return self._registry.stale(windows)

    def visible(self) -> None:
        self._after.visible()

    def unverifiable(self) -> str:
        try:
            kernels.cupy()
        except LocalError as exc:
            return str(exc)
        return ""

    def verify(self, address: Words, length: Words, expected: Words) -> npt.NDArray[np.bool_]:
        cupy = kernels.cupy()
        with cupy.cuda.Device(self.index):
            if self._verifying is None:
                self._verifying = cupy.cuda.Stream(non_blocking=True)
            agreed = checksum.verify(address, length, expected, stream=self._verifying)
            out: npt.NDArray[np.bool_] = agreed.get(stream=self._verifying) != 0
        return out

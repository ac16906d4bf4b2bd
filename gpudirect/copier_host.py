"""A device without a GPU: "device memory" is host memory, and a thread does what a copy engine would.

For tests, and for trying the staging pipeline out. Streams can be held, slowed down and made to fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.errors import DeviceError, LocalError
from ..rdma.fabric import Domain, Fabric, Region
from .buffers import Memory
from .copier import IN_STREAM, Device, Lane, Mark, Window, Words, stream_handle
from .ladder import Decision, Direction, Rung
from .native._copier import ffi, lib

STAGED = Rung("staged", "a stand-in for a GPU is always staged, unless a test says otherwise")


class HostStream:
    """A stand-in for a CUDA stream, for lanes and for applications. Its ``ptr`` is what :func:`stream_handle`
    takes.
    """

    def __init__(self) -> None:
        self.pointer: Any = ffi.gc(lib.mkv_hoststream_new(), lib.mkv_hoststream_free)
        if self.pointer == ffi.NULL:
            raise MemoryError("a thread for copies cannot be started")

    @property
    def ptr(self) -> int:
        return int(ffi.cast("uintptr_t", self.pointer))

    def hold(self, held: bool = True) -> None:
        """Begins no further copy until ``hold(False)``."""
        lib.mkv_hoststream_hold(self.pointer, held)

    def delay(self, seconds: float) -> None:
        """Makes every copy take at least so long."""
        lib.mkv_hoststream_delay(self.pointer, int(seconds * 1e9))

    def refuse(self, good: int, rc: int) -> None:
        """Refuses the call after ``good`` more, once; rc 0: none."""
        lib.mkv_hoststream_refuse(self.pointer, good, rc)

    def lose(self, good: int, rc: int) -> None:
        """Is lost after ``good`` more copies, as after a fault; rc 0: works again."""
        lib.mkv_hoststream_lose(self.pointer, good, rc)

    @property
    def counts(self) -> tuple[int, int]:
        """Copies taken and copies done so far."""
        out = ffi.new("uint64_t[2]")
        lib.mkv_hoststream_counts(self.pointer, out, out + 1)
        return int(out[0]), int(out[1])


class _Mark(Mark):
    def __init__(self, driver: Any, stream: int) -> None:
        self._driver = driver
        self._event = lib.mkv_hostevent_new()
        rc = driver.record(self._event, ffi.cast("void *", stream))
        if rc:
            self.close()
            raise DeviceError(f"a stream cannot be waited for: error {rc}")

    def reached(self) -> bool:
        rc = self._driver.query(self._event)
        if rc not in (0, lib.MKV_COPY_NOT_READY):
            raise DeviceError(f"a stream was lost: error {rc}")
        return bool(rc == 0)

    def close(self) -> None:
        event, self._event = self._event, ffi.NULL
        lib.mkv_hostevent_free(event)


@dataclass(slots=True)
class _Window:
    region: Region

    def close(self) -> None:
        self.region.close()


class HostDevice(Device):
    """See the module. ``into`` and ``out`` are the streams of its lanes, ``pinned`` what was pinned."""

    def __init__(self, name: str = "cuda:0") -> None:
        self.name = name
        self.into = HostStream()
        self.out = HostStream()
        self.pinned: dict[int, int] = {}
        self.allocations: dict[int, int] = {}  # ids by address, where a test has set them
        self.freed: set[int] = set()  # addresses
        self.decision = Decision(STAGED, STAGED)
        self.flushes = 0
        self._driver = ffi.new("struct mkv_copy_driver *")
        lib.mkv_copy_host(self._driver)

    def lane(self, into_device: bool) -> Lane:
        stream = self.into if into_device else self.out
        events = [lib.mkv_hostevent_new() for _ in range(IN_STREAM)]

        def release() -> None:
            for event in events:
                lib.mkv_hostevent_free(event)

        pointers = [ffi.cast("void *", e) for e in events]
        return Lane(self._driver, ffi.NULL, ffi.cast("void *", stream.pointer), pointers, release)

    def pin(self, address: int, nbytes: int) -> None:
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def mark(self, stream: Any) -> Mark:
        return _Mark(self._driver, stream_handle(stream))

    def allocation_id(self, address: int) -> int:
        return self.allocations.get(address, 0)

    def explain(self, rc: int) -> str:
        return f"error {rc} of the stand-in for a GPU"

    def decide(self, fabric: Fabric, memory: Memory) -> Decision:
        return self.decision

    def failed(self, rung: str, direction: Direction, why: str) -> Decision:
        self.decision = replace(self.decision, **{direction: Rung("staged", f"{rung}: {why}")})
        return self.decision

    def acquire(self, domain: Domain, memory: Memory, remote_read: bool, rung: str, id: int) -> Window:
        """As ordinary host memory, which it is."""
        region = domain.register(
            memory.address, memory.nbytes, remote_read=remote_read, owner=memory.owner, region_id=id
        )
        return _Window(region)

    def stale(self, windows: Sequence[Any]) -> list[Any]:
        return [w for w in windows if w.region.address in self.freed]

    def visible(self) -> None:
        self.flushes += 1

    def unverifiable(self) -> str:
        return "the stand-in for a GPU has no kernels"

    def verify(self, address: Words, length: Words, expected: Words) -> npt.NDArray[np.bool_]:
        raise LocalError(self.unverifiable())

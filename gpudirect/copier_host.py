"""A device without a GPU: "device memory" is host memory, and a thread does what a copy engine would.

For tests, and for trying the staging pipeline out. Streams can be held, slowed down and made to fail.
"""

from __future__ import annotations

from typing import Any

from ..rdma.errors import DeviceError
from .copier import IN_STREAM, Device, Lane, Mark
from .native._copier import ffi, lib


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


class HostDevice(Device):
    """See the module. ``into`` and ``out`` are the streams of its lanes, ``pinned`` what was pinned."""

    def __init__(self, name: str = "cuda:0") -> None:
        self.name = name
        self.into = HostStream()
        self.out = HostStream()
        self.pinned: dict[int, int] = {}
        self.allocations: dict[int, int] = {}  # ids by address, where a test has set them
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
        from .copier import stream_handle

        return _Mark(self._driver, stream_handle(stream))

    def allocation_id(self, address: int) -> int:
        return self.allocations.get(address, 0)

    def explain(self, rc: int) -> str:
        return f"error {rc} of the stand-in for a GPU"

"""A CUDA device for the staging pipeline: one stream each way, events without timing, pinned host memory.

Nothing here synchronises a device: lanes ask for events, and a mark is an event on the application's own
stream.
"""

from __future__ import annotations

from typing import Any

from ..rdma.errors import DeviceError
from . import driver
from .copier import IN_STREAM, Device, Lane, Mark, stream_handle
from .native._copier import ffi, lib


class _Mark(Mark):
    def __init__(self, cuda: driver.Driver, device: int, stream: int) -> None:
        self._cuda = cuda
        self._device = device
        self._handle: int | None = None
        with cuda.on(device):
            self._handle = cuda.event_create()
            cuda.event_record(self._handle, stream)

    def reached(self) -> bool:
        with self._cuda.on(self._device):
            return self._handle is None or self._cuda.event_query(self._handle)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with self._cuda.on(self._device):
                self._cuda.event_destroy(handle)


class CudaDevice(Device):
    """:param index: as CUDA counts, so CUDA_VISIBLE_DEVICES matters. :raises DeviceError: no CUDA here."""

    def __init__(self, index: int) -> None:
        if why := driver.available():
            raise DeviceError(f"cuda:{index} cannot be used: {why}")
        self.name = f"cuda:{index}"
        self.index = index
        self._cuda = driver.load()

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
        return _Mark(self._cuda, self.index, stream_handle(stream))

    def allocation_id(self, address: int) -> int:
        try:
            return self._cuda.buffer_id(address)
        except DeviceError:  # nothing is there any more
            return 0

    def explain(self, rc: int) -> str:
        return self._cuda.error_text(rc)

"""What the staging pipeline asks of a device: pinned host memory, and lanes that copy to and from it.

A :class:`Lane` copies one way, on one stream, and is driven by one C thread (native/copier.h). The same lane
runs over libcuda (:mod:`.copier_cuda`) and over a stand-in without a GPU (:mod:`.copier_host`): only the
driver's functions differ.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..rdma.errors import DeviceError, LocalError
from ..rdma.jobs import now_ns
from .native._copier import ffi, lib

if TYPE_CHECKING:
    from ..rdma.fabric import Domain, Fabric, Region
    from .buffers import Memory
    from .ladder import Decision, Direction

Words = npt.NDArray[np.uint64]
COPY = np.dtype([("dst", "<u8"), ("src", "<u8"), ("nbytes", "<u8")])
LATE: int = lib.MKV_COPY_LATE
CLOSED: int = lib.MKV_COPY_CLOSED
IN_STREAM = 16  # transfers of a lane that are in its stream at once


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a transfer: the copies at ``ok`` are in place, the others are not because of ``rc`` (the
    driver's error, or LATE).
    """

    ok: npt.NDArray[np.bool_]
    rc: int


class Mark(ABC):
    """A place in a stream of the application's: an event recorded there. Closed when nobody has it any more,
    or before.
    """

    @abstractmethod
    def reached(self) -> bool:
        """Whether the stream has come that far. :raises DeviceError: it never will."""

    @abstractmethod
    def close(self) -> None:
        """Gives the event back; closing twice is closing once."""

    def __del__(self) -> None:
        self.close()


class Lane:
    """Copies one way, in order. Made by :meth:`Device.lane`; used from the thread of the loop that it is
    attached to.

    :param driver: ``struct mkv_copy_driver *``. :param events: ``void *``, the lane's own.
    :param release: gives stream and events back; called last.
    """

    def __init__(
        self, driver: Any, context: Any, stream: Any, events: list[Any], release: Callable[[], None]
    ) -> None:
        self._release = release
        self._lane: Any = lib.mkv_lane_new(driver, context, stream, ffi.new("void *[]", events), len(events))
        if self._lane == ffi.NULL:
            release()
            raise MemoryError("a thread for copies cannot be started")
        self._under_way: dict[int, tuple[Any, Any, asyncio.Future[None]]] = {}
        self._out = ffi.new("struct mkv_transfer *[]", 64)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats = ffi.new("struct mkv_lane_stats *")
        self._lock = threading.Lock()  # stats() may be called from anywhere

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the loop's thread: outcomes will be taken there from now on."""
        self._loop = loop
        loop.add_reader(lib.mkv_lane_eventfd(self._lane), self._reap)

    def _reap(self) -> None:
        while True:
            n = lib.mkv_lane_reap(self._lane, self._out, 64)
            for i in range(n):
                _, _, future = self._under_way.pop(int(ffi.cast("uintptr_t", self._out[i])))
                if not future.done():
                    future.set_result(None)
            if n < 64:
                return

    async def copy(self, copies: npt.NDArray[np.void], seconds: float) -> Outcome:
        """Carries copies out; ends only when none of them can be under way any more.

        :param copies: dtype :data:`COPY`, shape (n,); adjacent ones (on both sides) become one.
        :param seconds: to get into the stream. What is in there is waited for, however long that takes.
        """
        if self._loop is None or self._lane == ffi.NULL:
            raise LocalError("this lane is closed, or not attached to a loop")
        if copies.dtype != COPY or not copies.flags.c_contiguous:
            raise LocalError("copies must be a contiguous array of memkv.gpudirect.copier.COPY")
        transfer = ffi.new("struct mkv_transfer *")
        transfer.copies = ffi.cast("struct mkv_copy *", ffi.from_buffer(copies))
        ok = np.zeros(len(copies), np.bool_)
        transfer.ok = ffi.cast("uint8_t *", ffi.from_buffer(ok))
        transfer.n = len(copies)
        transfer.deadline_ns = now_ns() + max(0, int(seconds * 1e9))
        future: asyncio.Future[None] = self._loop.create_future()
        self._under_way[int(ffi.cast("uintptr_t", transfer))] = transfer, (copies, ok), future
        lib.mkv_lane_submit(self._lane, transfer)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        return Outcome(ok, int(transfer.rc))

    def stats(self) -> dict[str, int]:
        """Counters: ``bytes`` and ``blocks`` in place, ``calls`` of the driver, ``errors``, ``transfers``,
        ``last_error``.
        """
        with self._lock:
            if self._lane != ffi.NULL:
                lib.mkv_lane_stats(self._lane, self._stats)
        return {n: int(getattr(self._stats, n)) for n, _ in ffi.typeof("struct mkv_lane_stats").fields}

    def detach(self) -> None:
        """On the loop's thread, when nothing is under way any more."""
        if self._loop is not None:
            self._loop.remove_reader(lib.mkv_lane_eventfd(self._lane))
            self._loop = None

    def close(self) -> None:
        """Ends the thread; waits for what is in the stream."""
        if self._lane != ffi.NULL:
            with self._lock:
                lane, self._lane = self._lane, ffi.NULL
            lib.mkv_lane_free(lane, self._stats)
            self._release()


class Window(Protocol):
    """Device memory as a region of the fabric's; ``close`` it when no batch uses it any more."""

    region: Region

    def close(self) -> None: ...


class Device(ABC):
    """A GPU, or what stands in for one. ``name`` is like "cuda:0"."""

    name: str

    @abstractmethod
    def lane(self, into_device: bool) -> Lane:
        """A lane over a stream of its own. :raises DeviceError: the driver refuses."""

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> None:
        """Makes host memory fit for asynchronous copies. :raises DeviceError: the driver refuses."""

    @abstractmethod
    def unpin(self, address: int) -> None: ...

    @abstractmethod
    def mark(self, stream: Any) -> Mark:
        """Records where ``stream`` is now.

        :param stream: an object with ``ptr`` (CuPy), ``cuda_stream`` (torch) or ``__cuda_stream__``, or the
            handle as an integer; 0 is the legacy default stream.
        """

    @abstractmethod
    def allocation_id(self, address: int) -> int:
        """What is never the same for two allocations of a process; 0 where that is not known."""

    @abstractmethod
    def explain(self, rc: int) -> str:
        """A driver's error as text."""

    # --- without staging, where a NIC reaches it ---

    @abstractmethod
    def decide(self, fabric: Fabric, memory: Memory) -> Decision:
        """The rungs to take for this memory; may have to ask the machine first, for seconds."""

    @abstractmethod
    def failed(self, rung: str, direction: Direction, why: str) -> Decision:
        """A rung that was decided for could not be taken: the rungs to take instead."""

    @abstractmethod
    def acquire(self, domain: Domain, memory: Memory, remote_read: bool, rung: str, id: int) -> Window:
        """Registers memory by a rung, as region ``id``. :raises NotRegistered: it does not work."""

    @abstractmethod
    def stale(self, windows: Sequence[Any]) -> list[Any]:
        """Those (of its own making) whose memory was freed meanwhile; asked once a batch."""

    @abstractmethod
    def visible(self) -> None:
        """Returns when what a NIC has written is visible to work that is launched from now on."""

    @abstractmethod
    def unverifiable(self) -> str:
        """Why checksums cannot be computed on it; empty if they can."""

    @abstractmethod
    def verify(self, address: Words, length: Words, expected: Words) -> npt.NDArray[np.bool_]:
        """Computes the payload checksums of blocks on the device: where they agree. Blocks its thread."""


def stream_handle(stream: Any) -> int:
    """The driver's handle of a stream object of CuPy, torch or anything that speaks ``__cuda_stream__``.

    :raises LocalError: it is none of these.
    """
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("ptr", "cuda_stream"):
        if isinstance(value := getattr(stream, name, None), int):
            return value
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise LocalError(
        f"a {type(stream).__name__} is no CUDA stream", "a CuPy or torch stream, or its handle as an integer"
    )


def open_device(name: str) -> Device:
    """The device called ``name``.

    :raises LocalError: there is no such kind. :raises DeviceError: it cannot be used here, and why.
    """
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdigit():
        raise LocalError(f"there is no device {name!r}", "cuda:0")
    try:
        from .copier_cuda import CudaDevice
    except ImportError as exc:
        raise DeviceError(f"{name} cannot be used: {exc}") from None
    return CudaDevice(int(index))

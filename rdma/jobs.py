"""Driving batches from Python: on the caller's thread, or by one C thread with an eventfd.

A job is a C struct that begins with ``struct mkv_job``; whoever makes one keeps it and everything it points
to alive until it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import LocalError
from .native._rdma import ffi, lib

SEG = np.dtype([("offset", "<u8"), ("region", "<u4"), ("length", "<u4")])
READ = np.dtype(
    [
        ("cookie", "<u8"),
        ("offset", "<u8"),
        ("region", "<u4"),
        ("nseg", "<u4"),
        ("spare", "<u8"),
        ("seg", SEG, (4,)),
    ]
)
OUTCOME = np.dtype(
    [
        ("cookie", "<u8"),
        ("posted_ns", "<u8"),
        ("done_ns", "<u8"),
        ("sample_ns", "<u8"),
        ("status", "<i4"),
        ("vendor", "<u4"),
    ]
)


def now_ns() -> int:
    """The data path's clock (CLOCK_BOOTTIME)."""
    return int(lib.mkv_clock_ns())


def run(jobs: list[Any]) -> None:
    """Runs jobs (``struct mkv_job *``) to their end on this thread, without the GIL."""
    if len(jobs) == 1:
        lib.mkv_run_one(ffi.cast("struct mkv_job *", jobs[0]))
        return
    array = ffi.new("struct mkv_job *[]", [ffi.cast("struct mkv_job *", j) for j in jobs])
    lib.mkv_run(array, len(jobs))


def read_batch(channel: Any, reads: npt.NDArray[np.void], timeout: float = 5.0) -> npt.NDArray[np.void]:
    """Carries out a list of READs and waits for all of them.

    :param channel: of an :class:`~memkv.rdma.fabric.Endpoint` that reads.
    :param reads: dtype :data:`READ`, shape (n,).
    :returns: dtype :data:`OUTCOME`, shape (n,); ``status`` is 0 or a negative errno.
    """
    if reads.dtype != READ or not reads.flags.c_contiguous:
        raise LocalError("reads must be a contiguous array of memkv.rdma.jobs.READ")
    outcome = np.zeros(len(reads), OUTCOME)
    job = ffi.new("struct mkv_readjob *")
    lib.mkv_readjob_init(
        job,
        channel,
        ffi.cast("struct mkv_read *", ffi.from_buffer(reads)),
        ffi.cast("struct mkv_done *", ffi.from_buffer(outcome)),
        len(reads),
        int(timeout * 1e9),
    )
    run([job])
    return outcome


@dataclass(slots=True)
class _Entry:
    job: Any
    owner: Any


class Loop:
    """A C thread that drives submitted jobs. ``fd`` is an eventfd that is readable while :meth:`reap` has
    some.
    """

    def __init__(self) -> None:
        self._loop: Any = lib.mkv_loop_new()
        if self._loop == ffi.NULL:
            raise MemoryError("the progress thread cannot be started")
        self.fd: int = lib.mkv_loop_eventfd(self._loop)
        self._under_way: dict[int, _Entry] = {}
        self._out = ffi.new("struct mkv_job *[]", 64)

    def submit(self, job: Any, owner: Any) -> None:
        """Hands a job over; ``owner`` (which keeps it alive) comes back from :meth:`reap`."""
        pointer = ffi.cast("struct mkv_job *", job)
        self._under_way[int(ffi.cast("uintptr_t", pointer))] = _Entry(pointer, owner)
        lib.mkv_loop_submit(self._loop, pointer)

    def reap(self) -> list[Any]:
        """The owners of jobs that are done, oldest first."""
        owners: list[Any] = []
        while True:
            n = lib.mkv_loop_reap(self._loop, self._out, 64)
            done = (int(ffi.cast("uintptr_t", self._out[i])) for i in range(n))
            owners.extend(self._under_way.pop(address).owner for address in done)
            if n < 64:
                return owners

    def close(self) -> None:
        """Waits for what is under way and ends the thread."""
        if self._loop != ffi.NULL:
            lib.mkv_loop_free(self._loop)
            self._loop = ffi.NULL

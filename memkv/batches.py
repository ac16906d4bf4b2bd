"""One batch of keys over the nodes that hold them: who gets which keys, one C job per node, one array of
statuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .buffers import SLICE
from .channels import ReadChannel
from .native._peer import ffi
from .rdma.errors import LocalError
from .session import Session
from .status import Status
from .store.messages import SLOT_BYTES

Keys = npt.NDArray[np.uint8]
Index = npt.NDArray[np.uint32] | None
Parts = list[tuple[Session, npt.NDArray[np.uint32]]]


def as_keys(keys: Any) -> Keys:
    """Keys as a C-contiguous (n, 16) array of bytes, without copying one that is so already.

    :param keys: such an array, or a sequence of 16-byte strings.
    """
    if not isinstance(keys, np.ndarray):
        keys = list(keys)
        if not all(isinstance(k, bytes | bytearray | memoryview) and len(k) == 16 for k in keys):
            raise LocalError("a key is 16 bytes", "memkv.keys makes them")
        keys = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 16:
        raise LocalError(f"keys are an array of shape (n, 16) and dtype uint8, not {keys.shape} {keys.dtype}")
    return np.ascontiguousarray(keys)


def check_slices(slices: Any, n: int) -> None:
    """:raises LocalError: not n of them, or not made by :meth:`Buffer.slices`: C takes them as they lie
    there.
    """
    if getattr(slices, "dtype", None) != SLICE or slices.shape != (n,) or not slices.flags.c_contiguous:
        what = f"{slices.shape} {slices.dtype}" if isinstance(slices, np.ndarray) else type(slices).__name__
        raise LocalError(f"{n} keys need as many slices, contiguous, not {what}", "Buffer.slices")


def _pointer(kind: str, array: npt.NDArray[Any] | None) -> Any:
    return ffi.NULL if array is None else ffi.from_buffer(kind, array)


class Batch:
    """Keys, where they go, and what became of them.

    :param slices: dtype SLICE, one per key; None: only look the keys up.
    :param checksum: verify payload checksums. :param fresh: do not trust the location cache.
    :param checksums: (n,) uint64, receives what the HITs' payload checksums have to be.
    """

    __slots__ = (
        "checksum",
        "checksums",
        "elapsed_us",
        "fresh",
        "keys",
        "lengths",
        "places",
        "slices",
        "status",
        "under_way",
    )

    def __init__(
        self,
        keys: Keys,
        slices: Any,
        checksum: bool,
        fresh: bool,
        timed: bool = False,
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        n = len(keys)
        if slices is not None:
            check_slices(slices, n)
        self.keys = keys
        self.slices = slices
        self.checksum = checksum
        self.fresh = fresh
        self.status = np.zeros(n, np.uint8)
        self.lengths = np.zeros(n, np.uint32)
        self.checksums = checksums
        self.elapsed_us = np.zeros(n, np.uint32) if timed else None
        self.places: npt.NDArray[np.uint8] | None = None  # (n, 32): slots that nodes have named, else zero
        self.under_way: list[tuple[Session, ReadChannel, Index]] = []

    def load(self, session: Session, channel: ReadChannel, index: Index, timeout: float) -> Any:
        """Puts the keys at ``index`` (None: all) on a channel; the C job, ready to be driven."""
        self.under_way.append((session, channel, index))
        n = len(self.keys) if index is None else len(index)
        job = channel.job
        strict = np.zeros(3 * n, np.uint32) if channel.view.strict else None
        job.keys = _pointer("uint8_t[]", self.keys)
        job.index = _pointer("uint32_t[]", index)
        job.slices = _pointer("struct mkv_slice[]", self.slices)
        job.places = _pointer("struct mkv_slot[]", self.places)
        job.status = _pointer("uint8_t[]", self.status)
        job.lengths = _pointer("uint32_t[]", self.lengths)
        job.checksums = _pointer("uint64_t[]", self.checksums)
        job.elapsed_us = _pointer("uint32_t[]", self.elapsed_us)
        job.strict_scratch = _pointer("uint32_t[]", strict)
        job.n = n
        job.checksum = self.checksum
        job.fresh = self.fresh
        channel.keep = (self, index, strict)
        channel.start(timeout)
        return job

    def set(self, index: Index, status: Status) -> None:
        """Gives all keys at ``index`` a status."""
        self.status[slice(None) if index is None else index] = status

    def unload(self, unknown: Parts, cold: Parts) -> None:
        """Gives the channels back after their jobs are done. ``unknown`` receives the keys left PENDING,
        which met a slab that is not known yet, to be loaded again once the session has been refreshed;
        ``cold`` those that are in flash only, to be staged.
        """
        for session, channel, index in self.under_way:
            job = channel.job
            undrained, met_unknown, met_cold = job.job.undrained, job.unknown, job.cold
            if job.job.rc:  # late, or the channel broke
                session.doubt()
            session.pool.give_back(channel)  # destroys it if it is broken: from here nothing can write
            if undrained:
                pending = self._with(index, Status.PENDING)
                self.status[pending] = Status.TIMEOUT
                continue
            if met_unknown:
                unknown.append((session, self._with(index, Status.PENDING)))
            if met_cold:
                cold.append((session, self._with(index, Status.COLD)))
            if session.view.table_changed and session.closed is None:
                session.view.table_changed = 0
                session.loop.call_soon_threadsafe(session.refresh_soon)
        self.under_way.clear()

    def _with(self, index: Index, status: Status) -> npt.NDArray[np.uint32]:
        """The keys among ``index`` (None: all) that have a status."""
        if index is None:
            return np.flatnonzero(self.status == status).astype(np.uint32)
        found: npt.NDArray[np.uint32] = index[self.status[index] == status]
        return found

    def learn(self, index: npt.NDArray[np.uint32], slots: bytes) -> None:
        """Notes down where blocks were staged for this batch. Nobody else may READ by these slots."""
        if self.places is None:
            self.places = np.zeros((len(self.keys), SLOT_BYTES), np.uint8)
        self.places[index] = np.frombuffer(slots, np.uint8).reshape(-1, SLOT_BYTES)

    def replace(self, old: Status, new: Status) -> None:
        """Gives every key that has one status another."""
        self.status[self.status == old] = new

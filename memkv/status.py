"""What became of each block of a batch: one byte per key, never an exception.

The numbers are those of ``MKV_*`` in store/native/layout.h; a test compares them.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

FIRST_ERROR = 16  # statuses >= this are errors: ``statuses >= FIRST_ERROR`` works on a whole array


class Status(IntEnum):
    """A block's status. Only HIT says that its destination holds the block; else it is undefined."""

    PENDING = 0
    HIT = 1
    MISS = 2
    STALE = 3
    TIMEOUT = 4
    CORRUPT = 5
    STORED = 6
    EXISTS = 7
    DONE = 8
    COLD = 9
    ERROR_LINK = 16
    ERROR_UNREACHABLE = 17
    ERROR_LENGTH = 18
    ERROR_BOUNDS = 19
    ERROR_TOO_LARGE = 20
    ERROR_FULL = 21
    ERROR_REFUSED = 22
    ERROR_INTERNAL = 23
    ERROR_DEVICE = 24
    ERROR_COPY = 25

    @property
    def is_error(self) -> bool:
        """True for a failure with a cause to look into; a miss, or a lost race or deadline, is none."""
        return self >= FIRST_ERROR


def kept(status: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """(n,) of a put's statuses: which blocks are held now, whoever brought them."""
    out: npt.NDArray[np.bool_] = (status == Status.STORED) | (status == Status.EXISTS)
    return out


_TEXT = {
    Status.PENDING: "not decided yet",
    Status.HIT: "present, verified and in place",
    Status.MISS: "not held by the node",
    Status.STALE: "changed twice while it was read; treat it as a miss",
    Status.TIMEOUT: "the deadline passed first",
    Status.CORRUPT: "the payload does not agree with its checksum",
    Status.STORED: "stored and visible to every peer",
    Status.EXISTS: "held already; nothing was copied",
    Status.DONE: "carried out",
    Status.COLD: "held in flash only, and not staged in time",
    Status.ERROR_LINK: "the connection to the node broke under way",
    Status.ERROR_UNREACHABLE: "the node is not connected; it will be tried again by itself",
    Status.ERROR_LENGTH: "the slice has not the block's length, or the namespace refuses it",
    Status.ERROR_BOUNDS: "the slice is not inside a registered buffer",
    Status.ERROR_TOO_LARGE: "longer than the namespace's blocks, or than the node's memory",
    Status.ERROR_FULL: "the node has no room, and nothing that it may evict in time",
    Status.ERROR_REFUSED: "not allowed: a region that was not offered, a pin without a time to live",
    Status.ERROR_INTERNAL: "the node's own fault; its log says more",
    Status.ERROR_DEVICE: "the node's flash could not be read, or the block not be written to it",
    Status.ERROR_COPY: "the GPU's driver refused or failed the copy; the log and stats say why",
}


def describe(status: int) -> str:
    """A status as one line: its name and what it means. Numbers of a newer node are described as such."""
    try:
        known = Status(status)
    except ValueError:
        kind = "error" if status >= FIRST_ERROR else "status"
        return f"{kind} {status}: unknown to this version of memkv"
    return f"{known.name}: {_TEXT[known]}"

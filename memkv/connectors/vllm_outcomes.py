"""What became of a batch: which of its blocks are good, and what the log says of the others.

A miss is not worth a line. What is (an error, a deadline, a wrong checksum) is said once in :data:`QUIET`
seconds for each reason, since a node that is gone would else fill the log with every step of the engine.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import numpy.typing as npt

from ..status import FIRST_ERROR, Status, describe, kept
from ..tickets import Ticket

log = logging.getLogger("memkv.vllm")

QUIET = 10.0  # seconds


class Outcomes:
    """:param what: "load", "store" or "lookup"."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._said: dict[str, float] = {}

    def good(self, ticket: Ticket, count: int) -> npt.NDArray[np.bool_]:
        """(count,) True for each block that is held, has come, or is kept; all False if the whole batch was
        refused.
        """
        status = ticket.status
        if status is None:
            self._say(str(ticket.error), count, count)
            return np.zeros(count, np.bool_)
        bad = status[(status >= FIRST_ERROR) | (status == Status.TIMEOUT) | (status == Status.CORRUPT)]
        if bad.size:
            self._say(describe(int(bad[0])), bad.size, count)
        good: npt.NDArray[np.bool_] = kept(status) if self.what == "store" else status == Status.HIT
        return good

    def _say(self, reason: str, bad: int, count: int) -> None:
        now = time.monotonic()
        if now - self._said.get(reason, -QUIET) >= QUIET:
            self._said[reason] = now
            log.warning("%s: %d of %d blocks failed: %s", self.what, bad, count, reason)

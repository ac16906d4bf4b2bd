"""Touches: one-sided READs are invisible to the node, so hits are reported to it now and then, many at a
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import numpy.typing as npt

from .session import Session
from .store import messages as m

INTERVAL = 1.0  # seconds
MOST = 16384  # keys kept for one session; of more, the newest


class Touches:
    """Collects keys from any thread; sends them from the control thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._keys: dict[Session, list[npt.NDArray[np.uint8]]] = {}
        self._scheduled = False

    def add(self, session: Session, keys: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            self._keys.setdefault(session, []).append(keys)
            if self._scheduled:
                return
            self._scheduled = True
        with contextlib.suppress(RuntimeError):  # the peer was closed just now
            self._loop.call_soon_threadsafe(self._loop.call_later, INTERVAL, self._send)

    def _send(self) -> None:
        with self._lock:
            taken, self._keys = self._keys, {}
            self._scheduled = False
        for session, lists in taken.items():
            if session.closed is None:
                keys = np.unique(np.concatenate(lists)[-MOST:], axis=0)
                session.say(m.Touch(session.info.namespace, keys.tobytes()))

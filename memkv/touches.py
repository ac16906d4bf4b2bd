"""Touches: one-sided READs are invisible to the node, so hits are reported to it now and then, many at a
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import numpy.typing as npt

from .batches import Keys
from .status import Status

INTERVAL = 1.0  # seconds
MOST_BATCHES = 16384  # kept; of more, the newest
MOST_KEYS = 65536


class Touches:
    """Collects batches from any thread; sends their hits from the control thread.

    :param send: coroutine function that tells the nodes of keys.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, send: Callable[[Keys], Coroutine[Any, Any, None]]
    ) -> None:
        self._loop = loop
        self._send = send
        self._lock = threading.Lock()
        self._batches: deque[tuple[Keys, npt.NDArray[np.uint8]]] = deque(maxlen=MOST_BATCHES)
        self._scheduled = False

    def add(self, keys: Keys, status: npt.NDArray[np.uint8]) -> None:
        """Notes down a batch. It is only copied here; which keys were hits is found out later, for many at
        once.
        """
        with self._lock:
            self._batches.append((keys.copy(), status.copy()))
            if self._scheduled:
                return
            self._scheduled = True
        with contextlib.suppress(RuntimeError):  # the peer was closed just now
            self._loop.call_soon_threadsafe(self._loop.call_later, INTERVAL, self._flush)

    def _flush(self) -> None:
        with self._lock:
            taken, self._batches = self._batches, deque(maxlen=MOST_BATCHES)
            self._scheduled = False
        hits = np.concatenate([keys[status == Status.HIT] for keys, status in taken])[-MOST_KEYS:]
        if len(hits):
            self._task = self._loop.create_task(self._send(np.unique(hits, axis=0)))

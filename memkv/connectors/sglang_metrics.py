"""What SGLang asks its storage backend for now and then: how many pages each batch moved, and how fast."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sglang.srt.observability.metrics_collector import StorageMetrics


@dataclass(slots=True)
class Moved:
    """Of one batch; the caller says what came of it."""

    pages: int = 0
    page_bytes: int = 0


class Metrics:
    """Filled by SGLang's prefetch and backup threads, emptied by its scheduler. Nothing is kept where SGLang
    was not told to ask (``--enable-metrics``): it would never be taken away.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._now = StorageMetrics()

    @contextmanager
    def fetching(self) -> Iterator[Moved]:
        with self._timing(fetched=True) as moved:
            yield moved

    @contextmanager
    def keeping(self) -> Iterator[Moved]:
        with self._timing(fetched=False) as moved:
            yield moved

    @contextmanager
    def _timing(self, fetched: bool) -> Iterator[Moved]:
        moved, started = Moved(), time.perf_counter()
        yield moved
        seconds = time.perf_counter() - started
        if not self._enabled or not moved.pages:
            return
        with self._lock:
            now = self._now
            pages, bandwidth = (
                (now.prefetch_pgs, now.prefetch_bandwidth)
                if fetched
                else (now.backup_pgs, now.backup_bandwidth)
            )
            pages.append(moved.pages)
            bandwidth.append(moved.pages * moved.page_bytes / seconds / 1e9)

    def take(self) -> StorageMetrics:
        """What came together since the last time: pages of each batch, and GB/s."""
        with self._lock:
            taken, self._now = self._now, StorageMetrics()
        return taken

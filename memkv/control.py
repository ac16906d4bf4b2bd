"""The peer's background: one thread with an asyncio loop for control, and the C thread that drives batches
for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from .rdma.errors import DeadlineError, LocalError
from .rdma.jobs import Loop

T = TypeVar("T")


class Control:
    """The two threads. ``closed`` is set by whoever ends it, before :meth:`stop`."""

    def __init__(self) -> None:
        self.closed = False
        self.loop = asyncio.new_event_loop()
        self._work: set[asyncio.Task[Any]] = set()
        self._progress = Loop()
        self._thread = threading.Thread(target=self._run, name="memkv-control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.add_reader(self._progress.fd, self._reap)
        self.loop.run_forever()
        self.loop.remove_reader(self._progress.fd)
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def _reap(self) -> None:
        for future in self._progress.reap():
            if not future.done():
                future.set_result(None)

    async def drive(self, job: Any) -> None:
        """Hands a C job to the progress thread and waits for its end."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._progress.submit(job, future)
        await future

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine on the control thread; :meth:`settle` waits for it.

        :raises LocalError: the peer is closed.
        """

        async def tracked() -> T:
            task: Any = asyncio.current_task()
            self._work.add(task)
            try:
                return await coroutine
            finally:
                self._work.discard(task)

        if not self.closed:
            running = tracked()
            try:
                return asyncio.run_coroutine_threadsafe(running, self.loop)
            except RuntimeError:  # closed just now
                running.close()
        coroutine.close()
        raise LocalError("the peer is closed")

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """The same, and waits for it. It should end by itself: ``timeout`` is for what should not happen."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise LocalError("a blocking call from a callback of memkv itself", "use peer.aio")
        future = self.start(coroutine)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():  # just now, or with a DeadlineError of its own
                return future.result()
            future.cancel()
            raise DeadlineError("this took longer than it may", "a longer timeout") from None

    async def settle(self) -> None:
        """Waits for all coroutines that were started."""
        if self._work:
            await asyncio.wait(set(self._work))

    def finish(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs a last coroutine, then ends both threads."""
        asyncio.run_coroutine_threadsafe(last, self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._progress.close()

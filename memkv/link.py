"""The link to one node: a session that is made again when it is lost, behind a circuit breaker.

A batch asks for ``session`` and gets the one that is up, or None at once: a dead node costs its keys, never
time. In the background the link dials again, waiting between attempts from 50 ms up to 2 s, with jitter, so
that the peers of a restarted node do not arrive together.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from .rdma.errors import MemKVError
from .session import Session, Settings
from .store.framing import RefusedError

log = logging.getLogger("memkv.peer")

FIRST_WAIT = 0.05
LONGEST_WAIT = 2.0


class Link:
    """See above.

    :param address: "host:port", also the node's name for placement.
    :param attach: coroutine function that readies a fresh session (fabric, regions, namespace).
    """

    def __init__(
        self, address: str, settings: Settings, attach: Callable[[Session], Awaitable[None]]
    ) -> None:
        self.address = address
        host, _, port = address.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.settings = settings
        self._attach = attach
        self.session: Session | None = None
        self.error: MemKVError | None = None  # why there is none
        self.reconnects = 0
        self._task: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """One attempt. :raises MemKVError: why it failed."""
        session = await Session.open(self.host, self.port, self.settings)
        session.start()
        try:
            await self._attach(session)
        except BaseException as exc:
            session.fail(exc if isinstance(exc, MemKVError) else MemKVError(f"{exc!r}"))
            raise
        if session.closed is not None:
            raise session.closed
        self.session, self.error = session, None

    def keep(self) -> None:
        """Watches over the session from now on."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        wait = FIRST_WAIT
        while True:
            session = self.session
            if session is not None:
                await session.over.wait()
                self.session, self.error = None, session.closed
                log.warning("%s: %s; trying again", self.address, session.closed)
                wait = FIRST_WAIT
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            try:
                await self.connect()
                self.reconnects += 1
                log.info("%s: connected again", self.address)
            except RefusedError as exc:
                self.error, wait = exc, LONGEST_WAIT
            except MemKVError as exc:
                self.error, wait = exc, min(wait * 2, LONGEST_WAIT)
            except Exception as exc:
                log.exception("%s: unexpected", self.address)
                self.error, wait = MemKVError(f"{exc!r}"), LONGEST_WAIT

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.session is not None:
            await self.session.leave("the peer closes")
            self.session = None

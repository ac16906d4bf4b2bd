"""One connection to one node, from handshake to loss: control messages, the namespace's view, channels.

Everything here runs on the peer's control thread, but for the pool, which batches use from their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import __version__
from .channels import DEPTH, ChannelPool, ReadChannel
from .native._peer import ffi, lib
from .rdma.errors import DeadlineError, LocalError, MemKVError, RemoteError
from .rdma.fabric import Domain, Endpoint, RemoteTable
from .store import messages as m
from .store.protocol import PeerProtocol
from .wire import from_channel, from_region, to_rails, to_region

log = logging.getLogger("memkv.peer")

READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Settings:
    """What a peer asks of every node."""

    namespace: str
    secret: bytes
    create: bool
    block_bytes: int  # 0: the node's default, or what the namespace has
    align: int
    grace_ms: int
    strict: bool | None  # None: as the node advises
    cache_entries: int
    max_channels: int
    timeout: float  # seconds, for control requests


class Session:
    """A connection that is up, or was. Made by :meth:`open`; ``closed`` is set when it is over."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        protocol: PeerProtocol,
        host: str,
        settings: Settings,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.protocol = protocol
        self.host = host
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.closed: MemKVError | None = None
        self.over = asyncio.Event()
        self.welcome: m.Welcome | None = None
        self.info: m.NamespaceInfo
        self.remote = RemoteTable()
        self.view: Any = None
        self.pool: ChannelPool
        self.pull: Endpoint | None = None
        self.get_domain: Domain
        self.put_domain: Domain
        self._requests: dict[int, asyncio.Future[Any]] = {}
        self._next = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Future[None] | None = None
        self._pulling = asyncio.Lock()

    # --- connection ---

    @classmethod
    async def open(cls, host: str, port: int, settings: Settings) -> Session:
        """Connects and authenticates; returns after the node's Welcome.

        :raises RefusedError: a wrong secret, no common version. :raises MemKVError: not reachable.
        """
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), settings.timeout)
        except (OSError, TimeoutError) as exc:
            why = getattr(exc, "strerror", None) or "no answer"
            raise RemoteError(f"{host}:{port} cannot be reached: {why}", "is memkv-node serve running there?") from None
        protocol = PeerProtocol(settings.secret, software=f"memkv {__version__}", role="peer")
        session = cls(reader, writer, protocol, host, settings)
        try:
            await asyncio.wait_for(session._shake(), settings.timeout)
        except TimeoutError:
            writer.close()
            raise DeadlineError(f"{host}:{port} did not complete the handshake", "is it a memkv node?") from None
        except BaseException:
            writer.close()
            raise
        return session

    async def _shake(self) -> None:
        while self.welcome is None:
            self._flush()
            data = await self.reader.read(READ_BYTES)
            if not data:
                self.protocol.receive_eof()
                raise RemoteError("the node closed the connection during the handshake")
            for message in self.protocol.receive_data(data):
                if isinstance(message, m.Welcome):
                    self.welcome = message

    def _flush(self) -> None:
        data = self.protocol.data_to_send()
        if data:
            self.writer.write(data)

    def start(self) -> None:
        """Begins to take messages in the background."""
        self._spawn(self._receive())

    def _spawn(self, coroutine: Any) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self) -> None:
        error: MemKVError = RemoteError("the node closed the connection")
        try:
            while True:
                data = await self.reader.read(READ_BYTES)
                if not data:
                    break
                for message in self.protocol.receive_data(data):
                    if isinstance(message, m.Bye):
                        error = RemoteError(f"the node left: {message.reason}")
                    self._take(message)
                self._flush()
        except MemKVError as exc:
            error = exc
        except OSError as exc:
            error = RemoteError(f"the connection was lost: {exc.strerror}")
        self.fail(error)

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            self.say(m.Pong(message.request))
        elif isinstance(message, m.SlabAdded):
            self.remote.add(from_region(message.slab))
        elif isinstance(message, m.SlabRetired):
            self._spawn(self._slab_retired(message))
        elif isinstance(message, m.TableChanged):
            self._spawn(self._table_changed(message))
        else:
            future = self._requests.pop(getattr(message, "request", 0), None)
            if future is None or future.done():
                return
            if isinstance(message, m.Refusal):
                future.set_exception(RemoteError(message.message, message.hint))
            else:
                future.set_result(message)

    def say(self, message: m.Message) -> None:
        """Sends a message that is not answered."""
        if self.closed is None:
            self.writer.write(self.protocol.send(message))

    async def ask(self, make: Any, timeout: float | None = None) -> Any:
        """Sends ``make(request id)`` and returns the reply.

        :raises RefusedError: the node refuses. :raises DeadlineError: no reply in time.
        """
        if self.closed is not None:
            raise self.closed
        request = self._next
        self._next += 1
        future: asyncio.Future[Any] = self.loop.create_future()
        self._requests[request] = future
        try:
            self.writer.write(self.protocol.send(make(request)))
            return await asyncio.wait_for(future, self.settings.timeout if timeout is None else timeout)
        except TimeoutError:
            raise DeadlineError("the node did not answer in time", "a longer timeout, or is it overloaded?") from None
        finally:
            self._requests.pop(request, None)

    def fail(self, error: MemKVError) -> None:
        """Ends the session: requests fail, channels are destroyed, and no READ of the node's is served any more."""
        if self.closed is not None:
            return
        self.closed = error
        self.over.set()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: whoever asked may have gone
        if hasattr(self, "pool"):
            self.pool.close(error)
        if self.pull is not None:
            self.pull.close()
        self.writer.close()
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()

    async def leave(self, reason: str) -> None:
        """Says goodbye and ends the session."""
        if self.closed is None:
            with contextlib.suppress(OSError, MemKVError):
                self.writer.write(self.protocol.send(m.Bye(reason)))
                await asyncio.wait_for(self.writer.drain(), 1.0)
        self.fail(LocalError("the peer is closed"))

    # --- namespace ---

    async def attach(self, get_domain: Domain, put_domain: Domain, regions: list[m.RegionInfo]) -> None:
        """Opens the namespace, offers put sources, and makes a first channel each way."""
        self.get_domain, self.put_domain = get_domain, put_domain
        self.info = await self._open_namespace(self.settings.create)
        s = self.settings
        cache = ffi.gc(lib.mkv_cache_new(s.cache_entries), lib.mkv_cache_free)
        view = ffi.new("struct mkv_view *")
        view.salt, view.grace_ns, view.incarnation = self.info.salt, self.info.grace_ns, self.info.incarnation
        view.cache = cache
        view.strict = (self.info.clock == "strict") if s.strict is None else s.strict
        self.view, self._cache = view, cache
        self._learn(self.info)
        self.pool = ChannelPool(self._open_read_channel, self.loop, s.max_channels)
        if regions:
            await self.ask(lambda r: m.OfferRegions(r, regions))
        await self.pool.warm()

    async def _open_namespace(self, create: bool) -> m.NamespaceInfo:
        s = self.settings
        mode: Any = "create" if create else "open"
        info: m.NamespaceInfo = await self.ask(
            lambda r: m.OpenNamespace(r, s.namespace, mode, s.block_bytes, s.align, s.grace_ms)
        )
        return info

    def _learn(self, info: m.NamespaceInfo) -> None:
        for slab in info.slabs:
            self.remote.add(from_region(slab))
        self._set_table(info.table)

    def _set_table(self, table: m.TableInfo) -> None:
        if (table.version << 8) >= int(self.view.table) & ~0xFF:
            self.remote.add(from_region(table.region))
            self.view.table = table.version << 8 | (table.buckets.bit_length() - 1)
            self.view.table_changed = 0

    def refresh_soon(self) -> None:
        """An epoch line named a table that we do not have: its notice is on its way, or was lost."""
        if self.closed is None and self._refreshing is None:
            self._spawn(self._refresh_quietly())

    async def _refresh_quietly(self) -> None:
        with contextlib.suppress(MemKVError):
            await self.refresh()

    def note_refusal(self, error: MemKVError) -> None:
        """A request that failed as a whole: its keys get a status, the log the reason."""
        log.warning("%s: %s", self.host, error)

    async def refresh(self) -> None:
        """Asks for slabs and table anew; callers at the same time share one request."""
        if self._refreshing is None:
            self._refreshing = asyncio.ensure_future(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        try:
            self._learn(await self._open_namespace(create=False))
        finally:
            self._refreshing = None

    async def _slab_retired(self, notice: m.SlabRetired) -> None:
        for id in np.frombuffer(notice.ids, "<u4"):
            self.remote.remove(int(id))
        await self.pool.quiesce()
        self.say(m.Ack(notice.notice))

    async def _table_changed(self, notice: m.TableChanged) -> None:
        old = int(self.view.table) >> 8
        self._set_table(notice.table)
        await self.pool.quiesce()
        if old != int(self.view.table) >> 8:
            self.remote.remove(lib.MKV_TABLE_REGION + old)
        self.say(m.Ack(notice.notice))

    # --- channels ---

    async def _connect(self, endpoint: Endpoint, purpose: Any) -> Endpoint:
        fabric: Any = endpoint.offer.fabric
        timeout = self.settings.timeout
        started = time.monotonic()
        try:
            info: m.ChannelInfo = await self.ask(
                lambda r: m.OpenChannel(
                    r,
                    self.info.namespace,
                    purpose,
                    fabric,
                    rails=to_rails(endpoint.offer),
                    streams=endpoint.offer.streams,
                    deadline_ms=int(timeout * 1000),
                )
            )
            left = max(0.1, timeout - (time.monotonic() - started))
            await asyncio.to_thread(endpoint.connect, from_channel(fabric, info), self.host, left)
        except BaseException:
            endpoint.close()
            raise
        return endpoint

    async def _open_read_channel(self) -> ReadChannel:
        endpoint = self.get_domain.endpoint("read", self.remote, depth=DEPTH, dial=True)
        return ReadChannel(await self._connect(endpoint, "get"), self.get_domain, self.view)

    async def ensure_pull(self) -> None:
        """The channel over which the node pulls puts; made on the first put."""
        async with self._pulling:
            if self.pull is None:
                self.pull = await self._connect(self.put_domain.endpoint("serve", dial=True), "pull")

    async def offer(self, regions: list[Any]) -> None:
        """Tells the node of put sources (``rdma.fabric.RegionDesc``)."""
        infos = [to_region(r) for r in regions]
        await self.ask(lambda r: m.OfferRegions(r, infos))

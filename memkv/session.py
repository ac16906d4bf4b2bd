"""One connection to one node, from handshake to loss: control messages, the namespace's view, channels.

Everything here runs on the peer's control thread, but for the pool, which batches use from their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from . import __version__
from .channels import DEPTH, ChannelPool, ReadChannel
from .native._peer import ffi, lib
from .pulls import Pulls
from .rdma.errors import DeadlineError, LocalError, MemKVError, RemoteError
from .rdma.fabric import Domain, Endpoint, RemoteTable
from .store import messages as m
from .store.framing import RefusedError, RemoteProtocolError
from .store.protocol import PeerProtocol
from .wire import from_channel, from_region, to_rails, to_region

log = logging.getLogger("memkv.peer")

T = TypeVar("T")

READ_BYTES = 1 << 18
PROBE_SECONDS = 2.0  # a node that does not answer a Ping for so long is down


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
        self.pulls = Pulls(self._open_pull)
        self.get_domain: Domain
        self.put_domain: Domain
        self._requests: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, Callable[[Any], None]] = {}
        self._next = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._probing = False

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
            raise RemoteError(
                f"{host}:{port} cannot be reached: {why}", "is memkv-node serve running there?"
            ) from None
        _watch_socket(writer)
        protocol = PeerProtocol(settings.secret, software=f"memkv {__version__}", role="peer")
        session = cls(reader, writer, protocol, host, settings)
        try:
            await asyncio.wait_for(session._shake(), settings.timeout)
        except TimeoutError:
            writer.close()
            raise DeadlineError(
                f"{host}:{port} did not complete the handshake", "is it a memkv node?"
            ) from None
        except RemoteProtocolError as exc:
            writer.write(exc.reply)
            writer.close()
            raise
        except OSError as exc:
            writer.close()
            raise RemoteError(f"{host}:{port} broke off the handshake: {exc.strerror or exc}") from None
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
        except RemoteProtocolError as exc:
            error = exc
            self.writer.write(exc.reply)
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
        elif isinstance(message, m.Staged):
            stream = self._streams.pop(message.request, None)
            if stream is not None:
                if not message.last:
                    self._streams[message.request] = stream
                stream(message)
        else:
            if isinstance(message, m.NamespaceInfo):
                self._learn(message)  # at once: a notice behind it already takes it for known
            request = getattr(message, "request", 0)
            future = self._requests.pop(request, None)
            if isinstance(message, m.Refusal) and (stream := self._streams.pop(request, None)):
                stream(RefusedError(message.message, message.hint, code=message.code))
            if future is None or future.done():
                return
            if isinstance(message, m.Refusal):
                future.set_exception(RefusedError(message.message, message.hint, code=message.code))
            else:
                future.set_result(message)

    def say(self, message: m.Message) -> None:
        """Sends a message that is not answered."""
        if self.closed is None:
            self.writer.write(self.protocol.send(message))

    def stream(self, make: Any, take: Callable[[Any], None]) -> None:
        """Sends ``make(request id)``, which is answered in parts: ``take`` gets each, or the error that ends
        them.
        """
        if self.closed is not None:
            take(self.closed)
            return
        request, self._next = self._next, self._next + 1
        try:
            self.writer.write(self.protocol.send(make(request)))
        except MemKVError as exc:
            take(exc)
        else:
            self._streams[request] = take

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
        # wait_for would cost one more turn of the loop, which every put would notice.
        late = self.loop.call_later(self.settings.timeout if timeout is None else timeout, _expire, future)
        try:
            self.writer.write(self.protocol.send(make(request)))
            return await future
        except TimeoutError:
            self._doubt()
            raise DeadlineError(
                "the node did not answer in time", "a longer timeout, or is it overloaded?"
            ) from None
        finally:
            late.cancel()
            self._requests.pop(request, None)

    def fail(self, error: MemKVError) -> None:
        """Ends the session: requests fail, channels are destroyed, and no READ of the node's is served any
        more.
        """
        if self.closed is not None:
            return
        self.closed = error
        self.over.set()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: whoever asked may have gone
        streams, self._streams = self._streams, {}
        for take in streams.values():
            take(error)
        if hasattr(self, "pool"):
            self.pool.close(error)
        self.pulls.close()
        self.writer.close()
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()

    def doubt(self) -> None:
        """A batch was late, or its channel broke: sees whether the node still answers. From any thread.

        A node that has stopped, or cannot be reached any more, would otherwise cost every batch its whole
        deadline until the kernel notices. While it answers, nothing happens: one-sided READs ask nobody.
        """
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._doubt)

    def _doubt(self) -> None:
        if self.closed is None and not self._probing:
            self._probing = True
            self._spawn(self._probe())

    async def _probe(self) -> None:
        try:
            await self.ask(m.Ping, min(PROBE_SECONDS, self.settings.timeout))
        except DeadlineError:
            self.fail(RemoteError("the node does not answer", "is it stopped, or overloaded?"))
        except MemKVError:
            pass
        finally:
            self._probing = False

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
        self.pool = ChannelPool(self._open_read_channel, self.loop, self.settings.max_channels)
        await self._open_namespace(self.settings.create)
        if regions:
            await self.ask(lambda r: m.OfferRegions(r, regions))
        await self.pool.warm()

    async def _open_namespace(self, create: bool) -> None:
        """Asks for all that the node has to tell of the namespace; ``_learn`` takes it."""
        s = self.settings
        mode: Any = "create" if create else "open"
        await self.ask(lambda r: m.OpenNamespace(r, s.namespace, mode, s.block_bytes, s.align, s.grace_ms))

    def _learn(self, info: m.NamespaceInfo) -> None:
        if self.view is None:
            self._first_view(info)
        for slab in info.slabs:
            self.remote.add(from_region(slab))
        self._set_table(info.table)

    def _first_view(self, info: m.NamespaceInfo) -> None:
        s = self.settings
        cache = ffi.gc(lib.mkv_cache_new(s.cache_entries), lib.mkv_cache_free)
        view = ffi.new("struct mkv_view *")
        view.salt, view.grace_ns, view.incarnation = info.salt, info.grace_ns, info.incarnation
        view.cache = cache
        view.strict = (info.clock == "strict") if s.strict is None else s.strict
        self.info, self.view, self._cache = info, view, cache

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
            self._refreshing = _shared(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        try:
            await self._open_namespace(create=False)
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
            await _in_thread(lambda: endpoint.connect(from_channel(fabric, info), self.host, left))
            if self.closed is not None:
                raise self.closed
        except BaseException:
            endpoint.close()
            raise
        endpoint.number = info.channel
        return endpoint

    async def _open_read_channel(self) -> ReadChannel:
        endpoint = self.get_domain.endpoint("read", self.remote, depth=DEPTH, dial=True)
        await self._connect(endpoint, "get")
        try:
            return ReadChannel(endpoint, self.get_domain, self.view, self._channel_gone)
        except BaseException:
            endpoint.close()
            raise

    def _channel_gone(self, endpoint: Endpoint) -> None:
        """Our end of a channel is destroyed: the node is told, so that it keeps no end for it. From any
        thread.
        """
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._close_channel, endpoint.number)

    def _close_channel(self, number: int) -> None:
        async def tell() -> None:
            with contextlib.suppress(MemKVError):
                await self.ask(lambda r: m.CloseChannel(r, number))

        if self.closed is None and number:
            self._spawn(tell())

    async def _open_pull(self) -> Endpoint:
        return await self._connect(self.put_domain.endpoint("serve", dial=True), "pull")

    async def offer(self, regions: list[Any]) -> None:
        """Tells the node of put sources (``rdma.fabric.RegionDesc``)."""
        infos = [to_region(r) for r in regions]
        await self.ask(lambda r: m.OfferRegions(r, infos))


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _shared(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that several may wait for, shielded, and nobody has to."""
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(lambda t: t.cancelled() or t.exception())
    return task


async def _in_thread(call: Callable[[], None]) -> None:
    """Makes a call that blocks. It has ended when this has, cancelled or not: what it works on may be
    destroyed.
    """
    work = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _watch_socket(writer: asyncio.StreamWriter) -> None:
    """Lets the kernel notice a node that has vanished while nothing is asked of it: within about a minute."""
    sock = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)

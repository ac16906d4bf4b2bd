"""One control connection of the node: what its peer asks for, and what it owns.

A session owns channels, a table of the regions that its peer offers, and the puts that it has queued. Quick
requests are answered at once; those that wait or block (a device, a put, a large batch) run as tasks, a
bounded number of them. Whatever a peer does wrong ends its own session with one line in the log, and
nothing else.

The end of a session, however it comes about, has one order: puts and stages are cancelled, their jobs end,
tasks end, channels are destroyed, and only then do the notices that it owed count as acknowledged, for only
now can its queue pairs reach nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..rdma.errors import MemKVError
from ..rdma.fabric import TABLE_CAPACITY, Endpoint, Fabric, Offer, RailEnd, RegionDesc, RemoteTable
from . import messages as m
from .batches import INLINE_KEYS, KeyBatch, call_of, delete
from .columns import unpack_column
from .config import NodeConfig
from .flash.tier import FlashTier
from .framing import LocalProtocolError, RemoteProtocolError
from .metrics import Counters
from .namespace import Namespace
from .namespaces import Namespaces
from .native._store import ffi, lib
from .protocol import NodeProtocol, State, printable
from .puts import PullChannel, PutEngine, PutQueue
from .refusals import Refuse, code_of
from .sockets import hang_up, name_of, watch

log = logging.getLogger("memkv.node")

HANDSHAKE_SECONDS = 10.0
CHUNK = 256 << 10  # bytes of one read
UNREAD_LIMIT = 32 << 20  # bytes of replies that a peer leaves unread
LIFETIME_REGIONS = 1 << 18  # offered in one session's life: a table keeps what was withdrawn
PULL_DEPTH = 128  # READs under way on one pull channel
MAX_MS = 3_600_000
NO_FLASH = "this node has no flash tier"


@dataclass(slots=True)
class Shared:
    """What all sessions of a node use."""

    config: NodeConfig
    name: str
    software: str
    incarnation: int
    clock: str  # what the node advises its peers: "plain" or "strict"
    fabric: Fabric
    namespaces: Namespaces
    engine: PutEngine
    pool: ThreadPoolExecutor  # for what blocks
    counters: Counters
    sections: Callable[[], m.Sections]
    flash: FlashTier | None


class Session:
    """See the module. ``run`` is its whole life."""

    def __init__(self, shared: Shared, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shared = shared
        self.config = shared.config
        self.peer = name_of(writer)
        self.protocol = NodeProtocol(shared.config.secret, incarnation=shared.incarnation)
        self.remote = RemoteTable()
        self.withdrawing: set[int] = set()
        self.channels: dict[int, Endpoint | PullChannel] = {}
        self.queues: dict[int, PutQueue] = {}  # by namespace: those that are open
        self.closing = False
        self._reader = reader
        self._writer = writer
        self._talk: asyncio.Task[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reason = ""
        self._offered = 0
        self._next_channel = 1
        self._opening = 0

    # --- life ---

    async def run(self) -> None:
        """Serves the connection until it ends, then gives back all that it owned."""
        watch(self._writer)
        self._talk = asyncio.create_task(self._converse())
        await asyncio.wait([self._talk])
        self.closing = True
        faulty = True
        try:
            reason, faulty = self._talk.result(), False
        except asyncio.CancelledError:
            reason, faulty = self._reason, self._reason != ""
        except RemoteProtocolError as exc:
            reason = str(exc)
            self._write(exc.reply)
        except TimeoutError:
            reason = f"no handshake within {HANDSHAKE_SECONDS:g} s"
        except (OSError, MemKVError) as exc:
            reason = str(exc)
        except Exception:
            log.exception("session %s: a fault of ours", self.peer)
            reason = "a fault of the node"
        counters = self.shared.counters
        counters.sessions_faulted += faulty and self.protocol.authenticated
        counters.sessions_refused += not self.protocol.authenticated
        log.log(
            logging.WARNING if faulty else logging.INFO, "session %s closed: %s", self.peer, printable(reason)
        )
        await self._release()
        await hang_up(self._reader, self._writer)

    def lost(self, reason: str) -> None:
        """Ends the session for something that its peer did or failed to do."""
        if not self.closing:
            self.closing = True
            self._reason = reason
            self._last_words(m.Refusal(0, m.Code.LIMIT, reason))
            self._stop_talking()

    def leave(self, reason: str) -> None:
        """Ends the session because the node goes down."""
        if not self.closing:
            self.closing = True
            self._last_words(m.Bye(reason))
            self._stop_talking()

    def _last_words(self, message: m.Message) -> None:
        with contextlib.suppress(LocalProtocolError):
            self._write(self.protocol.send(message))

    def _stop_talking(self) -> None:
        if self._talk:
            self._talk.cancel()

    async def _release(self) -> None:
        """Gives back everything, in the order that the module's head gives."""
        for queue in self.queues.values():
            queue.fail(lib.MKV_ERROR_LINK)
        if self.shared.flash:
            self.shared.flash.staging.drop(self)
        pulls = [c for c in self.channels.values() if isinstance(c, PullChannel)]
        for pull in pulls:
            pull.cancel()
        for pull in pulls:
            await pull.idle.wait()
        while waiting := {*self._tasks, *(f for q in self.queues.values() for f in q.farewells)}:
            await asyncio.wait(waiting)
        for id in list(self.channels):
            await self._destroy(id)
        self.shared.namespaces.notices.gone(self)
        for id in self.queues:
            self.shared.namespaces.by_id[id].sessions.discard(self)

    # --- the connection ---

    async def _converse(self) -> str:
        """Reads and acts until the peer says Bye; returns why it left."""
        async with asyncio.timeout(HANDSHAKE_SECONDS) as patience:
            while True:
                data = await self._reader.read(CHUNK)
                if not data:
                    self.protocol.receive_eof()
                    return "left"
                for message in self.protocol.receive_data(data):
                    if isinstance(message, m.Hello):
                        self._welcome(message)
                        patience.reschedule(None)
                    elif isinstance(message, m.Bye):
                        return f"left: {message.reason}"
                    else:
                        self._act(message)
                self._write(self.protocol.data_to_send())
                await asyncio.sleep(0)  # a peer that always has more to say gets no more than its turn

    def _welcome(self, hello: m.Hello) -> None:
        self.shared.counters.sessions_opened += 1
        log.info("session %s: %s (%s)", self.peer, printable(hello.role), printable(hello.software))
        s = self.shared
        self._write(self.protocol.welcome(s.name, s.software, [s.fabric.name]))

    def notify(self, message: m.Message) -> None:
        """Sends a message, unless the session is ending."""
        if not self.closing and self.protocol.state is State.READY:
            self._write(self.protocol.send(message))

    def _write(self, data: bytes) -> None:
        if not data or self._writer.is_closing():
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > UNREAD_LIMIT:
            self.lost(f"{UNREAD_LIMIT >> 20} MiB of replies were not read")

    # --- requests ---

    def _act(self, message: m.Message) -> None:
        self.shared.counters.request(type(message).__name__)
        request: int = getattr(message, "request", 0)
        try:
            reply = None
            if quick := _QUICK.get(type(message)):
                reply = quick(self, message)
            elif isinstance(message, KeyBatch) and self._inline(message):
                reply = call_of(self._namespace(message.namespace), message)()
            if reply is not None:
                self.notify(reply)
            if type(message) not in _SLOW or reply is not None:
                return
            if len(self._tasks) >= self.config.max_requests:
                raise Refuse(
                    m.Code.LIMIT, f"{len(self._tasks)} requests are under way", "max_requests of the node"
                )
            task = asyncio.create_task(self._answer(request, _SLOW[type(message)](self, message)))
        except Exception as exc:
            self._refuse(request, exc)
        else:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: int, work: Coroutine[Any, Any, m.Message | None]) -> None:
        try:
            reply = await work
            if reply is not None:
                self.notify(reply)
        except Exception as exc:
            self._refuse(request, exc)

    def _refuse(self, request: int, exc: Exception) -> None:
        """Answers a request with what went wrong."""
        self.shared.counters.refusals += 1
        code, text, hint = code_of(exc), str(exc), ""
        if isinstance(exc, Refuse):
            text, hint = exc.message, exc.hint
        if code is m.Code.INTERNAL:
            log.error(
                "session %s: request refused: %s", self.peer, exc, exc_info=not isinstance(exc, MemKVError)
            )
            text = text if isinstance(exc, MemKVError) else "the node failed; its log says more"
        if request:
            self.notify(m.Refusal(request, code, text[:1000], hint[:1000]))
        elif not self.closing:
            self.lost(text)

    def _ping(self, r: m.Ping) -> m.Message:
        return m.Pong(r.request)

    def _pong(self, r: m.Pong) -> None:
        return None

    def _ack(self, r: m.Ack) -> None:
        self.shared.namespaces.notices.acknowledge(self, r.notice)

    def _stats(self, r: m.Stats) -> m.Message:
        return m.StatsInfo(r.request, self.shared.sections())

    def _touch(self, r: m.Touch) -> None:
        if queue := self.queues.get(r.namespace):
            lib.mkv_ns_touch(queue.ns, ffi.from_buffer(r.keys), r.blocks)

    def _unstage(self, r: m.Unstage) -> None:
        if queue := self.queues.get(r.namespace):
            keys, generations = ffi.from_buffer(r.keys), ffi.from_buffer("uint32_t[]", r.generations)
            lib.mkv_ns_unstage(queue.ns, keys, generations, r.blocks)

    async def _open_namespace(self, r: m.OpenNamespace) -> m.Message:
        ns = await self.shared.namespaces.open(r)
        if ns.id not in self.queues:
            self.queues[ns.id] = PutQueue(
                self.shared.engine, ns.ns, self.config.max_put_bytes, self._destroy_pull
            )
            ns.sessions.add(self)
        return ns.info(r.request, self.shared.clock)  # no await since it was added: no notice can be missed

    def _namespace(self, id: int) -> Namespace:
        if id not in self.queues:
            raise Refuse(
                m.Code.NOT_FOUND, f"namespace {id} is not open in this session", "OpenNamespace first"
            )
        return self.shared.namespaces.by_id[id]

    async def _in_pool(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.shared.pool, call)

    # --- batches of keys ---

    def _inline(self, r: KeyBatch) -> bool:
        """Whether it is quick enough for the event loop; with flash a Delete waits for devices."""
        return r.blocks <= INLINE_KEYS and not (isinstance(r, m.Delete) and self.shared.flash)

    async def _many_keys(self, r: KeyBatch) -> m.Message:
        reply: m.Message = await self._in_pool(call_of(self._namespace(r.namespace), r))
        return reply

    async def _delete(self, r: m.Delete) -> m.Message:
        ns, tier = self._namespace(r.namespace), self.shared.flash
        if tier is None:
            return await self._many_keys(r)
        timeout = min(r.deadline_ms or self.config.put_timeout_ms, MAX_MS) / 1000
        return await delete(ns, r, tier, self.shared.pool, timeout)

    async def _stage(self, r: m.Stage) -> m.Message | None:
        ns, tier = self._namespace(r.namespace), self.shared.flash
        if tier is None:
            raise Refuse(m.Code.UNSUPPORTED, NO_FLASH, "--flash of the node")
        if not r.blocks:
            return m.Staged(r.request, b"", b"", b"", True)
        if tier.staging.blocks_of(self) + r.blocks > self.config.max_queued_blocks:
            raise Refuse(
                m.Code.LIMIT,
                f"{tier.staging.blocks_of(self)} blocks are being staged",
                "max_queued_blocks of the node",
            )
        timeout = min(r.deadline_ms or self.config.stage_timeout_ms, MAX_MS) / 1000
        await tier.staging.serve(ns.ns, r, timeout, self)
        return None

    # --- channels ---

    async def _open_channel(self, r: m.OpenChannel) -> m.Message:
        ns = self._namespace(r.namespace)
        fabric = self.shared.fabric
        if r.fabric != fabric.name:
            raise Refuse(
                m.Code.UNSUPPORTED,
                f"this node moves bytes over {fabric.name} ({fabric.reason})",
                "fabric of the node",
            )
        if len(self.channels) + self._opening >= self.config.max_channels:
            raise Refuse(
                m.Code.LIMIT, f"{self.config.max_channels} channels are open", "max_channels of the node"
            )
        other = Offer(r.fabric, tuple(_rail_end(rail) for rail in r.rails), r.port, r.token, r.streams)
        timeout = min(r.deadline_ms or 5000, MAX_MS) / 1000

        def make() -> Endpoint:
            if r.purpose == "get":
                endpoint = ns.serve.endpoint("serve")
            else:
                endpoint = ns.pull.endpoint("read", self.remote, depth=PULL_DEPTH)
            try:
                if fabric.name == "verbs":  # on tcp the peer dials, once it has our answer
                    endpoint.connect(other, self.peer, timeout)
            except BaseException:
                endpoint.close()
                raise
            return endpoint

        self._opening += 1
        try:
            endpoint = await self._in_pool(make)
        finally:
            self._opening -= 1
        id, self._next_channel = self._next_channel, self._next_channel + 1
        if r.purpose == "pull":
            pull = PullChannel(id, endpoint, PULL_DEPTH)
            self.channels[id] = self.queues[ns.id].pulls[id] = pull
        else:
            self.channels[id] = endpoint
        ours = endpoint.offer
        rails = [m.RailInfo(e.device, e.gid, e.qpn, e.psn, e.mtu, e.rd_atomic, e.lid) for e in ours.rails]
        return m.ChannelInfo(r.request, id, rails, ours.port, ours.token, ours.streams)

    async def _close_channel(self, r: m.CloseChannel) -> m.Message:
        if not 0 < r.channel < self._next_channel:
            raise Refuse(m.Code.NOT_FOUND, f"there is no channel {r.channel}")
        channel = self.channels.get(r.channel)
        if isinstance(channel, PullChannel):
            channel.cancel()
            await channel.idle.wait()
        await self._destroy(r.channel)  # gone already, because it broke: that is well too
        return m.Done(r.request)

    async def _destroy_pull(self, pull: PullChannel) -> None:
        await self._destroy(pull.id)

    async def _destroy(self, id: int) -> None:
        """Destroys a channel, whose jobs have ended; once."""
        channel = self.channels.pop(id, None)
        if isinstance(channel, PullChannel):
            for queue in self.queues.values():
                if queue.pulls.pop(id, None):
                    queue.pump()
            await self._in_pool(channel.destroy)
        elif channel is not None:
            await self._in_pool(channel.close)

    # --- puts ---

    def _offer(self, r: m.OfferRegions) -> m.Message:
        rails = len(getattr(self.shared.fabric, "rails", ()))
        new: dict[int, RegionDesc] = {}
        for info in r.regions:
            desc = RegionDesc(
                info.id, info.length, info.access, info.secret, tuple((k.iova, k.rkey) for k in info.rails)
            )
            known = new.get(desc.id) or self.remote.known.get(desc.id)
            if known == desc:
                continue
            if known is not None:
                raise Refuse(
                    m.Code.MISMATCH, f"region {desc.id} was offered with other keys", "withdraw it first"
                )
            if desc.id >= TABLE_CAPACITY:
                raise Refuse(m.Code.LIMIT, f"region id {desc.id}", f"ids are below {TABLE_CAPACITY}")
            if len(desc.rails) != rails:
                raise Refuse(
                    m.Code.MISMATCH, f"region {desc.id} has {len(desc.rails)} keys, the node {rails} rails"
                )
            new[desc.id] = desc
        if len(self.remote.known) + len(new) > self.config.max_regions:
            raise Refuse(
                m.Code.LIMIT, f"{self.config.max_regions} regions are offered", "max_regions of the node"
            )
        if self._offered + len(new) > LIFETIME_REGIONS:
            raise Refuse(
                m.Code.LIMIT, f"{self._offered} regions were offered in this session", "connect anew"
            )
        self._offered += len(new)
        for desc in new.values():
            self.remote.add(desc)
        return m.Done(r.request)

    async def _withdraw(self, r: m.WithdrawRegions) -> m.Message:
        ids = set(unpack_column(r.ids, 4).tolist())
        self.withdrawing |= ids  # a put that comes now finds them gone
        try:
            if users := [f for q in self.queues.values() for f in q.users(ids)]:
                await asyncio.wait(users)
            for id in ids:
                self.remote.remove(id)
        finally:
            self.withdrawing -= ids
        return m.Done(r.request)

    async def _put(self, r: m.Put) -> m.Message:
        self._namespace(r.namespace)
        queue = self.queues[r.namespace]
        if r.durability == "flash" and self.shared.flash is None:
            raise Refuse(
                m.Code.UNSUPPORTED,
                f"{NO_FLASH}, so nothing survives it",
                'durability "memory", or --flash of the node',
            )
        if not r.blocks:
            return m.PutDone(r.request, b"")
        if self.closing or not queue.connected:
            raise Refuse(
                m.Code.NOT_FOUND, "no pull channel of this namespace is connected", "OpenChannel pull first"
            )
        if queue.blocks_waiting + r.blocks > self.config.max_queued_blocks:
            raise Refuse(
                m.Code.LIMIT, f"{queue.blocks_waiting} blocks are queued", "max_queued_blocks of the node"
            )
        timeout_ms = min(r.deadline_ms or self.config.put_timeout_ms, MAX_MS)
        outcome = await queue.put(r, self.withdrawing, timeout_ms * 1_000_000)
        return m.PutDone(r.request, outcome.statuses)


_QUICK: dict[type, Callable[[Any, Any], m.Message | None]] = {
    m.Ping: Session._ping,
    m.Pong: Session._pong,
    m.Ack: Session._ack,
    m.Stats: Session._stats,
    m.Touch: Session._touch,
    m.Unstage: Session._unstage,
    m.OfferRegions: Session._offer,
}
_SLOW: dict[type, Callable[[Any, Any], Coroutine[Any, Any, m.Message | None]]] = {
    m.OpenNamespace: Session._open_namespace,
    m.OpenChannel: Session._open_channel,
    m.CloseChannel: Session._close_channel,
    m.WithdrawRegions: Session._withdraw,
    m.Put: Session._put,
    m.Lookup: Session._many_keys,
    m.Match: Session._many_keys,
    m.Pin: Session._many_keys,
    m.Unpin: Session._many_keys,
    m.Delete: Session._delete,
    m.Stage: Session._stage,
}


def _rail_end(rail: m.RailInfo) -> RailEnd:
    if rail.mtu not in (256, 512, 1024, 2048, 4096):
        raise Refuse(m.Code.PROTOCOL, f"an MTU of {rail.mtu}", "256 to 4096, a power of two")
    return RailEnd(rail.device, rail.gid, rail.qpn, rail.psn, rail.mtu, rail.rd_atomic, rail.lid)

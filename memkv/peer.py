"""The peer: what an inference engine holds to find, fetch and keep blocks.

Gets run on the caller's own thread, in C, without the GIL; nothing of the node's CPU is involved. Control
(connecting, puts, pins, notices) and asynchronous batches live on one background thread with an asyncio loop.
All methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .aio import AsyncPeer
from .batches import Batch, Index, Keys, as_keys
from .buffers import Buffer, Slices
from .channels import ChannelPool
from .control import Control
from .fabrics import choose_fabric
from .gets import Gets, prefix
from .gpu import Gpu
from .gpudirect.staging import SLOT_BYTES, SLOTS
from .gpudirect.staging import Settings as StagingSettings
from .link import Link
from .placement import Placement
from .rdma.errors import LocalError, MemKVError
from .rdma.fabric import Fabric
from .registering import Registry
from .requests import Make, Requests
from .session import Session, Settings
from .staging import MESSAGE_KEYS
from .status import Status
from .store import messages as m
from .tickets import Then, Ticket
from .touches import Touches
from .wire import to_region

log = logging.getLogger("memkv.peer")

Statuses = npt.NDArray[np.uint8]

GALLOP = (16, 64, 256)  # keys looked up one-sidedly before match asks the nodes
DEFAULT_PORT = 7420
LONGEST = 3600.0  # seconds that a call may be given
LONGEST_PIN_MS = 2**32 - 1

# What a node is asked for each batch of keys: (session, keys, deadline in ms) → (request id → message).
_LOOKUP: Make = lambda s, k, t: lambda r: m.Lookup(r, s.info.namespace, k)  # noqa: E731
_UNPIN: Make = lambda s, k, t: lambda r: m.Unpin(r, s.info.namespace, k)  # noqa: E731
_DELETE: Make = lambda s, k, t: lambda r: m.Delete(r, s.info.namespace, k, t)  # noqa: E731


def _pin(ttl: float) -> Make:
    ms = round(ttl * 1000)
    if not 1 <= ms <= LONGEST_PIN_MS:
        raise LocalError(f"a pin of {ttl:g} seconds", "ttl: 0.001 s to 49 days")
    return lambda s, k, t: lambda r: m.Pin(r, s.info.namespace, k, ms)


def read_secret(secret: bytes | str | None, file: str | os.PathLike[str] | None) -> bytes:
    """The shared secret: given, from a file, or from the environment variable MEMKV_SECRET; else empty."""
    if secret is not None:
        return secret.encode() if isinstance(secret, str) else secret
    if file is not None:
        with open(file, "rb") as f:
            return f.read().strip()
    return os.environ.get("MEMKV_SECRET", "").encode()


def _exactly(slices: Slices, status: Statuses, lengths: npt.NDArray[np.uint32]) -> Statuses:
    """Statuses with which only blocks that fill their slices are HITs."""
    status[(status == Status.HIT) & (lengths != slices["length"])] = Status.ERROR_LENGTH
    return status


class Peer:
    """A connection to one or more nodes, for one namespace. Use :func:`memkv.connect`."""

    def __init__(
        self,
        nodes: str | Sequence[str],
        namespace: str,
        *,
        secret: bytes | str | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        create: bool = True,
        block_bytes: int = 0,
        align: int = 0,
        grace: float = 0.0,
        strict: bool | None = None,
        checksum: bool = False,
        fabric: str = "auto",
        devices: Sequence[str] = (),
        ib_port: int | None = None,
        gid_index: int | None = None,
        max_msg: int = 0,
        timeout: float = 5.0,
        cache_entries: int = 1 << 16,
        max_channels: int = 4,
        auto_touch: bool = True,
        staging_slot_bytes: int = SLOT_BYTES,
        staging_slots: int = SLOTS,
    ) -> None:
        names = [nodes] if isinstance(nodes, str) else list(nodes)
        names = [n if n.rpartition(":")[2].isdigit() else f"{n}:{DEFAULT_PORT}" for n in names]
        if not names or len(set(names)) != len(names):
            raise LocalError("nodes: at least one, each once")
        self.namespace = namespace
        self.timeout = timeout
        self.checksum = checksum
        self.fabric: Fabric | None = None
        self._fabric_wish: dict[str, Any] = {
            "demanded": fabric,
            "devices": devices,
            "ib_port": ib_port,
            "gid_index": gid_index,
            "max_msg": max_msg,
        }
        settings = Settings(
            namespace=namespace,
            secret=read_secret(secret, secret_file),
            create=create,
            block_bytes=block_bytes,
            align=align,
            grace_ms=round(grace * 1000),
            strict=strict,
            cache_entries=cache_entries,
            max_channels=max_channels,
            timeout=timeout,
        )
        slots = StagingSettings(staging_slot_bytes, staging_slots)
        self._placement = Placement(names)
        self._links = [Link(name, settings, self._attach) for name in names]
        self._pools: weakref.WeakSet[ChannelPool] = weakref.WeakSet()  # of sessions that are over, too
        self._control = Control()
        self._tickets: deque[Ticket] = deque()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.aio = AsyncPeer(self)
        self._requests = Requests(self._parts)
        touches = Touches(self._control.loop, self._requests.touch) if auto_touch else None
        self._gets = Gets(self._control, self._parts, touches)
        self._gpu = Gpu(self._control, self._gets, self._requests, self._parts, slots)
        self._registry = Registry(self, self._control, self._gpu, self._tell_all, self._quiesce)
        self._buffers = self._registry.buffers
        try:
            self._control.call(self._connect(), timeout * 4)
        except BaseException:
            self.close()
            raise

    # --- connecting ---

    def _seconds(self, timeout: float | None) -> float:
        return min(max(0.0, self.timeout if timeout is None else timeout), LONGEST)

    async def _connect(self) -> None:
        errors = await asyncio.gather(*(link.connect() for link in self._links), return_exceptions=True)
        failures = [e for e in errors if isinstance(e, BaseException)]
        for link, error in zip(self._links, errors, strict=True):
            if isinstance(error, BaseException):
                link.error = error if isinstance(error, MemKVError) else MemKVError(f"{error!r}")
                log.warning("%s: %s", link.address, link.error)
        if len(failures) == len(self._links):
            raise failures[0]
        for link in self._links:
            link.keep()

    async def _attach(self, session: Session) -> None:
        assert session.welcome is not None
        local = session.writer.get_extra_info("sockname")[0]
        if self.fabric is None:
            fabric = choose_fabric(session.welcome.fabrics, local, **self._fabric_wish)
            self._get_domain, self._put_domain = fabric.domain(), fabric.domain()
            self._registry.open(self._get_domain, self._put_domain)
            self.fabric = fabric
        elif self.fabric.name not in session.welcome.fabrics:
            raise MemKVError(
                f"this node offers {session.welcome.fabrics}, the others are used over {self.fabric.name}",
                "all nodes of a cluster need one fabric: memkv-node serve --fabric",
            )
        offered = self._registry.offered
        await session.attach(self._get_domain, self._put_domain, [to_region(b.desc) for b in offered])
        self._pools.add(session.pool)
        while late := [b for b in self._registry.offered if b not in offered]:  # registered meanwhile
            offered += late
            await session.offer([b.desc for b in late])

    # --- buffers ---

    def register(self, buffer: Any) -> Buffer:
        """Registers memory for gets and puts.

        :param buffer: anything with the buffer protocol, or ``(pointer, size in bytes)``; GPU memory as an
            array of CuPy, torch or JAX, or ``(pointer, size in bytes, "cuda:0")``. It must stay where it is
            until the :class:`Buffer` is closed. A read-only one can only be put from.
        :raises LocalError: not usable memory, or blocks longer than the staging slots. :raises DeviceError:
            the kernel or the GPU's driver refuses (memlock).

        GPU memory that the fabric cannot reach is *staged*: through ``staging_slots`` pinned host slots of
        ``staging_slot_bytes`` each (arguments of :func:`memkv.connect`; 64 MiB together by default), for each
        device and direction. The buffer's ``get_rung`` and ``put_rung`` say which way blocks go, and why.
        """
        return self._registry.register(buffer)

    def _unregister(self, handle: Buffer) -> None:
        self._registry.unregister(handle)

    async def _quiesce(self) -> None:
        await asyncio.gather(*(pool.quiesce() for pool in list(self._pools)))

    async def _tell_all(self, action: Any, fatal: bool = False) -> None:
        """Does ``action(session)`` for all that are up. One that fails loses its session if that is
        ``fatal``; else it is only logged: the next session is told everything anew.
        """
        sessions = self._sessions()
        for session, error in zip(
            sessions, await asyncio.gather(*map(action, sessions), return_exceptions=True), strict=True
        ):
            if isinstance(error, MemKVError):
                log.warning("%s: %s", session.host, error)
                if fatal:
                    session.fail(error)
            elif isinstance(error, BaseException):
                raise error

    def _sessions(self) -> list[Session]:
        return [link.session for link in self._links if link.session is not None]

    # --- finding ---

    def _parts(self, keys: Keys) -> list[tuple[Link, Index]]:
        if len(self._links) == 1:
            return [(self._links[0], None)]
        nodes = self._placement.nodes(keys)
        return [
            (self._links[i], np.flatnonzero(nodes == i).astype(np.uint32)) for i in np.unique(nodes).tolist()
        ]

    def match(self, keys: Any, *, timeout: float | None = None) -> int:
        """How many of ``keys`` are held, counted from the first one without a gap.

        :param keys: (n, 16) uint8, the blocks of a prefix in order.

        Up to 336 keys by one-sided READs of the index; the rest, if it comes to that, by one message per
        node.
        """
        keys = as_keys(keys)
        start = 0
        for stage in GALLOP:
            part = keys[start : start + stage]
            if not len(part):
                return start
            held = prefix(self._lookup(part, timeout))
            start += held
            if held < len(part):
                return start
        while start < len(keys):
            part = keys[start : start + MESSAGE_KEYS]
            held = prefix(self._ask_lookup(part, timeout))
            start += held
            if held < len(part):
                break
        return start

    def exists(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        """HIT or MISS (or an error) for each key; nothing is fetched."""
        keys = as_keys(keys)
        return self._lookup(keys, timeout) if len(keys) <= GALLOP[-1] else self._ask_lookup(keys, timeout)

    def _lookup(self, keys: Keys, timeout: float | None) -> Statuses:
        return self._gets.run(Batch(keys, None, False, True), self._seconds(timeout)).status

    def _ask_lookup(self, keys: Keys, timeout: float | None) -> Statuses:
        return self._rpc(keys, timeout, _LOOKUP)

    # --- getting ---

    def get_into(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        checksum: bool | None = None,
        exact: bool = False,
        lengths: npt.NDArray[np.uint32] | None = None,
        stream: Any = None,
    ) -> Statuses:
        """Fetches blocks into registered memory, of the host or of a GPU, or both in one batch.

        :param keys: (n, 16) uint8, or a sequence of 16-byte strings.
        :param slices: where each goes (:meth:`Buffer.slices`), with room for the whole block.
        :param timeout: seconds for the batch; the peer's default if None.
        :param checksum: verify payloads too; by default as the peer was made. Key, length, generation and
            time are always verified.
        :param exact: a block that does not fill its slice is ERROR_LENGTH, and not a HIT.
        :param lengths: (n,) uint32, receives the length of each HIT in bytes.
        :param stream: a CUDA stream (of CuPy or torch, or its handle) on which slices may still be in use:
            nothing is written into them before the work that it has now is over.
        :returns: (n,) uint8 of :class:`~memkv.status.Status`; a slice's content is undefined unless HIT.

        When this returns no copy into a slice is under way, and GPU memory holds the blocks for all work that
        is launched from now on, on whatever stream. Copies that have begun are waited for beyond
        ``timeout``: nobody can take them back.
        """
        keys, verify = as_keys(keys), self.checksum if checksum is None else checksum
        if self._gpu.concerns(slices, stream):
            status, found = self._control.call(
                self._gpu.get(keys, slices, self._seconds(timeout), verify, stream)(), None
            )
        else:
            batch = Batch(keys, slices, verify, False)
            status, found = self._gets.run(batch, self._seconds(timeout)).status, batch.lengths
        if lengths is not None:
            lengths[:] = found
        return _exactly(slices, status, found) if exact else status

    def stage(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        """Has the nodes bring blocks that they hold in flash into memory, without fetching them: what an
        engine announces is faster to get later. :meth:`submit_stage` does not wait.

        :returns: (n,) uint8: HIT (in memory now), MISS, TIMEOUT, CORRUPT or an error.
        """
        t = self._seconds(timeout)
        return self._control.call(self._requests.stage(as_keys(keys), t), t + 5)

    # --- keeping ---

    def put_from(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        durability: str = "memory",
        checksums: npt.NDArray[np.uint64] | None = None,
        stream: Any = None,
    ) -> Statuses:
        """Has the nodes pull blocks out of registered memory, of the host or of a GPU, and keep them.

        :param slices: what to keep; each slice's length is the block's. It must not change until this
            returns.
        :param durability: "memory", or "flash" where the node has some.
        :param checksums: (n,) uint64 as docs/layout.md defines them; without them the node computes its own.
        :param stream: the CUDA stream whose work makes the blocks: nothing is read before the work that it
            has now is over. Without one they have to be complete.
        :returns: (n,) uint8: STORED, EXISTS, CORRUPT, TIMEOUT or an error. With durability "flash" also
            ERROR_DEVICE: the block is in memory, and there is no place or no good device for it on flash;
            and MISS: somebody deleted it before it was durable. When this returns nobody reads the slices.
        """
        keys, t = as_keys(keys), self._seconds(timeout)
        if self._gpu.concerns(slices, stream):
            return self._control.call(self._gpu.put(keys, slices, t, durability, checksums, stream)(), None)
        return self._control.call(self._requests.put(keys, slices, t, durability, checksums), t * 2 + 10)

    def touch(self, keys: Any) -> None:
        """Tells the nodes that blocks are in use, so that they are evicted later. Gets do it themselves."""
        self._control.call(self._requests.touch(as_keys(keys)), self.timeout)

    def pin(self, keys: Any, ttl: float, *, timeout: float | None = None) -> Statuses:
        """Keeps blocks from being evicted for ``ttl`` seconds: DONE, MISS, or ERROR_FULL over the limit.

        :raises LocalError: ``ttl`` is not between 1 ms and 49 days.
        """
        return self._rpc(as_keys(keys), timeout, _pin(ttl))

    def unpin(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        """Takes one pin back: DONE or MISS."""
        return self._rpc(as_keys(keys), timeout, _UNPIN)

    def delete(self, keys: Any, *, timeout: float | None = None) -> Statuses:
        """Removes blocks: DONE or MISS. What was acknowledged as deleted is never served again."""
        return self._rpc(as_keys(keys), timeout, _DELETE)

    def _rpc(self, keys: Keys, timeout: float | None, make: Make) -> Statuses:
        t = self._seconds(timeout)
        return self._control.call(self._requests.ask(keys, t, make), t + 5)

    # --- callers with a loop of their own ---
    #
    # Each submit returns at once. What was submitted is done with when its ticket is: then ``then`` is called
    # with it, on the control thread, where it must not block nor call the peer; without ``then`` the ticket
    # is kept for :meth:`reap`.

    def fileno(self) -> int:
        """An eventfd that becomes readable when a submitted batch is done; then call :meth:`reap`."""
        return self._event

    def submit_get(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        exact: bool = False,
        stream: Any = None,
        tag: object = None,
        then: Then | None = None,
    ) -> Ticket:
        """Starts a get. See :meth:`get_into`; slices are the batch's until its ticket is done."""
        t = self._seconds(timeout)
        work = self._get_async(as_keys(keys), slices, t, self.checksum, stream, exact)
        return self._submit(work, tag, then)

    def _get_async(
        self, keys: Keys, slices: Slices, seconds: float, checksum: bool, stream: Any, exact: bool = False
    ) -> Coroutine[Any, Any, Statuses]:
        """A get for the control thread. What it needs of the caller's thread is done here and now."""
        if self._gpu.concerns(slices, stream):
            start = self._gpu.get(keys, slices, seconds, checksum, stream)

            async def gpu_work() -> Statuses:
                status, lengths = await start()
                return _exactly(slices, status, lengths) if exact else status

            return gpu_work()
        return self._run_async(Batch(keys, slices, checksum, False), seconds, exact)

    async def _run_async(self, batch: Batch, seconds: float, exact: bool = False) -> Statuses:
        await self._gets.run_async(batch, seconds)
        return _exactly(batch.slices, batch.status, batch.lengths) if exact else batch.status

    def _put_async(
        self,
        keys: Keys,
        slices: Slices,
        seconds: float,
        durability: str,
        checksums: npt.NDArray[np.uint64] | None,
        stream: Any,
    ) -> Coroutine[Any, Any, Statuses]:
        """A put for the control thread."""
        if self._gpu.concerns(slices, stream):
            return self._gpu.put(keys, slices, seconds, durability, checksums, stream)()
        return self._requests.put(keys, slices, seconds, durability, checksums)

    def submit_put(
        self,
        keys: Any,
        slices: Slices,
        *,
        timeout: float | None = None,
        durability: str = "memory",
        stream: Any = None,
        tag: object = None,
        then: Then | None = None,
    ) -> Ticket:
        """Starts a put. See :meth:`put_from`."""
        t = self._seconds(timeout)
        return self._submit(self._put_async(as_keys(keys), slices, t, durability, None, stream), tag, then)

    def submit_stage(
        self, keys: Any, *, timeout: float | None = None, tag: object = None, then: Then | None = None
    ) -> Ticket:
        """Announces blocks. See :meth:`stage`."""
        return self._submit(self._requests.stage(as_keys(keys), self._seconds(timeout)), tag, then)

    def submit_exists(
        self, keys: Any, *, timeout: float | None = None, tag: object = None, then: Then | None = None
    ) -> Ticket:
        """Starts a lookup. See :meth:`exists`."""
        keys, t = as_keys(keys), self._seconds(timeout)
        if len(keys) <= GALLOP[-1]:
            return self._submit(self._run_async(Batch(keys, None, False, True), t), tag, then)
        return self._submit(self._requests.ask(keys, t, _LOOKUP), tag, then)

    def submit_pin(
        self,
        keys: Any,
        ttl: float,
        *,
        timeout: float | None = None,
        tag: object = None,
        then: Then | None = None,
    ) -> Ticket:
        """Starts to pin: a lookup and a hold in one message. See :meth:`pin`."""
        work = self._requests.ask(as_keys(keys), self._seconds(timeout), _pin(ttl))
        return self._submit(work, tag, then)

    def submit_unpin(
        self, keys: Any, *, timeout: float | None = None, tag: object = None, then: Then | None = None
    ) -> Ticket:
        """Starts to take pins back. See :meth:`unpin`."""
        return self._submit(self._requests.ask(as_keys(keys), self._seconds(timeout), _UNPIN), tag, then)

    def submit_delete(
        self, keys: Any, *, timeout: float | None = None, tag: object = None, then: Then | None = None
    ) -> Ticket:
        """Starts to remove blocks. See :meth:`delete`."""
        return self._submit(self._requests.ask(as_keys(keys), self._seconds(timeout), _DELETE), tag, then)

    def _submit(self, work: Coroutine[Any, Any, Statuses], tag: object, then: Then | None) -> Ticket:
        ticket = Ticket(tag)

        async def follow() -> None:
            try:
                ticket.status = await work
            except MemKVError as exc:
                ticket.error = exc
            except Exception as exc:
                log.exception("a submitted batch")
                ticket.error = MemKVError(f"{exc!r}")
            ticket.done = True
            if then is None:
                self._tickets.append(ticket)
                os.eventfd_write(self._event, 1)
                return
            try:
                then(ticket)
            except Exception:
                log.exception("what was to be called after a submitted batch")

        try:
            self._control.start(follow())
        except LocalError:
            work.close()
            raise
        return ticket

    def reap(self) -> list[Ticket]:
        """Tickets that are done, oldest first; after :meth:`close` those that were under way, too. Never
        blocks.
        """
        if not self._control.closed:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event)
        out = []
        while self._tickets:
            out.append(self._tickets.popleft())
        return out

    # --- about itself ---

    def stats(self) -> dict[str, Any]:
        """Counters of this peer, one entry per node, with the fabric and why it was taken. Where GPU memory
        was registered, ``gpu`` has each device's slots and bytes, and every buffer's rungs and their reasons.
        """
        nodes = {}
        for link in self._links:
            session = link.session
            entry: dict[str, Any] = {"up": session is not None, "reconnects": link.reconnects}
            if session is None:
                entry["error"] = str(link.error)
            else:
                view = session.view
                for name in ("hits", "misses", "stale", "corrupt", "errors", "bytes", "lookups", "cached"):
                    entry[name] = int(getattr(view, name))
                entry["channels_busy"], entry["channels_idle"] = session.pool.counts
                entry["strict"] = bool(view.strict)
            nodes[link.address] = entry
        fabric = self.fabric.describe() | {"reason": self.fabric.reason} if self.fabric else {}
        out: dict[str, Any] = {"namespace": self.namespace, "fabric": fabric, "nodes": nodes}
        if self._gpu.used:
            out["gpu"] = self._gpu.stats()
        return out

    def node_stats(self, *, timeout: float | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """What each node that is up says of itself: sections of flat values, by node."""
        t = self._seconds(timeout)

        async def ask() -> dict[str, dict[str, dict[str, Any]]]:
            out = {}
            for link in self._links:
                if link.session is not None:
                    with contextlib.suppress(MemKVError):
                        info: m.StatsInfo = await link.session.ask(m.Stats, t)
                        out[link.address] = dict(info.sections)
            return out

        return self._control.call(ask(), t * len(self._links) + 1)

    def close(self) -> None:
        """Leaves the nodes and withdraws everything. Batches under way, on whatever thread, are waited for:
        until their deadlines at most.
        """
        if self._control.closed:
            return
        self._control.closed = True
        self._control.finish(self._leave())
        self._registry.close()
        self._gpu.close()
        if self.fabric is not None:
            self._get_domain.close()
            self._put_domain.close()
            self.fabric.close()
        os.close(self._event)

    async def _leave(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links), return_exceptions=True)
        await asyncio.gather(*(pool.quiesce() for pool in list(self._pools)))
        await self._control.settle()
        await self._gpu.detach()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

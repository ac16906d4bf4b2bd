"""A store node: memory, fabric, namespaces and sessions, put together and taken apart in the right order.

A node of one's own event loop::

    node = Node(NodeConfig.load("node.toml"))
    await node.start()
    await node.serve_forever()  # until somebody awaits node.stop()

and one on a thread, for tests, benchmarks and embedding::

    with NodeThread(NodeConfig(listen=("127.0.0.1", 0))) as node:
        connect(node.address)

Resources are entered on a stack as they come, so that whatever fails in the middle of a start is undone
like a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..rdma import devices
from ..rdma.errors import DeviceError, LocalError
from ..rdma.fabric import Fabric
from ..rdma.memory import HostMemory
from ..rdma.tcp import TcpFabric
from ..rdma.verbs import VerbsFabric
from . import messages as m
from .config import Address, NodeConfig, is_loopback
from .flash.store import FlashStore
from .flash.tier import FlashTier
from .framing import LocalProtocolError
from .metrics import Counters, HttpEndpoint
from .namespace import Settings
from .namespaces import Namespaces
from .native._store import ffi, lib
from .populate import Ahead
from .protocol import NodeProtocol
from .puts import PutEngine
from .session import CHUNK, Session, Shared
from .sockets import hang_up

log = logging.getLogger("memkv.node")

T = TypeVar("T")
MAX_UNPROVEN = 128  # connections that have not authenticated yet
POOL_THREADS = 4
FLUSH_PART = 0.8  # of the time for a stop may go by before flash gives up writing; the rest is for the rest


def software() -> str:
    """Name and version, as the handshake shows them."""
    try:
        return f"memkv {importlib.metadata.version('memkv')}"
    except importlib.metadata.PackageNotFoundError:
        return "memkv"


def open_fabric(config: NodeConfig) -> Fabric:
    """The highest rung of the ladder that can be had: verbs, else tcp with the reason why not verbs.

    :raises DeviceError: verbs was demanded and cannot be used, or the data port is taken.
    :raises LocalError: a device was named that does not exist.
    """
    reason = "tcp was asked for"
    if config.fabric != "tcp":
        try:
            return _open_verbs(config)
        except (DeviceError, LocalError) as exc:
            if config.fabric == "verbs" or config.devices:
                raise
            reason = f"verbs cannot be used: {exc}"
    try:
        return TcpFabric(listen=(config.listen[0], config.data_port), reason=reason)
    except OSError as exc:
        raise DeviceError(
            f"no data connections on {config.listen[0]}:{config.data_port}: {exc.strerror or exc}",
            exc.errno or 0,
            "data_port",
        ) from None


def _open_verbs(config: NodeConfig) -> Fabric:
    toward = _address_of(config.listen[0])
    port = config.ib_port or None
    index = None if config.gid_index < 0 else config.gid_index
    names: tuple[str | None, ...] = config.devices or (None,)
    selections = [devices.select(name, port, index, toward) for name in names]
    return VerbsFabric(selections, max_msg=config.max_msg, grace_ns=config.grace_ms * 1_000_000)


def _address_of(host: str) -> str | None:
    """The one address that the node listens on, if there is one that a device could carry."""
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0]).split("%")[0]
    except OSError:
        return None
    return None if ipaddress.ip_address(address).is_unspecified or is_loopback(address) else address


class Node:
    """A store node. Everything but the constructor belongs to one event loop."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.name = config.node_name
        self.software = software()
        self.incarnation = secrets.randbelow(2**64 - 1) + 1
        self.address: Address = config.listen
        self.metrics_address: Address | None = None
        self.counters = Counters()
        self.sessions: dict[Session, asyncio.Task[None]] = {}
        self.memory: HostMemory
        self.fabric: Fabric
        self.namespaces: Namespaces
        self.engine: PutEngine
        self.flash: FlashTier | None = None
        self.stopping = False
        self._arena: Any = ffi.NULL
        self._started = time.monotonic()
        self._stopping_since = 0.0
        self._stack = contextlib.AsyncExitStack()
        self._stopped = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Takes memory, opens the fabric and listens; on failure everything is given back.

        :raises LocalError: a setting that cannot be, or strangers would be served.
        :raises DeviceError: no memory, a demanded fabric that cannot be had, an address that is taken.
        """
        self.config.check_exposure()
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        log.info(
            "node %s listens on %s:%d over %s: %s",
            self.name,
            *self.address,
            self.fabric.name,
            self.fabric.reason,
        )

    async def _start(self) -> None:
        config, events, stack = self.config, asyncio.get_running_loop(), self._stack
        pool = ThreadPoolExecutor(POOL_THREADS, "memkv-pool")
        stack.callback(pool.shutdown)

        async def in_pool(function: Callable[[], None]) -> None:
            await events.run_in_executor(pool, function)

        self.memory = await events.run_in_executor(pool, HostMemory, config.memory, config.huge)
        stack.callback(self.memory.close)
        self.fabric = await events.run_in_executor(pool, open_fabric, config)
        stack.callback(self.fabric.close)
        self._arena = lib.mkv_arena_new(
            ffi.cast("void *", self.memory.address), self.memory.nbytes, config.slab, self.incarnation
        )
        if self._arena == ffi.NULL:
            raise DeviceError("the arena cannot be set up", ffi.errno, "memory, slab_bytes")
        stack.callback(self._free_arena)
        ahead = Ahead(self._arena, config.slab)
        stack.callback(ahead.close)
        store = await events.run_in_executor(pool, self._open_flash) if config.flash else None
        if store:
            stack.push_async_callback(in_pool, store.close)  # it waits for devices
            self.flash = FlashTier(store, pool)
        self.engine = PutEngine(self.counters.put)
        stack.callback(self.engine.close)
        self.engine.attach(events)
        self.namespaces = Namespaces(
            self.fabric,
            self._arena,
            self.incarnation,
            Settings(config.block_bytes, config.align, config.grace_ms * 1_000_000),
            config.max_namespaces,
            pool,
            config.ack_timeout_ms / 1000,
            ahead,
            store,
        )
        stack.push_async_callback(self.namespaces.close)
        fd = lib.mkv_arena_eventfd(self._arena)
        events.add_reader(fd, self._chores, fd)
        stack.callback(events.remove_reader, fd)
        if self.flash:
            self.flash.attach(events, lambda: list(self.namespaces.by_name.values()))
            stack.push_async_callback(self.flash.detach)
            await self.namespaces.restore()
            stack.push_async_callback(self._finish_flash)
        self._shared = Shared(
            config=config,
            name=self.name,
            software=self.software,
            incarnation=self.incarnation,
            clock=config.clock,
            fabric=self.fabric,
            namespaces=self.namespaces,
            engine=self.engine,
            pool=pool,
            counters=self.counters,
            sections=self.sections,
            flash=self.flash,
        )
        if config.metrics is not None:
            http = HttpEndpoint(self)
            await _listening(http.start(config.metrics), config.metrics, "metrics")
            self.metrics_address = http.address
            stack.push_async_callback(http.stop)
        stack.push_async_callback(self._end_sessions)
        serving = asyncio.start_server(self._accept, *config.listen, limit=CHUNK, backlog=256)
        self._server = await _listening(serving, config.listen, "listen")
        self.address = self._server.sockets[0].getsockname()[:2]

    def _open_flash(self) -> FlashStore:
        """Opens the devices; makes the files that are not there yet, which takes as long as writing them."""
        config = self.config
        return FlashStore(
            config.flash_paths,
            (self.memory.address, self.memory.nbytes),
            dirty_max=config.dirty_max,
            threads=config.flash_threads,
        )

    async def _finish_flash(self) -> None:
        assert self.flash is not None
        gone = time.monotonic() - self._stopping_since if self.stopping else 0.0
        await self.flash.finish(max(0.1, self.config.stop_timeout * FLUSH_PART - gone))

    def _free_arena(self) -> None:
        lib.mkv_arena_free(self._arena)
        self._arena = ffi.NULL

    def _chores(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        self.namespaces.wake()

    # --- sessions ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unproven = sum(not s.protocol.authenticated for s in self.sessions)
        if self.stopping:
            await self._turn_away(reader, writer, m.Code.CLOSING, "the node is going down", "")
        elif len(self.sessions) >= self.config.max_sessions or unproven >= MAX_UNPROVEN:
            await self._turn_away(
                reader, writer, m.Code.LIMIT, "too many connections", "max_sessions of the node"
            )
        else:
            session = Session(self._shared, reader, writer)
            task = asyncio.current_task()
            assert task is not None
            self.sessions[session] = task
            try:
                await session.run()
            finally:
                del self.sessions[session]

    async def _turn_away(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, code: m.Code, why: str, hint: str
    ) -> None:
        self.counters.sessions_refused += 1
        with contextlib.suppress(LocalProtocolError):
            writer.write(NodeProtocol(incarnation=self.incarnation).send(m.Refusal(0, code, why, hint)))
        await hang_up(reader, writer)

    async def _end_sessions(self) -> None:
        self.stopping = True
        if self._server:
            self._server.close()
        for session in list(self.sessions):
            session.leave("the node is going down")
        if self.sessions:
            await asyncio.wait(list(self.sessions.values()))
        if self._server:
            await self._server.wait_closed()

    # --- life ---

    async def serve_forever(self) -> None:
        """Returns after :meth:`stop` has been called and is through."""
        await self._stopped.wait()

    @property
    def stopped_clean(self) -> bool:
        """Whether a stop has left nothing in memory that flash was to have."""
        return self.flash is None or self.flash.complete

    async def stop(self) -> None:
        """Says Bye to every session, waits for what is under way, has flash write what is dirty, and gives
        everything back. Only flash minds ``stop_timeout``: whoever calls this may set a limit to the rest.
        """
        if self.stopping:
            await self._stopped.wait()
            return
        self.stopping = True
        self._stopping_since = time.monotonic()
        try:
            await self._stack.aclose()
        finally:
            self._stopped.set()
        log.info("node %s has stopped", self.name)

    # --- what it tells ---

    def health(self) -> tuple[bool, str]:
        """Whether it can serve, and if not why."""
        if self.stopping:
            return False, "going down"
        if self._server is None:
            return False, "not started"
        if self.flash and (out := self.flash.degraded()):
            return True, f"serving, degraded: flash: {out}"
        return True, "serving"

    def _memory(self) -> dict[str, int | str]:
        free = int(lib.mkv_arena_free_slabs(self._arena)) if self._arena != ffi.NULL else 0
        return {
            "bytes": self.memory.nbytes,
            "pages": self.memory.pages,
            "pages_reason": self.memory.reason,
            "slab_bytes": self.config.slab,
            "slabs": self.memory.nbytes // self.config.slab,
            "slabs_free": free,
        }

    def status(self) -> dict[str, Any]:
        """What ``/status`` returns; every value is JSON."""
        out = {
            "node": self.name,
            "software": self.software,
            "incarnation": f"{self.incarnation:016x}",
            "uptime_s": round(time.monotonic() - self._started, 3),
            "address": f"{self.address[0]}:{self.address[1]}",
            "fabric": {**self.fabric.describe(), "reason": self.fabric.reason},
            "memory": self._memory(),
            "flash": self.flash.status() if self.flash else {"devices": 0, "reason": "--flash was not given"},
            "flash_devices": self.flash.store.describe() if self.flash else {},
            "sessions": len(self.sessions),
            "puts_under_way": self.engine.under_way,
            "puts": self.counters.put_statuses(),
            "namespaces": {name: ns.stats() for name, ns in self.namespaces.by_name.items()},
        }
        if isinstance(self.fabric, TcpFabric):
            out["responder"] = self.fabric.stats()
        return out

    def sections(self) -> m.Sections:
        """The same for the control protocol: sections of flat values; a namespace's is "namespace:NAME", a
        device's "flash:PATH".
        """
        status = self.status()
        namespaces, devices = status.pop("namespaces"), status.pop("flash_devices")
        sections: m.Sections = {k: status.pop(k) for k in list(status) if isinstance(status[k], dict)}
        sections["node"] = status
        sections.update({f"namespace:{name}": stats for name, stats in namespaces.items()})
        sections.update({f"flash:{path}": facts for path, facts in devices.items()})
        return sections


async def _listening(coroutine: Any, address: Address, knob: str) -> Any:
    try:
        return await coroutine
    except OSError as exc:
        raise DeviceError(
            f"{address[0]}:{address[1]} cannot be listened on: {exc.strerror or exc}", exc.errno or 0, knob
        ) from None


class NodeThread:
    """A node on a thread and event loop of its own: for tests, benchmarks, and embedding.

    A context manager; ``address`` is where it listens.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.node: Node
        self._loop: asyncio.AbstractEventLoop
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="memkv-node", daemon=True)

    @property
    def address(self) -> Address:
        return self.node.address

    @property
    def metrics_address(self) -> Address | None:
        return self.node.metrics_address

    def start(self) -> NodeThread:
        """Starts it and waits until it listens. :raises MemKVError: as :meth:`Node.start`."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def stop(self) -> None:
        """Stops it and waits until everything is given back."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.node.stop(), self._loop).result()
            self._thread.join()

    def call(self, function: Callable[[], T]) -> T:
        """Calls something on the node's event loop."""

        async def on_loop() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()

    def __enter__(self) -> NodeThread:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as exc:
            self._failure = exc
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.node = Node(self.config)
        await self.node.start()
        self._ready.set()
        await self.node.serve_forever()

"""The tcp fabric: one-sided READ semantics over sockets, for machines without an RDMA device.

Each fabric has one C responder thread that serves READs of registered, REMOTE_READ regions, and on the node
one listener that hands incoming data connections to the endpoints they belong to. A data connection begins
with a preamble::

    0          8                 40
    │"MKVDATA1"│ token, 32 bytes │        answered by one byte, "K", once the endpoint has the socket

The token came over the authenticated control connection; whoever cannot show one is closed without a word.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

from .errors import DeadlineError, DeviceError
from .fabric import REMOTE_READ, Domain, Endpoint, Fabric, Offer, Region, RemoteTable, Role
from .native._rdma import ffi, lib

MAGIC = b"MKVDATA1"
TOKEN_BYTES = 32
PREAMBLE_BYTES = len(MAGIC) + TOKEN_BYTES
PREAMBLE_SECONDS = 5.0
MAX_STRANGERS = 256  # connections that have not shown a token yet
STREAMS = 2
WITHDRAW_NS = 2_000_000_000


class TcpFabric(Fabric):
    """Sockets.

    :param listen: (host, port) for data connections; None where only this side dials. Port 0: any.
    :param streams: sockets per channel.
    """

    name = "tcp"

    def __init__(
        self, listen: tuple[str, int] | None = None, *, streams: int = STREAMS, reason: str = ""
    ) -> None:
        self.streams = streams
        self.reason = reason or "tcp was asked for"
        self.responder: Any = lib.mkv_tcp_responder_new()
        if self.responder == ffi.NULL:
            raise DeviceError("the tcp responder cannot be started", ffi.errno)
        self.listener = _Listener(listen) if listen else None

    @property
    def port(self) -> int:
        """Where data connections are taken; 0 if nowhere."""
        return self.listener.port if self.listener else 0

    def domain(self) -> TcpDomain:
        return TcpDomain(self)

    def describe(self) -> dict[str, str | int | float | bool]:
        return {"fabric": "tcp", "streams": self.streams, "data_port": self.port}

    def stats(self) -> dict[str, int]:
        """Counters of the responder."""
        out = ffi.new("struct mkv_tcp_stats *")
        lib.mkv_tcp_responder_stats(self.responder, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct mkv_tcp_stats").fields}

    def close(self) -> None:
        if self.listener:
            self.listener.close()
        if self.responder != ffi.NULL:
            lib.mkv_tcp_responder_free(self.responder)
            self.responder = ffi.NULL


class _Listener:
    """Accepts data connections on a thread of its own and hands each to the endpoint whose token it shows."""

    def __init__(self, address: tuple[str, int]) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.create_server(address, family=family, backlog=256)
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        self.waiting: dict[bytes, TcpEndpoint] = {}
        self.lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="memkv-accept", daemon=True)
        self._thread.start()

    def expect(self, token: bytes, endpoint: TcpEndpoint) -> None:
        with self.lock:
            self.waiting[token] = endpoint

    def forget(self, token: bytes) -> None:
        with self.lock:
            self.waiting.pop(token, None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        for s in (self.socket, self._wake, self._woken):
            s.close()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self.socket, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        strangers: dict[socket.socket, tuple[float, bytes]] = {}

        def drop(sock: socket.socket) -> None:
            selector.unregister(sock)
            strangers.pop(sock, None)

        while True:
            soonest = min((until for until, _ in strangers.values()), default=None)
            events = selector.select(None if soonest is None else max(0.0, soonest - time.monotonic()))
            for key, _ in events:
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._woken:
                    for stranger in list(strangers):
                        stranger.close()
                    selector.close()
                    return
                if sock is self.socket:
                    self._accept(selector, strangers)
                    continue
                until, have = strangers[sock]
                try:
                    got = sock.recv(PREAMBLE_BYTES - len(have))
                except BlockingIOError:
                    continue
                except OSError:
                    got = b""
                have += got
                if got and len(have) < PREAMBLE_BYTES:
                    strangers[sock] = (until, have)
                    continue
                drop(sock)
                if not (got and self._admit(sock, have)):
                    sock.close()
            now = time.monotonic()
            for sock in [s for s, (until, _) in strangers.items() if until <= now]:
                drop(sock)
                sock.close()

    def _accept(
        self, selector: selectors.BaseSelector, strangers: dict[socket.socket, tuple[float, bytes]]
    ) -> None:
        try:
            sock, _ = self.socket.accept()
        except OSError:
            return
        if len(strangers) >= MAX_STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        strangers[sock] = (time.monotonic() + PREAMBLE_SECONDS, b"")
        selector.register(sock, selectors.EVENT_READ)

    def _admit(self, sock: socket.socket, preamble: bytes) -> bool:
        token = preamble[len(MAGIC) :]
        if not preamble.startswith(MAGIC):
            return False
        with self.lock:
            endpoint = self.waiting.get(token)
        return endpoint is not None and endpoint._take(sock)


class TcpDomain(Domain):
    """Regions under random keys, and the sockets over which they may be READ."""

    def __init__(self, fabric: TcpFabric) -> None:
        super().__init__(fabric)
        self.tcp = fabric
        self.endpoints: set[TcpEndpoint] = set()

    def _register(
        self, address: int, length: int, access: int
    ) -> tuple[list[Any], list[tuple[int, int, int]], int]:
        return [], [], secrets.randbits(64) | 1 if access & REMOTE_READ else 0

    def _unregister(self, region: Region) -> None:
        if region.access & REMOTE_READ:
            entry = lib.mkv_table_at(self.table.ptr, region.id)
            lib.mkv_tcp_region_withdraw(self.tcp.responder, entry, WITHDRAW_NS)

    def endpoint(
        self, role: Role, remote: RemoteTable | None = None, *, depth: int = 128, dial: bool = False
    ) -> TcpEndpoint:
        return TcpEndpoint(self, role, remote, depth, dial)

    def close(self) -> None:
        for endpoint in list(self.endpoints):
            endpoint.close()
        for region in list(self.regions.values()):
            region.close()
        lib.mkv_tcp_responder_drop(self.tcp.responder, self.table.ptr)


class TcpEndpoint(Endpoint):
    """Some sockets: dialled (the peer) or awaited (the node); read from, or handed to the responder."""

    def __init__(
        self, domain: TcpDomain, role: Role, remote: RemoteTable | None, depth: int, dial: bool
    ) -> None:
        self.domain = domain
        self.role = role
        self.remote = remote
        self.depth = depth
        self.dial = dial
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._served: list[int] = []  # ids of the responder
        self._fds: list[int] = []  # collected for a channel
        self._channel: Any = ffi.NULL
        self._closed = False
        token = b"" if dial else secrets.token_bytes(TOKEN_BYTES)
        self.offer = Offer("tcp", port=domain.tcp.port, token=token, streams=domain.tcp.streams)
        if not dial:
            if domain.tcp.listener is None:
                raise DeviceError("this side takes no data connections", 0, "it has to dial")
            domain.tcp.listener.expect(token, self)
        domain.endpoints.add(self)

    def connect(self, other: Offer, host: str = "", timeout: float = 5.0) -> None:
        until = time.monotonic() + timeout
        if not self.dial:
            if not self._ready.wait(timeout):
                raise DeadlineError("the other side opened no data connection", "is the data port reachable?")
            return
        self.offer = Offer("tcp", streams=other.streams)
        hint = f"is {host}:{other.port} (the node's data port) reachable from here? --data-port fixes it"
        for _ in range(other.streams):
            try:
                sock = socket.create_connection(
                    (host, other.port), timeout=max(0.05, until - time.monotonic())
                )
                sock.sendall(MAGIC + other.token)
                answer = sock.recv(1)
            except TimeoutError:
                raise DeadlineError("the data connection was not answered in time", hint) from None
            except OSError as exc:
                raise DeviceError(f"no data connection: {exc.strerror}", exc.errno or 0, hint) from None
            if answer != b"K":
                sock.close()
                raise DeviceError("the data connection was refused", 0, hint)
            self._take(sock, answer=False)

    def _take(self, sock: socket.socket, answer: bool = True) -> bool:
        """Makes a connected socket ours; False if this endpoint wants no more."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._closed or self._ready.is_set():
                return False
            if self.role == "serve":
                if answer:  # before the responder owns the socket, and may close it
                    sock.send(b"K")
                fd = sock.detach()
                id = lib.mkv_tcp_responder_add(self.domain.tcp.responder, fd, self.domain.table.ptr)
                if id < 0:
                    socket.socket(fileno=fd).close()
                    return False
                self._served.append(id)
            else:
                fd = sock.detach()
                self._fds.append(fd)
                if len(self._fds) == self.offer.streams:
                    self._open_channel()
                if answer:  # after the channel is there: the other side may ask for READs now
                    os.write(fd, b"K")
            if len(self._served) + len(self._fds) == self.offer.streams:
                self._ready.set()
                if not self.dial and self.domain.tcp.listener:
                    self.domain.tcp.listener.forget(self.offer.token)
        return True

    def _open_channel(self) -> None:
        assert self.remote is not None
        fds = ffi.new("int[]", self._fds)
        channel = lib.mkv_tcp_channel_new(
            fds, len(self._fds), self.depth, self.domain.table.ptr, self.remote.ptr
        )
        if channel == ffi.NULL:
            raise DeviceError("no channel over these sockets", ffi.errno)
        self._channel = channel

    @property
    def channel(self) -> Any:
        return self._channel

    def close(self) -> None:
        if not self.dial and self.domain.tcp.listener:
            self.domain.tcp.listener.forget(self.offer.token)
        with self._lock:
            self._closed = True
            for id in self._served:
                lib.mkv_tcp_responder_remove(self.domain.tcp.responder, id)
            self._served = []
            if self._channel != ffi.NULL:
                lib.mkv_tcp_channel_free(self._channel)
                self._channel = ffi.NULL
            elif self.role == "read":
                for fd in self._fds:
                    socket.socket(fileno=fd).close()
            self._fds = []
        self.domain.endpoints.discard(self)

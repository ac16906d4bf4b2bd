"""The limits that figures are divided by: the plainest loop of READs, or of receives, over the same working
set.

Both have a process of their own on the other side, which holds as much memory as the node's blocks take and
does nothing else. Over verbs it is passive (the device serves); over tcp it has a sending thread per socket::

    bench process                        passive process
    ┌────────────────┐   offers, pipe    ┌───────────────┐
    │ mkv_bare_reads │◄─────────────────►│ registered    │
    │ one queue pair │═══════════════════│ memory        │
    └────────────────┘                   └───────────────┘
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma import tcp
from ..rdma._ptr import qp_pointer
from ..rdma.devices import Selection, select
from ..rdma.errors import DeadlineError, DeviceError, MemKVError
from ..rdma.fabric import RemoteTable
from ..rdma.memory import HostMemory
from ..rdma.native._rdma import ffi, lib
from ..rdma.verbs import VerbsEndpoint, VerbsFabric
from .cluster import START_SECONDS, Child

WINDOWS = (4, 8, 16, 32, 64, 128)
SIGNALS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the bare loop of READs runs."""

    window: int
    signal_every: int
    events: bool

    def __str__(self) -> str:
        how = "sleeping" if self.events else "spinning"
        return f"window {self.window}, every {self.signal_every} signalled, {how}"


class Limit(ABC):
    """A bare loop, ready to run. A context manager; it ends its process."""

    what: str

    @abstractmethod
    def calibrate(self, size: int) -> str:
        """Finds the best setting for blocks of ``size`` bytes; says which."""

    @abstractmethod
    def run(self, size: int, nbytes: int) -> int:
        """Moves about ``nbytes`` in blocks of ``size``; the nanoseconds for :meth:`moved` bytes."""

    def moved(self, size: int, nbytes: int) -> int:
        """What ``run`` with the same arguments moves, bytes."""
        return max(1, nbytes // size) * size

    def gbps(self, size: int, nbytes: int) -> float:
        """GB/s of one run."""
        return self.moved(size, nbytes) / self.run(size, nbytes)

    @abstractmethod
    def latency(self, size: int, count: int, *, events: bool) -> npt.NDArray[np.uint64]:
        """Nanoseconds of ``count`` blocks, one at a time."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Limit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_limit(fabric: str, working_set: int, into: HostMemory, rail: Selection | None) -> Limit:
    """The bare loop of a fabric, landing in ``into``. ``rail``: the device, port and GID that the peer
    uses."""
    if fabric == "verbs":
        assert rail is not None
        return BareReads(working_set, into, rail)
    return BareSockets(working_set, into)


# --- verbs ---


def _passive(pipe: Connection, nbytes: int, device: str, port: int, gid_index: int) -> None:
    """The passive process: memory, a queue pair, and then nothing until the pipe ends."""
    fabric = VerbsFabric([select(device, port, gid_index)])
    domain = fabric.domain()
    memory = HostMemory(nbytes)
    memory.array[:] = 1
    region = domain.register(memory.address, memory.nbytes, remote_read=True, owner=memory)
    endpoint = domain.endpoint("serve")
    pipe.send((endpoint.offer, region.desc))
    endpoint.connect(pipe.recv(), "", START_SECONDS)
    pipe.send("connected")
    pipe.recv()


class BareReads(Limit):
    """``mkv_bare_reads`` over a queue pair to the passive process."""

    what = "bare"

    def __init__(self, working_set: int, into: HostMemory, rail: Selection) -> None:
        self.settings: dict[int, Setting] = {}
        self._memory = into
        choice = (rail.device.name, rail.port.number, rail.gid.gid.index)
        self._child = Child(_passive, working_set, *choice)
        self._fabric = VerbsFabric([rail])
        self._domain = self._fabric.domain()
        try:
            self._region = self._domain.register(into.address, into.nbytes, owner=into)
            self._endpoint: VerbsEndpoint = self._domain.endpoint("read", RemoteTable(16), depth=max(WINDOWS))
            offer, self._remote = self._child.ask()
            self._endpoint.connect(offer, "", START_SECONDS)
            self._child.ask(self._endpoint.offer)
            self._qp = qp_pointer(self._endpoint.qps[0], self._domain.pds[0])
        except BaseException:
            self.close()
            raise

    def _loop(self, size: int, count: int, setting: Setting) -> Any:
        bare = ffi.new("struct mkv_bare *")
        bare.qp = self._qp
        bare.remote_addr, bare.rkey = self._remote.rails[0]
        bare.remote_bytes = self._remote.length
        bare.local_addr, bare.local_bytes = self._memory.address, self._memory.nbytes
        bare.lkey = self._region.handles[0].lkey
        bare.size, bare.count = size, count
        bare.window, bare.signal_every, bare.events = setting.window, setting.signal_every, setting.events
        return bare

    def _timed(self, size: int, count: int, setting: Setting) -> int:
        ns = int(lib.mkv_bare_reads(self._loop(size, count, setting)))
        if ns < 0:
            raise DeviceError("the bare loop of READs failed", -ns, "dmesg may say more")
        return ns

    def calibrate(self, size: int) -> str:
        spent = self._timed(size, 8, Setting(4, 1, True)) / 8
        count = int(min(max(40e6 / spent, 16), 4096))  # READs of a try: about 40 ms

        def best(tries: list[Setting]) -> Setting:
            return min(tries, key=lambda s: min(self._timed(size, count, s) for _ in range(2)))

        window = best([Setting(w, max(1, w // 8), e) for w in WINDOWS for e in (True, False)])
        found = best([replace(window, signal_every=s) for s in SIGNALS if s <= window.window // 2])
        self.settings[size] = found
        return str(found)

    def run(self, size: int, nbytes: int) -> int:
        return self._timed(size, self.moved(size, nbytes) // size, self.settings[size])

    def latency(self, size: int, count: int, *, events: bool) -> npt.NDArray[np.uint64]:
        """Nanoseconds of ``count`` READs, one at a time."""
        out = np.zeros(count, np.uint64)
        pointer = ffi.cast("uint64_t *", ffi.from_buffer(out))
        rc = lib.mkv_bare_latency(self._loop(size, count, Setting(1, 1, events)), pointer)
        if rc < 0:
            raise DeviceError("the bare loop of single READs failed", -rc)
        return out

    def close(self) -> None:
        if hasattr(self, "_endpoint"):
            self._endpoint.close()
        self._domain.close()
        self._fabric.close()
        self._child.close()


# --- tcp ---


REQUEST_BYTES = 32  # about what a READ is asked for with


def _senders(pipe: Connection, port: int, nbytes: int, streams: int) -> None:
    """The sending process: for each (size, bytes) that comes over the pipe, so much over every socket; for a
    (size, -count), blocks one by one, each when it is asked for."""
    memory = HostMemory(nbytes)
    memory.array[:] = 1
    data = ffi.cast("void *", memory.address)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pipe.send("connected")
    while True:
        size, total = pipe.recv()
        if total < 0:
            _answer(socks[0], memory, size, -total)
            continue
        args = [(sock.fileno(), data, memory.nbytes, size, total) for sock in socks]
        threads = [threading.Thread(target=lib.mkv_bare_send, args=a) for a in args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _answer(sock: socket.socket, memory: HostMemory, size: int, count: int) -> None:
    view, request = memory.array.data, bytearray(REQUEST_BYTES)
    places = max(1, memory.nbytes // size)
    for i in range(count):
        if sock.recv_into(request, REQUEST_BYTES, socket.MSG_WAITALL) < REQUEST_BYTES:
            return
        sock.sendall(view[i % places * size :][:size])


class BareSockets(Limit):
    """``mkv_bare_recv`` over as many sockets as a channel of the tcp fabric has."""

    what = "bare sockets"

    def __init__(self, working_set: int, into: HostMemory, streams: int = tcp.STREAMS) -> None:
        self.streams = streams
        self._memory = into
        self._socks: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(START_SECONDS)
            self._child = Child(_senders, listener.getsockname()[1], working_set, streams)
            try:
                for _ in range(streams):
                    sock, _ = listener.accept()
                    sock.setblocking(True)
                    self._socks.append(sock)
                self._child.ask()
            except BaseException as error:
                self.close()
                if isinstance(error, TimeoutError) and not isinstance(error, MemKVError):
                    raise DeadlineError("the process of the bare socket loop does not connect") from None
                raise
        self._fds = ffi.new("int[]", [s.fileno() for s in self._socks])

    def calibrate(self, size: int) -> str:
        return f"{self.streams} sockets"

    def moved(self, size: int, nbytes: int) -> int:
        return max(1, nbytes // size // self.streams) * size * self.streams

    def run(self, size: int, nbytes: int) -> int:
        each = self.moved(size, nbytes) // self.streams
        start = time.monotonic_ns()
        self._child.pipe.send((size, each))
        target = ffi.cast("void *", self._memory.address)
        ns = int(lib.mkv_bare_recv(self._fds, self.streams, target, self._memory.nbytes, size, each))
        if ns < 0:
            raise DeviceError("the bare socket loop failed", -ns)
        return min(ns, time.monotonic_ns() - start)

    def latency(self, size: int, count: int, *, events: bool) -> npt.NDArray[np.uint64]:
        """Nanoseconds of ``count`` single blocks: a request and its answer over one socket, by Python at both
        ends (which adds about a microsecond to each)."""
        sock, request = self._socks[0], bytes(REQUEST_BYTES)
        into = self._memory.array.data[:size]
        out = np.zeros(count, np.uint64)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._child.pipe.send((size, -count))
        for i in range(count):
            start = time.perf_counter_ns()
            sock.send(request)
            if sock.recv_into(into, size, socket.MSG_WAITALL) < size:
                raise DeviceError("the bare loop of single blocks over a socket failed", errno.ECONNRESET)
            out[i] = time.perf_counter_ns() - start
        return out

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        self._child.close()

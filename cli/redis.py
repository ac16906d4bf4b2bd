"""Redis beside the tcp fabric: a server of our own on the loopback address, and the leanest client that it
allows.

All values of a run have the same size, so that every reply is as long as any other: ``$65536\\r\\n``, the
value, ``\\r\\n``. The client asks for a batch in one message and receives all replies by one scattered
``recvmsg``, each value in its place: no parsing, no copy, and far fewer calls than a client library makes.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from ..rdma.errors import MemKVError
from . import pattern
from .cluster import STOP_SECONDS, end_with_parent
from .sample import Plan, Sample

PIECES = 1024  # of one recvmsg: IOV_MAX


def available() -> str:
    """Empty if there is a server, else what to say."""
    return "" if shutil.which("redis-server") else "redis-server is not installed (apt install redis-server)"


def _command(*words: bytes) -> bytes:
    head = b"*%d\r\n" % len(words)
    return head + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Redis:
    """A server with the working set of ``plan`` in it, and a connection. A context manager.

    :raises MemKVError: it does not start.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.keys = plan.keys(0, plan.blocks)
        self.into = np.zeros((plan.blocks, plan.size), np.uint8)
        self._common = pattern.ramp(plan.size)
        self._turn = 0
        self._folder = tempfile.TemporaryDirectory(prefix="memkv-redis-")
        self._server, port = _start(self._folder.name)
        try:
            self._sock = _connect(port, self._server)
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        value = np.zeros((1, self.plan.size), np.uint8)
        for key in self.keys:
            pattern.fill(value, key[None], self._common)
            self._sock.sendall(_command(b"SET", key.tobytes(), value.tobytes()))
            if (said := self._sock.recv(64)) != b"+OK\r\n":
                raise MemKVError(f"redis-server does not take a value: {said!r}")

    def get(self, seconds: float, batch: int) -> Sample:
        """Whole passes of GETs for at least ``seconds``, ``batch`` of them in a message; the last pass is
        verified."""
        n, sample = self.plan.blocks, Sample()
        requests = [
            b"".join(_command(b"GET", key.tobytes()) for key in self.keys[i : i + batch])
            for i in range(0, n, batch)
        ]
        while sample.ns < seconds * 1e9:
            self._turn = (self._turn + 1) % n
            order = np.roll(np.arange(n), -self._turn)  # block i goes to place i + turn
            replies = [self._places(order[i : i + batch]) for i in range(0, n, batch)]
            start = time.perf_counter_ns()
            for request, reply in zip(requests, replies, strict=True):
                before = time.perf_counter_ns()
                self._sock.sendall(request)
                _receive(self._sock, reply)
                sample.times_us.append((time.perf_counter_ns() - before) / 1000)
            sample.ns += time.perf_counter_ns() - start
            sample.hits += n
        sample.nbytes = sample.hits * self.plan.size
        if self.plan.verify:
            due = np.roll(self.keys, self._turn, axis=0)
            sample.wrong = int(pattern.wrong(self.into, due, self._common).sum())
        return sample

    def _places(self, order: Any) -> list[memoryview]:
        """Where the replies of a batch go: head, value, end, head, …"""
        head = len(b"$%d\r\n" % self.plan.size)
        out: list[memoryview] = []
        for i, place in enumerate(order):
            out.append(memoryview(bytearray(head + 2 * (i > 0))))
            out.append(memoryview(self.into[place]))
        return [*out, memoryview(bytearray(2))]

    def close(self) -> None:
        if hasattr(self, "_sock"):
            self._sock.close()
        self._server.terminate()
        try:
            self._server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()

    def __enter__(self) -> Redis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _start(folder: str) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", folder]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=quiet, process_group=0, preexec_fn=end_with_parent
    )
    return server, port


def _connect(port: int, server: subprocess.Popen[bytes]) -> socket.socket:
    until = time.monotonic() + 20.0
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                raise MemKVError("redis-server does not start") from None
            time.sleep(0.05)


def _receive(sock: socket.socket, places: Sequence[memoryview]) -> None:
    """Fills all of them."""
    left = list(places)
    while left:
        got = sock.recvmsg_into(left[:PIECES], 0, socket.MSG_WAITALL)[0]
        if not got:
            raise MemKVError("redis-server has closed the connection")
        done = 0
        while done < len(left) and got >= len(left[done]):
            got -= len(left[done])
            done += 1
        left = left[done:]
        if got:
            left[0] = left[0][got:]

"""Nodes and peers for the tests of the whole: nodes on a thread, and nodes in processes that may be killed.

A test module says ``pytest_plugins = "tests.nodes"`` and then has the fixtures at the end of this file. A
block is what :func:`blocks_of` makes of its key, so that a test can tell whether it is the right one.

PYTEST_DONT_REWRITE: tests import this module before pytest takes it as a plugin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest

import memkv
from memkv.peer import Peer
from memkv.status import Status
from memkv.store.config import NodeConfig
from memkv.store.node import NodeThread

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
GRACE = 0.5  # seconds: short enough to see evictions; a READ may take half of it, on a loaded machine too
REPOSITORY = Path(__file__).parents[1]

Array = npt.NDArray[Any]
StartNode = Callable[..., NodeThread]
Connect = Callable[..., Peer]

SETTINGS: dict[str, Any] = {
    "memory": 16 * MIB,
    "slab_bytes": 2 * MIB,
    "block_bytes": BLOCK,
    "grace_ms": int(GRACE * 1000),
    "huge": False,
}


# --- keys and blocks ---


def keys_of(n: int, seed: int = 0, tag: int | None = None) -> npt.NDArray[np.uint8]:
    """n keys that are never the same for two seeds; with a placement ``tag``, all on one node."""
    keys = np.random.default_rng([seed, n]).integers(0, 256, (n, 16), np.uint8)
    keys[:, 12:] = np.frombuffer(seed.to_bytes(4, "little"), np.uint8)
    if tag is not None:
        keys[:, :4] = np.frombuffer(tag.to_bytes(4, "little"), np.uint8)
    return keys


def blocks_of(keys: npt.NDArray[np.uint8], length: int = BLOCK) -> npt.NDArray[np.uint8]:
    """(n, length): what is stored under these keys in every test; no two bytes of it need be alike."""
    words = np.ascontiguousarray(keys).view("<u8").astype(np.uint64)
    places = np.arange(length // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (words[:, :1] ^ places) * (words[:, 1:] | np.uint64(1))
    return np.ascontiguousarray(mixed.view(np.uint8)[:, :length])


class Blocks:
    """Memory of n blocks that is registered with a peer, to put from and to get into."""

    def __init__(self, peer: Peer, n: int, length: int = BLOCK) -> None:
        self.peer = peer
        self.length = length
        self.memory = np.zeros((n, length), np.uint8)
        self.buffer = peer.register(self.memory)
        self.slices = self.buffer.split(length)

    def put(self, keys: npt.NDArray[np.uint8], **options: Any) -> npt.NDArray[np.uint8]:
        """Puts the blocks of these keys: statuses."""
        self.memory[: len(keys)] = blocks_of(keys, self.length)
        return self.peer.put_from(keys, self.slices[: len(keys)], **options)

    def get(self, keys: npt.NDArray[np.uint8], **options: Any) -> npt.NDArray[np.uint8]:
        """Gets these keys: statuses. A HIT that is not the key's block fails the test."""
        self.memory[: len(keys)] = 0
        status = self.peer.get_into(keys, self.slices[: len(keys)], **options)
        hits = status == Status.HIT
        assert np.array_equal(self.memory[: len(keys)][hits], blocks_of(keys[hits], self.length))
        return status


def count(statuses: Array) -> dict[Status, int]:
    """How many there are of each status."""
    values, numbers = np.unique(statuses, return_counts=True)
    return {Status(int(v)): int(n) for v, n in zip(values, numbers, strict=True)}


# --- waiting, counting ---


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """Looks again and again until ``condition()`` is true, and returns it."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.01)
    return result


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the body takes longer."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"{took:.2f} s, where {seconds:g} s are allowed"


def file_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    """Names of Python's threads, and how many the kernel counts."""
    return {t.name for t in threading.enumerate()} | {f"{len(os.listdir('/proc/self/task'))} tasks"}


# --- nodes ---


def address_of(node: Any) -> str:
    """ "host:port" of a node of either kind, or of a plain address."""
    address = node if isinstance(node, tuple) else node.address
    return f"{address[0]}:{address[1]}"


def stats_of(node: NodeThread, namespace: str = "test") -> dict[str, int]:
    """A namespace's figures, from the node itself."""
    return node.call(lambda: node.node.namespaces.by_name[namespace].stats())


class NodeProcess:
    """A node that can be killed, stopped, and started again on the same port. A context manager."""

    def __init__(self, fabric: str, **settings: Any) -> None:
        self.settings = SETTINGS | {"fabric": fabric} | settings
        self.address = ("127.0.0.1", 0)
        self.metrics = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._announced = -1

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Starts it, on the port that it had before if any, and waits until it serves."""
        return self.launch().ready()

    def launch(self) -> Self:
        read, write = os.pipe()
        command = [sys.executable, "-m", "memkv.cli.node", "serve", "--ready-fd", str(write)]
        command += ["--listen", address_of(self), "--metrics", "127.0.0.1:0", "--clock", "plain"]
        for name, value in self.settings.items():
            command += [f"--{name.replace('_', '-')}", str(value).lower() if name == "huge" else str(value)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            command, pass_fds=[write], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(write)
        self._announced = read
        return self

    def ready(self) -> Self:
        assert self._process is not None
        with open(self._announced, "rb") as ready:
            assert select.select([ready], [], [], 60)[0], "the node did not start in time"
            words = ready.readline().decode().split()
        assert words[:1] == ["ready"], f"the node ended with {self._process.wait()}"
        host, _, port = words[1].rpartition(":")
        self.address, self.metrics = (host, int(port)), words[2]
        return self

    def status(self) -> dict[str, Any]:
        """What it says of itself, by HTTP."""
        with urllib.request.urlopen(f"{self.metrics}/status", timeout=10) as answer:
            out: dict[str, Any] = json.load(answer)
        return out

    def stats(self, namespace: str = "test") -> dict[str, int]:
        figures: dict[str, int] = self.status()["namespaces"][namespace]
        return figures

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(30)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP for as long as the body runs."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            until(lambda: self._state() == "T", what="stopped")
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class Proxy:
    """Stands between a peer and a node's control port; may hold back what it gets, or cut the connections."""

    def __init__(self, node: Any) -> None:
        self.node = node.address
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.flowing = threading.Event()
        self.flowing.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = self.listener.accept()[0]
                there = socket.create_connection(self.node)
                self._pairs.append((here, there))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.flowing.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Ends all connections; new ones are taken."""
        pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.flowing.set()
        self.cut()


@pytest.fixture
def start_node(fabric_name: str) -> Iterator[StartNode]:
    """Starts nodes on threads, small and quick ones, over the fabric of the test; stops them in the end."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> NodeThread:
            config = {"listen": ("127.0.0.1", 0), "fabric": fabric_name, "secret": b""} | SETTINGS | settings
            return stack.enter_context(NodeThread(NodeConfig(**config)))

        yield start


@pytest.fixture
def start_process(fabric_name: str) -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes in processes of their own; kills what is left of them in the end."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> NodeProcess:
            return stack.enter_context(NodeProcess(fabric_name, **settings))

        yield start


@pytest.fixture
def connect(fabric_name: str) -> Iterator[Connect]:
    """Connects peers to nodes (of either kind, or addresses) over the fabric of the test; closes them in the
    end.
    """
    with contextlib.ExitStack() as stack:

        def make(*nodes: Any, namespace: str = "test", **options: Any) -> Peer:
            options = {"fabric": fabric_name, "secret": b"", "timeout": 5.0} | options
            return stack.enter_context(memkv.connect([address_of(n) for n in nodes], namespace, **options))

        yield make


@pytest.fixture
def node(start_node: StartNode) -> NodeThread:
    return start_node()


@pytest.fixture
def peer(node: NodeThread, connect: Connect) -> Peer:
    return connect(node)

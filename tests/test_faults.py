"""What becomes of a batch, and of everything it used, when something breaks under it.

Each fault ends in the status that it should, within its deadline, leaves nothing set aside on the node, and
is over when its cause is: what follows is served again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memkv
from memkv import link, session
from memkv.peer import Peer
from memkv.rdma import tcp
from memkv.rdma.errors import DeadlineError, MemKVError, RemoteError
from memkv.session import Session
from memkv.status import Status
from memkv.store import messages as m
from memkv.store.framing import RefusedError
from memkv.store.node import NodeThread
from memkv.store.protocol import PeerProtocol

from .nodes import (
    BLOCK,
    KIB,
    MIB,
    REPOSITORY,
    Blocks,
    Connect,
    NodeProcess,
    Proxy,
    StartNode,
    address_of,
    blocks_of,
    count,
    keys_of,
    stats_of,
    until,
    within,
)

pytest_plugins = "tests.nodes"

HIT, MISS, STORED, EXISTS = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS
TIMEOUT, LINK, UNREACHABLE = Status.TIMEOUT, Status.ERROR_LINK, Status.ERROR_UNREACHABLE
ENDED = {LINK, UNREACHABLE, TIMEOUT}
ONLY_VERBS = pytest.mark.parametrize(
    "fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True
)
ONLY_TCP = pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)

StartProcess = Callable[..., NodeProcess]


def session_of(peer: Peer) -> Session:
    session = peer._links[0].session
    assert session is not None
    return session


def is_up(peer: Peer) -> bool:
    return peer._links[0].session is not None


def reconnected(peer: Peer) -> Callable[[], bool]:
    """Whether the link has come back since."""
    before = peer._links[0].reconnects
    return lambda: peer._links[0].reconnects > before


def more_hits(peer: Peer) -> Callable[[], bool]:
    """Whether there were any since."""

    def hits() -> int:
        return sum(entry["hits"] for entry in peer.stats()["nodes"].values())

    before = hits()
    return lambda: hits() > before


def quiet(node: NodeThread) -> bool:
    """Nobody is connected, nothing is set aside."""
    figures = [ns.stats() for ns in list(node.node.namespaces.by_name.values())]
    return not node.node.sessions and not any(f["extents_filling"] or f["sessions"] for f in figures)


@contextlib.contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs ``work`` on a thread; the list gets what it returns, or raises, by the end of the body."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    yield outcome
    thread.join(30)
    assert not thread.is_alive(), "it has not ended"


# --- processes that die or stop ---

PUTTING_PEER = """
import sys
import memkv
from tests.nodes import Blocks, keys_of
address, fabric = sys.argv[1:]
peer = memkv.connect(address, "test", fabric=fabric, secret=b"")
blocks = Blocks(peer, 64)
for seed in range(10_000):
    blocks.put(keys_of(64, seed=seed))
"""


def test_a_peer_killed_in_the_middle_of_puts(
    start_node: StartNode, connect: Connect, fabric_name: str
) -> None:
    node = start_node(memory=64 * MIB)
    process = subprocess.Popen(
        [sys.executable, "-c", PUTTING_PEER, address_of(node), fabric_name],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        until(lambda: node.node.namespaces.by_name, 60)
        until(lambda: stats_of(node)["extents_filling"], 60, "a put is under way")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: quiet(node), what="all that was set aside is free again")
    reader = Blocks(connect(node), 64)
    seen = 0
    for seed in range(20):  # Blocks.get looks at every byte of a HIT
        status = count(reader.get(keys_of(64, seed=seed), checksum=True))
        assert status.keys() <= {HIT, MISS}
        seen += status.get(HIT, 0)
    assert seen
    assert count(reader.put(keys_of(64, seed=10**6))) == {STORED: 64}


def test_a_node_killed_in_the_middle_of_gets(start_process: StartProcess, connect: Connect) -> None:
    node = start_process(memory=32 * MIB)
    peer = connect(node)
    blocks, keys = Blocks(peer, 128), keys_of(128)
    assert count(blocks.put(keys)) == {STORED: 128}
    began = threading.Event()

    def work() -> dict[Status, int]:
        while True:
            status = count(blocks.get(keys))
            began.set()
            if status != {HIT: 128}:
                return status

    with in_background(work) as outcome:
        assert began.wait(10)
        node.kill()
    assert outcome[0].keys() <= {HIT} | ENDED
    until(lambda: not is_up(peer))
    domains: Any = [peer._get_domain, peer._put_domain]
    until(lambda: not any(d.endpoints for d in domains), what="all channels are destroyed")
    assert all(len(d.regions) == 1 for d in domains)  # the buffer's
    with within(1):
        assert count(blocks.get(keys)) == {UNREACHABLE: 128}
        assert count(blocks.put(keys)) == {UNREACHABLE: 128}
    node.start()
    until(lambda: is_up(peer))
    assert count(blocks.get(keys)) == {MISS: 128}
    assert count(blocks.put(keys)) == {STORED: 128}
    assert count(blocks.get(keys)) == {HIT: 128}


@ONLY_VERBS
def test_a_stopped_node_goes_on_serving_reads(start_process: StartProcess, connect: Connect) -> None:
    """No CPU of the store is on the path: its process is stopped, and everything is found and fetched."""
    node = start_process()
    warm, cold = connect(node), connect(node)
    blocks, others = Blocks(warm, 32), Blocks(cold, 32)
    keys, absent = keys_of(32), keys_of(32, seed=1)
    assert count(blocks.put(keys)) == {STORED: 32}
    assert count(blocks.get(keys)) == {HIT: 32}
    with node.stopped():
        for _ in range(3):
            assert count(blocks.get(keys)) == {HIT: 32}
            assert count(others.get(keys, checksum=True)) == {HIT: 32}
            assert count(others.get(absent)) == {MISS: 32}
        assert cold.match(keys) == 32
        assert count(cold.exists(absent)) == {MISS: 32}
    assert count(blocks.put(absent)) == {STORED: 32}


@ONLY_TCP
def test_a_stopped_node_is_late_and_then_left_alone(start_process: StartProcess, connect: Connect) -> None:
    node = start_process()
    peer = connect(node, timeout=0.5)
    blocks, keys = Blocks(peer, 8), keys_of(8)
    assert count(blocks.put(keys, timeout=5)) == {STORED: 8}
    with node.stopped():
        with within(2):
            assert count(blocks.get(keys)) == {TIMEOUT: 8}
        until(lambda: not is_up(peer), what="the node does not answer")
        with within(1):
            assert count(blocks.get(keys)) == {UNREACHABLE: 8}
            assert count(peer.pin(keys, 1)) == {UNREACHABLE: 8}
    until(lambda: is_up(peer))
    assert count(blocks.get(keys, timeout=5)) == {HIT: 8}


def test_a_put_that_a_stopped_node_does_not_answer(
    start_process: StartProcess, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv.puts.SLACK", 0.2)
    node = start_process()
    peer = connect(node, timeout=2)
    blocks, keys = Blocks(peer, 8), keys_of(8)
    assert count(blocks.put(keys)) == {STORED: 8}
    with node.stopped(), within(3):
        assert count(blocks.put(keys_of(8, seed=1), timeout=0.3)) == {TIMEOUT: 8}
        # nobody reads the slices any more: our end is gone
        assert not peer._put_domain.endpoints  # type: ignore[attr-defined]
    until(lambda: is_up(peer))
    assert count(blocks.put(keys_of(8, seed=2), timeout=5)) == {STORED: 8}


def test_a_node_that_goes_down_in_order(start_process: StartProcess, connect: Connect) -> None:
    node = start_process()
    peer = connect(node)
    blocks, keys = Blocks(peer, 8), keys_of(8)
    blocks.put(keys)
    assert node.terminate() == 0
    until(lambda: not is_up(peer))
    with within(1):
        assert count(blocks.get(keys)) == {UNREACHABLE: 8}
    node.start()
    until(lambda: is_up(peer))
    assert count(blocks.put(keys)) == {STORED: 8}


# --- channels that break ---


def break_far_end(node: NodeThread, peer: Peer) -> None:
    """Destroys the node's ends of all get channels."""
    ends = [c for s in node.call(lambda: list(node.node.sessions)) for c in list(s.channels.values())]
    for end in ends:
        if not hasattr(end, "job"):
            end.close()


def break_near_end(node: NodeThread, peer: Peer) -> None:
    """Moves our queue pairs to the error state; on tcp, ends the sockets."""
    for endpoint in list(peer._get_domain.endpoints):  # type: ignore[attr-defined]
        if peer.fabric is not None and peer.fabric.name == "tcp":
            for fd in endpoint_sockets(os.getpid(), node):
                os_shutdown(fd)
            return
        from pyverbs.enums import IBV_QP_STATE, IBV_QPS_ERR
        from pyverbs.qp import QPAttr

        for qp in endpoint.qps:
            qp.modify(QPAttr(qp_state=IBV_QPS_ERR), IBV_QP_STATE)


def endpoint_sockets(pid: int, node: NodeThread) -> list[int]:
    """Our descriptors that are connected to the node's data port."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
            with sock, contextlib.suppress(OSError):
                if sock.family == socket.AF_INET and sock.getpeername()[1] == node.node.fabric.port:  # type: ignore[attr-defined]
                    found.append(int(name))
    return found


def os_shutdown(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("breaks", [break_far_end, break_near_end])
def test_a_channel_that_breaks_is_replaced(
    node: NodeThread, connect: Connect, breaks: Callable[[NodeThread, Peer], None]
) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 16), keys_of(16)
    blocks.put(keys)
    assert count(blocks.get(keys)) == {HIT: 16}
    breaks(node, peer)
    with within(4):
        assert count(blocks.get(keys)) == {LINK: 16}
    assert count(blocks.get(keys)) == {HIT: 16}
    assert is_up(peer)
    assert peer._links[0].reconnects == 0
    assert session_of(peer).pool.counts == (0, 1)


def test_a_channel_that_breaks_under_a_batch(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 100), keys_of(100)
    assert count(blocks.put(keys)) == {STORED: 100}
    ended = threading.Event()

    def work() -> list[dict[Status, int]]:
        outcomes = []
        while not ended.is_set():
            outcomes.append(count(blocks.get(keys)))
        return outcomes

    with in_background(work) as outcome:
        for _ in range(3):
            until(more_hits(peer))
            break_far_end(node, peer)
        ended.set()
    assert all(s.keys() <= {HIT, LINK} for s in outcome[0])
    assert count(blocks.get(keys)).keys() <= {HIT, LINK}  # the last break may still be unnoticed
    assert count(blocks.get(keys)) == {HIT: 100}


def test_a_pull_channel_that_breaks_is_replaced(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks = Blocks(peer, 16)
    assert count(blocks.put(keys_of(16))) == {STORED: 16}
    pull = session_of(peer).pulls.endpoints[0]
    assert pull is not None
    pull.close()
    with within(5):
        assert count(blocks.put(keys_of(16, seed=1))).keys() <= {LINK, STORED}
    assert count(blocks.put(keys_of(16, seed=2))) == {STORED: 16}
    assert stats_of(node)["extents_filling"] == 0
    assert is_up(peer)


def test_a_put_out_of_time_does_not_cost_the_next_one(node: NodeThread, connect: Connect) -> None:
    """The node ends the pull channel with the put that was late; the peer makes another."""
    peer = connect(node)
    blocks = Blocks(peer, 128)
    for seed in range(200):
        if TIMEOUT in count(blocks.put(keys_of(128, seed=seed), timeout=0.001)):
            break
    else:
        pytest.skip("this machine puts 8 MiB in a millisecond")
    for seed in range(1000, 1003):
        assert count(blocks.put(keys_of(128, seed=seed), timeout=10)) == {STORED: 128}
    assert stats_of(node)["extents_filling"] == 0


def test_a_get_out_of_time_leaves_the_slices_alone(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, other, keys = Blocks(peer, 100), Blocks(peer, 100), keys_of(100)
    assert count(blocks.put(keys)) == {STORED: 100}
    for timeout in (0.001, 0.0005, 0.0001):
        with within(3):
            status = peer.get_into(keys, blocks.slices, timeout=timeout)
        assert count(status).keys() <= {HIT, TIMEOUT}
        blocks.memory[:] = 0xAA  # ours again: nothing may land here any more
        assert count(other.get(keys)) == {HIT: 100}
        assert (blocks.memory == 0xAA).all()


# --- the control connection ---


def test_a_control_connection_that_is_cut(node: NodeThread, connect: Connect) -> None:
    with Proxy(node) as proxy:
        peer = connect(proxy)
        blocks, keys = Blocks(peer, 16), keys_of(16)
        assert count(blocks.put(keys)) == {STORED: 16}
        for _ in range(3):
            again = reconnected(peer)
            proxy.cut()
            with within(4):
                assert count(blocks.get(keys)).keys() <= {HIT, LINK, UNREACHABLE}
            until(again)
            assert count(blocks.get(keys)) == {HIT: 16}
            assert count(blocks.put(keys)) == {EXISTS: 16}  # of a buffer that was offered before
        peer.close()
    until(lambda: quiet(node))


def test_a_control_connection_that_says_nothing(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv.puts.SLACK", 0.2)
    with Proxy(node) as proxy:
        peer = connect(proxy, timeout=1)
        blocks, keys = Blocks(peer, 16), keys_of(16)
        assert count(blocks.put(keys)) == {STORED: 16}
        assert count(blocks.get(keys)) == {HIT: 16}
        proxy.flowing.clear()
        assert count(blocks.get(keys)) == {HIT: 16}  # nobody is asked
        assert peer.match(keys) == 16
        with within(3):
            assert count(peer.pin(keys, 1, timeout=0.2)) == {TIMEOUT: 16}
            assert count(blocks.put(keys_of(16, seed=1), timeout=0.2)).keys() <= {TIMEOUT, LINK}
        until(lambda: not is_up(peer))
        proxy.flowing.set()
        until(lambda: is_up(peer))
        assert count(blocks.get(keys)) == {HIT: 16}
        assert count(blocks.put(keys_of(16, seed=2))) == {STORED: 16}


def test_a_buffer_registered_while_the_link_comes_back(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached, go_on = threading.Event(), threading.Event()
    attach = Session.attach

    async def slow(self: Session, *arguments: Any) -> None:
        await attach(self, *arguments)
        attached.set()
        await self.loop.run_in_executor(None, go_on.wait, 10)

    with Proxy(node) as proxy:
        peer = connect(proxy)
        monkeypatch.setattr(Session, "attach", slow)
        proxy.cut()
        assert attached.wait(10)
        blocks = Blocks(peer, 4)
        go_on.set()
        until(lambda: is_up(peer))
        assert count(blocks.put(keys_of(4))) == {STORED: 4}


def test_a_buffer_stays_until_a_batch_that_outlives_its_session_has_ended(
    node: NodeThread, connect: Connect
) -> None:
    with Proxy(node) as proxy:
        peer = connect(proxy)
        blocks = Blocks(peer, 1)
        ended = session_of(peer)
        channel = ended.pool.try_take()  # as a batch does
        assert channel is not None
        proxy.cut()
        until(lambda: ended.closed)
        with in_background(blocks.buffer.close) as outcome:
            until(lambda: blocks.buffer.id not in peer._buffers)
            until(lambda: is_up(peer))
            assert not outcome
            ended.pool.give_back(channel)
        assert outcome == [None]


def test_notices_right_behind_the_first_answer(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Session._take

    def eager(self: Session, message: m.Message) -> None:
        take(self, message)
        if isinstance(message, m.NamespaceInfo):
            take(self, m.TableChanged(10**6, message.namespace, message.table))
            take(self, m.SlabRetired(10**6 + 1, message.namespace, (10**5).to_bytes(4, "little")))

    monkeypatch.setattr(Session, "_take", eager)
    blocks = Blocks(connect(node), 4)
    assert count(blocks.put(keys_of(4))) == {STORED: 4}
    assert count(blocks.get(keys_of(4))) == {HIT: 4}


# --- handshakes that fail ---


def test_a_wrong_secret(start_node: StartNode, connect: Connect) -> None:
    node = start_node(secret=b"right")
    assert count(Blocks(connect(node, secret=b"right"), 1).put(keys_of(1))) == {STORED: 1}
    assert connect(node, secret="right")
    for secret in (b"wrong", b""):
        with within(4), pytest.raises(MemKVError, match="secret") as caught:
            connect(node, secret=secret)
        assert caught.value.hint
    with pytest.raises(MemKVError, match="secret"):
        connect(start_node(secret=b""), secret=b"right")


def test_the_secret_in_a_file(start_node: StartNode, connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(" right\n")
    assert connect(start_node(secret=b"right"), secret=None, secret_file=file)


def test_another_version_of_the_protocol(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        session,
        "PeerProtocol",
        lambda secret, **names: PeerProtocol(secret, versions=(77, 78), **names),
    )
    with within(4), pytest.raises(RefusedError, match="version"):
        connect(node)


def test_something_else_listens_there(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and says nothing
        with within(4), pytest.raises(DeadlineError, match="is it a memkv node"):
            connect(server.getsockname(), timeout=0.3)

        def talk() -> None:
            client, _ = server.accept()
            client.recv(1)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
            client.close()

        server.accept()
        with in_background(talk), within(4), pytest.raises(MemKVError):
            connect(server.getsockname(), timeout=1)

        def hang_up() -> None:
            client, _ = server.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()  # with a reset

        with in_background(hang_up), within(4), pytest.raises(RemoteError):
            connect(server.getsockname(), timeout=1)


def test_a_link_goes_on_after_whatever_a_restarted_node_does(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LONGEST_WAIT", 0.1)
    failures: list[BaseException] = [
        RefusedError("going down"),
        OSError("reset"),
        ValueError("a fault of ours"),
        MemKVError("anything"),
    ]
    attach = Session.attach

    async def failing(self: Session, *arguments: Any) -> None:
        if failures:
            raise failures.pop()
        await attach(self, *arguments)

    with Proxy(node) as proxy:
        peer = connect(proxy)
        monkeypatch.setattr(Session, "attach", failing)
        proxy.cut()
        until(lambda: not failures and is_up(peer))
        assert count(Blocks(peer, 1).put(keys_of(1))) == {STORED: 1}


# --- limits ---


def test_blocks_longer_than_the_longest_message(start_node: StartNode, connect: Connect) -> None:
    node = start_node(max_msg=8 * KIB, block_bytes=MIB, memory=64 * MIB, slab_bytes=8 * MIB)
    peer = connect(node, max_msg=8 * KIB)
    blocks, keys = Blocks(peer, 8, MIB), keys_of(8)
    assert count(blocks.put(keys)) == {STORED: 8}
    assert count(blocks.get(keys, checksum=True)) == {HIT: 8}


REGISTERING_PEER = """
import sys
import memkv
from memkv.rdma.errors import DeviceError
peer = memkv.connect(sys.argv[1], "test", fabric="verbs", secret=b"")
try:
    peer.register(bytearray(64 << 20))
except DeviceError as exc:
    print(exc)
peer.register(bytearray(4096)).close()
print("and goes on")
"""


@ONLY_VERBS
def test_too_little_memory_may_be_locked(node: NodeThread) -> None:
    command = [sys.executable, "-c", REGISTERING_PEER, address_of(node)]
    drop = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -l 8192; exec "$@"', "sh", *drop, *command],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "ulimit -l" in done.stdout, done.stderr
    assert "LimitMEMLOCK" in done.stdout
    assert "and goes on" in done.stdout, done.stderr


def test_a_put_whose_buffer_is_closed_under_way(node: NodeThread, connect: Connect) -> None:
    """Closing waits for the node to have let go; what was put is whole, or is not there."""
    peer, reader = connect(node), Blocks(connect(node), 64)
    for seed in range(5):
        keys, blocks = keys_of(64, seed=seed), Blocks(peer, 64)
        blocks.memory[:] = blocks_of(keys)
        ticket = peer.submit_put(keys, blocks.slices)
        blocks.buffer.close()
        blocks.memory[:] = 0xEE
        (done,) = until(peer.reap)
        assert done is ticket
        assert ticket.status is not None
        assert count(ticket.status).keys() <= {STORED, Status.ERROR_BOUNDS}
        held = reader.get(keys)
        assert ((held == HIT) == (ticket.status == STORED)).all()
    assert stats_of(node)["extents_filling"] == 0


# --- strangers ---


@ONLY_TCP
def test_strangers_on_the_data_port(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "PREAMBLE_SECONDS", 0.2)
    port = node.node.fabric.port  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:

        def stranger(data: bytes) -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            sock.sendall(data)
            return sock

        talking = [stranger(os.urandom(40)) for _ in range(20)]
        forging = [stranger(tcp.MAGIC + os.urandom(32)) for _ in range(20)]
        halfway = [stranger(tcp.MAGIC) for _ in range(20)]
        silent = [stranger(b"") for _ in range(20)]
        peer = connect(node)
        blocks, keys = Blocks(peer, 8), keys_of(8)
        assert count(blocks.put(keys)) == {STORED: 8}
        assert count(blocks.get(keys)) == {HIT: 8}
        for sock in (*talking, *forging, *halfway, *silent):
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""  # hung up on, without a word
    assert count(blocks.get(keys)) == {HIT: 8}


def test_strangers_on_the_control_port(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 8), keys_of(8)
    with contextlib.ExitStack() as stack:
        for data in (os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 28, b""):
            stack.enter_context(socket.create_connection(node.address)).sendall(data)
        assert count(blocks.put(keys)) == {STORED: 8}
        assert count(blocks.get(keys)) == {HIT: 8}
    until(lambda: len(node.node.sessions) == 1)


# --- what is left ---


def test_nothing_is_left_after_many_peers(node: NodeThread, fabric_name: str) -> None:
    def once(seed: int) -> None:
        with memkv.connect(address_of(node), "test", fabric=fabric_name, secret=b"") as peer:
            blocks = Blocks(peer, 4)
            assert count(blocks.put(keys_of(4, seed=seed))) == {STORED: 4}

    once(0)
    until(lambda: quiet(node))
    for seed in range(1, 8):
        once(seed)
    until(lambda: quiet(node))
    namespace = node.node.namespaces.by_name["test"]
    assert not namespace.serve.endpoints  # type: ignore[attr-defined]
    assert not namespace.pull.endpoints  # type: ignore[attr-defined]
    figures = stats_of(node)
    assert len(namespace.serve.regions) == figures["slabs"] + figures["tables"]
    assert len(namespace.pull.regions) == figures["slabs"]
    assert stats_of(node)["extents_quarantine"] == 0


def test_nothing_is_read_from_a_namespace_of_another_name(node: NodeThread, connect: Connect) -> None:
    keys = keys_of(4)
    Blocks(connect(node, namespace="mine"), 4).put(keys)
    assert count(Blocks(connect(node, namespace="yours"), 4).get(keys)) == {MISS: 4}


def test_every_batch_ends_by_its_deadline_when_nothing_works(
    node: NodeThread, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No channel can be opened, no put is answered: still everything returns, with a status."""
    peer = connect(node)
    blocks, keys = Blocks(peer, 4), keys_of(4)

    async def never(self: Session, make: Any, timeout: float | None = None) -> Any:
        raise DeadlineError("the test lets nothing through")

    monkeypatch.setattr(Session, "ask", never)
    session = session_of(peer)
    channel = session.pool.try_take()
    assert channel is not None
    with within(4):
        assert count(blocks.get(keys, timeout=0.3)).keys() <= ENDED
        assert count(blocks.put(keys, timeout=0.3)).keys() <= ENDED
        assert count(peer.pin(keys, 1, timeout=0.3)).keys() <= ENDED
        assert peer.match(keys, timeout=0.3) == 0
    session.pool.give_back(channel)
    monkeypatch.undo()
    started = time.monotonic()
    until(lambda: is_up(peer))
    assert time.monotonic() - started < 5
    assert count(blocks.put(keys)) == {STORED: 4}
    assert np.array_equal(blocks.memory, blocks_of(keys, BLOCK))

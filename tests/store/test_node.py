"""The node: who gets in, what namespaces are, how they change under their sessions, and how it all ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.rdma.errors import DeviceError, LocalError
from memkv.store import layout
from memkv.store import messages as m
from memkv.store.columns import pack_keys
from memkv.store.config import NodeConfig, parse_address, parse_size
from memkv.store.framing import Code
from memkv.store.native._store import lib
from memkv.store.node import Node, NodeThread
from memkv.store.protocol import RemoteProtocolError

from .raw import RawPeer, Refused, checksum, keys_of
from .test_puts import BLOCK, eventually, quiet, random_blocks, ready

Connect = Callable[..., RawPeer]
Start = Callable[..., NodeThread]
STORED, HIT, MISS, DONE = lib.MKV_STORED, lib.MKV_HIT, lib.MKV_MISS, lib.MKV_DONE

# --- who gets in ------------------------------------------------------------------------------------------


def test_the_handshake_names_the_node(start_node: Start, connect: Connect, fabric_name: str) -> None:
    node = start_node(secret=b"s3cret", name="node-7")
    peer = connect(node, b"s3cret")
    assert peer.protocol.welcome is not None
    assert peer.protocol.welcome.node == "node-7"
    assert peer.protocol.welcome.fabrics == [fabric_name]
    assert peer.protocol.incarnation == node.node.incarnation != 0
    assert peer.ask(m.Ping) == m.Pong(1)


def test_a_wrong_secret_is_turned_away(start_node: Start, connect: Connect) -> None:
    node = start_node(secret=b"s3cret")
    with pytest.raises(RemoteProtocolError) as refused:
        connect(node, b"another")
    assert refused.value.code == Code.SECRET
    eventually(lambda: quiet(node))
    assert node.node.counters.sessions_refused == 1
    assert connect(node, b"s3cret").ask(m.Ping)


def test_garbage_closes_the_connection_that_it_came_on(node: NodeThread, connect: Connect) -> None:
    good = connect(node)
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 100, b"\x05\0\0\0" + bytes(29)):
        with socket.create_connection(node.address, timeout=5) as sock:
            sock.sendall(garbage)
            while sock.recv(4096):
                pass
    bad = connect(node)
    bad.socket.sendall(b"\x03\0\0\0" + bytes(40))  # not the frame that is due
    with pytest.raises(RemoteProtocolError):
        bad.ask(m.Ping)
    assert good.ask(m.Ping)
    eventually(lambda: len(node.node.sessions) == 1)
    assert node.node.counters.sessions_faulted == 1


def test_too_many_connections_are_refused(start_node: Start, connect: Connect) -> None:
    node = start_node(max_sessions=2)
    peers = [connect(node), connect(node)]
    with pytest.raises(RemoteProtocolError) as refused:
        connect(node)
    assert refused.value.code == Code.LIMIT
    peers[0].close()
    eventually(lambda: len(node.node.sessions) == 1)
    assert connect(node).ask(m.Ping)


def test_a_node_does_not_serve_strangers() -> None:
    config = NodeConfig(listen=("0.0.0.0", 0), secret=b"", memory=2 << 20, fabric="tcp")
    with pytest.raises(LocalError, match="--secret-file"):
        NodeThread(config).start()
    with NodeThread(NodeConfig(listen=("0.0.0.0", 0), insecure=True, memory=2 << 20, fabric="tcp")) as node:
        assert node.address[1]


def test_a_taken_address_is_said_and_nothing_leaks() -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = NodeConfig(listen=taken.getsockname()[:2], memory=2 << 20, fabric="tcp")
        with pytest.raises(DeviceError, match="listen"):
            NodeThread(config).start()
    assert threading.active_count() == before


# --- namespaces -------------------------------------------------------------------------------------------


def test_a_namespace_keeps_what_it_was_made_with(node: NodeThread, connect: Connect) -> None:
    peer, other = connect(node), connect(node)
    with pytest.raises(Refused, match="no namespace") as refused:
        peer.open("a", mode="open")
    assert refused.value.refusal.code == Code.NOT_FOUND
    info = peer.open("a", block_bytes=8192, align=512, grace_ms=50)
    assert (info.block_bytes, info.align, info.grace_ns) == (8192, 512, 50_000_000)
    same = other.open("a", mode="open")
    assert (same.namespace, same.salt, same.block_bytes) == (info.namespace, info.salt, 8192)
    with pytest.raises(Refused, match="block_bytes 8192") as refused:
        other.open("a", block_bytes=4096)
    assert refused.value.refusal.code == Code.MISMATCH
    assert other.open("b").namespace != info.namespace


@pytest.mark.parametrize("settings", [{"block_bytes": 4 << 20}, {"align": 1000}, {"grace_ms": 1}])
def test_namespaces_that_cannot_be(node: NodeThread, connect: Connect, settings: dict[str, int]) -> None:
    peer = connect(node)
    with pytest.raises(Refused) as refused:
        peer.open("a", **settings)
    assert refused.value.refusal.code == Code.LIMIT
    assert not node.node.namespaces.by_name


def test_a_new_namespace_comes_with_a_table_and_a_slab(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info = peer.open()
    assert len(info.slabs) == 1
    assert info.slabs[0].length == 2 << 20
    reader = peer.open_get(info)
    epoch = np.frombuffer(reader.read(info.table.region.id, 0, 64), layout.EPOCH)[0]
    assert epoch["magic"] == layout.EPOCH_MAGIC
    assert epoch["incarnation"] == info.incarnation
    assert (epoch["table"], epoch["buckets"]) == (info.table.version, info.table.buckets)


def test_peers_of_one_namespace_cannot_read_another(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    mine, other = peer.open("mine"), peer.open("other")
    reader = peer.open_get(mine)
    reader.learn(other.slabs[0])  # its keys are known, but the channel belongs to the domain of "mine"
    with pytest.raises(OSError, match="READ"):
        reader.read(other.slabs[0].id, 0, 64)


def test_a_namespace_has_to_be_open_in_the_session(node: NodeThread, connect: Connect) -> None:
    info = connect(node).open()
    stranger = connect(node)
    with pytest.raises(Refused) as refused:
        stranger.on_keys(m.Lookup, info, keys_of(1))
    assert refused.value.refusal.code == Code.NOT_FOUND


def test_namespaces_share_the_arena_when_it_is_used_up(start_node: Start, connect: Connect) -> None:
    node = start_node(memory=8 << 20, grace_ms=20)
    peer = connect(node)
    info, source, _ = ready(peer, 31)
    for first in range(0, 124, 31):
        peer.statuses(peer.put(info, keys_of(*range(first, first + 31)), source, BLOCK))
    assert peer.stats()["slabs"] == 4
    late = peer.open("late")
    assert not late.slabs
    retired = peer.notice(m.SlabRetired, info.namespace)
    peer.send(m.Ack(retired.notice))
    assert peer.notice(m.SlabAdded, late.namespace)
    peer.open_pull(late)
    assert peer.statuses(peer.put(late, keys_of(1), source, BLOCK)) == [STORED]


# --- batches of keys --------------------------------------------------------------------------------------


def test_lookup_match_touch_delete(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 6)
    peer.statuses(peer.put(info, keys_of(0, 1, 2, 4, 5, 6), source, BLOCK))
    assert peer.on_keys(m.Lookup, info, keys_of(1, 3, 6)) == [HIT, MISS, HIT]
    assert peer.ask(m.Match, info.namespace, pack_keys(keys_of(*range(7)))).count == 3
    peer.send(m.Touch(info.namespace, pack_keys(keys_of(0, 1, 99))))
    assert peer.on_keys(m.Delete, info, keys_of(1, 3)) == [DONE, MISS]
    assert peer.ask(m.Match, info.namespace, pack_keys(keys_of(*range(7)))).count == 1
    assert peer.on_keys(m.Lookup, info, keys_of(*range(5000)))[:3] == [HIT, MISS, HIT]
    assert peer.on_keys(m.Lookup, info, keys_of()) == []
    stats = peer.stats()
    assert (stats["touches"], stats["deletes"], stats["blocks"]) == (2, 1, 5)


def test_a_deleted_block_is_not_valid_any_more(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 1)
    key = keys_of(1)
    peer.statuses(peer.put(info, key, source, BLOCK))
    reader = peer.open_get(peer.open())
    slot = reader.find(info, key[0])
    assert slot is not None
    peer.on_keys(m.Delete, info, key)
    assert reader.find(info, key[0]) is None
    offset = int(layout.location_offset(slot["location"])) - 64
    line = np.frombuffer(reader.read(int(layout.location_slab(slot["location"])), offset, 64), layout.LINE)[0]
    assert line["generation"] == 0


def test_pinned_blocks_outlive_pressure(start_node: Start, connect: Connect) -> None:
    node = start_node(memory=2 << 20, grace_ms=20)
    peer = connect(node)
    info, source, _ = ready(peer, 16)
    peer.statuses(peer.put(info, keys_of(*range(16)), source, BLOCK))
    assert peer.on_keys(m.Pin, info, keys_of(3, 77), 60_000) == [DONE, MISS]
    for first in range(100, 196, 16):
        peer.statuses(peer.put(info, keys_of(*range(first, first + 16)), source, BLOCK))
    assert peer.on_keys(m.Lookup, info, keys_of(3)) == [HIT]
    assert peer.stats()["evictions"] > 16
    assert peer.on_keys(m.Unpin, info, keys_of(3)) == [DONE]
    assert peer.on_keys(m.Pin, info, keys_of(3), 0) == [lib.MKV_ERROR_REFUSED]


# --- change under the sessions ----------------------------------------------------------------------------


def test_slabs_come_with_notices(node: NodeThread, connect: Connect) -> None:
    peer, other = connect(node), connect(node)
    info, source, blocks = ready(peer, 31)
    watching = other.open()
    reader = other.open_get(watching)
    for first in range(0, 93, 31):
        keys = keys_of(*range(first, first + 31))
        assert peer.statuses(peer.put(info, keys, source, BLOCK)) == [STORED] * 31
    for p in (peer, other):
        added = p.notice(m.SlabAdded)
        assert added.namespace == info.namespace
        assert added.slab.id not in [s.id for s in info.slabs]
    for slab in other.open().slabs:
        reader.learn(slab)
    assert reader.get(watching, keys_of(92)[0]) == blocks[30].tobytes()


def put_small(peer: RawPeer, info: m.NamespaceInfo, source: int, first: int, n: int) -> None:
    """Blocks of 512 bytes, to fill an index."""
    keys = keys_of(*range(first, first + n))
    columns = m.Put(
        peer.post_id(),
        info.namespace,
        pack_keys(keys),
        np.full(n, 512, "<u4").tobytes(),
        np.full(n, source, "<u4").tobytes(),
        np.zeros(n, "<u8").tobytes(),
    )
    peer.send(columns)
    assert set(peer.statuses(columns.request)) == {STORED}


def test_the_index_grows_and_every_session_has_to_agree(start_node: Start, connect: Connect) -> None:
    node = start_node(grace_ms=20)
    peer, other = connect(node), connect(node)
    settings: dict[str, Any] = {"block_bytes": 512, "align": 512}
    info, source, blocks = ready(peer, 1, 512, **settings)
    old = other.open(**settings)
    reader = other.open_get(old)
    n = old.table.buckets * 8 * 8 // 10
    put_small(peer, info, source, 0, n)
    changed = [p.notice(m.TableChanged) for p in (peer, other)]
    table = changed[0].table
    assert table == changed[1].table
    assert table.buckets == 2 * old.table.buckets
    assert peer.open(**settings).table == table
    peer.send(m.Ack(changed[0].notice))
    time.sleep(0.1)
    ns = node.node.namespaces.by_name["test"]
    assert set(ns.tables) == {old.table.version, table.version}  # the other session still reads the old one
    epoch = np.frombuffer(reader.read(old.table.region.id, 0, 64), layout.EPOCH)[0]
    assert epoch["table"] == table.version
    other.send(m.Ack(changed[1].notice))
    eventually(lambda: set(ns.tables) == {table.version})
    again = connect(node)
    now = again.open(**settings)
    fresh = again.open_get(now)
    for number in (0, n // 2, n - 1):
        assert fresh.get(now, keys_of(number)[0]) == blocks[0].tobytes()


def test_a_session_that_dies_counts_as_having_agreed(start_node: Start, connect: Connect) -> None:
    node = start_node(grace_ms=20)
    peer, other = connect(node), connect(node)
    settings: dict[str, Any] = {"block_bytes": 512, "align": 512}
    info, source, _ = ready(peer, 1, 512, **settings)
    other.open(**settings)
    put_small(peer, info, source, 0, info.table.buckets * 8 * 8 // 10)
    peer.send(m.Ack(peer.notice(m.TableChanged).notice))
    ns = node.node.namespaces.by_name["test"]
    assert len(ns.tables) == 2
    other.vanish()
    eventually(lambda: len(ns.tables) == 1)


def test_a_session_that_does_not_acknowledge_is_closed(start_node: Start, connect: Connect) -> None:
    node = start_node(grace_ms=20, ack_timeout_ms=200)
    peer, other = connect(node), connect(node)
    settings: dict[str, Any] = {"block_bytes": 512, "align": 512}
    info, source, _ = ready(peer, 1, 512, **settings)
    other.open(**settings)
    put_small(peer, info, source, 0, info.table.buckets * 8 * 8 // 10)
    peer.send(m.Ack(peer.notice(m.TableChanged).notice))
    with pytest.raises(RemoteProtocolError, match="TableChanged was not acknowledged"):
        other.wait(10**9)
    eventually(lambda: len(node.node.namespaces.by_name["test"].tables) == 1)
    assert peer.ask(m.Ping)


# --- the end ----------------------------------------------------------------------------------------------


def test_stopping_says_bye_and_gives_everything_back(start_node: Start, connect: Connect) -> None:
    before = set(threading.enumerate())
    files = len(list(Path("/proc/self/fd").iterdir()))
    node = start_node()
    peers = [connect(node) for _ in range(3)]
    info, source, _ = ready(peers[0], 4)
    peers[0].statuses(peers[0].put(info, keys_of(1, 2, 3, 4), source, BLOCK))
    peers[1].open_get(peers[1].open())
    node.stop()
    for peer in peers:
        assert "going down" in peer.notice(m.Bye).reason
        peer.close()
    assert set(threading.enumerate()) <= before
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert node.node.memory.map is None


def test_a_node_can_be_stopped_in_the_middle_of_a_put(start_node: Start, connect: Connect) -> None:
    node = start_node(memory=2 << 20, grace_ms=20_000)
    peer = connect(node)
    info, source, _ = ready(peer, 40)
    peer.put(
        info, keys_of(*range(40)), source, BLOCK, deadline_ms=60_000
    )  # waits for room that will not come
    eventually(lambda: node.node.engine.under_way == 1)
    begun = time.monotonic()
    node.stop()
    assert time.monotonic() - begun < 5


def test_a_channel_can_be_closed_and_opened_again(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 1)
    channel = peer.open_pull(info)
    reader = peer.open_get(info)
    for id in (channel, reader.id, 1):
        assert isinstance(peer.ask(m.CloseChannel, id), m.Done)
    with pytest.raises(OSError, match="READ"):
        reader.read(info.slabs[0].id, 0, 64)
    with pytest.raises(Refused) as refused:
        peer.ask(m.CloseChannel, 99)
    assert refused.value.refusal.code == Code.NOT_FOUND
    with pytest.raises(Refused, match="pull channel"):
        peer.statuses(peer.put(info, keys_of(1), source, BLOCK))


def test_limits_of_a_session(start_node: Start, connect: Connect) -> None:
    node = start_node(max_channels=2, max_regions=2, max_queued_blocks=4)
    peer = connect(node)
    info, source, _ = ready(peer, 8)
    peer.open_pull(info)
    with pytest.raises(Refused, match="max_channels"):
        peer.open_get(info)
    peer.source(random_blocks(1).reshape(-1))
    with pytest.raises(Refused, match="max_regions"):
        peer.source(random_blocks(1).reshape(-1))
    with pytest.raises(Refused, match="max_queued_blocks"):
        peer.statuses(peer.put(info, keys_of(*range(8)), source, BLOCK))


def test_the_wrong_fabric_is_refused_with_the_reason(
    node: NodeThread, connect: Connect, fabric_name: str
) -> None:
    peer = connect(node)
    info = peer.open()
    other = "tcp" if fabric_name == "verbs" else "verbs"
    with pytest.raises(Refused, match=f"over {fabric_name}") as refused:
        peer.ask(m.OpenChannel, info.namespace, "get", other)
    assert refused.value.refusal.code == Code.UNSUPPORTED


def test_blocks_that_a_peer_stores_are_found_by_another(node: NodeThread, connect: Connect) -> None:
    writer, reader = connect(node), connect(node)
    info, source, blocks = ready(writer, 2)
    sums = [checksum(b) for b in blocks]
    assert writer.statuses(writer.put(info, keys_of(1, 2), source, BLOCK, sums)) == [STORED] * 2
    seen = reader.open()
    assert reader.open_get(seen).get(seen, keys_of(1)[0]) == blocks[0].tobytes()


# --- settings ---------------------------------------------------------------------------------------------


def test_a_file_under_overrides(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    file = tmp_path / "node.toml"
    file.write_text(f'listen = "[::1]:9000"\nmemory = "4G"\nhuge = "auto"\nsecret_file = "{secret}"\n')
    config = NodeConfig.load(file, memory="64M", grace_ms=None, fabric="tcp")
    assert config.listen == ("::1", 9000)
    assert config.memory == 64 << 20
    assert config.slab == 4 << 20
    assert config.secret == b"hush"
    assert config.grace_ms == 1000
    assert "hush" not in repr(config)


@pytest.mark.parametrize(
    ("settings", "knob"),
    [
        ({"memory": "much"}, "memory"),
        ({"memory": 100}, "memory"),
        ({"listen": "nowhere:x"}, "listen"),
        ({"fabric": "ether"}, "fabric"),
        ({"align": 1024}, "align"),
        ({"block_bytes": "1G"}, "block_bytes"),
        ({"slab_bytes": 5000}, "slab_bytes"),
        ({"grace_ms": 1}, "grace_ms"),
        ({"huge": "perhaps"}, "huge"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"max_sessions": "ten"}, "max_sessions"),
        ({"log_level": "loud"}, "log_level"),
        ({"memroy": "1G"}, "memroy"),
        ({"secret_file": "/nowhere/at/all"}, "secret"),
    ],
)
def test_a_bad_value_names_its_knob(settings: dict[str, Any], knob: str) -> None:
    with pytest.raises(LocalError, match=knob):
        NodeConfig.load(None, **settings)


def test_sizes_and_addresses() -> None:
    assert parse_size("64M", "x") == parse_size("64 MiB", "x") == parse_size(64 << 20, "x")
    assert parse_address("host", "x") == ("host", 7420)
    assert parse_address("[fe80::1]:1", "x") == ("fe80::1", 1)
    assert NodeConfig().slab == 64 << 20
    assert NodeConfig(memory=32 << 20).slab == 2 << 20
    assert NodeConfig(memory=64 << 30).slab == 256 << 20


def test_a_demanded_fabric_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises((DeviceError, LocalError)):
        NodeThread(
            NodeConfig(listen=("127.0.0.1", 0), memory=2 << 20, fabric="verbs", devices=("none0",))
        ).start()


def test_without_a_device_tcp_is_taken_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv.rdma.devices.names", list)
    with NodeThread(NodeConfig(listen=("127.0.0.1", 0), memory=2 << 20)) as node:
        assert node.node.fabric.name == "tcp"
        assert "no RDMA device" in node.node.fabric.reason


def test_a_node_that_was_never_started_can_be_asked_for_its_health() -> None:
    assert Node(NodeConfig()).health() == (False, "not started")

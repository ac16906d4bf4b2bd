"""Puts: what is pulled gets stored, verified and visible; what is not leaves nothing behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.rdma.fabric import Offer, RegionDesc
from memkv.store import messages as m
from memkv.store.framing import Code
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from .raw import RawPeer, Refused, checksum, keys_of

Connect = Callable[..., RawPeer]
Start = Callable[..., NodeThread]
BLOCK = 64 << 10
STORED, EXISTS, HIT, MISS = lib.MKV_STORED, lib.MKV_EXISTS, lib.MKV_HIT, lib.MKV_MISS


def random_blocks(n: int, length: int = BLOCK) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (n, length), np.uint8)


def ready(peer: RawPeer, n: int, length: int = BLOCK, **settings: Any) -> tuple[m.NamespaceInfo, int, Any]:
    """A namespace, a pull channel, and n random blocks in an offered region: (info, region id, blocks)."""
    info = peer.open(**settings)
    peer.open_pull(info)
    blocks = random_blocks(n, length)
    return info, peer.source(blocks.reshape(-1)).id, blocks


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.02)


def quiet(node: NodeThread) -> bool:
    """No session, no put under way, no extent set aside."""

    def look() -> bool:
        stats = [ns.stats() for ns in node.node.namespaces.by_name.values()]
        idle = not node.node.sessions and not node.node.engine.under_way
        return idle and not any(s["extents_filling"] or s["sessions"] for s in stats)

    return node.call(look)


def test_a_put_is_pulled_and_can_be_read(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, blocks = ready(peer, 8)
    keys = keys_of(*range(8))
    sums = [checksum(b) for b in blocks]
    assert peer.statuses(peer.put(info, keys, source, BLOCK, sums)) == [STORED] * 8
    reader = peer.open_get(peer.open())
    for key, block in zip(keys, blocks, strict=True):
        assert reader.get(info, key) == block.tobytes()
    assert peer.on_keys(m.Lookup, info, keys_of(0, 99)) == [HIT, MISS]


def test_blocks_of_odd_lengths_and_without_checksums(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    lengths = [1, 511, 512, 4097, 65535, 65536]
    info, source, blocks = ready(peer, 1)
    keys = keys_of(*range(len(lengths)))
    for key, length in zip(keys, lengths, strict=True):
        request = peer.put(info, key.reshape(1, 16), source, length)
        assert peer.statuses(request) == [STORED]
    reader = peer.open_get(peer.open())
    for key, length in zip(keys, lengths, strict=True):
        assert reader.get(info, key) == blocks[0, :length].tobytes()


def test_a_key_is_stored_once(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 4)
    assert peer.statuses(peer.put(info, keys_of(1, 2, 1, 3), source, BLOCK)) == [
        STORED,
        STORED,
        EXISTS,
        STORED,
    ]
    assert peer.statuses(peer.put(info, keys_of(3, 4), source, BLOCK)) == [EXISTS, STORED]
    assert peer.stats()["blocks"] == 4
    assert peer.stats()["extents_filling"] == 0


def test_a_wrong_checksum_is_corrupt_and_nothing_of_it_stays(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, blocks = ready(peer, 3)
    before = peer.stats()
    sums = [checksum(b) for b in blocks]
    sums[1] ^= 1
    statuses = peer.statuses(peer.put(info, keys_of(1, 2, 3), source, BLOCK, sums))
    assert statuses == [STORED, lib.MKV_CORRUPT, STORED]
    assert peer.on_keys(m.Lookup, info, keys_of(2)) == [MISS]
    after = peer.stats()
    assert after["blocks"] == 2
    assert after["extents_free"] == before["extents_free"] + after["extents"] - before["extents"] - 2


def test_lengths_that_the_namespace_refuses(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 2)
    assert peer.statuses(peer.put(info, keys_of(1), source, BLOCK + 1)) == [lib.MKV_ERROR_TOO_LARGE]
    assert peer.statuses(peer.put(info, keys_of(2), source, 0)) == [lib.MKV_ERROR_LENGTH]


def test_sources_that_were_not_offered(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 2)
    assert peer.statuses(peer.put(info, keys_of(1, 2), 77, BLOCK)) == [lib.MKV_ERROR_BOUNDS] * 2
    # the third block lies behind the end of the region
    statuses = peer.statuses(peer.put(info, keys_of(1, 2, 3), source, BLOCK))
    assert statuses == [STORED, STORED, lib.MKV_ERROR_BOUNDS]


def test_a_withdrawn_region_is_not_read_any_more(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 1)
    peer.ask(m.WithdrawRegions, source.to_bytes(4, "little"))
    assert peer.statuses(peer.put(info, keys_of(1), source, BLOCK)) == [lib.MKV_ERROR_BOUNDS]


def test_a_region_with_a_wrong_key_breaks_its_own_channel_only(node: NodeThread, connect: Connect) -> None:
    peer, other = connect(node), connect(node)
    info, source, _ = ready(peer, 1)
    info2, source2, _ = ready(other, 1)
    real = peer._offers.regions[source].desc
    rails = [m.RailKey(iova, rkey ^ 0x5A5A00) for iova, rkey in real.rails]
    peer.ask(m.OfferRegions, [m.RegionInfo(900, real.length, 2, real.secret ^ 2, rails)])
    assert peer.statuses(peer.put(info, keys_of(1), 900, BLOCK)) == [lib.MKV_ERROR_LINK]
    with pytest.raises(Refused) as refused:
        peer.statuses(peer.put(info, keys_of(1), source, BLOCK))
    assert refused.value.refusal.code == Code.NOT_FOUND
    peer.open_pull(info)
    assert peer.statuses(peer.put(info, keys_of(1), source, BLOCK)) == [STORED]
    assert other.statuses(other.put(info2, keys_of(2), source2, BLOCK)) == [STORED]


def test_a_full_arena_evicts_what_is_old(start_node: Start, connect: Connect) -> None:
    node = start_node(memory=4 << 20)
    peer = connect(node)
    info, source, _ = ready(peer, 32)
    for first in range(0, 160, 32):
        assert (
            peer.statuses(peer.put(info, keys_of(*range(first, first + 32)), source, BLOCK)) == [STORED] * 32
        )
    stats = peer.stats()
    assert stats["evictions"] > 0
    assert peer.on_keys(m.Lookup, info, keys_of(159)) == [HIT]


def test_a_full_arena_says_so_when_nothing_comes_free_before_the_deadline(
    start_node: Start, connect: Connect
) -> None:
    node = start_node(memory=2 << 20, grace_ms=20_000)  # what is evicted stays in quarantine
    peer = connect(node)
    info, source, _ = ready(peer, 31)
    n = peer.stats()["extents"]
    assert peer.statuses(peer.put(info, keys_of(*range(n)), source, BLOCK)) == [STORED] * n
    begun = time.monotonic()
    statuses = peer.statuses(peer.put(info, keys_of(1000, 1001), source, BLOCK, deadline_ms=300))
    assert statuses == [lib.MKV_ERROR_FULL] * 2
    assert 0.25 < time.monotonic() - begun < 2
    # the channel is as good as before
    assert peer.statuses(peer.put(info, keys_of(n - 1), source, BLOCK)) == [EXISTS]


def test_many_puts_at_once_are_served_in_turn(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 4)
    peer.open_pull(info)
    requests = [peer.put(info, keys_of(*range(4 * k, 4 * k + 4)), source, BLOCK) for k in range(20)]
    assert [peer.statuses(r) for r in requests] == [[STORED] * 4] * 20


def test_flash_is_refused_with_a_reason(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 1)
    with pytest.raises(Refused, match="no flash tier") as refused:
        peer.statuses(peer.put(info, keys_of(1), source, BLOCK, durability="flash"))
    assert refused.value.refusal.code == Code.UNSUPPORTED


def test_a_put_needs_a_pull_channel(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info = peer.open()
    with pytest.raises(Refused, match="pull channel"):
        peer.statuses(peer.put(info, keys_of(1), 1, BLOCK))


# --- peers that do not play their part (their data sockets are the test's own, so tcp only) -----------------


class Stalled:
    """A pull channel whose far end is a socket that the test does not answer on."""

    def __init__(self, peer: RawPeer, info: m.NamespaceInfo) -> None:
        answer = peer.ask(m.OpenChannel, info.namespace, "pull", "tcp")
        self.id = answer.channel
        self.sockets = []
        for _ in range(answer.streams):
            sock = socket.create_connection((peer.host, answer.port), timeout=5)
            sock.sendall(b"MKVDATA1" + answer.token)
            assert sock.recv(1) == b"K"
            self.sockets.append(sock)

    def asked(self) -> int:
        """Bytes of requests that have come."""
        n = 0
        for sock in self.sockets:
            sock.setblocking(False)
            try:
                n += len(sock.recv(1 << 16, socket.MSG_PEEK))
            except BlockingIOError:
                continue
        return n

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def tcp_only(fabric_name: str) -> None:
    if fabric_name != "tcp":
        pytest.skip("the far end of a queue pair cannot be made to stall")


@pytest.mark.usefixtures("tcp_only")
def test_a_put_that_stalls_times_out_and_its_extent_waits_for_the_drain(
    node: NodeThread, connect: Connect
) -> None:
    peer = connect(node)
    info = peer.open()
    stalled = Stalled(peer, info)
    peer.ask(m.OfferRegions, [m.RegionInfo(5, 1 << 20, 2, 99, [])])
    request = peer.put(info, keys_of(1, 2), 5, BLOCK, deadline_ms=600)
    eventually(lambda: stalled.asked() >= 80)
    assert peer.stats()["extents_filling"] == 2  # set aside for as long as a READ may land there
    assert peer.statuses(request) == [lib.MKV_TIMEOUT] * 2
    assert peer.stats()["extents_filling"] == 0
    assert peer.on_keys(m.Lookup, info, keys_of(1, 2)) == [MISS] * 2
    assert peer.ask(m.CloseChannel, stalled.id)  # it is gone already
    stalled.close()
    peer.open_pull(info)
    source = peer.source(random_blocks(1).reshape(-1))
    assert peer.statuses(peer.put(info, keys_of(1), source.id, BLOCK)) == [STORED]


@pytest.mark.usefixtures("tcp_only")
def test_puts_queue_behind_a_stalled_one_no_longer_than_their_own_deadline(
    node: NodeThread, connect: Connect
) -> None:
    peer = connect(node)
    info = peer.open()
    stalled = Stalled(peer, info)
    peer.ask(m.OfferRegions, [m.RegionInfo(5, 1 << 20, 2, 99, [])])
    slow = peer.put(info, keys_of(1), 5, BLOCK, deadline_ms=1500)
    begun = time.monotonic()
    assert peer.statuses(peer.put(info, keys_of(2), 5, BLOCK, deadline_ms=100)) == [lib.MKV_TIMEOUT]
    assert time.monotonic() - begun < 1
    assert peer.statuses(slow) == [lib.MKV_TIMEOUT]
    stalled.close()


@pytest.mark.usefixtures("tcp_only")
def test_a_stalled_peer_holds_up_nobody_else(node: NodeThread, connect: Connect) -> None:
    peer, other = connect(node), connect(node)
    info = peer.open()
    stalled = Stalled(peer, info)
    peer.ask(m.OfferRegions, [m.RegionInfo(5, 1 << 20, 2, 99, [])])
    slow = peer.put(info, keys_of(1), 5, BLOCK, deadline_ms=800)
    info2, source, _ = ready(other, 4)
    assert (
        other.statuses(other.put(info2, keys_of(*range(10, 14)), source, BLOCK), timeout=0.7) == [STORED] * 4
    )
    assert peer.statuses(slow) == [lib.MKV_TIMEOUT]
    stalled.close()


@pytest.mark.usefixtures("tcp_only")
def test_a_withdrawal_waits_for_the_puts_that_use_the_region(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info = peer.open()
    stalled = Stalled(peer, info)
    peer.ask(m.OfferRegions, [m.RegionInfo(i, 1 << 20, 2, 99, []) for i in (5, 6)])
    slow = peer.put(info, keys_of(1), 5, BLOCK, deadline_ms=400)
    assert peer.ask(m.WithdrawRegions, (6).to_bytes(4, "little"))  # nobody uses that one
    begun = time.monotonic()
    peer.ask(m.WithdrawRegions, (5).to_bytes(4, "little"))
    assert time.monotonic() - begun > 0.2
    assert peer.statuses(slow) == [lib.MKV_TIMEOUT]
    stalled.close()


@pytest.mark.usefixtures("tcp_only")
def test_a_peer_that_vanishes_in_the_middle_of_a_put_leaves_nothing_behind(
    node: NodeThread, connect: Connect
) -> None:
    peer = connect(node)
    info = peer.open()
    stalled = Stalled(peer, info)
    peer.ask(m.OfferRegions, [m.RegionInfo(5, 1 << 20, 2, 99, [])])
    regions = len(node.node.namespaces.by_name["test"].serve.regions)
    peer.put(info, keys_of(1, 2, 3), 5, BLOCK, deadline_ms=60_000)
    eventually(lambda: stalled.asked() >= 120)
    assert not quiet(node)
    peer.vanish()  # its data sockets stay open, and silent
    eventually(lambda: quiet(node))
    ns = node.node.namespaces.by_name["test"]
    assert node.call(lambda: ns.stats()["blocks"]) == 0
    assert len(ns.serve.regions) == regions
    assert not node.call(lambda: len(ns.pull.endpoints))  # type: ignore[attr-defined]
    stalled.close()


def test_a_peer_that_vanishes_between_puts_leaves_its_blocks(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, blocks = ready(peer, 2)
    assert peer.statuses(peer.put(info, keys_of(1, 2), source, BLOCK)) == [STORED] * 2
    peer.vanish()
    eventually(lambda: quiet(node))
    other = connect(node)
    info = other.open()
    assert other.open_get(info).get(info, keys_of(2)[0]) == blocks[1].tobytes()


def test_offers_and_descriptors_agree(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info, source, _ = ready(peer, 1)
    desc = peer._offers.regions[source].desc
    assert isinstance(desc, RegionDesc)
    rails = [m.RailKey(iova, rkey) for iova, rkey in desc.rails]
    again = m.RegionInfo(source, desc.length, 2, desc.secret, rails)
    assert peer.ask(m.OfferRegions, [again])  # the same once more does no harm
    with pytest.raises(Refused, match="other keys"):
        peer.ask(m.OfferRegions, [m.RegionInfo(source, desc.length - 1, 2, desc.secret, rails)])
    assert isinstance(Offer("tcp"), Offer)
    assert info.slabs

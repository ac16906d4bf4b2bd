"""Many peers that put, delete, pin, stall and vanish at once: nothing leaks, and the store stays sound."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np

from memkv.store import messages as m
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from .raw import RawPeer, Refused, keys_of
from .test_puts import eventually, quiet

SECONDS = 2.0
BLOCK = 16 << 10


class Visitor(threading.Thread):
    """Connects, does this and that, leaves one way or another, and comes again."""

    def __init__(self, node: NodeThread, fabric: str, seed: int) -> None:
        super().__init__()
        self.node, self.fabric, self.random = node, fabric, random.Random(seed)
        self.failure: Exception | None = None
        self.until = time.monotonic() + SECONDS

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self.visit()
        except Exception as exc:
            self.failure = exc

    def visit(self) -> None:
        chance = self.random
        peer = RawPeer(self.node.address, self.fabric)
        info = peer.open(chance.choice(["a", "b"]))
        peer.open_pull(info)
        source = peer.source(np.zeros(8 * BLOCK, np.uint8)).id
        for _ in range(chance.randrange(1, 20)):
            keys = keys_of(*(chance.randrange(2000) for _ in range(8)))
            act = chance.choice([self.put, self.put, self.put, self.delete, self.pin])
            act(peer, info, keys, source)
            for notice in [n for n in peer.arrived if isinstance(n, m.SlabRetired | m.TableChanged)]:
                peer.arrived.remove(notice)
                peer.send(m.Ack(notice.notice))
        if chance.random() < 0.3:
            peer.put(info, keys_of(*range(8)), source, BLOCK)  # and does not wait for it
            peer.vanish()
        peer.close()

    def put(self, peer: RawPeer, info: m.NamespaceInfo, keys: np.ndarray, source: int) -> None:
        length = self.random.choice([BLOCK, BLOCK // 2, 700])
        try:
            statuses = peer.statuses(
                peer.put(info, keys, source, length, deadline_ms=self.random.choice([5, 2000]))
            )
            broken = lib.MKV_TIMEOUT in statuses or lib.MKV_ERROR_LINK in statuses
        except Refused:  # the channel broke in the put before
            broken = True
        if broken:
            peer.open_pull(info)

    def delete(self, peer: RawPeer, info: m.NamespaceInfo, keys: np.ndarray, source: int) -> None:
        peer.on_keys(m.Delete, info, keys)

    def pin(self, peer: RawPeer, info: m.NamespaceInfo, keys: np.ndarray, source: int) -> None:
        peer.on_keys(m.Pin, info, keys, 50)


def test_peers_that_come_and_go(start_node: Callable[..., NodeThread], fabric_name: str) -> None:
    node = start_node(memory=8 << 20, slab_bytes=1 << 20, block_bytes=BLOCK, grace_ms=20)
    visitors = [Visitor(node, fabric_name, seed) for seed in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
        assert visitor.failure is None
    eventually(lambda: quiet(node))
    for ns in node.node.namespaces.by_name.values():
        assert lib.mkv_ns_check(ns.ns) == 0
        eventually(lambda ns=ns: len(ns.slabs) == len(ns.pull.regions))  # type: ignore[misc]
        assert len(ns.serve.regions) == len(ns.slabs) + len(ns.tables)
        assert not ns.pull.endpoints  # type: ignore[attr-defined]
        assert not ns.serve.endpoints  # type: ignore[attr-defined]
    assert node.node.counters.put_statuses()["stored"] > 0

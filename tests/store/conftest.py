"""Fixtures of the store: a node on a thread, and raw peers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memkv.store.config import NodeConfig
from memkv.store.node import NodeThread

from .raw import RawPeer

MIB = 1 << 20


@pytest.fixture
def start_node(fabric_name: str) -> Iterator[Callable[..., NodeThread]]:
    """Starts nodes over the fabric of the test, small and quick ones; stops them in the end."""
    nodes: list[NodeThread] = []

    def start(**settings: Any) -> NodeThread:
        settings = {
            "listen": ("127.0.0.1", 0),
            "fabric": fabric_name,
            "memory": 16 * MIB,
            "slab_bytes": 2 * MIB,
            "block_bytes": 64 << 10,
            "grace_ms": 100,
            "secret": b"",
            "huge": False,
        } | settings
        nodes.append(NodeThread(NodeConfig(**settings)).start())
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()


@pytest.fixture
def node(start_node: Callable[..., NodeThread]) -> NodeThread:
    return start_node()


@pytest.fixture
def connect(fabric_name: str) -> Iterator[Callable[..., RawPeer]]:
    """Connects raw peers to a node; closes them in the end."""
    peers: list[RawPeer] = []

    def make(node: NodeThread, secret: bytes = b"") -> RawPeer:
        peers.append(RawPeer(node.address, fabric_name, secret))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()

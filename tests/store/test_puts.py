"""Puts: what is pulled gets stored, verified and visible; what is not leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memkv.store import messages as m
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from .raw import RawPeer, checksum, keys_of

Connect = Callable[..., RawPeer]
BLOCK = 64 << 10


def random_blocks(n: int, length: int = BLOCK) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (n, length), np.uint8)


def test_a_put_is_pulled_and_can_be_read(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    info = peer.open()
    peer.open_pull(info)
    blocks = random_blocks(8)
    source = peer.source(blocks.reshape(-1))
    sums = [checksum(b) for b in blocks]
    keys = keys_of(*range(8))
    assert peer.statuses(peer.put(info, keys, source.id, BLOCK, sums)) == [lib.MKV_STORED] * 8
    reader = peer.open_get(peer.open())
    for key, block in zip(keys, blocks, strict=True):
        assert reader.get(info, key) == block.tobytes()
    assert peer.on_keys(m.Lookup, info, keys_of(0, 99)) == [lib.MKV_HIT, lib.MKV_MISS]

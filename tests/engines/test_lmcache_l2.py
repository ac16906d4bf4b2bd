"""The L2 adapter, as LMCache's factory loads it, against a node: bytes, bitmaps, what may hit and what may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

from memkv.connectors.lmcache_l2 import MemKVL2Adapter, MemKVL2AdapterConfig
from memkv.store.node import NodeThread

from .lmcache_l2 import LAYOUT, NBYTES, SHAPE, Arena, keys_of, load, load_adapter, lookup, same, store

pytest_plugins = "tests.nodes"

Adapt = Callable[..., MemKVL2Adapter]


@pytest.fixture
def adapt(fabric_name: str) -> Iterator[Adapt]:
    """Loads adapters for nodes; closes them in the end."""
    with ExitStack() as stack:

        def make(*nodes: Any, **params: Any) -> MemKVL2Adapter:
            adapter = load_adapter(*nodes, fabric=fabric_name, **params)
            stack.callback(adapter.close)
            return adapter

        yield make


# --- storing and loading ---


def test_what_was_stored_comes_back_byte_by_byte(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(node, desc=arena.desc), keys_of(8)
    written, read = arena.objects(8, seed=1), arena.objects(8)
    result = store(adapter, keys, written)
    assert (result.is_successful(), result.bytes_transferred()) == (True, 8 * NBYTES)
    assert lookup(adapter, keys) == [True] * 8
    assert load(adapter, keys, read) == [True] * 8
    assert same(read, written) == [True] * 8


def test_bitmaps_have_holes_where_keys_are_missing(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(node, desc=arena.desc), keys_of(9)
    written, read = arena.objects(9, seed=1), arena.objects(9)
    there = [i % 3 != 1 for i in range(9)]
    some = np.flatnonzero(there)
    assert store(adapter, [keys[i] for i in some], [written[i] for i in some]).is_successful()
    assert lookup(adapter, keys) == there
    assert load(adapter, keys, read) == there
    assert same(read, written) == there


def test_another_server_finds_what_one_has_stored(node: NodeThread, adapt: Adapt) -> None:
    here, there = Arena(), Arena()
    keys, written, read = keys_of(4), here.objects(4, seed=1), there.objects(4)
    assert store(adapt(node, desc=here.desc), keys, written).is_successful()
    other = adapt(node, desc=there.desc)
    assert lookup(other, keys) == [True] * 4
    assert load(other, keys, read) == [True] * 4
    assert same(read, written) == [True] * 4

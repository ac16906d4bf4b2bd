# ruff: noqa: E402  the engine first: without it the tests are skipped
"""The L2 adapter when something is wrong: locks and their ends, nodes that die or are not there, closing."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from lmcache.v1.memory_management import GDSMemoryObject, MemoryObjMetadata

from memkv.connectors import lmcache_sites
from memkv.connectors.lmcache_l2 import MemKVL2Adapter
from memkv.store.node import NodeThread
from tests.nodes import GRACE, MIB, NodeProcess, Proxy, StartNode, file_descriptors, until, within

from .lmcache_l2 import LAYOUT, NBYTES, Arena, content_of, keys_of, load, load_adapter, lookup, same, store

pytest_plugins = "tests.nodes"

Adapt = Callable[..., MemKVL2Adapter]
FULL = 4 * MIB // (NBYTES + 4096)  # blocks that fill the small node, with their headers


@pytest.fixture
def adapt(fabric_name: str) -> Iterator[Adapt]:
    with ExitStack() as stack:

        def make(*nodes: Any, **params: Any) -> MemKVL2Adapter:
            adapter = load_adapter(*nodes, fabric=fabric_name, **params)
            stack.callback(adapter.close)
            return adapter

        yield make


@pytest.fixture
def small(start_node: StartNode) -> NodeThread:
    """A node with room for few blocks."""
    return start_node(memory=4 * MIB, slab_bytes=2 * MIB, block_bytes=NBYTES)


def pins(node: NodeThread) -> int:
    """Blocks of the node that may not be evicted, of all namespaces."""
    spaces = node.call(lambda: [n.stats() for n in node.node.namespaces.by_name.values()])
    return sum(s["extents_pinned"] for s in spaces)


def flood(adapter: MemKVL2Adapter, arena: Arena, seed: int) -> None:
    """Stores more than the small node can hold, so that everything that can be evicted is."""
    objects = arena.objects(16, seed=seed)
    stored = 0
    end = time.monotonic() + 60
    while stored < 3 * FULL:
        assert time.monotonic() < end
        seed += 1
        stored += 16 if store(adapter, keys_of(16, seed), objects).is_successful() else 0
    for obj in objects:
        arena.allocator.free(obj)


# --- locks ---


def test_what_is_locked_stays_and_what_is_not_goes(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(small, desc=arena.desc), keys_of(8)
    written, read = arena.objects(8, seed=1), arena.objects(8)
    assert store(adapter, keys, written).is_successful()
    assert lookup(adapter, keys[:4]) == [True] * 4
    flood(adapter, arena, 100)
    assert load(adapter, keys, read) == [True] * 4 + [False] * 4
    assert same(read[:4], written[:4]) == [True] * 4


def test_unlocking_lets_go(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(small, desc=arena.desc), keys_of(4)
    assert store(adapter, keys, arena.objects(4, seed=1)).is_successful()
    assert lookup(adapter, keys) == [True] * 4
    assert pins(small) == 4
    adapter.submit_unlock(keys)
    until(lambda: pins(small) == 0, what="unlocked")
    flood(adapter, arena, 100)
    assert lookup(adapter, keys) == [False] * 4


def test_locks_are_counted_and_unlocking_more_often_does_no_harm(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    one, two, keys = adapt(small, desc=arena.desc), adapt(small, desc=arena.desc), keys_of(4)
    assert store(one, keys, arena.objects(4, seed=1)).is_successful()
    for adapter in (one, one, two):
        assert lookup(adapter, keys) == [True] * 4
    assert one.report_status()["locks"] == 8
    for _ in range(5):
        one.submit_unlock([*keys, *keys_of(2, seed=9)])
    assert one.report_status()["locks"] == 0
    assert lookup(one, keys_of(1, seed=8)) == [False]  # an answer after all of that
    assert pins(small) == 4  # the other server's
    two.submit_unlock(keys)
    until(lambda: pins(small) == 0, what="unlocked by the other, too")


def test_locks_of_a_server_that_is_gone_expire(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    gone, adapter, keys = (
        adapt(small, desc=arena.desc, lock_ttl=1.5),
        adapt(small, desc=arena.desc),
        keys_of(4),
    )
    assert store(gone, keys, arena.objects(4, seed=1)).is_successful()
    assert lookup(gone, keys) == [True] * 4
    gone._holds._held.clear()  # as if it had been killed: it never says that it lets go
    gone.close()
    assert pins(small) == 4
    until(lambda: pins(small) == 0, 20, "the node has forgotten them")
    flood(adapter, arena, 100)
    assert lookup(adapter, keys) == [False] * 4


def test_a_lock_that_has_expired_takes_nobody_elses_away(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    late, other = adapt(small, desc=arena.desc, lock_ttl=0.2), adapt(small, desc=arena.desc)
    keys = keys_of(4)
    assert store(late, keys, arena.objects(4, seed=1)).is_successful()
    assert lookup(late, keys) == [True] * 4
    until(lambda: late.report_status()["locks"] == 0, what="expired")
    until(lambda: pins(small) == 0, 20, "the node has forgotten them")
    assert lookup(other, keys) == [True] * 4
    late.submit_unlock(keys)
    assert lookup(late, keys_of(1, seed=8)) == [False]  # an answer after that
    assert pins(small) == 4


def test_a_node_that_has_no_room_for_locks_still_says_what_it_has(small: NodeThread, adapt: Adapt) -> None:
    arena = Arena(2 * FULL * NBYTES)
    adapter, n = adapt(small, desc=arena.desc), FULL * 3 // 4
    keys, written, read = keys_of(n), arena.objects(n, seed=1), arena.objects(n)
    store(adapter, keys, written)
    found = lookup(adapter, keys)
    held = adapter.report_status()["locks"]
    assert 0 < held < sum(found)
    assert load(adapter, keys, read) == found
    adapter.submit_unlock([k for k, f in zip(keys, found, strict=True) if f])
    until(lambda: pins(small) == 0, what="unlocked")


# --- nodes ---


def test_a_node_killed_midway(start_process: Callable[..., NodeProcess], adapt: Adapt) -> None:
    process = start_process()
    arena = Arena(96 * NBYTES)
    adapter, keys = adapt(process, desc=arena.desc, get_timeout=1.0, put_timeout=1.0), keys_of(32)
    written, read = arena.objects(32, seed=1), arena.objects(32)
    assert store(adapter, keys, written).is_successful()
    assert lookup(adapter, keys) == [True] * 32
    tasks = [adapter.submit_load_task(keys, read) for _ in range(3)]
    process.kill()
    poller = select.poll()
    poller.register(adapter.get_load_event_fd(), select.POLLIN)
    while tasks:
        assert poller.poll(20_000)
        os.eventfd_read(adapter.get_load_event_fd())
        for task in list(tasks):
            if (bitmap := adapter.query_load_result(task)) is not None:
                tasks.remove(task)
                assert all(content_of(read[i]) == content_of(written[i]) for i in range(32) if bitmap.test(i))
    assert load(adapter, keys, read) == [False] * 32
    assert lookup(adapter, keys) == [False] * 32
    assert not store(adapter, keys_of(4, seed=5), written[:4]).is_successful()
    adapter.submit_unlock(keys)
    assert not adapter.report_status()["is_healthy"]


def test_a_node_that_comes_back_is_used_again(
    start_process: Callable[..., NodeProcess], adapt: Adapt
) -> None:
    process, arena = start_process(), Arena()
    adapter, keys, written = adapt(process, desc=arena.desc), keys_of(4), arena.objects(4, seed=1)
    assert store(adapter, keys, written).is_successful()
    process.kill()
    assert lookup(adapter, keys) == [False] * 4
    process.start()
    until(lambda: store(adapter, keys, written).is_successful(), 30, "joined again")
    assert lookup(adapter, keys) == [True] * 4


def test_a_node_that_is_not_there_yet(
    start_process: Callable[..., NodeProcess], adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_sites, "RETRY", 0.1)
    process, arena = start_process(), Arena()
    process.kill()
    adapter, keys, written = adapt(process, desc=arena.desc), keys_of(4), arena.objects(4, seed=1)
    assert not store(adapter, keys, written).is_successful()
    assert lookup(adapter, keys) == [False] * 4
    assert load(adapter, keys, written) == [False] * 4
    status = adapter.report_status()
    assert not status["is_healthy"]
    assert "error" in status["kinds"][0]
    process.start()
    until(lambda: store(adapter, keys, written).is_successful(), 30, "joined")
    assert lookup(adapter, keys) == [True] * 4


def test_a_secret_that_is_not_there_is_a_miss_and_is_said(node: NodeThread, adapt: Adapt) -> None:
    """The settings were good when the adapter was made; what fails later must not end LMCache's threads."""
    arena = Arena()
    adapter, keys = adapt(node, desc=arena.desc, secret_file="/nonexistent/secret"), keys_of(2)
    assert lookup(adapter, keys) == [False] * 2
    assert not store(adapter, keys, arena.objects(2, seed=1)).is_successful()
    assert "/nonexistent/secret" in adapter.report_status()["kinds"][0]["error"]


def test_objects_that_are_not_in_memory_are_not_stored(node: NodeThread, adapt: Adapt, caplog: Any) -> None:
    """Those of LMCache's GDS tier."""
    (size,) = LAYOUT.shapes
    meta = MemoryObjMetadata(size, LAYOUT.dtypes[0], 0, NBYTES, 1, shapes=[size], dtypes=LAYOUT.dtypes)
    adapter, keys, objects = adapt(node), keys_of(1), [GDSMemoryObject(meta)]
    assert not store(adapter, keys, objects).is_successful()
    assert load(adapter, keys, objects) == [False]
    assert "host memory" in caplog.text


def test_no_call_waits_for_a_node_that_does_not_answer(
    start_process: Callable[..., NodeProcess], adapt: Adapt
) -> None:
    """Neither one that has stopped before it is first asked, nor later."""
    process, arena = start_process(), Arena()
    params = {"desc": arena.desc, "get_timeout": 3.0, "put_timeout": 3.0, "connect_timeout": 3.0}
    keys, objects = keys_of(4), arena.objects(4, seed=1)
    first, later = adapt(process, **params), adapt(process, **params)
    assert store(later, keys, objects).is_successful()
    with process.stopped():
        for adapter in (first, later):
            with within(2.5):  # any that waited would take longer
                adapter.submit_store_task(keys, objects)
                adapter.submit_lookup_and_lock_task(keys, {})
                adapter.submit_load_task(keys, objects)
                adapter.submit_unlock(keys)
                adapter.delete(keys)
                adapter.report_status()
        assert lookup(first, keys) == [False] * 4
        assert load(later, keys, objects) == [False] * 4


# --- the end ---


def test_closing_with_tasks_under_way(node: NodeThread, adapt: Adapt) -> None:
    before = file_descriptors()
    arena = Arena(128 * NBYTES)
    with Proxy(node) as proxy:
        adapter, keys = adapt(proxy, desc=arena.desc, put_timeout=2.0, get_timeout=2.0), keys_of(16)
        written, read = arena.objects(16, seed=1), arena.objects(16)
        assert store(adapter, keys, written).is_successful()
        proxy.flowing.clear()
        for _ in range(4):
            adapter.submit_load_task(keys, read)
            adapter.submit_store_task(keys_of(16, seed=3), written)
            adapter.submit_lookup_and_lock_task(keys, {})
        with within(20):
            adapter.close()
        for obj in read:
            obj.raw_tensor.fill_(7)
        proxy.flowing.set()
        time.sleep(GRACE)  # whatever could still arrive
        assert all(set(content_of(obj)) == {7} for obj in read)
        adapter.close()
    until(lambda: file_descriptors() <= before, 10, "all descriptors closed")


def test_calls_after_closing_do_nothing(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys, objects = adapt(node, desc=arena.desc), keys_of(2), arena.objects(2, seed=1)
    assert store(adapter, keys, objects).is_successful()
    adapter.close()
    task = adapter.submit_load_task(keys, objects)
    assert adapter.query_load_result(task) is None
    adapter.submit_lookup_and_lock_task(keys, {})
    adapter.submit_store_task(keys, objects)
    adapter.submit_unlock(keys)
    adapter.delete(keys)
    assert not adapter.report_status()["is_healthy"]


def test_closing_unlocks(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(node, desc=arena.desc), keys_of(4)
    assert store(adapter, keys, arena.objects(4, seed=1)).is_successful()
    assert lookup(adapter, keys) == [True] * 4
    adapter.close()
    until(lambda: pins(node) == 0, what="unlocked")

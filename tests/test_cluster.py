"""Several nodes behind one peer: who holds what, and what one dead node costs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from memkv.placement import Placement
from memkv.rdma.errors import MemKVError
from memkv.status import Status
from memkv.store.node import NodeThread

from .nodes import (
    KIB,
    Array,
    Blocks,
    Connect,
    NodeProcess,
    StartNode,
    address_of,
    blocks_of,
    count,
    keys_of,
    until,
    within,
)

pytest_plugins = "tests.nodes"

HIT, MISS, STORED, DONE = Status.HIT, Status.MISS, Status.STORED, Status.DONE
UNREACHABLE, LINK, TIMEOUT = Status.ERROR_UNREACHABLE, Status.ERROR_LINK, Status.TIMEOUT
TAGS, NEIGHBOURS = 48, 2
N = TAGS * NEIGHBOURS
LENGTH = 4 * KIB  # these tests are about who, not about how much

StartProcess = Callable[..., NodeProcess]


@pytest.fixture
def three(fabric_name: str) -> Iterator[list[NodeProcess]]:
    """Three nodes that may be killed."""
    nodes = [NodeProcess(fabric_name).launch() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for node in nodes:
            stack.push(node)
        yield [node.ready() for node in nodes]


def cluster_keys(seed: int = 0) -> Array:
    """Runs of neighbours, which share a tag."""
    return np.concatenate([keys_of(NEIGHBOURS, seed=seed * TAGS + t, tag=t * 7919) for t in range(TAGS)])


def owners(nodes: list[Any], keys: Array) -> Array:
    """Index of the node of each key."""
    return Placement([address_of(n) for n in nodes]).nodes(keys)


def up(peer: Any) -> int:
    return sum(bool(entry["up"]) for entry in peer.stats()["nodes"].values())


def test_neighbours_stay_together_and_tags_are_spread(start_node: StartNode, connect: Connect) -> None:
    nodes = [start_node() for _ in range(3)]
    peer = connect(*nodes)
    keys = cluster_keys()
    blocks = Blocks(peer, N, LENGTH)
    assert count(blocks.put(keys)) == {STORED: N}
    owner = owners(nodes, keys)
    assert (owner.reshape(TAGS, NEIGHBOURS) == owner[::NEIGHBOURS, None]).all()
    stats = peer.node_stats()
    for i, node in enumerate(nodes):
        assert stats[address_of(node)]["namespace:test"]["blocks"] == (owner == i).sum() > 0
    order = np.random.default_rng(1).permutation(N)
    assert count(blocks.get(keys[order])) == {HIT: N}
    assert count(blocks.get(keys[order], checksum=True)) == {HIT: N}
    assert peer.match(keys) == N
    assert count(peer.exists(keys[order])) == {HIT: N}
    assert count(peer.pin(keys[order], 10)) == {DONE: N}
    assert count(peer.delete(keys[::2].copy())) == {DONE: N // 2}
    assert (blocks.get(keys) == np.where(np.arange(N) % 2, HIT, MISS)).all()
    other = connect(*reversed(nodes))  # the order of the list does not matter
    assert (Blocks(other, N, LENGTH).get(keys) == np.where(np.arange(N) % 2, HIT, MISS)).all()


def test_a_long_prefix_over_several_nodes(start_node: StartNode, connect: Connect) -> None:
    nodes = [start_node(block_bytes=1024, align=512) for _ in range(3)]
    peer = connect(*nodes)
    keys = np.concatenate([keys_of(64, seed=t, tag=t * 104729) for t in range(8)])
    blocks = Blocks(peer, len(keys), 1024)
    assert count(blocks.put(keys)) == {STORED: 512}
    assert peer.match(keys) == 512
    peer.delete(keys[400:401].copy())
    assert peer.match(keys) == 400


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_node_without_a_free_channel_holds_up_no_other(
    start_node: StartNode, connect: Connect, asynchronous: bool
) -> None:
    nodes = [start_node() for _ in range(3)]
    peer = connect(*nodes, max_channels=1)
    keys = cluster_keys()
    blocks = Blocks(peer, N, LENGTH)
    blocks.put(keys)
    session = peer._links[0].session
    assert session is not None
    channel = session.pool.try_take()
    assert channel is not None
    owner = owners(nodes, keys)
    with within(3):
        if asynchronous:
            status = asyncio.run(peer.aio.get_into(keys, blocks.slices, timeout=0.5))
        else:
            status = blocks.get(keys, timeout=0.5)
    session.pool.give_back(channel)
    assert (status == np.where(owner == 0, TIMEOUT, HIT)).all()
    assert count(blocks.get(keys)) == {HIT: N}


def test_a_killed_node_costs_its_own_keys_only(three: list[NodeProcess], connect: Connect) -> None:
    peer = connect(*three)
    keys = cluster_keys()
    blocks = Blocks(peer, N, LENGTH)
    assert count(blocks.put(keys)) == {STORED: N}
    assert count(blocks.get(keys)) == {HIT: N}
    lost = owners(three, keys) == 1
    before = {a: e["incarnation"] for a, e in incarnations(peer).items()}
    started = time.monotonic()
    for _ in range(10):
        blocks.get(keys)
    usual = time.monotonic() - started

    three[1].kill()
    with within(4):  # the first one may have to find out
        status = blocks.get(keys)
    assert count(status[~lost]) == {HIT: int((~lost).sum())}
    assert count(status[lost]).keys() <= {LINK, UNREACHABLE, MISS}
    until(lambda: up(peer) == 2)
    with within(2 * usual + 1):  # they have less to bring, and nobody to wait for
        for _ in range(10):
            status = blocks.get(keys)
            assert (status == np.where(lost, UNREACHABLE, HIT)).all()
    first_lost = int(np.flatnonzero(lost)[0])
    assert peer.match(keys) == first_lost
    assert (peer.exists(keys) == np.where(lost, UNREACHABLE, HIT)).all()
    assert (peer.pin(keys, 1) == np.where(lost, UNREACHABLE, DONE)).all()
    fresh = cluster_keys(seed=1)
    gone = owners(three, fresh) == 1
    assert (blocks.put(fresh) == np.where(gone, UNREACHABLE, STORED)).all()
    assert str(peer.stats()["nodes"][address_of(three[1])]["error"])
    assert len(peer.node_stats()) == 2

    three[1].start()
    until(lambda: up(peer) == 3, what="the restarted node is used again")
    assert incarnations(peer)[address_of(three[1])]["incarnation"] != before[address_of(three[1])]
    assert peer.stats()["nodes"][address_of(three[1])]["reconnects"] == 1
    assert (blocks.get(keys) == np.where(lost, MISS, HIT)).all()  # nobody trusts the old locations
    assert (blocks.put(keys) == np.where(lost, STORED, Status.EXISTS)).all()
    assert count(blocks.get(keys)) == {HIT: N}


def incarnations(peer: Any) -> dict[str, dict[str, Any]]:
    return {address: sections["node"] for address, sections in peer.node_stats().items()}


def test_connecting_while_one_of_three_is_down(
    three: list[NodeProcess], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    three[2].kill()
    with caplog.at_level(logging.WARNING, "memkv.peer"):
        peer = connect(*three)
    assert [
        r for r in caplog.records if address_of(three[2]) in r.message and "cannot be reached" in r.message
    ]
    keys = cluster_keys()
    blocks = Blocks(peer, N, LENGTH)
    down = owners(three, keys) == 2
    assert (blocks.put(keys) == np.where(down, UNREACHABLE, STORED)).all()
    three[2].start()
    until(lambda: up(peer) == 3)
    assert (blocks.put(keys) == np.where(down, STORED, Status.EXISTS)).all()
    assert count(blocks.get(keys)) == {HIT: N}


def test_connecting_while_all_are_down(start_process: StartProcess, connect: Connect) -> None:
    nodes = [start_process() for _ in range(2)]
    for node in nodes:
        node.kill()
    names = {t.name for t in threading.enumerate()}
    with within(5), pytest.raises(MemKVError, match="is memkv-node serve running there"):
        connect(*nodes)
    assert {t.name for t in threading.enumerate()} == names


def test_a_stopped_node_holds_up_one_batch_at_most(
    three: list[NodeProcess], connect: Connect, fabric_name: str
) -> None:
    peer = connect(*three, timeout=1.0)
    keys = cluster_keys()
    blocks = Blocks(peer, N, LENGTH)
    assert count(blocks.put(keys, timeout=10)) == {STORED: N}
    assert count(blocks.get(keys, timeout=10)) == {HIT: N}
    lost = owners(three, keys) == 0
    with three[0].stopped():
        with within(4):
            status = blocks.get(keys)
        if fabric_name == "verbs":  # READs need no CPU of the node's
            assert count(status) == {HIT: N}
        else:
            assert (status == np.where(lost, TIMEOUT, HIT)).all()
            until(lambda: up(peer) == 2, what="the node that does not answer is left alone")
            with within(2):
                for _ in range(5):
                    assert (blocks.get(keys) == np.where(lost, UNREACHABLE, HIT)).all()
    until(lambda: up(peer) == 3)
    assert count(blocks.get(keys, timeout=10)) == {HIT: N}


def test_a_node_that_comes_and_goes_under_load(three: list[NodeProcess], connect: Connect) -> None:
    peer = connect(*three)
    keys = cluster_keys()
    owner = owners(three, keys)
    assert count(Blocks(peer, N, LENGTH).put(keys)) == {STORED: N}
    ended, failures = threading.Event(), []

    def work(seed: int) -> None:
        try:
            blocks, rng = Blocks(peer, N, LENGTH), np.random.default_rng(seed)
            while not ended.is_set():
                order = rng.permutation(N)
                started = time.monotonic()
                status = blocks.get(keys[order]) if rng.integers(2) else blocks.put(keys[order])
                assert time.monotonic() - started < 8
                assert not set(np.unique(status[owner[order] != 2]).tolist()) - {HIT, STORED, Status.EXISTS}
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    three[2].kill()
    until(lambda: up(peer) == 2)
    three[2].start()
    until(lambda: up(peer) == 3)
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures
    blocks = Blocks(peer, N, LENGTH)
    blocks.put(keys)
    assert count(blocks.get(keys)) == {HIT: N}
    assert not any(entry["channels_busy"] for entry in peer.stats()["nodes"].values())


@pytest.mark.parametrize("fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True)
def test_all_nodes_have_to_be_used_over_one_fabric(
    start_node: StartNode, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    nodes: list[NodeThread] = [start_node(fabric="tcp"), start_node(fabric="verbs")]
    with caplog.at_level(logging.WARNING, "memkv.peer"):
        peer = connect(*nodes, fabric="auto")
    assert up(peer) == 1
    assert "all nodes of a cluster need one fabric" in caplog.text


def test_blocks_are_where_other_peers_look_for_them(start_node: StartNode, connect: Connect) -> None:
    nodes = [start_node() for _ in range(2)]
    keys = cluster_keys(seed=2)
    Blocks(connect(*nodes), N, LENGTH).put(keys)
    owner = owners(nodes, keys)
    for i, node in enumerate(nodes):  # a peer of one node sees that node's share
        alone = Blocks(connect(node), N, LENGTH)
        assert (alone.get(keys) == np.where(owner == i, HIT, MISS)).all()
        held = alone.memory[owner == i]
        assert np.array_equal(held, blocks_of(keys, LENGTH)[owner == i])

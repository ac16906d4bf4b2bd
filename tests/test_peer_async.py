"""Peers for callers with an event loop or a poll loop of their own."""

from __future__ import annotations

import asyncio
import queue
import select
import threading
import time
from typing import Any

import numpy as np
import pytest

from memkv.peer import Peer
from memkv.rdma.errors import LocalError, MemKVError
from memkv.status import Status
from memkv.store.node import NodeThread
from memkv.tickets import Ticket

from .nodes import Blocks, Connect, blocks_of, count, keys_of, stats_of, until, within

pytest_plugins = "tests.nodes"

HIT, MISS, STORED, EXISTS, DONE = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS, Status.DONE


def collect(peer: Peer, n: int, seconds: float = 20.0) -> list[Ticket]:
    """n tickets, as a poll loop gets them: asleep in select until there is something to reap."""
    out: list[Ticket] = []
    end = time.monotonic() + seconds
    while len(out) < n:
        assert select.select([peer.fileno()], [], [], max(0.0, end - time.monotonic()))[0]
        out += peer.reap()
    return out


# --- asyncio ---


def test_every_call_has_its_awaited_namesake(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)

    async def main() -> None:
        blocks, keys, aio = Blocks(peer, 8), keys_of(8), peer.aio
        blocks.memory[:] = blocks_of(keys)
        assert count(await aio.put_from(keys, blocks.slices)) == {STORED: 8}
        assert count(await aio.put_from(keys, blocks.slices, durability="memory")) == {EXISTS: 8}
        blocks.memory[:] = 0
        assert count(await aio.get_into(keys, blocks.slices, checksum=True)) == {HIT: 8}
        assert np.array_equal(blocks.memory, blocks_of(keys))
        assert await aio.match(keys) == 8
        assert count(await aio.exists(keys)) == {HIT: 8}
        assert count(await aio.pin(keys, 10)) == {DONE: 8}
        assert count(await aio.unpin(keys)) == {DONE: 8}
        await aio.touch(keys)
        assert count(await aio.delete(keys)) == {DONE: 8}
        assert count(await aio.get_into(keys, blocks.slices, timeout=5)) == {MISS: 8}
        assert len(await aio.get_into(keys[:0], blocks.slices[:0])) == 0

    asyncio.run(main())
    assert stats_of(node)["touches"] >= 8


def test_many_batches_at_once(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    keys = keys_of(64)

    async def worker(seed: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = Blocks(peer, 8)
        for _ in range(10):
            some = keys[rng.permutation(64)[:8]]
            blocks.memory[:] = blocks_of(some)
            assert count(await peer.aio.put_from(some, blocks.slices)).keys() <= {STORED, EXISTS}
            blocks.memory[:] = 0
            assert count(await peer.aio.get_into(some, blocks.slices)) == {HIT: 8}
            assert np.array_equal(blocks.memory, blocks_of(some))

    async def main() -> None:
        await asyncio.gather(*(worker(i) for i in range(16)))

    asyncio.run(main())
    assert stats_of(node)["puts"] == 64


def test_the_callers_loop_runs_while_a_batch_waits(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, max_channels=1)
    session = peer._links[0].session
    assert session is not None
    channel = session.pool.try_take()
    assert channel is not None
    blocks, keys = Blocks(peer, 4), keys_of(4)

    async def main() -> None:
        batch = asyncio.create_task(peer.aio.get_into(keys, blocks.slices, timeout=20))
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not batch.done()
        session.pool.give_back(channel)
        assert count(await batch) == {MISS: 4}

    asyncio.run(main())


def test_no_channel_before_the_deadline(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, max_channels=1)
    session = peer._links[0].session
    assert session is not None
    channel = session.pool.try_take()
    assert channel is not None
    blocks, keys = Blocks(peer, 4), keys_of(4)
    with within(2):
        assert count(asyncio.run(peer.aio.get_into(keys, blocks.slices, timeout=0.1))) == {Status.TIMEOUT: 4}
        assert count(blocks.get(keys, timeout=0.1)) == {Status.TIMEOUT: 4}
    session.pool.give_back(channel)
    assert count(blocks.get(keys)) == {MISS: 4}
    assert session.pool.counts == (0, 1)


def test_cancelling_leaves_the_batch_to_its_end(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 32), keys_of(32)
    blocks.memory[:] = blocks_of(keys)

    async def main() -> None:
        put = asyncio.create_task(peer.aio.put_from(keys, blocks.slices))
        await asyncio.sleep(0)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put

    asyncio.run(main())
    until(lambda: peer.match(keys) == 32, what="the put has gone on")
    assert count(blocks.get(keys)) == {HIT: 32}


def test_awaited_calls_refuse_what_the_others_refuse(peer: Peer) -> None:
    blocks = Blocks(peer, 2)

    async def main() -> None:
        coroutine: Any
        for coroutine in (
            peer.aio.get_into(keys_of(3), blocks.slices),
            peer.aio.put_from(keys_of(3), blocks.slices),
            peer.aio.put_from(keys_of(2), blocks.slices, checksums=np.zeros(1, np.uint64)),
            peer.aio.match(np.zeros((1, 15), np.uint8)),
        ):
            with pytest.raises(LocalError):
                await coroutine
        peer.close()
        for coroutine in (
            peer.aio.get_into(keys_of(2), blocks.slices),
            peer.aio.put_from(keys_of(2), blocks.slices),
            peer.aio.touch(keys_of(2)),
            peer.aio.match(keys_of(2)),
        ):
            with pytest.raises(LocalError, match="closed"):
                await coroutine

    asyncio.run(main())


# --- submit, reap ---


def test_tickets_come_out_by_select(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 8), keys_of(8)
    blocks.memory[:] = blocks_of(keys)
    assert not select.select([peer.fileno()], [], [], 0)[0]
    assert peer.reap() == []
    ticket = peer.submit_put(keys, blocks.slices, tag="put")
    (done,) = collect(peer, 1)
    assert done is ticket
    assert (done.tag, done.done, done.error) == ("put", True, None)
    assert done.status is not None
    assert count(done.status) == {STORED: 8}
    blocks.memory[:] = 0
    peer.submit_get(keys, blocks.slices, tag=7)
    (done,) = collect(peer, 1)
    assert done.tag == 7
    assert done.status is not None
    assert count(done.status) == {HIT: 8}
    assert np.array_equal(blocks.memory, blocks_of(keys))
    assert not select.select([peer.fileno()], [], [], 0)[0]


def test_a_hundred_tickets_under_way(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 100), keys_of(100)
    blocks.memory[:] = blocks_of(keys)
    for i in range(100):
        peer.submit_put(keys[i : i + 1], blocks.slices[i : i + 1], tag=i)
    puts = collect(peer, 100)
    assert sorted(t.tag for t in puts) == list(range(100))  # type: ignore[type-var]
    assert {int(t.status[0]) for t in puts if t.status is not None} == {STORED}
    blocks.memory[:] = 0
    for i in range(100):
        peer.submit_get(keys[i : i + 1], blocks.slices[i : i + 1], tag=i)
    gets = collect(peer, 100)
    assert {int(t.status[0]) for t in gets if t.status is not None} == {HIT}
    assert np.array_equal(blocks.memory, blocks_of(keys))


def test_a_batch_that_is_refused_as_a_whole(peer: Peer) -> None:
    blocks = Blocks(peer, 2)
    with pytest.raises(LocalError):
        peer.submit_get(keys_of(3), blocks.slices)
    ticket = peer.submit_put(keys_of(3), blocks.slices)
    (done,) = collect(peer, 1)
    assert done is ticket
    assert isinstance(done.error, LocalError)
    assert done.status is None


def test_a_fault_of_the_batchs_own_ends_its_ticket(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(peer, 2)
    for part in (peer._gets, peer._requests):
        monkeypatch.setattr(part, "_route", lambda keys: 1 // 0)
    peer.submit_put(keys_of(2), blocks.slices)
    peer.submit_get(keys_of(2), blocks.slices)
    for ticket in collect(peer, 2):
        assert isinstance(ticket.error, MemKVError)
        assert "ZeroDivisionError" in str(ticket.error)


def test_tickets_with_no_time(peer: Peer) -> None:
    blocks = Blocks(peer, 2)
    peer.submit_get(keys_of(2), blocks.slices, timeout=0)
    (done,) = collect(peer, 1)
    assert done.status is not None
    assert count(done.status) == {Status.TIMEOUT: 2}


# --- the end ---


def test_closing_with_tickets_under_way(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 128), keys_of(128)
    blocks.memory[:] = blocks_of(keys)
    tickets = [peer.submit_put(keys[i : i + 16], blocks.slices[i : i + 16]) for i in range(0, 128, 16)]
    tickets += [peer.submit_get(keys[i : i + 16], blocks.slices[i : i + 16]) for i in range(0, 128, 16)]
    with within(10):
        peer.close()
    assert all(t.done for t in tickets)
    assert set(peer.reap()) == set(tickets)
    assert peer.reap() == []
    allowed = {HIT, MISS, STORED, EXISTS, Status.ERROR_LINK, Status.ERROR_UNREACHABLE}
    for ticket in tickets:
        assert ticket.error is None
        assert ticket.status is not None
        assert count(ticket.status).keys() <= allowed
    until(lambda: not node.node.sessions)
    assert stats_of(node)["extents_filling"] == 0


def test_closing_ends_what_is_awaited(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, max_channels=1)
    session = peer._links[0].session
    assert session is not None
    channel = session.pool.try_take()
    assert channel is not None
    blocks, keys = Blocks(peer, 4), keys_of(4)
    outcomes: list[Any] = []

    async def main() -> None:
        outcomes.append(count(await peer.aio.get_into(keys, blocks.slices, timeout=60)))

    waiter = threading.Thread(target=lambda: asyncio.run(main()))
    waiter.start()
    until(lambda: session.pool._waiting, what="the batch waits for a channel")
    with within(5):
        closer = threading.Thread(target=peer.close)
        closer.start()
        waiter.join(5)
        session.pool.give_back(channel)
        closer.join(5)
    assert outcomes == [{Status.ERROR_UNREACHABLE: 4}]


# --- what is done with a batch when it is over ---


def test_every_call_can_be_submitted(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 300), keys_of(300)
    blocks.memory[:] = blocks_of(keys)
    done: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
    few, slices = keys[:8], blocks.slices[:8]

    def outcome(ticket: Ticket) -> dict[Status, int]:
        assert done.get(timeout=20) is ticket
        assert ticket.done
        assert ticket.status is not None
        return count(ticket.status)

    then = done.put
    assert outcome(peer.submit_pin(few, 10, then=then)) == {MISS: 8}
    assert outcome(peer.submit_put(few, slices, then=then)) == {STORED: 8}
    assert outcome(peer.submit_exists(few, then=then)) == {HIT: 8}
    assert outcome(peer.submit_exists(keys, then=then)) == {HIT: 8, MISS: 292}  # more than one-sided READs
    assert outcome(peer.submit_pin(few, 10, then=then)) == {DONE: 8}
    assert outcome(peer.submit_unpin(few, then=then)) == {DONE: 8}
    assert outcome(peer.submit_get(few, slices, exact=True, then=then)) == {HIT: 8}
    assert outcome(peer.submit_delete(few, then=then)) == {DONE: 8}
    assert peer.reap() == []  # those with a place to go are not kept


def test_a_faulty_callback_harms_nobody_else(node: NodeThread, connect: Connect) -> None:
    peer, keys = connect(node), keys_of(2)

    def faulty(ticket: Ticket) -> None:
        raise RuntimeError("a fault in the application")

    peer.submit_exists(keys, then=faulty)
    peer.submit_exists(keys)
    assert [t.done for t in collect(peer, 1)] == [True]

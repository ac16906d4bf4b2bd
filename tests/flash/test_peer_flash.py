"""Peers of a node whose flash holds ten times what its memory does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memkv.status import Status
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from ..nodes import BLOCK, Blocks, Connect, NodeProcess, count, keys_of, stats_of, until
from .conftest import (
    ARENA,
    BATCH,
    IN_ARENA,
    clear_faults,
    fault,
    flash_of,
    get_all,
    in_batches,
    io_of,
    put_all,
    written,
)

pytest_plugins = "tests.nodes"
pytestmark = pytest.mark.asan

Start = Callable[..., NodeThread]
MANY = keys_of(10 * IN_ARENA, seed=77)
SOME = MANY[: 2 * IN_ARENA]


def test_a_working_set_of_ten_arenas(start: Start, connect: Connect) -> None:
    node = start()
    peer = connect(node)
    put_all(peer, MANY)
    assert (get_all(peer, MANY) == Status.HIT).all()
    order = np.random.default_rng(1).permutation(len(MANY))
    assert (get_all(peer, MANY[order]) == Status.HIT).all()
    assert (get_all(peer, MANY[order[:64]], checksum=True) == Status.HIT).all()
    assert peer.match(MANY) == len(MANY)
    stats = stats_of(node)
    assert stats["flash_blocks"] == len(MANY)
    assert stats["flash_evictions"] == 0
    assert flash_of(node)["dropped_corrupt"] == 0


@pytest.mark.parametrize("strict", [False, True])
def test_strict_readers_and_others_fetch_staged_blocks(start: Start, connect: Connect, strict: bool) -> None:
    node = start()
    put_all(connect(node), SOME)
    assert (get_all(connect(node, strict=strict), SOME) == Status.HIT).all()


def test_a_scan_of_flash_waits_for_no_quarantine(start: Start, connect: Connect) -> None:
    """With a grace period of a minute, an extent that others may know of is of no use again in this test."""
    third = 2 * IN_ARENA // 3
    for part in in_batches(MANY[: 4 * third], third):  # a restart leaves memory empty
        node = start(grace_ms=60_000)
        put_all(connect(node), part)
        written(node)
        node.stop()
    node = start(grace_ms=60_000)
    peer = connect(node)
    for _ in range(2):
        assert (get_all(peer, MANY[: 4 * third]) == Status.HIT).all()
    assert stats_of(node)["evictions"] >= 4 * third
    assert sum(n["cached"] for n in peer.stats()["nodes"].values()) == 0  # no place was kept for later


def test_what_is_in_flash_only_is_found(start: Start, connect: Connect) -> None:
    """By one-sided lookups and by message; and what is not held still ends a prefix."""
    node = start()
    peer = connect(node)
    put_all(peer, MANY)
    staged = flash_of(node)["staged_blocks"]
    assert peer.match(MANY) == len(MANY)
    assert peer.match(np.concatenate([MANY[:300], keys_of(1, seed=5), MANY[300:]])) == 300
    assert count(peer.exists(MANY[:200])) == {Status.HIT: 200}
    assert flash_of(node)["staged_blocks"] == staged  # nothing was fetched for that


def test_many_who_want_one_cold_block_share_a_read(start: Start, connect: Connect) -> None:
    node = start()
    put_all(connect(node), SOME)
    written(node)
    peers = [connect(node) for _ in range(6)]
    blocks = [Blocks(peer, 1) for peer in peers]
    fault(node, lib.MKV_FAULT_HELD, lib.MKV_IO_READ)  # so that all come while it is read
    reads, joined = io_of(node)["reads"], flash_of(node)["stage_joined"]
    results: list[int] = []
    asking = [threading.Thread(target=lambda b=b: results.append(int(b.get(SOME[:1])[0]))) for b in blocks]
    for thread in asking:
        thread.start()
    until(lambda: flash_of(node)["stage_joined"] - joined == len(peers) - 1, what="all of them wait")
    clear_faults(node)
    for thread in asking:
        thread.join()
    assert results == [Status.HIT] * len(peers)
    assert io_of(node)["reads"] == reads + 1


def test_what_was_announced_is_in_memory_when_it_is_wanted(start: Start, connect: Connect) -> None:
    node = start()
    peer = connect(node)
    put_all(peer, SOME)
    written(node)
    cold = SOME[:BATCH]
    assert count(peer.stage(cold)) == {Status.HIT: BATCH}
    reads = io_of(node)["reads"]
    assert (get_all(peer, cold) == Status.HIT).all()
    assert io_of(node)["reads"] == reads  # no device has been asked
    assert count(peer.stage(keys_of(3, seed=4))) == {Status.MISS: 3}


def test_announcing_without_waiting(start: Start, connect: Connect) -> None:
    node = start()
    peer = connect(node)
    put_all(peer, SOME)
    written(node)
    ticket = peer.submit_stage(SOME[:BATCH], tag="soon")
    until(lambda: ticket.done)
    assert ticket.status is not None
    assert count(ticket.status) == {Status.HIT: BATCH}
    blocks = Blocks(peer, BATCH)
    get = peer.submit_get(SOME[BATCH : 2 * BATCH], blocks.slices)
    until(lambda: get.done)
    assert get.status is not None
    assert count(get.status) == {Status.HIT: BATCH}


def test_durable_puts_say_what_became_of_them(start: Start, connect: Connect) -> None:
    node = start()
    peer = connect(node)
    blocks, keys = Blocks(peer, BATCH), SOME[:BATCH]
    assert count(blocks.put(keys, durability="flash")) == {Status.STORED: BATCH}
    assert flash_of(node)["dirty_blocks"] == 0
    assert count(blocks.put(keys, durability="flash")) == {Status.EXISTS: BATCH}
    fault(node, lib.MKV_FAULT_HELD, lib.MKV_IO_FLUSH)
    more = SOME[BATCH : 2 * BATCH]
    assert count(blocks.put(more, durability="flash", timeout=0.3)) == {Status.TIMEOUT: BATCH}
    assert count(blocks.get(more)) == {Status.HIT: BATCH}  # it is there, and not promised
    clear_faults(node)
    assert count(blocks.put(more, durability="flash")) == {Status.EXISTS: BATCH}


def test_puts_wait_for_a_slow_device_and_memory_stays_bounded(start: Start, connect: Connect) -> None:
    dirty = 1 << 20
    node = start(dirty_bytes=dirty)
    peer = connect(node)
    blocks = Blocks(peer, BATCH)
    fault(node, lib.MKV_FAULT_HELD, lib.MKV_IO_WRITE)
    seen, worst = [], 0
    for part in in_batches(SOME):
        seen += blocks.put(part, timeout=0.15).tolist()
        worst = max(worst, flash_of(node)["dirty_bytes"])
    assert Status.STORED in seen
    assert set(seen) <= {Status.STORED, Status.TIMEOUT, Status.ERROR_FULL}
    assert seen[-1] != Status.STORED
    assert worst <= dirty + BATCH * BLOCK
    clear_faults(node)
    written(node)
    stored = np.flatnonzero(np.array(seen) == Status.STORED)
    assert (get_all(peer, SOME[stored]) == Status.HIT).all()
    rest = np.flatnonzero(np.array(seen) != Status.STORED)
    for part in in_batches(SOME[rest]):
        assert set(blocks.put(part).tolist()) <= {Status.STORED, Status.EXISTS}


def test_pins_hold_in_flash(start: Start, connect: Connect, tmp_path: Path) -> None:
    node = start(flash=(f"{tmp_path / 'small'}:20M",))
    peer = connect(node)
    pinned = keys_of(20, seed=6)
    put_all(peer, pinned[:16])
    put_all(peer, pinned[16:])
    put_all(peer, MANY[:100])  # memory holds fewer: those to be pinned are in flash only
    assert count(peer.pin(pinned, 60)) == {Status.DONE: 20}
    put_all(peer, MANY[100:])  # twice what the file holds
    assert stats_of(node)["flash_evictions"] > 0
    assert (get_all(peer, pinned) == Status.HIT).all()
    assert (get_all(peer, MANY) == Status.MISS).any()
    assert count(peer.unpin(pinned)) == {Status.DONE: 20}


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_peer_outlives_its_node(
    start_process: Callable[..., NodeProcess], connect: Connect, tmp_path: Path, how: str
) -> None:
    node = start_process(flash=f"{tmp_path / 'flash'}:64M", **ARENA)
    peer = connect(node)
    put_all(peer, SOME, durability="flash")
    if how == "killed":
        node.kill()
    else:
        assert node.terminate() == 0
    blocks = Blocks(peer, BATCH)
    assert set(blocks.get(SOME[:BATCH], timeout=0.5).tolist()) <= {
        Status.ERROR_UNREACHABLE,
        Status.ERROR_LINK,
    }
    node.start()
    scanned = node.status()["flash"]["scan_total"]
    assert bool(scanned) == (how == "killed")
    until(lambda: count(blocks.get(SOME[:BATCH], timeout=2)) == {Status.HIT: BATCH}, 15, "it is back")
    assert (get_all(peer, SOME) == Status.HIT).all()
    assert node.status()["flash"]["recovered"] >= len(SOME)


def test_readers_of_extents_that_are_staged_into_again_and_again(start: Start, connect: Connect) -> None:
    """Memory of few blocks, all of them wanted all the time: what readers have cached is evicted and another
    block is staged into the very place under them. No mixture may pass.
    """
    node = start(memory=2 << 20, slab_bytes=1 << 20)
    put_all(connect(node), SOME)
    written(node)
    begun = time.monotonic()
    wrong: list[BaseException] = []
    hits = [0, 0, 0]

    def read(seed: int) -> None:
        blocks, rng = Blocks(connect(node), 4), np.random.default_rng(seed)
        try:
            while (took := time.monotonic() - begun) < 3.0 or (sum(hits) < 200 and took < 30.0):
                batch = SOME[rng.choice(len(SOME), 4, replace=False)]
                hits[seed] += int((blocks.get(batch) == Status.HIT).sum())
        except BaseException as exc:
            wrong.append(exc)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert not wrong, wrong[0]
    assert sum(hits) > 100
    assert flash_of(node)["staged_blocks"] > len(SOME)

"""Devices that fail under a node that serves: it goes on with what is left, and says so."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memkv.status import Status
from memkv.store.flash import tier as tier_module
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from ..nodes import Blocks, Connect, count, keys_of, until, within
from .conftest import BATCH, clear_faults, devices_of, fault, flash_of, get_all, health_of, put_all, written

pytest_plugins = "tests.nodes"
pytestmark = [pytest.mark.asan, pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)]

KEYS = keys_of(240, seed=88)
READ, WRITE = lib.MKV_IO_READ, lib.MKV_IO_WRITE
Two = Callable[..., NodeThread]


@pytest.fixture
def two(start: Callable[..., NodeThread], tmp_path: Path) -> Two:
    """A node over two files."""

    def make(**settings: object) -> NodeThread:
        return start(flash=(f"{tmp_path / 'a'}:32M", f"{tmp_path / 'b'}:32M"), **settings)

    return make


def is_out(node: NodeThread, device: int) -> bool:
    return bool(devices_of(node)[device]["failed"])


def test_a_read_error_costs_the_block_and_no_other(
    start: Callable[..., NodeThread], connect: Connect
) -> None:
    node = start()
    peer = connect(node)
    put_all(peer, KEYS)
    written(node)
    fault(node, lib.MKV_FAULT_ERROR, READ, error=-errno.EIO, times=1)
    status = get_all(peer, KEYS)
    bad = status != Status.HIT
    assert bad.sum() <= 1
    assert set(status[bad].tolist()) <= {Status.ERROR_DEVICE, Status.MISS}
    assert devices_of(node)[0]["read_errors"] == 1
    assert health_of(node) == (True, "serving")


def is_degraded(node: NodeThread) -> bool:
    ok, reason = health_of(node)
    return ok and reason.startswith("serving, degraded")


def test_a_wrong_bit_on_the_way_is_no_hit(start: Callable[..., NodeThread], connect: Connect) -> None:
    node = start()
    peer = connect(node)
    put_all(peer, KEYS)
    written(node)
    fault(node, lib.MKV_FAULT_FLIP, READ, times=3)
    status = get_all(peer, KEYS)  # every HIT is exact
    assert (status != Status.HIT).sum() == 3
    assert devices_of(node)[0]["corrupt"] == 3


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODEV, errno.ENOSPC], ids=["EIO", "gone", "full"])
def test_one_of_two_devices_refuses_writes(two: Two, connect: Connect, error: int) -> None:
    node = two()
    peer = connect(node)
    put_all(peer, KEYS[:64], durability="flash")
    fault(node, lib.MKV_FAULT_ERROR, WRITE, device=0, error=-error)
    put_all(peer, KEYS[64:160])
    until(lambda: is_out(node, 0), 20, "the device is taken out")
    until(lambda: is_degraded(node), what="it says so")
    assert flash_of(node)["devices_out"] == 1
    put_all(peer, KEYS[160:], durability="flash")  # on the other one
    assert (get_all(peer, KEYS[160:]) == Status.HIT).all()
    status = get_all(peer, KEYS)
    assert set(status.tolist()) <= {Status.HIT, Status.MISS, Status.ERROR_DEVICE}
    assert (status == Status.HIT).sum() > len(KEYS) // 2
    assert devices_of(node)[0]["write_errors"] > 0
    assert not is_out(node, 1)


def test_one_of_two_devices_is_gone(two: Two, connect: Connect) -> None:
    node = two()
    peer = connect(node)
    put_all(peer, KEYS)
    written(node)
    fault(node, lib.MKV_FAULT_ERROR, device=1, error=-errno.ENODEV)
    first = get_all(peer, KEYS)
    until(lambda: get_all(peer, KEYS) is not None and is_out(node, 1), 20, "the device is taken out")
    status = get_all(peer, KEYS)
    assert set(status.tolist()) <= {Status.HIT, Status.MISS, Status.ERROR_DEVICE}
    assert (status == Status.HIT).sum() >= len(KEYS) // 3
    assert (first == Status.HIT).sum() >= (status == Status.HIT).sum() // 2
    gone = KEYS[status != Status.HIT]
    for i in range(0, len(gone), BATCH):  # computed again, and kept where there is room
        assert set(Blocks(peer, BATCH).put(gone[i : i + BATCH]).tolist()) <= {Status.STORED, Status.EXISTS}
    assert count(peer.delete(KEYS[:20])).get(Status.TIMEOUT, 0) == 0


def test_a_device_that_hangs_is_taken_out(
    two: Two, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_module, "STUCK_SECONDS", 1)
    node = two()
    peer = connect(node)
    put_all(peer, KEYS)
    written(node)
    fault(node, lib.MKV_FAULT_HELD, READ, device=0)
    with within(15):
        status = get_all(peer, KEYS[:64], timeout=1.0)
    assert set(status.tolist()) <= {
        Status.HIT,
        Status.TIMEOUT,
        Status.ERROR_DEVICE,
        Status.MISS,
        Status.STALE,
    }
    until(lambda: is_out(node, 0), 10, "the device is taken out")
    assert "no answer" in health_of(node)[1]
    with within(15):
        status = get_all(peer, KEYS, timeout=2.0)
    assert (status == Status.HIT).sum() >= len(KEYS) // 3
    clear_faults(node)  # what it had under way ends, and does no harm
    again = get_all(peer, KEYS)
    assert set(np.unique(again).tolist()) <= {Status.HIT, Status.MISS, Status.ERROR_DEVICE}


def test_the_only_device_fails(start: Callable[..., NodeThread], connect: Connect) -> None:
    """What is left is a node with memory only."""
    node = start()
    peer = connect(node)
    put_all(peer, KEYS[:32], durability="flash")
    fault(node, lib.MKV_FAULT_ERROR, error=-errno.EIO)
    blocks = Blocks(peer, BATCH)
    status = blocks.put(KEYS[32:48], durability="flash", timeout=5)
    assert set(status.tolist()) <= {Status.ERROR_DEVICE, Status.TIMEOUT}
    until(lambda: is_out(node, 0) or blocks.put(keys_of(8, seed=99)) is None, 20, "the device is taken out")
    more = keys_of(BATCH, seed=98)
    assert set(blocks.put(more).tolist()) == {Status.STORED}
    assert (get_all(peer, more) == Status.HIT).all()
    until(lambda: is_degraded(node), what="it says so")
    assert set(blocks.put(KEYS[48:64], durability="flash", timeout=5).tolist()) == {Status.ERROR_DEVICE}

"""Blocks that a node has in flash only, got into GPU memory through slots (tests/gpus.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memkv.gpudirect.copier_host import HostDevice
from memkv.status import Status
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from ..gpus import SLOTS, GpuBlocks
from ..nodes import Connect, count, keys_of, until
from .conftest import IN_ARENA, clear_faults, fault, flash_of, io_of, put_all, written

pytest_plugins = ["tests.nodes", "tests.gpus"]
pytestmark = pytest.mark.asan

HIT, MISS, TIMEOUT = Status.HIT, Status.MISS, Status.TIMEOUT
Start = Callable[..., NodeThread]
SOME = keys_of(3 * IN_ARENA, seed=78)


@pytest.mark.parametrize("strict", [False, True])
def test_more_than_memory_holds(start: Start, connect: Connect, gpu: HostDevice, strict: bool) -> None:
    node = start()
    peer = connect(node, strict=strict, timeout=20, **SLOTS)
    put_all(peer, SOME)
    blocks = GpuBlocks(peer, len(SOME))
    assert count(blocks.get(SOME, checksum=True)) == {HIT: len(SOME)}
    assert flash_of(node)["staged_blocks"] > 0
    order = np.random.default_rng(2).permutation(len(SOME))
    wanted = SOME[order].copy()
    wanted[::3] = keys_of(len(wanted[::3]), seed=79)
    expected = np.where(np.arange(len(SOME)) % 3, HIT, MISS)
    assert blocks.get(wanted).tolist() == expected.tolist()


def test_a_flash_that_hangs_costs_those_who_want_what_is_in_it(
    start: Start, connect: Connect, gpu: HostDevice
) -> None:
    node = start()
    peer = connect(node, timeout=20, **SLOTS)
    put_all(peer, SOME)
    written(node)
    hot, cold = SOME[-IN_ARENA // 4 :], SOME[: IN_ARENA // 4]
    assert count(peer.pin(hot, 60)) == {Status.DONE: len(hot)}  # or they go for those that are brought
    blocks, others = GpuBlocks(peer, len(hot)), GpuBlocks(peer, len(cold))
    assert count(blocks.get(hot)) == {HIT: len(hot)}
    fault(node, lib.MKV_FAULT_HELD, lib.MKV_IO_READ)
    results: list[Any] = []
    call = threading.Thread(target=lambda: results.append(others.get(cold, timeout=20)))
    call.start()
    try:
        until(lambda: io_of(node)["under_way"], what="the device is asked")
        for _ in range(5):
            assert count(blocks.get(hot, timeout=5)) == {HIT: len(hot)}
        assert not results
    finally:
        clear_faults(node)
        call.join(30)
    assert count(results[0]) == {HIT: len(cold)}


def test_flash_that_is_too_late(start: Start, connect: Connect, gpu: HostDevice) -> None:
    node = start()
    peer = connect(node, **SLOTS)
    put_all(peer, SOME)
    written(node)
    blocks = GpuBlocks(peer, 8)
    fault(node, lib.MKV_FAULT_HELD, lib.MKV_IO_READ)
    assert count(blocks.get(SOME[:8], timeout=0.3)) == {TIMEOUT: 8}
    clear_faults(node)
    assert count(blocks.get(SOME[:8])) == {HIT: 8}

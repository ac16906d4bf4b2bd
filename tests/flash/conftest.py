"""What the tests of flash share: nodes over small files, and faults of their devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.peer import Peer
from memkv.status import Status
from memkv.store.native._store import ffi, lib
from memkv.store.node import NodeThread

from ..nodes import BLOCK, MIB, Blocks, StartNode, count, until

ARENA: dict[str, Any] = {"memory": 4 * MIB, "slab_bytes": 1 * MIB, "grace_ms": 100}
IN_ARENA = 4 * 15  # blocks that memory holds
BATCH = 16


def fault(
    node: NodeThread,
    kind: int,
    op: int = 0,
    *,
    device: int = 0,
    error: int = 0,
    times: int = 0,
    chance: int = 0,
) -> None:
    """Has the node's device go wrong from now on."""
    one = ffi.new("struct mkv_fault *")
    one.kind, one.op, one.device, one.error, one.times = kind, op, device, error, times
    assert node.node.flash is not None
    assert lib.mkv_flashio_fault(node.node.flash.store.io, one) == 0


def clear_faults(node: NodeThread) -> None:
    assert node.node.flash is not None
    lib.mkv_flashio_fault_clear(node.node.flash.store.io)


def flash_of(node: NodeThread) -> dict[str, Any]:
    """What the node says of its flash."""
    out: dict[str, Any] = node.call(node.node.status)["flash"]
    return out


def devices_of(node: NodeThread) -> list[dict[str, Any]]:
    return list(node.call(node.node.status)["flash_devices"].values())


def health_of(node: NodeThread) -> tuple[bool, str]:
    return node.call(node.node.health)


def io_of(node: NodeThread) -> dict[str, int]:
    """Figures of its I/O engine."""
    assert node.node.flash is not None
    out = ffi.new("struct mkv_flashio_stats *")
    lib.mkv_flashio_stats(node.node.flash.store.io, out)
    return {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct mkv_flashio_stats").fields}


def in_batches(keys: Any, n: int = BATCH) -> list[Any]:
    return [keys[i : i + n] for i in range(0, len(keys), n)]


def put_all(peer: Peer, keys: Any, **options: Any) -> None:
    """Puts all of them, as fast as flash takes them."""
    blocks = Blocks(peer, BATCH, BLOCK)
    for part in in_batches(keys):
        status = blocks.put(part, timeout=20, **options)
        assert count(status) == {Status.STORED: len(part)}
    blocks.buffer.close()


def get_all(peer: Peer, keys: Any, **options: Any) -> Any:
    """Statuses; every HIT is exact."""
    blocks = Blocks(peer, BATCH, BLOCK)
    status = np.concatenate([blocks.get(part, **options) for part in in_batches(keys)])
    blocks.buffer.close()
    return status


def written(node: NodeThread) -> None:
    """Waits until nothing is dirty."""
    until(lambda: not flash_of(node)["dirty_blocks"], 30, "everything written")


@pytest.fixture
def start(start_node: StartNode, tmp_path: Path) -> Callable[..., NodeThread]:
    """Starts a node with 4 MiB of memory over a file of 64 MiB."""

    def make(**settings: Any) -> NodeThread:
        return start_node(**(ARENA | {"flash": (f"{tmp_path / 'flash'}:64M",)} | settings))

    return make

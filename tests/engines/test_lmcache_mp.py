# ruff: noqa: E402  the engine first: without it the tests are skipped
"""The L2 adapter under LMCache's own storage manager: its L1, its store and prefetch controllers, a node."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from lmcache.v1.distributed.api import GroupedObjectKeys, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager

from memkv.store.node import NodeThread
from tests.nodes import MIB, NodeProcess, address_of, until

from .lmcache_l2 import LAYOUT, LONG, NBYTES, content_of, keys_of
from .test_lmcache_l2_faults import pins

pytest_plugins = "tests.nodes"


@contextmanager
def server(node: Any, fabric: str, shm_name: str = "", **spec: Any) -> Iterator[StorageManager]:
    """What LMCache's server makes of its command line: L1 memory, and the adapter behind it."""
    adapter = {
        "type": "plugin",
        "module_path": "memkv.connectors.lmcache_l2",
        "class_name": "MemKVL2Adapter",
        "adapter_params": {"nodes": address_of(node), "fabric": fabric, "get_timeout": 1.0},
    }
    args = argparse.Namespace(l2_adapter=[json.dumps(adapter | spec)])
    memory = L1MemoryManagerConfig(8 * MIB, use_lazy=False, shm_name=shm_name)
    config = StorageManagerConfig(
        L1ManagerConfig(memory),
        EvictionConfig(eviction_policy="LRU"),
        parse_args_to_l2_adapters_config(args),
    )
    manager = StorageManager(config)
    try:
        yield manager
    finally:
        manager.close()


def adapter_of(manager: StorageManager) -> Any:
    ((_, adapter),) = manager.l2_adapters()
    return adapter


def write(manager: StorageManager, keys: list[ObjectKey], seed: int) -> list[bytes]:
    """As an engine's store: into L1, from where the store controller takes it on."""
    objects = manager.reserve_write(keys, LAYOUT)
    assert set(objects) == set(keys)
    for i, key in enumerate(keys):
        content = torch.randint(0, 256, (NBYTES,), generator=torch.Generator().manual_seed(seed + i))
        objects[key].raw_tensor[:NBYTES] = content.to(torch.uint8)
    contents = [content_of(objects[key]) for key in keys]
    manager.finish_write(keys)
    return contents


def prefetch(
    manager: StorageManager, keys: list[ObjectKey], policy: Any = "prefix"
) -> tuple[list[bool], int]:
    """(which of the keys are in L1 now, how many of them came from L2)."""
    handle = manager.submit_prefetch_task(
        PrefetchTaskSpec([GroupedObjectKeys(keys, 0, LAYOUT)], fetching_policy=policy)
    )
    assert manager.wait_prefetch_status(handle, LONG)
    result = manager.query_prefetch_status(handle)
    assert result is not None
    return [result.hit_cells[0].test(i) for i in range(len(keys))], result.l2_hit_count


def read(manager: StorageManager, keys: list[ObjectKey]) -> list[bytes]:
    with manager.read_prefetched_results(keys) as objects:
        assert objects is not None
        contents = [content_of(obj) for obj in objects]
    manager.finish_read_prefetched(keys)
    return contents


def stored(manager: StorageManager, n: int) -> None:
    until(lambda: adapter_of(manager).get_usage().total_bytes_used == n * NBYTES, what="stored in L2")


@pytest.mark.parametrize("shm_name", ["", "lmcache_l1_pool_memkv_test"])
def test_one_server_prefetches_what_another_has_written(
    shm_name: str, node: NodeThread, fabric_name: str
) -> None:
    keys = keys_of(12)
    with server(node, fabric_name, shm_name) as manager:
        contents = write(manager, keys, seed=1)
        stored(manager, 12)
    with server(node, fabric_name, shm_name) as manager:
        assert prefetch(manager, keys) == ([True] * 12, 12)
        assert read(manager, keys) == contents
        (site,) = adapter_of(manager)._sites
        assert site._regions is not None
        assert len(site._regions) == 1  # L1, as it was described
        until(lambda: pins(node) == 0, what="the controller has unlocked")


@pytest.mark.parametrize("policy", ["prefix", "full"])
def test_a_hole_ends_a_prefix_and_nothing_else(policy: str, node: NodeThread, fabric_name: str) -> None:
    keys = keys_of(8)
    with server(node, fabric_name) as manager:
        contents = write(manager, [*keys[:3], *keys[4:]], seed=1)
        stored(manager, 7)
    with server(node, fabric_name) as manager:
        there = [i < 3 if policy == "prefix" else i != 3 for i in range(8)]
        assert prefetch(manager, keys, policy) == (there, sum(there))
        found = [key for key, t in zip(keys, there, strict=True) if t]
        assert read(manager, found) == contents[: len(found)]
        until(lambda: pins(node) == 0, what="also what it found and did not want is unlocked")


def test_another_model_hits_nothing(node: NodeThread, fabric_name: str) -> None:
    with server(node, fabric_name) as manager:
        write(manager, keys_of(4), seed=1)
        stored(manager, 4)
        assert prefetch(manager, keys_of(4, model_name="another")) == ([False] * 4, 0)


def test_lmcaches_quotas_delete_from_nodes(node: NodeThread, fabric_name: str) -> None:
    """Its eviction by users, which needs no capacity of the adapter's."""
    eviction = {"eviction_policy": "IsolatedLRU", "trigger_watermark": 0.5, "eviction_ratio": 0.5}
    with server(node, fabric_name, eviction=eviction) as manager:
        manager.quota_manager.set_quota("user", 4 * NBYTES)
        keys = keys_of(8, cache_salt="user")
        write(manager, keys, seed=1)
        usage = adapter_of(manager).get_usage
        until(lambda: 0 < usage().total_bytes_used <= 4 * NBYTES, 30, "evicted by LMCache")


def test_a_node_that_dies_is_a_miss_for_the_controllers(start_process: Any, fabric_name: str) -> None:
    process: NodeProcess = start_process()
    keys = keys_of(8)
    with server(process, fabric_name) as manager:
        write(manager, keys, seed=1)
        stored(manager, 8)
        manager.clear()
        process.kill()
        assert prefetch(manager, keys) == ([False] * 8, 0)
        write(manager, keys_of(4, seed=2), seed=2)
        assert prefetch(manager, keys_of(4, seed=2)) == ([True] * 4, 0)  # L1 has them
        status = manager.report_status()
        assert status["store_controller"]["thread_alive"]
        assert status["prefetch_controller"]["thread_alive"]

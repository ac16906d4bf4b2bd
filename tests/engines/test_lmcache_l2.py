# ruff: noqa: E402  the engine first: without it the tests are skipped
"""The L2 adapter as LMCache's factory loads it, against a node: bytes, bitmaps, and what may hit."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed: script/test --engines brings it")
torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")

from lmcache.v1.check.check_mode_test_l2_adapter import run_test_mode
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry

from memkv.connectors import lmcache_keys, lmcache_memory
from memkv.connectors.lmcache_l2 import MemKVL2Adapter, MemKVL2AdapterConfig
from memkv.peer import Peer
from memkv.rdma.errors import DeviceError
from memkv.store.node import NodeThread
from tests.nodes import REPOSITORY, address_of, until

from .lmcache_l2 import (
    DTYPE,
    LAYOUT,
    NBYTES,
    SHAPE,
    Arena,
    content_of,
    keys_of,
    load,
    load_adapter,
    lookup,
    same,
    store,
)

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


def test_what_is_stored_twice_is_copied_once(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys, written = adapt(node, desc=arena.desc), keys_of(4), arena.objects(4, seed=1)
    assert store(adapter, keys, written).bytes_transferred() == 4 * NBYTES
    again = store(adapter, keys, written)
    assert (again.is_successful(), again.bytes_transferred()) == (True, 0)
    assert adapter.get_usage().total_bytes_used == 4 * NBYTES


def test_batches_of_nothing(node: NodeThread, adapt: Adapt) -> None:
    adapter = adapt(node)
    assert store(adapter, [], []).is_successful()
    assert lookup(adapter, []) == []
    assert load(adapter, [], []) == []


def test_several_nodes(start_node: Any, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys = adapt(start_node(), start_node(), desc=arena.desc), keys_of(16)
    written, read = arena.objects(16, seed=1), arena.objects(16)
    assert store(adapter, keys, written).is_successful()
    assert lookup(adapter, keys) == [True] * 16
    assert load(adapter, keys, read) == [True] * 16
    assert same(read, written) == [True] * 16
    (kind,) = adapter.report_status()["kinds"]
    assert all(n["bytes"] for n in kind["nodes"].values())


def test_kinds_of_object_mixed_in_one_batch(node: NodeThread, adapt: Adapt) -> None:
    """Groups of layers of a hybrid model: each has its layout, a prefetch has keys of all."""
    small = MemoryLayoutDesc([torch.Size([1, 4, 16, 32]), torch.Size([1, 2, 16, 8])], [DTYPE, torch.float32])
    layouts = {0: LAYOUT, 1: small}
    arena = Arena()
    adapter = adapt(node, desc=arena.desc)
    keys, written, read = [], [], []
    for group, layout in layouts.items():
        some, objects = keys_of(4, object_group_id=group), arena.objects(4, layout, seed=group)
        assert store(adapter, some, objects).is_successful()
        keys, written = keys + some, written + objects
        read += arena.objects(4, layout)
    task = adapter.submit_lookup_and_lock_task(keys, layouts)
    bitmap = until(lambda: adapter.query_lookup_and_lock_result(task))
    assert bitmap.popcount() == 8
    assert load(adapter, keys, read) == [True] * 8
    assert same(read, written) == [True] * 8


# --- what may hit ---


def test_another_server_finds_what_one_has_stored(node: NodeThread, adapt: Adapt) -> None:
    here, there = Arena(), Arena()
    keys, written, read = keys_of(4), here.objects(4, seed=1), there.objects(4)
    assert store(adapt(node, desc=here.desc), keys, written).is_successful()
    other = adapt(node, desc=there.desc)
    assert lookup(other, keys) == [True] * 4
    assert load(other, keys, read) == [True] * 4
    assert same(read, written) == [True] * 4


RANK = ObjectKey.ComputeKVRank
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {  # of the key, of the settings, layout
    "model": ({"model_name": "meta-llama/Llama-3.1-8B-Instruct"}, {}, LAYOUT),
    "rank": ({"kv_rank": RANK(2, 0, 2, 0)}, {}, LAYOUT),
    "size of the world": ({"kv_rank": RANK(4, 1, 4, 1)}, {}, LAYOUT),
    "ranks of a host": ({"kv_rank": RANK(2, 1, 1, 0)}, {}, LAYOUT),
    "object group": ({"object_group_id": 1}, {}, LAYOUT),
    "cache salt": ({"cache_salt": "user"}, {}, LAYOUT),
    "dtype": ({}, {}, MemoryLayoutDesc([SHAPE], [torch.float16])),
    "chunk size": ({}, {}, MemoryLayoutDesc([torch.Size([2, 4, 32, 64])], [DTYPE])),
    "shape of as many bytes": ({}, {}, MemoryLayoutDesc([torch.Size([2, 4, 32, 32])], [DTYPE])),
    "groups of as many bytes": ({}, {}, MemoryLayoutDesc([torch.Size([1, 4, 16, 64])] * 2, [DTYPE] * 2)),
    "salt": ({}, {"salt": "a"}, LAYOUT),
    "namespace": ({}, {"namespace": "a"}, LAYOUT),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_configuration_does_not_hit(what: str, node: NodeThread, adapt: Adapt) -> None:
    fields, params, layout = DIFFERENT[what]
    arena = Arena()
    assert store(adapt(node, desc=arena.desc), keys_of(4), arena.objects(4, seed=1)).is_successful()
    other, keys, read = adapt(node, desc=arena.desc, **params), keys_of(4, **fields), arena.objects(4, layout)
    assert lookup(other, keys, layout) == [False] * 4
    assert load(other, keys, read) == [False] * 4
    assert not any(b"".join(map(content_of, read)))


def test_another_release_of_lmcache_does_not_hit(
    node: NodeThread, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, keys = Arena(), keys_of(4)
    assert store(adapt(node, desc=arena.desc), keys, arena.objects(4, seed=1)).is_successful()
    monkeypatch.setattr(lmcache_keys, "version", lambda name: "0.5.7")
    assert lookup(adapt(node, desc=arena.desc), keys) == [False] * 4


def test_keys_are_the_same_in_every_process() -> None:
    """Whatever PYTHONHASHSEED is: nothing here hashes with Python's hash."""
    program = """
import torch
from lmcache.v1.distributed.api import ObjectKey
from memkv.connectors.lmcache_keys import identity_of, layout_of, object_digest
layout = layout_of([torch.Size([2, 4, 16, 64])], [torch.bfloat16])
key = ObjectKey(bytes(32), "meta-llama/Llama-3.1-8B", 0x2010201, 1, "salt")
identity = identity_of("mp", key.model_name, layout, "", {})
print(identity.namespace(layout.nbytes), identity.keys([object_digest(key)]).tobytes().hex())
"""
    out = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert out[0] == out[1]
    assert len(out[0].split()[-1]) == 32


# --- the interface ---


def test_event_fds_are_three(node: NodeThread, adapt: Adapt) -> None:
    two = adapt(node), adapt(node)
    fds = {
        fd
        for a in two
        for fd in (a.get_store_event_fd(), a.get_lookup_and_lock_event_fd(), a.get_load_event_fd())
    }
    assert len(fds) == 6


def test_lmcaches_own_check_of_adapters(node: NodeThread, fabric_name: str, capsys: Any) -> None:
    spec = {
        "type": "plugin",
        "module_path": "memkv.connectors.lmcache_l2",
        "class_name": "MemKVL2Adapter",
        "adapter_params": {"nodes": address_of(node), "fabric": fabric_name},
    }
    asyncio.run(run_test_mode("model", l2_adapter=[json.dumps(spec)], num_keys=4, obj_size=4096))
    out = capsys.readouterr().out
    assert out.count("4/4 |     100.0%") == 4, out


@pytest.mark.parametrize(
    ("params", "knob"),
    [
        ({}, "nodes"),
        ({"nodes": "127.0.0.1:1", "get_timout": 1}, "get_timout"),
        ({"nodes": "127.0.0.1:1", "lock_ttl": "long"}, "lock_ttl"),
        ({"nodes": "127.0.0.1:1", "lock_ttl": 0}, "lock_ttl"),
        ({"nodes": "127.0.0.1:1", "serde": {"type": "fp8"}}, "serde"),
    ],
)
def test_settings_that_cannot_be_meant(
    params: dict[str, Any], knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMKV_NODES", raising=False)
    spec = {"type": "plugin", "module_path": "memkv.connectors.lmcache_l2", "class_name": "MemKVL2Adapter"}
    args = argparse.Namespace(l2_adapter=[json.dumps(spec | {"adapter_params": params})])
    (config,) = parse_args_to_l2_adapters_config(args).adapters
    with pytest.raises(ValueError, match=knob):
        create_l2_adapter_from_registry(config)


def test_nodes_from_the_environment(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKV_NODES", address_of(node))
    assert MemKVL2AdapterConfig.from_dict({}).settings.nodes == (address_of(node),)


class Listener(L2AdapterListener):
    """What the adapter tells of."""

    def __init__(self) -> None:
        self.stored: list[tuple[ObjectKey, int]] = []
        self.accessed: list[ObjectKey] = []
        self.deleted: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


def test_listeners_usage_and_deletion(node: NodeThread, adapt: Adapt) -> None:
    arena, listener = Arena(), Listener()
    adapter, keys = adapt(node, desc=arena.desc), keys_of(4, cache_salt="user")
    adapter.register_listener(listener)
    store(adapter, keys, arena.objects(4, seed=1))
    load(adapter, [*keys, *keys_of(1, seed=9)], arena.objects(5))
    assert listener.stored == [(key, NBYTES) for key in keys]
    assert listener.accessed == keys
    assert adapter.get_usage().bytes_by_cache_salt == {"user": 4 * NBYTES}
    adapter.delete([*keys[:2], *keys_of(1, seed=9)])
    until(lambda: len(listener.deleted) == 2, what="told of deletions")
    assert listener.deleted == keys[:2]
    assert adapter.get_usage().total_bytes_used == 2 * NBYTES
    assert lookup(adapter, keys) == [False, False, True, True]
    with pytest.raises(NotImplementedError, match="digests"):
        adapter.list_l2_keys()


def test_two_threads_at_once(node: NodeThread, adapt: Adapt) -> None:
    """As LMCache's two controllers: one stores, one looks up, loads and unlocks."""
    arena = Arena(160 * NBYTES)
    adapter, rounds = adapt(node, desc=arena.desc), 20
    batches = [(keys_of(3, seed), arena.objects(3, seed=seed)) for seed in range(rounds)]
    read = arena.objects(3)
    wrong: list[Any] = []

    def storing() -> None:
        for keys, objects in batches:
            if not store(adapter, keys, objects).is_successful():
                wrong.append("store")

    def loading() -> None:
        for _ in range(3):
            for keys, objects in batches:
                found = lookup(adapter, keys)
                loaded = load(adapter, keys, read)
                equal = same(read, objects)
                if any(f and not d for f, d in zip(found, loaded, strict=True)):
                    wrong.append("locked, and lost")
                if any(d and not e for d, e in zip(loaded, equal, strict=True)):
                    wrong.append("wrong bytes")
                adapter.submit_unlock(keys)

    threads = [threading.Thread(target=storing), threading.Thread(target=loading)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    for keys, objects in batches:
        assert load(adapter, keys, read) == [True] * 3
        assert same(read, objects) == [True] * 3


# --- memory ---


def regions(adapter: MemKVL2Adapter) -> int:
    (site,) = adapter._sites
    assert site._regions is not None
    return len(site._regions)


def test_an_arena_that_is_described_is_registered_once(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter = adapt(node, desc=arena.desc)
    for seed in range(3):
        assert store(adapter, keys_of(4, seed), arena.objects(4, seed=seed)).is_successful()
    assert regions(adapter) == 1


def test_an_arena_that_is_not_described_is_found(node: NodeThread, adapt: Adapt) -> None:
    one, two = Arena(), Arena()
    adapter = adapt(node)
    for seed in range(3):
        keys, written = keys_of(4, seed), one.objects(2, seed=seed) + two.objects(2, seed=seed + 10)
        read = two.objects(2) + one.objects(2)
        assert store(adapter, keys, written).is_successful()
        assert load(adapter, keys, read) == [True] * 4
        assert same(read, written) == [True] * 4
    assert regions(adapter) == 2


@pytest.mark.parametrize("bounce", [64 << 20, NBYTES])
def test_what_cannot_be_registered_is_copied_through(
    bounce: int, node: NodeThread, adapt: Adapt, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """As a memlock limit would have it: the arena is refused, a little memory is not."""
    arena, register = Arena(), Peer.register

    def limited(peer: Peer, buffer: Any) -> Any:
        if isinstance(buffer, tuple):
            raise DeviceError("the memlock limit is 8 MiB", 12, "ulimit -l unlimited")
        return register(peer, buffer)

    monkeypatch.setattr(Peer, "register", limited)
    monkeypatch.setattr(lmcache_memory, "BOUNCE_BYTES", bounce)
    adapter, keys = adapt(node, desc=arena.desc), keys_of(5)
    written, read = arena.objects(4, seed=1), arena.objects(5)
    assert store(adapter, keys[:4], written).is_successful()
    assert load(adapter, keys, read) == [True] * 4 + [False]
    assert same(read[:4], written) == [True] * 4
    assert regions(adapter) == 0
    assert caplog.text.count("ulimit") == 1


def test_objects_of_a_serde_are_not_found_and_it_is_said(node: NodeThread, adapt: Adapt, caplog: Any) -> None:
    arena = Arena()
    adapter, keys = adapt(node, desc=arena.desc), keys_of(2)
    assert lookup(adapter, keys) == [False] * 2
    serialized = MemoryLayoutDesc([torch.Size([NBYTES // 2])], [torch.uint8])
    store(adapter, keys, arena.objects(2, serialized, seed=1))
    assert lookup(adapter, keys) == [False] * 2
    assert '"serde"' in caplog.text


def test_an_object_that_was_narrowed_is_not_stored(node: NodeThread, adapt: Adapt) -> None:
    arena = Arena()
    adapter, keys, objects = adapt(node, desc=arena.desc), keys_of(2), arena.objects(2, seed=1)
    objects[1].set_used_size(NBYTES // 2)
    assert not store(adapter, keys, objects).is_successful()
    assert lookup(adapter, keys) == [True, False]

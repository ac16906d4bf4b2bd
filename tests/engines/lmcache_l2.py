"""For tests of the L2 adapter: an arena with objects in it, the adapter as LMCache loads it, and what its
controllers do with it.
"""

from __future__ import annotations

import argparse
import json
import select
from typing import Any

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_allocators.tensor_memory_allocator import TensorMemoryAllocator
from lmcache.v1.platform import consume_fd

from memkv.connectors.lmcache_l2 import MemKVL2Adapter
from tests.nodes import address_of

MODEL = "meta-llama/Llama-3.1-8B"
SHAPE = torch.Size([2, 4, 16, 64])  # 16 tokens
DTYPE = torch.bfloat16
LAYOUT = MemoryLayoutDesc([SHAPE], [DTYPE])
NBYTES = SHAPE.numel() * DTYPE.itemsize
LONG = 20.0  # seconds: nothing takes that long


def keys_of(n: int, seed: int = 0, **fields: Any) -> list[ObjectKey]:
    """n keys of one sequence; those of two seeds differ."""
    rng = np.random.default_rng([seed, 7])
    fields = {"model_name": MODEL, "kv_rank": ObjectKey.ComputeKVRank(2, 1, 2, 1)} | fields
    return [ObjectKey(chunk_hash=rng.bytes(32), **fields) for _ in range(n)]


class Arena:
    """LMCache's L1 memory and objects in it."""

    def __init__(self, nbytes: int = 64 * NBYTES) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.allocator = TensorMemoryAllocator(self.memory)
        self.desc = L1MemoryDesc(self.memory.data_ptr(), nbytes, 4096)

    def objects(self, n: int, layout: MemoryLayoutDesc = LAYOUT, seed: int | None = None) -> list[Any]:
        """n objects: random bytes, or zeros without a seed."""
        objects = self.allocator.batched_allocate(layout.shapes, layout.dtypes, n)
        assert objects is not None, "the test's arena is too small"
        for i, obj in enumerate(objects):
            rng = np.random.default_rng([seed or 0, i])
            size = obj.get_size()
            content = np.zeros(size, np.uint8) if seed is None else rng.integers(0, 256, size, np.uint8)
            obj.raw_tensor[:size] = torch.from_numpy(content)
            obj.parent_allocator = None  # they go with the arena
        return list(objects)


def content_of(obj: Any) -> bytes:
    return bytes(obj.raw_tensor[: obj.get_size()].numpy())


def same(one: list[Any], other: list[Any]) -> list[bool]:
    """Object by object, whether every byte is the same."""
    return [content_of(a) == content_of(b) for a, b in zip(one, other, strict=True)]


def load_adapter(*nodes: Any, desc: L1MemoryDesc | None = None, **params: Any) -> MemKVL2Adapter:
    """By LMCache's command line, parser and factory."""
    spec = {
        "type": "plugin",
        "module_path": "memkv.connectors.lmcache_l2",
        "class_name": "MemKVL2Adapter",
        "adapter_params": {"nodes": ",".join(map(address_of, nodes))} | params,
    }
    args = argparse.Namespace(l2_adapter=[json.dumps(spec)])
    (config,) = parse_args_to_l2_adapters_config(args).adapters
    adapter = create_l2_adapter(config, desc)
    assert isinstance(adapter, MemKVL2Adapter)
    return adapter


# --- what the controllers do: submit, sleep in poll until the fd is readable, ask ---


def wait_for(fd: int, ask: Any) -> Any:
    """The first thing that ``ask()`` answers after the fd said that there is something to ask for."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while True:
        assert poller.poll(LONG * 1000), "the event fd was not signalled"
        consume_fd(fd)
        if (answer := ask()) is not None:
            return answer


def store(adapter: Any, keys: list[ObjectKey], objects: list[Any]) -> L2StoreResult:
    task = adapter.submit_store_task(keys, objects)
    result: L2StoreResult = wait_for(
        adapter.get_store_event_fd(), lambda: adapter.pop_completed_store_tasks().get(task)
    )
    return result


def lookup(adapter: Any, keys: list[ObjectKey], layout: MemoryLayoutDesc = LAYOUT) -> list[bool]:
    groups = {key.object_group_id: layout for key in keys}
    task = adapter.submit_lookup_and_lock_task(keys, groups)
    fd = adapter.get_lookup_and_lock_event_fd()
    bitmap = wait_for(fd, lambda: adapter.query_lookup_and_lock_result(task))
    assert adapter.query_lookup_and_lock_result(task) is None, "an answer is given once"
    return [bitmap.test(i) for i in range(len(keys))]


def load(adapter: Any, keys: list[ObjectKey], objects: list[Any]) -> list[bool]:
    task = adapter.submit_load_task(keys, objects)
    bitmap = wait_for(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    assert adapter.query_load_result(task) is None, "an answer is given once"
    return [bitmap.test(i) for i in range(len(keys))]

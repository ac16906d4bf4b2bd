"""SGLang's own cache controller, its queues and storage threads, over memkv, with nothing replaced."""

# ruff: noqa: E402 - the engine is imported where it is known to be there

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from memkv.rdma.errors import MemKVError
from memkv.store.node import NodeThread

from ..nodes import MIB, REPOSITORY, NodeProcess, StartNode, until

pytest_plugins = "tests.nodes"

torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
host = pytest.importorskip(
    "tests.engines.sglang_host", reason="sglang is not installed: script/test --engines brings it"
)

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

SECONDS = 30


@pytest.fixture
def node(start_node: StartNode) -> NodeThread:
    return start_node(memory=64 * MIB)


def prompt(pages: int, seed: int = 0, page: int = host.PAGE) -> RadixKey:
    return RadixKey(array("q", range(1000 * seed, 1000 * seed + pages * page)))


def backup(controller: Any, key: RadixKey, slots: Any, **more: Any) -> int:
    """Has pages written to storage: how many tokens of them the backup thread says it kept."""
    names = get_storage_hash_str(key, None, page_size=controller.page_size)
    controller.write_storage(slots, key, names, **more)
    kept: int = controller.ack_backup_queue.get(timeout=SECONDS).completed_tokens
    return kept


def query(controller: Any, key: RadixKey, **more: Any) -> Any:
    """Has the prefetch thread ask how much of a prompt is held: the operation, as the scheduler gets it."""
    controller.prefetch(CacheRequestHandle("request", 0), key, **more)
    return controller.prefetch_hit_queue.get(timeout=SECONDS)


def fetch(controller: Any, operation: Any, slots: Any) -> int:
    """Has the I/O thread fetch what was found into these slots, as the scheduler does: tokens that came."""
    operation.host_indices = slots
    controller.prefetch_buffer.put(operation)
    tokens = 0
    while True:
        ack = controller.ack_prefetch_queue.get(timeout=SECONDS)
        if ack.completed_tokens is not None:
            tokens = ack.completed_tokens
        if ack.completed_req:
            return tokens


def threads_live(controller: Any) -> bool:
    return all(
        thread.is_alive()
        for thread in (
            controller.prefetch_thread,
            controller.prefetch_io_aux_thread,
            controller.prefetch_sync_thread,
            controller.backup_thread,
        )
    )


# --- backup, prefetch ---


@pytest.mark.parametrize("interface_v1", [1, 0], ids=["zero copy", "by copy"])
@pytest.mark.parametrize("layout", host.LAYOUTS)
def test_what_was_backed_up_is_prefetched_byte_for_byte(
    node: NodeThread, layout: str, interface_v1: int
) -> None:
    extra = host.extra_config(node, interface_v1=interface_v1)
    ours, theirs = host.mha_pool(layout), host.mha_pool(layout)
    host.fill(ours, 1)
    key, longer = prompt(6), prompt(8)
    slots, into = host.slots(ours, [7, 2, 9, 4, 0, 11]), host.slots(theirs, [1, 3, 5, 8, 6, 10])
    with host.controller(ours, dict(extra)) as first:
        assert (first.page_get_func == first._page_get_zero_copy) == bool(interface_v1)
        assert backup(first, key, slots) == 6 * host.PAGE
    with host.controller(theirs, dict(extra)) as second:
        found = query(second, longer)
        assert found.storage_hit_count == 6 * host.PAGE
        assert fetch(second, found, into) == 6 * host.PAGE
        assert query(second, prompt(6, seed=1)).storage_hit_count == 0
    assert host.pages_at(theirs, into) == host.pages_at(ours, slots)


def test_more_pages_than_one_batch(node: NodeThread) -> None:
    """The controller cuts at 128 pages."""
    ours, theirs = host.mha_pool(page=1), host.mha_pool(page=1)
    host.fill(ours, 1)
    key = RadixKey(array("q", range(129)))
    slots = host.slots(ours, list(range(128, -1, -1)))
    with host.controller(ours, host.extra_config(node)) as first:
        assert backup(first, key, slots) == 129
    with host.controller(theirs, host.extra_config(node)) as second:
        found = query(second, key)
        assert found.storage_hit_count == 129
        assert fetch(second, found, host.slots(theirs, list(range(129)))) == 129
    assert host.pages_at(theirs, host.slots(theirs, list(range(129)))) == host.pages_at(ours, slots)


def test_other_adapters_and_tenants_have_other_hashes(node: NodeThread) -> None:
    """SGLang's, which memkv relies on: LoRA and cache salt are in the chain that the hashes stand for."""
    pool = host.mha_pool()
    tokens = array("q", range(8))
    with host.controller(pool, host.extra_config(node)) as made:
        assert backup(made, RadixKey(tokens), host.slots(pool, [0, 1])) == 8
        assert query(made, RadixKey(tokens)).storage_hit_count == 8
        assert query(made, RadixKey(tokens, extra_key="lora-1")).storage_hit_count == 0
        assert query(made, RadixKey(tokens, cache_salt="tenant")).storage_hit_count == 0


def test_one_rank_writes_latents_and_all_read_them(node: NodeThread) -> None:
    ours, theirs = host.mla_pool(), host.mla_pool()
    host.fill(ours, 1)
    key, slots = prompt(3), host.slots(ours, [2, 1, 0])
    with host.controller(theirs, host.extra_config(node), tp_rank=1, tp_size=2) as reader:
        assert reader.backup_skip
        assert backup(reader, key, slots) == 0
        assert query(reader, key).storage_hit_count == 0
        with host.controller(ours, host.extra_config(node), tp_rank=0, tp_size=2) as writer:
            assert backup(writer, key, slots) == 12
        assert fetch(reader, query(reader, key), slots) == 12
    assert host.pages_at(theirs, slots) == host.pages_at(ours, slots)


def test_another_process_has_the_same_keys(node: NodeThread) -> None:
    pool = host.mha_pool()
    host.fill(pool, 1)
    slots = host.slots(pool, [3, 2, 1])
    with host.controller(pool, host.extra_config(node)) as made:
        assert backup(made, prompt(3), slots) == 12
    program = """
import hashlib, json, sys
from tests.engines import sglang_host as host
from tests.engines.test_sglang_controller import fetch, prompt, query
pool = host.mha_pool()
slots = host.slots(pool, [5, 6, 7])
with host.controller(pool, json.loads(sys.argv[1])) as made:
    assert fetch(made, query(made, prompt(3)), slots) == 12
print(hashlib.sha256(b"".join(host.pages_at(pool, slots))).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(host.extra_config(node))],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    want = hashlib.sha256(b"".join(host.pages_at(pool, slots))).hexdigest()
    assert done.stdout.split()[-1] == want


# --- nodes that go ---


def test_no_node_at_the_start_is_an_error_that_names_it() -> None:
    extra = host.extra_config(("127.0.0.1", 1), connect_timeout=1.0, fabric="tcp")
    before = threading.active_count()
    with pytest.raises(MemKVError, match=r"127\.0\.0\.1:1"), host.controller(host.mha_pool(), extra):
        pass
    until(lambda: threading.active_count() <= before, what="no thread is left")


def test_threads_outlive_a_node_that_is_killed(start_process: Callable[..., NodeProcess]) -> None:
    node = start_process(memory=16 * MIB)
    pool = host.mha_pool()
    host.fill(pool, 1)
    key, slots = prompt(3), host.slots(pool, [0, 1, 2])
    extra = host.extra_config(node, get_timeout=0.5, put_timeout=0.5)
    with host.controller(pool, extra) as made:
        assert backup(made, key, slots) == 12
        found = query(made, key)
        assert found.storage_hit_count == 12
        node.kill()  # between the query and the fetch
        assert fetch(made, found, host.slots(pool, [5, 6, 7])) == 0
        assert query(made, key).storage_hit_count == 0
        assert backup(made, key, slots) == 0
        assert threads_live(made)
        node.start()
        until(lambda: backup(made, key, slots) == 12, SECONDS, "the node taken again")
        assert fetch(made, query(made, key), host.slots(pool, [5, 6, 7])) == 12
    assert host.pages_at(pool, host.slots(pool, [5, 6, 7])) == host.pages_at(pool, slots)


# --- hybrid models ---


def test_states_come_back_with_the_prefix_that_they_end(node: NodeThread) -> None:
    ours, theirs = (host.mha_pool(), host.mamba_pool()), (host.mha_pool(), host.mamba_pool())
    for pool in ours:
        host.fill(pool, 1)
    key = prompt(4)
    names = get_storage_hash_str(key, None, page_size=host.PAGE)
    slots, state = host.slots(ours[0], [3, 1, 2, 0]), torch.tensor([5])

    def transfer(*, slots: Any, keys: list[str] | None) -> PoolTransfer:
        return PoolTransfer(
            PoolName.MAMBA, host_indices=slots, keys=keys, hit_policy=PoolHitPolicy.TRAILING_PAGES
        )

    with host.controller(ours[0], host.extra_config(node), sides={PoolName.MAMBA: ours[1]}) as first:
        kept = backup(first, key, slots, extra_pools=[transfer(slots=state, keys=names[2:3])])
        assert kept == 16
    with host.controller(theirs[0], host.extra_config(node), sides={PoolName.MAMBA: theirs[1]}) as second:
        found = query(second, key, extra_pools=[transfer(slots=torch.tensor([9]), keys=[""])])
        assert found.storage_hit_count == 12  # the state after the third page
        assert fetch(second, found, host.slots(theirs[0], [0, 1, 2])) == 12
    assert host.pages_at(theirs[0], host.slots(theirs[0], [0, 1, 2])) == host.pages_at(ours[0], slots)[:3]
    assert host.page_bytes(theirs[1], 9) == host.page_bytes(ours[1], 5)

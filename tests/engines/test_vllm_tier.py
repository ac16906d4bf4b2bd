"""The memkv tier below vLLM's tier of host memory: vLLM's tiering manager drives it, on a real node."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memkv.rdma.errors import LocalError, MemKVError
from memkv.status import Status
from memkv.store.node import NodeThread
from tests.nodes import NodeProcess, StartNode, address_of, until

pytest.importorskip("vllm", reason="vllm is not installed: script/test --engines brings it")

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    TierFilter,
    TierMatcher,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from memkv.connectors import vllm_plugin
from memkv.connectors.vllm_tier import MemKVTier

pytest_plugins = "tests.nodes"

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
PENDING = LookupResult.HIT_PENDING
ROW = 8192  # bytes of a chunk of the host tier
PATIENT = {"get_timeout": 20, "put_timeout": 20}  # on a loaded machine, too
QUICK = {"get_timeout": 0.3, "put_timeout": 0.3}

CONFIG = OffloadingConfig(
    groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("model.layers.0",), group_id=0),),
    worker_kv_bytes_per_block=ROW // 2,
    enable_kv_cache_events=False,
    extra_config={},
    engine_id="",
    model=OffloadingModelConfig(name="a/model", dtype="float16"),
    cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
    parallel=OffloadingParallelConfig(
        rank=0,
        world_size=2,
        tp_size=2,
        pp_size=1,
        pcp_size=1,
        dcp_size=1,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
        is_parallelism_agnostic=True,
    ),
    kv_cache_layout="LBHNC",
)


class Offload:
    """vLLM's TieringOffloadingManager with a memkv tier, and what its connector would do with it."""

    def __init__(self, tier: dict[str, Any], config: Any = CONFIG, rows: int = 8) -> None:
        extra = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": rows * ROW,
            "secondary_tiers": [tier],
        }
        config = replace(config, engine_id=f"memkv-test-{uuid.uuid4()}", extra_config=extra)
        self.spec = OffloadingSpecFactory.create_spec(config)
        self.manager = self.spec.get_manager()
        (self.tier,) = self.manager.secondary_tiers
        view = self.manager.primary_tier.get_kv_memoryview()
        self.rows = np.asarray(view)
        self._numbers = itertools.count()

    def request(self) -> ReqContext:
        context = ReqContext(req_id=f"r{next(self._numbers)}")
        self.manager.on_new_request(context)
        return context

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))

    def settle(self) -> None:
        def idle() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        until(idle, what="no job under way")

    def store(self, keys: Sequence[bytes]) -> None:
        """A request whose blocks come from the GPU."""
        context = self.request()
        out = self.manager.prepare_store(keys, context)
        assert out is not None
        for key, row in zip(out.keys_to_store, out.store_spec.chunk_ids, strict=True):
            self.rows[row] = bytes_of(key)
        if out.keys_to_store:
            self.manager.complete_store(out.keys_to_store, context)
        self.manager.on_request_finished(context)

    def forget(self) -> None:
        """Nothing is left in the host tier."""
        self.manager.reset_cache()
        self.manager.on_reset_flushed()
        self.rows[:] = 0

    def lookup(self, keys: Sequence[bytes], context: ReqContext) -> list[LookupResult]:
        """As often as it takes until each is a hit or a miss."""
        seen: list[LookupResult] = []

        def decided() -> bool:
            seen[:] = [self.manager.lookup(key, context) for key in keys]
            self.step()
            return all(result in (HIT, MISS) for result in seen)

        until(decided, what="hit or miss")
        return seen

    def load(self, keys: Sequence[bytes]) -> int:
        """A request that looks its prefix up and takes it to the GPU. How many blocks: each is right."""
        context = self.request()
        seen = self.lookup(keys, context)
        held = keys[: next((i for i, result in enumerate(seen) if result is MISS), len(seen))]
        if held:
            rows = self.manager.prepare_load(held, context).chunk_ids
            for key, row in zip(held, rows, strict=True):
                assert np.array_equal(self.rows[row], bytes_of(key))
            self.manager.complete_load(held, context)
        self.manager.on_request_finished(context)
        return len(held)

    def close(self) -> None:
        del self.rows  # of a view that vLLM releases
        self.manager.shutdown()


@pytest.fixture
def fabric_name() -> str:
    return "tcp"


@pytest.fixture(autouse=True)
def plugin() -> None:
    vllm_plugin.register()


@pytest.fixture
def offload() -> Iterator[Callable[..., Offload]]:
    with ExitStack() as stack:

        def start(node: Any, *, config: Any = CONFIG, rows: int = 8, **settings: Any) -> Offload:
            tier = {"type": "memkv", "nodes": address_of(node), "fabric": "tcp"} | PATIENT | settings
            out = Offload(tier, config, rows)
            stack.callback(out.close)
            return out

        yield start


def keys_of(n: int, seed: int = 0, group: int = 0) -> list[bytes]:
    rng = np.random.default_rng([seed, n])
    return [make_offload_key(rng.bytes(32), group) for _ in range(n)]


def bytes_of(key: bytes) -> Any:
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(-128, 128, ROW, np.int8)


def delete(offload: Offload, keys: Sequence[bytes]) -> None:
    assert (offload.tier._peer.delete(offload.tier._identity.keys(keys)) == Status.DONE).all()


# --- store, load ---


def test_blocks_come_back_after_the_host_tier_has_lost_them(
    node: NodeThread, offload: Callable[..., Offload]
) -> None:
    engine, keys = offload(node), keys_of(5)
    engine.store(keys)
    engine.settle()
    engine.forget()
    assert engine.load(keys) == 5
    assert engine.load(keys) == 5


def test_another_engine_loads_them(node: NodeThread, offload: Callable[..., Offload]) -> None:
    first, second, keys = offload(node), offload(node), keys_of(5)
    first.store(keys)
    first.settle()
    assert second.load([*keys, *keys_of(2, seed=1)]) == 5


def test_the_host_tier_evicts_and_memkv_has_it(node: NodeThread, offload: Callable[..., Offload]) -> None:
    engine = offload(node, rows=4)
    batches = [keys_of(3, seed=seed) for seed in range(6)]
    for keys in batches:
        engine.store(keys)
        engine.settle()
    for keys in batches:
        assert engine.load(keys) == 3


def test_chunks_of_cache_groups_are_apart(node: NodeThread, offload: Callable[..., Offload]) -> None:
    second = replace(CONFIG.groups[0], layer_names=("model.layers.1",), group_id=1)
    config = replace(CONFIG, groups=(*CONFIG.groups, second))
    engine, keys = offload(node, config=config), keys_of(2)
    engine.store(keys)
    engine.settle()
    engine.forget()
    assert engine.load([key[:-4] + (1).to_bytes(4, "big") for key in keys]) == 0
    assert engine.load(keys) == 2


def test_a_lookup_asks_once_for_all_keys_of_a_step(node: NodeThread, offload: Callable[..., Offload]) -> None:
    engine, keys = offload(node), keys_of(20)
    asked: list[int] = []
    submit = engine.tier._peer.submit_exists

    def count(found: Any, **options: Any) -> Any:
        asked.append(len(found))
        return submit(found, **options)

    engine.tier._peer.submit_exists = count
    contexts = [engine.request() for _ in range(2)]
    for context, part in zip(contexts, (keys[:12], keys[8:]), strict=True):
        assert {engine.manager.lookup(key, context) for key in part} == {RETRY}
    assert asked == []
    engine.step()
    engine.step()
    assert asked == [20]
    assert engine.lookup(keys[:12], contexts[0]) == [MISS] * 12
    assert asked == [20]


def test_what_another_engine_stores_is_found_by_the_next_request(
    node: NodeThread, offload: Callable[..., Offload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv.connectors.vllm_lookups.FRESH", 0.0)
    first, second, keys = offload(node), offload(node), keys_of(3)
    waiting = second.request()
    assert second.lookup(keys, waiting) == [MISS] * 3
    first.store(keys)
    first.settle()
    assert second.load(keys) == 3, "though a request lives that was told that they are missing"


def test_tiers_that_a_request_excludes_are_not_asked(
    node: NodeThread, offload: Callable[..., Offload]
) -> None:
    engine, keys = offload(node), keys_of(1)
    engine.store(keys)
    engine.settle()
    engine.forget()
    context = engine.request()
    context.load_tier_filter = TierFilter((TierMatcher(locality=Locality.LOCAL),))
    assert engine.manager.lookup(keys[0], context) is MISS
    assert engine.load(keys) == 1


def test_nothing_is_kept_of_requests_that_are_over(node: NodeThread, offload: Callable[..., Offload]) -> None:
    engine, keys = offload(node), keys_of(4)
    engine.store(keys)
    engine.settle()
    engine.forget()
    engine.load(keys)
    engine.load(keys_of(4, seed=1))
    engine.settle()
    lookups, tier = engine.tier._lookups, engine.tier
    assert (lookups._entries, lookups._by_request, tier._loading, tier._under_way) == ({}, {}, {}, 0)


# --- what fails ---


def test_what_was_evicted_after_the_lookup_is_a_miss_and_stays_one(
    node: NodeThread, offload: Callable[..., Offload]
) -> None:
    engine, keys = offload(node), keys_of(4)
    engine.store(keys)
    engine.settle()
    engine.forget()
    context = engine.request()
    tier = engine.tier
    for key in keys:
        tier.lookup(key, context)
    engine.step()
    until(lambda: all(tier.lookup(key, context) is HIT for key in keys))
    delete(engine, keys[2:3])
    assert engine.lookup(keys, context) == [HIT, HIT, MISS, HIT], "the others of the job have come"
    assert engine.manager._metrics.take_stats() is not None
    engine.manager.on_request_finished(context)
    assert engine.load(keys) == 2
    engine.store(keys[2:3])
    engine.settle()
    engine.forget()
    assert engine.load(keys) == 4


def test_a_node_that_is_killed_makes_jobs_fail_and_nothing_else(
    start_process: Callable[..., NodeProcess], offload: Callable[..., Offload]
) -> None:
    node = start_process()
    engine, keys = offload(node), keys_of(4)
    engine.store(keys)
    engine.settle()
    engine.forget()
    context = engine.request()
    for key in keys:
        engine.tier.lookup(key, context)
    engine.step()
    until(lambda: all(engine.tier.lookup(key, context) is HIT for key in keys))
    node.kill()
    assert engine.lookup(keys, context) == [MISS] * 4
    engine.manager.on_request_finished(context)
    more = keys_of(3, seed=1)
    engine.store(more)
    engine.settle()
    engine.forget()
    assert engine.load(more) == 0, "a store that failed is not visible"
    node.start()
    found = []

    def joined() -> bool:
        engine.store(more)
        engine.settle()
        engine.forget()
        found.append(engine.load(more))
        return found[-1] == 3

    until(joined, 30, "the node is joined again")


def test_a_stopped_node_costs_a_miss_and_never_a_wait(
    start_process: Callable[..., NodeProcess], offload: Callable[..., Offload]
) -> None:
    node = start_process()
    engine, keys = offload(node, **QUICK), keys_of(3)
    engine.store(keys)
    engine.settle()
    engine.forget()
    context = engine.request()
    with node.stopped():
        assert [engine.manager.lookup(key, context) for key in keys] == [RETRY] * 3
        engine.step()
        assert engine.lookup(keys, context) == [MISS] * 3
        engine.manager.on_request_finished(context)
        engine.store(keys_of(2, seed=1))
        assert engine.manager.has_pending_work(), "it came back, and the node has not answered"
        engine.manager.reset_cache()  # waits for the job's deadline: nobody reads the rows any more
        assert engine.tier._under_way == 0
        engine.manager.on_reset_flushed()


def test_a_node_without_room_stores_what_it_can(
    start_node: StartNode, offload: Callable[..., Offload]
) -> None:
    node = start_node(memory=2 << 20, slab_bytes=1 << 20, grace_ms=100)
    engine = offload(node, rows=512)
    keys = keys_of(400)
    engine.store(keys)
    engine.settle()
    engine.forget()
    context = engine.request()
    seen = engine.lookup(keys, context)
    for key, result in zip(keys, seen, strict=True):
        if result is HIT:
            (row,) = engine.manager.prepare_load([key], context).chunk_ids
            assert np.array_equal(engine.rows[row], bytes_of(key))
            engine.manager.complete_load([key], context)
    assert HIT in seen
    assert MISS in seen


def test_after_shutdown_the_host_tiers_memory_is_free(node: NodeThread) -> None:
    vllm_plugin.register()
    engine = Offload({"type": "memkv", "nodes": address_of(node), "fabric": "tcp"})
    engine.store(keys_of(2))
    region = engine.manager.primary_tier._mmap_region
    engine.close()  # while the job may be under way
    gc.collect()
    assert region.mmap_obj is None, "nobody holds the mapping"


# --- configuration ---


@pytest.mark.parametrize(
    "change",
    [
        {"model": OffloadingModelConfig(name="another/model", dtype="float16")},
        {"model": OffloadingModelConfig(name="a/model", dtype="bfloat16")},
        {"kv_cache_layout": "BLHNC"},
        {"cache": OffloadingCacheConfig(tokens_per_hash=8, blocks_per_chunk=1)},
        {"groups": (replace(CONFIG.groups[0], tokens_per_block=32),)},
        {"groups": (replace(CONFIG.groups[0], layer_names=("model.layers.1",)),)},
        {"groups": (replace(CONFIG.groups[0], sliding_window_size_in_chunks=4),)},
        {"parallel": replace(CONFIG.parallel, tp_size=1, pp_size=2)},
        {"parallel": replace(CONFIG.parallel, tp_size=1, pcp_size=2)},
        {"parallel": replace(CONFIG.parallel, dcp_size=2)},
        {"canonical_layout": True},
        {"worker_kv_bytes_per_block": ROW // 2 - 64},  # in rows of the same size
    ],
    ids=lambda change: ",".join(change),
)
def test_another_configuration_never_hits(
    node: NodeThread, offload: Callable[..., Offload], change: dict[str, Any]
) -> None:
    first, other, keys = offload(node), offload(node, config=replace(CONFIG, **change)), keys_of(2)
    first.store(keys)
    first.settle()
    assert other.load(keys) == 0
    assert offload(node, config=replace(CONFIG)).load(keys) == 2


@pytest.mark.parametrize("change", [{"salt": "tenant"}, {"revision": "v2"}, {"namespace": "staging"}])
def test_another_salt_or_revision_never_hits(
    node: NodeThread, offload: Callable[..., Offload], change: dict[str, str]
) -> None:
    first, other, keys = offload(node), offload(node, **change), keys_of(2)
    first.store(keys)
    first.settle()
    assert other.load(keys) == 0


def test_replicas_share(node: NodeThread, offload: Callable[..., Offload]) -> None:
    replica = replace(CONFIG, parallel=replace(CONFIG.parallel, data_parallel_index=1, data_parallel_size=2))
    first, other, keys = offload(node), offload(node, config=replica), keys_of(2)
    first.store(keys)
    first.settle()
    assert other.load(keys) == 2


def test_another_version_of_vllm_has_other_keys(
    node: NodeThread, offload: Callable[..., Offload], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, keys = offload(node), keys_of(2)
    first.store(keys)
    first.settle()
    monkeypatch.setattr("memkv.connectors.vllm_identity.ENGINE", "vllm-0.34")
    assert offload(node).load(keys) == 0


def test_the_factory_takes_the_name_or_the_module(node: NodeThread) -> None:
    config = {"type": "MemKVTier", "module_path": "memkv.connectors.vllm_tier"}
    assert SecondaryTierFactory.get_tier_class(config) is MemKVTier
    assert SecondaryTierFactory.get_tier_class({"type": "memkv"}) is MemKVTier
    engine = Offload({**config, "nodes": address_of(node), "fabric": "tcp"})
    engine.store(keys_of(1))
    engine.settle()
    engine.close()


def test_a_setting_that_does_not_exist_is_refused_by_name(node: NodeThread) -> None:
    with pytest.raises(LocalError, match="put_timeout"):
        Offload({"type": "memkv", "nodes": address_of(node), "put_timeuot": 1})


def test_no_node_at_the_start_is_an_error_that_names_it() -> None:
    with pytest.raises(MemKVError, match=r"127\.0\.0\.1"):
        Offload({"type": "memkv", "nodes": "127.0.0.1:1", "fabric": "tcp", "connect_timeout": 0.5})


# --- hashes ---


def test_hashes_of_this_process_alone_switch_the_tier_off(
    node: NodeThread,
    offload: Callable[..., Offload],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(kv_cache_utils, "_NONE_HASH_SEED", "drawn at random")
    engine, keys = offload(node), keys_of(2)
    engine.store(keys)
    engine.settle()
    engine.forget()
    assert engine.load(keys) == 0
    assert caplog.text.count("PYTHONHASHSEED") == 1


HASHES = """
import json, os, sys
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from memkv.connectors.vllm_identity import hashes_are_shared

def hashes(cases):
    out = []
    for algorithm, seed in cases:
        os.environ.pop("PYTHONHASHSEED", None)
        if seed is not None:
            os.environ["PYTHONHASHSEED"] = seed
        function = get_hash_fn_by_name(algorithm)
        kv_cache_utils.init_none_hash(function)
        first = kv_cache_utils.hash_block_tokens(function, None, [1, 2, 3], ("lora",))
        second = kv_cache_utils.hash_block_tokens(function, first, [4, 5], None)
        out.append([hashes_are_shared(), second.hex()])
    return out

if sys.argv[0] == "-c":
    print(json.dumps(hashes(json.loads(sys.argv[1]))))
"""


def test_which_block_hashes_two_processes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xxhash", reason="xxhash is not installed")
    monkeypatch.setenv("PYTHONHASHSEED", "")  # and restored in the end, like these
    for name in ("NONE_HASH", "_NONE_HASH_SEED"):
        monkeypatch.setattr(kv_cache_utils, name, getattr(kv_cache_utils, name, None), raising=False)
    cases = [("sha256_cbor", None), ("sha256", None), ("xxhash_cbor", None), ("xxhash_cbor", "0")]
    here: dict[str, Any] = {}
    exec(HASHES, here)
    ours = here["hashes"](cases)
    command = [sys.executable, "-c", HASHES, json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=120)
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert [said for said, _ in ours] == [True, True, False, True], "what memkv thinks of it"
    assert [mine == other for (_, mine), (_, other) in zip(ours, theirs, strict=True)] == [
        True,
        True,
        False,
        True,
    ], "what vLLM does"

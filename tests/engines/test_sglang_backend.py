"""MemKVHiCacheStorage over SGLang's real host pools and a real node: exact bytes, nothing but its own."""

# ruff: noqa: E402 - the engine is imported where it is known to be there

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memkv.store.node import NodeThread

from ..nodes import MIB, REPOSITORY, NodeProcess, StartNode, address_of, stats_of, until

pytest_plugins = "tests.nodes"

torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
host = pytest.importorskip(
    "tests.engines.sglang_host", reason="sglang is not installed: script/test --engines brings it"
)

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.storage import StorageBackendFactory

from memkv.connectors.sglang import MemKVHiCacheStorage
from memkv.connectors.sglang_identity import CONFIGURED
from memkv.rdma.errors import LocalError, MemKVError


@pytest.fixture
def node(start_node: StartNode) -> NodeThread:
    return start_node(memory=64 * MIB)


POOLS: dict[str, Callable[[], Any]] = {
    **{f"mha {layout}": lambda layout=layout: host.mha_pool(layout) for layout in host.LAYOUTS},
    **{f"mla {layout}": lambda layout=layout: host.mla_pool(layout) for layout in host.LAYOUTS[:3]},
    "asymmetric page_first": lambda: host.mha_pool("page_first", dim=16, v_dim=8),
    "asymmetric page_first_direct": lambda: host.mha_pool("page_first_direct", dim=16, v_dim=8),
    "one token a page": lambda: host.mha_pool("page_first", page=1),
}


# --- bytes ---


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS.keys())
def test_pages_come_back_into_other_places_of_another_instances_pool(
    node: NodeThread, make: Callable[[], Any]
) -> None:
    ours, theirs = make(), make()
    host.fill(ours, 1)
    host.fill(theirs, 2)
    mla = host.MLATokenToKVPoolHost
    kind = {"is_mla_model": isinstance(ours, mla)}
    keys = host.hashes(5)
    out, into = host.slots(ours, [3, 1, 8, 0, 15]), host.slots(theirs, [4, 2, 7, 15, 1])
    with host.backend(node, ours, **kind) as first:
        assert first.batch_exists(keys) == 0
        assert first.batch_set_v1(keys, out) == [True] * 5
        assert first.batch_exists(keys) == 5
    with host.backend(node, theirs, **kind) as second:
        untouched = host.slots(theirs, [0, 3, 5, 6, 8])
        before = host.pages_at(theirs, untouched)
        assert second.batch_exists(keys) == 5
        assert second.batch_get_v1(keys, into) == [True] * 5
        assert host.pages_at(theirs, into) == host.pages_at(ours, out)
        assert host.pages_at(theirs, untouched) == before


def test_a_block_for_each_piece(node: NodeThread) -> None:
    for layout, pieces in (("layer_first", 2 * 3), ("page_first", 2), ("page_first_direct", 2)):
        pool = host.mha_pool(layout)
        with host.backend(node, pool) as storage:
            assert storage.batch_set_v1(host.hashes(4), host.slots(pool, [0, 1, 2, 3])) == [True] * 4
            namespace = storage._kv_pages.peer.namespace
        assert stats_of(node, namespace)["blocks"] == 4 * pieces


def test_the_prefix_ends_at_the_first_page_that_is_missing(node: NodeThread) -> None:
    pool = host.mha_pool()
    keys = host.hashes(6)
    with host.backend(node, pool) as storage:
        kept = [keys[i] for i in (0, 1, 3, 5)]
        assert storage.batch_set_v1(kept, host.slots(pool, [0, 1, 2, 3])) == [True] * 4
        assert storage.batch_exists(keys) == 2
        assert storage.batch_get_v1(keys, host.slots(pool, list(range(6)))) == [
            True,
            True,
            False,
            True,
            False,
            True,
        ]
        assert storage.batch_exists([]) == 0
        assert storage.batch_get_v1([], host.slots(pool, [])) == []


def test_a_page_counts_only_with_all_of_its_pieces(node: NodeThread) -> None:
    pool = host.mha_pool("layer_first")
    keys = host.hashes(3)
    with host.backend(node, pool) as storage:
        assert storage.batch_set_v1(keys, host.slots(pool, [0, 1, 2])) == [True] * 3
        pages = storage._kv_pages
        pieces = pages.page_keys(keys)
        pages.peer.delete(pieces[len(pages.pieces) + 4 :][:1])  # one of the second page's six
        assert storage.batch_exists(keys) == 1
        assert storage.batch_get_v1(keys, host.slots(pool, [0, 1, 2])) == [True, False, True]
        assert storage.batch_set_v1(keys, host.slots(pool, [0, 1, 2])) == [True] * 3
        assert storage.batch_exists(keys) == 3


def test_of_a_node_that_evicts_every_page_is_right_or_missing(start_node: StartNode) -> None:
    node = start_node(memory=4 * MIB, slab_bytes=MIB)
    pool = host.mha_pool(heads=16, dim=128, layers=4)  # pages of 128 KiB: the node has room for fewer than 32
    want: dict[str, bytes] = {}
    hits = misses = 0
    with host.backend(node, pool, settings={"put_timeout": 2.0}) as storage:
        for turn in range(6):
            keys, slots = host.hashes(8, seed=turn), host.slots(pool, list(range(8)))
            host.fill(pool, turn)
            want |= zip(keys, host.pages_at(pool, slots), strict=True)
            assert len(storage.batch_set_v1(keys, slots)) == 8
            for start in range(0, len(want), 16):
                some = list(want)[start : start + 16]
                into = host.slots(pool, list(range(16, 16 + len(some))))
                found = storage.batch_get_v1(some, into)
                for key, there, page in zip(some, found, host.pages_at(pool, into), strict=True):
                    assert not there or page == want[key]
                    hits, misses = hits + there, misses + (not there)
    assert hits
    assert misses


# --- nothing but its own ---

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # what changes: (of the pool, of the storage configuration, of memkv's settings)
    "model": ({}, {"model_name": "meta-llama/Llama-3-8B"}, {}),
    "dtype": ({"dtype": torch.float16}, {}, {}),
    "layout": ({"layout": "page_first_direct"}, {}, {}),
    "layout of heads": ({"layout": "page_head"}, {}, {}),
    "tp rank": ({}, {"tp_rank": 1, "tp_size": 2}, {}),
    "tp size": ({}, {"tp_rank": 0, "tp_size": 4}, {}),
    "pp rank": ({}, {"pp_rank": 1, "pp_size": 2}, {}),
    "cp rank": ({}, {"attn_cp_rank": 1, "attn_cp_size": 2}, {}),
    "page size": ({"page": 8}, {}, {}),
    "page size, pages alike in bytes": ({"page": 8, "heads": 1}, {}, {}),
    "heads": ({"heads": 4}, {}, {}),
    "heads for layers": ({"heads": 3, "layers": 2}, {}, {}),
    "heads for widths": ({"heads": 1, "dim": 32, "v_dim": 32}, {}, {}),
    "salt": ({}, {}, {"salt": "another tenant"}),
    "deployment": ({}, {}, {"namespace": "blue"}),
}


@pytest.mark.parametrize(("pool", "config", "settings"), VARIANTS.values(), ids=VARIANTS.keys())
def test_another_configuration_never_hits(
    node: NodeThread, pool: dict[str, Any], config: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = {"tp_size": 2} if config.get("tp_rank") else {"pp_size": 2} if config.get("pp_rank") else {}
    base |= {"attn_cp_size": 2} if config.get("attn_cp_rank") else {}
    ours, theirs = host.mha_pool(), host.mha_pool(**pool)
    keys = host.hashes(4)
    with (
        host.backend(node, ours, **base) as first,
        host.backend(node, theirs, settings=settings, **config) as second,
    ):
        assert first.batch_set_v1(keys, host.slots(ours, [0, 1, 2, 3])) == [True] * 4
        assert second.batch_exists(keys) == 0
        assert second.batch_get_v1(keys, host.slots(theirs, [0, 1, 2, 3])) == [False] * 4
        assert second.batch_set_v1(keys, host.slots(theirs, [0, 1, 2, 3])) == [True] * 4
        assert first.batch_get_v1(keys, host.slots(ours, [4, 5, 6, 7])) == [True] * 4
        assert host.pages_at(ours, host.slots(ours, [4, 5, 6, 7])) == host.pages_at(
            ours, host.slots(ours, [0, 1, 2, 3])
        )


@pytest.mark.parametrize("name", CONFIGURED)
def test_what_only_the_engine_knows_counts_too(node: NodeThread, name: str) -> None:
    """A pool of float8 of either kind is one of bytes."""
    ours, theirs = (host.mha_pool(dtype=torch.uint8) for _ in range(2))
    one, other = {
        "kv_cache_dtype": ("fp8_e4m3", "fp8_e5m2"),
        "quantization": (None, "fp8"),
        "revision": ("v1", "v2"),
    }[name]
    keys = host.hashes(2)
    with host.get_context().override_server_args(**{name: one}), host.backend(node, ours) as first:
        assert first.batch_set_v1(keys, host.slots(ours, [0, 1])) == [True] * 2
    with host.get_context().override_server_args(**{name: other}), host.backend(node, theirs) as second:
        assert second.batch_exists(keys) == 0
    with host.get_context().override_server_args(**{name: one}), host.backend(node, theirs) as third:
        assert third.batch_exists(keys) == 2


def test_latents_are_shared_by_ranks_and_heads_are_not(node: NodeThread) -> None:
    keys = host.hashes(2)
    for make, shared in ((host.mla_pool, True), (host.mha_pool, False)):  # heads: of a draft model's pool
        ours, theirs = make(), make()
        host.fill(ours, 7)
        ranks = {"is_mla_model": True, "tp_size": 2}
        with host.backend(node, ours, tp_rank=0, **ranks) as first:
            assert first.batch_set_v1(keys, host.slots(ours, [0, 1])) == [True] * 2
        with host.backend(node, theirs, tp_rank=1, **ranks) as second:
            assert second.batch_exists(keys) == (2 if shared else 0)
            assert second.batch_get_v1(keys, host.slots(theirs, [0, 1])) == [shared] * 2


# --- nodes that go ---


def test_a_node_that_is_not_there_is_said_at_the_start() -> None:
    pool = host.mha_pool()
    settings = {"connect_timeout": 1.0, "fabric": "tcp"}
    with (
        pytest.raises(MemKVError, match=r"127\.0\.0\.1:1"),
        host.backend(("127.0.0.1", 1), pool, settings=settings),
    ):
        pass


def test_a_dead_node_is_a_miss_until_it_is_back(start_process: Callable[..., NodeProcess]) -> None:
    node = start_process(memory=16 * MIB)
    pool = host.mha_pool()
    keys, where = host.hashes(3), host.slots(pool, [0, 1, 2])
    settings = {"get_timeout": 0.5, "put_timeout": 0.5}
    with host.backend(node, pool, settings=settings) as storage:
        assert storage.batch_set_v1(keys, where) == [True] * 3
        node.kill()
        assert storage.batch_get_v1(keys, where) == [False] * 3
        assert storage.batch_exists(keys) == 0
        assert storage.batch_set_v1(keys, where) == [False] * 3
        node.start()
        until(lambda: all(storage.batch_set_v1(keys, where)), 30, "the node taken again")
        assert storage.batch_exists(keys) == 3


def test_what_is_kept_on_flash_outlives_the_node(
    start_process: Callable[..., NodeProcess], tmp_path: Path
) -> None:
    node = start_process(memory=8 * MIB, slab_bytes=MIB, flash=f"{tmp_path / 'flash'}:24M")
    ours, theirs = host.mha_pool(), host.mha_pool()
    host.fill(ours, 1)
    keys, out, into = host.hashes(6), host.slots(ours, list(range(6))), host.slots(theirs, list(range(9, 15)))
    with host.backend(node, ours, settings={"durability": "flash"}) as storage:
        assert storage.batch_set_v1(keys, out) == [True] * 6
        node.kill()
    node.start()
    with host.backend(node, theirs) as storage:
        until(lambda: storage.batch_exists(keys) == 6, 30, "flash scanned")
        assert storage.batch_get_v1(keys, into) == [True] * 6
    assert host.pages_at(theirs, into) == host.pages_at(ours, out)


# --- mistakes ---


def test_mistakes_are_told(node: NodeThread) -> None:
    pool = host.mha_pool()
    extra = host.extra_config(node)
    with pytest.raises(LocalError, match=r"no setting 'durabilty'.*durability"):
        MemKVHiCacheStorage(host.storage_config({**extra, "durabilty": "flash"}))
    with pytest.raises(LocalError, match="MEMKV_NODES"):
        MemKVHiCacheStorage(host.storage_config({**extra, "nodes": None}))
    with pytest.raises(LocalError, match="served-model-name"), host.backend(node, pool, model_name=None):
        pass
    unregistered = MemKVHiCacheStorage(host.storage_config(extra))
    with pytest.raises(LocalError, match="register_mem_pool_host"):
        unregistered.batch_get_v1(host.hashes(1), host.slots(pool, [0]))
    with (
        pytest.raises(LocalError, match="hicache-mem-layout"),
        host.backend(node, host.mha_pool("page_unified")),
    ):
        pass
    with host.backend(node, pool) as storage:
        keys = host.hashes(2)
        for wrong in (host.slots(pool, [0]), host.slots(pool, [0, 10**6]), host.slots(pool, [0, 1]) + 1):
            with pytest.raises(LocalError, match="host indices"):
                storage.batch_get_v1(keys, wrong)
            with pytest.raises(LocalError, match="host indices"):
                storage.batch_set_v1(keys, wrong)
        with pytest.raises(LocalError, match="no host pool mamba"):
            storage.batch_get_v2([PoolTransfer(PoolName.MAMBA, host.slots(pool, [0]), keys=keys[:1])])
        with pytest.raises(MemKVError, match="salt"):
            storage.clear()


def test_pools_that_are_not_a_ranks_own_are_refused(node: NodeThread) -> None:
    """SGLang resolves their slots by itself, or spreads their pages over ranks."""
    shared, spread = host.mha_pool(), host.mla_pool(dcp_size=2)
    shared.shared_allocation_domain = object()
    for pool in (shared, spread):
        with pytest.raises(LocalError, match="--dcp-size"), host.backend(node, pool):
            pass
    elsewhere = host.mla_pool()
    elsewhere.kv_buffer = None  # as on a rank that has the first rank's pages
    with pytest.raises(LocalError, match="--hicache-storage-backend"), host.backend(node, elsewhere):
        pass


def test_a_side_pool_in_a_layout_without_whole_pages_is_refused(node: NodeThread) -> None:
    kv, side = host.mha_pool(), host.mha_pool("page_unified")
    with host.backend(node, kv) as storage:
        with pytest.raises(LocalError, match="--hicache-mem-layout page_first"):
            storage.register_mem_host_pool_v2(side, PoolName.SWA)
        assert storage.batch_set_v1(host.hashes(1), host.slots(kv, [0])) == [True]


def test_settings_of_sglang_are_left_alone(node: NodeThread) -> None:
    from memkv.connectors.sglang import SGLANG

    extra = host.extra_config(node) | {name: 1 for name in SGLANG if name.startswith("prefetch")}
    made = MemKVHiCacheStorage(host.storage_config(extra), {})
    assert made.zero_copy
    assert made.settings.nodes == (extra["nodes"],)


def test_what_the_manual_says_to_paste_works(node: NodeThread, tmp_path: Path) -> None:
    manual = (REPOSITORY / "docs/engines/sglang.md").read_text()
    pasted = re.search(r"```json\n(.*?)```", manual, re.DOTALL)
    assert pasted
    secret = tmp_path / "secret"
    secret.write_text("")
    text = pasted[1].replace("10.0.0.7:7420,10.0.0.8:7420", address_of(node))
    extra = HybridCacheController.parse_storage_backend_extra_config(
        text.replace("/etc/memkv/secret", str(secret))
    )[0]
    pool = host.mha_pool()
    made = StorageBackendFactory.create_backend("dynamic", host.storage_config(extra), pool)
    assert made.zero_copy
    made.register_mem_pool_host(pool)
    assert made.batch_set_v1(host.hashes(1), host.slots(pool, [0])) == [True]
    made.close()
    made.close()


def test_figures_are_given_once(node: NodeThread) -> None:
    pool = host.mha_pool()
    keys, where = host.hashes(3), host.slots(pool, [0, 1, 2])
    with host.backend(node, pool) as storage:
        storage.batch_set_v1(keys[:2], where[:8])
        storage.batch_get_v1(keys, where)
        stats = storage.get_stats()
        assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [2])
        assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
        assert min(stats.backup_bandwidth + stats.prefetch_bandwidth) > 0
        assert storage.get_stats() == type(stats)()
    with host.backend(node, pool, enable_storage_metrics=False) as storage:
        assert storage.batch_get_v1(keys[:2], where[:8]) == [True] * 2
        assert storage.get_stats() == type(stats)()

"""Side pools of hybrid models, and tensors by a copy: the rest of what SGLang may ask of its backend."""

# ruff: noqa: E402 - the engine is imported where it is known to be there

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from memkv.store.node import NodeThread

from ..nodes import MIB, NodeProcess, StartNode

pytest_plugins = "tests.nodes"

torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
host = pytest.importorskip(
    "tests.engines.sglang_host", reason="sglang is not installed: script/test --engines brings it"
)

from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from memkv.rdma.errors import LocalError

ALL, TRAILING = PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES


@pytest.fixture
def node(start_node: StartNode) -> NodeThread:
    return start_node(memory=64 * MIB)


# --- side pools ---


def window(
    keys: list[str] | None, policy: PoolHitPolicy = TRAILING, name: str = PoolName.SWA
) -> PoolTransfer:
    return PoolTransfer(name, keys=keys, hit_policy=policy)


def test_where_a_prefix_can_be_restored(node: NodeThread) -> None:
    """As SGLang's own file backend has it: all pages of one pool, the last few of another."""
    kv, indexer, sliding = host.mha_pool(), host.mla_pool(), host.mha_pool()
    keys = host.hashes(8)
    with host.backend(node, kv) as storage:
        storage.register_mem_host_pool_v2(kv, PoolName.KV)
        storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
        storage.register_mem_host_pool_v2(sliding, PoolName.SWA)

        def keep(name: PoolName, pool: Any, pages: list[int]) -> None:
            transfer = PoolTransfer(name, host.slots(pool, pages), keys=[keys[i] for i in pages])
            assert storage.batch_set_v2([transfer]) == {name: [True] * len(pages)}

        keep(PoolName.KV, kv, [0, 1, 2, 3, 4, 5])
        keep(PoolName.INDEXER, indexer, [0, 1, 2, 3, 4])
        keep(PoolName.SWA, sliding, [1, 2, 4, 5])

        def told(*transfers: PoolTransfer) -> tuple[int, dict[str, int], list[int] | None]:
            found = storage.batch_exists_v2(keys, list(transfers))
            return found.kv_hit_pages, found.extra_pool_hit_pages, found.restorable_prefix_pages

        KV, SWA, INDEXER = PoolName.KV, PoolName.SWA, PoolName.INDEXER
        assert told() == (6, {KV: 6}, [1, 2, 3, 4, 5, 6])
        assert told(window(None, ALL, INDEXER)) == (5, {KV: 6, INDEXER: 5}, [1, 2, 3, 4, 5])
        assert told(window(None)) == (6, {KV: 6, SWA: 6}, [2, 3, 5, 6])
        assert told(window(["", ""])) == (6, {KV: 6, SWA: 6}, [3, 6])
        assert told(window([""] * 3)) == (0, {KV: 6}, [])
        assert told(window(["", ""]), window(None, ALL, INDEXER)) == (
            3,
            {KV: 6, SWA: 6, INDEXER: 5},
            [3],
        )
        groups = PoolTransfer(SWA, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=2, group_pages=1)
        assert told(groups) == (6, {KV: 6}, [1, 2, 3, 4, 5, 6])
        with pytest.raises(LocalError, match="no host pool draft"):
            told(window(None, ALL, PoolName.DRAFT))


def test_restorable_lengths_are_those_of_sglangs_own_file_backend(node: NodeThread, tmp_path: Path) -> None:
    """Whatever is held of which pool, and whatever is asked for."""
    pools = {PoolName.KV: host.mha_pool(), PoolName.INDEXER: host.mla_pool(), PoolName.SWA: host.mha_pool()}
    random = Random(1)
    with host.backend(node, pools[PoolName.KV]) as ours:
        file = HiCacheFile(host.storage_config({}), str(tmp_path / "files"))
        for backend in (ours, file):
            for name, pool in pools.items():
                backend.register_mem_host_pool_v2(pool, name)
        for seed in range(40):
            keys = host.hashes(8, seed=seed)
            for name, pool in pools.items():
                held = [i for i in range(8) if random.random() < 0.85]
                transfer = PoolTransfer(name, host.slots(pool, held), keys=[keys[i] for i in held])
                assert ours.batch_set_v2([transfer]) == file.batch_set_v2([transfer])
            for _ in range(4):
                asked = [
                    window([""] * random.randrange(4), random.choice([ALL, TRAILING]), name)
                    for name in random.sample([PoolName.SWA, PoolName.INDEXER], random.randrange(3))
                ]
                assert ours.batch_exists_v2(keys, asked) == file.batch_exists_v2(keys, asked)


def test_several_pools_move_in_one_call(node: NodeThread) -> None:
    ours, theirs = (host.mha_pool(), host.mamba_pool()), (host.mha_pool(), host.mamba_pool())
    keys = host.hashes(3)
    for pool in ours:
        host.fill(pool, 3)

    def transfers(pools: tuple[Any, Any], pages: list[int], states: list[int]) -> list[PoolTransfer]:
        return [
            PoolTransfer(PoolName.KV, host.slots(pools[0], pages), keys=keys),
            PoolTransfer(PoolName.MAMBA, torch.tensor(states), keys=keys[:2]),
        ]

    with host.backend(node, ours[0]) as first:
        first.register_mem_host_pool_v2(ours[1], PoolName.MAMBA)
        kept = first.batch_set_v2(transfers(ours, [0, 1, 2], [7, 3]))
        assert kept == {PoolName.KV: [True] * 3, PoolName.MAMBA: [True] * 2}
    with host.backend(node, theirs[0]) as second:
        second.register_mem_host_pool_v2(theirs[1], PoolName.MAMBA)
        found = second.batch_get_v2(transfers(theirs, [8, 4, 6], [0, 9]))
        assert found == {PoolName.KV: [True] * 3, PoolName.MAMBA: [True] * 2}
        lost = second.batch_get_v2([PoolTransfer(PoolName.MAMBA, torch.tensor([1]), keys=keys[2:])])
        assert lost == {PoolName.MAMBA: [False]}
        assert second.batch_get_v2([PoolTransfer(PoolName.MAMBA, keys=None)]) == {PoolName.MAMBA: []}
    assert host.pages_at(theirs[0], host.slots(theirs[0], [8, 4, 6])) == host.pages_at(
        ours[0], host.slots(ours[0], [0, 1, 2])
    )
    assert [host.page_bytes(theirs[1], s) for s in (0, 9)] == [host.page_bytes(ours[1], s) for s in (7, 3)]


def test_pools_of_one_shape_do_not_meet(node: NodeThread) -> None:
    kv, draft = host.mha_pool(), host.mha_pool()
    keys = host.hashes(2)
    with host.backend(node, kv) as storage:
        storage.register_mem_host_pool_v2(draft, PoolName.DRAFT)
        assert storage.batch_set_v1(keys, host.slots(kv, [0, 1])) == [True] * 2
        there = PoolTransfer(PoolName.DRAFT, host.slots(draft, [0, 1]), keys=keys)
        assert storage.batch_get_v2([there]) == {PoolName.DRAFT: [False] * 2}
        with pytest.raises(LocalError, match="second host pool"):
            storage.register_mem_host_pool_v2(host.mha_pool(), PoolName.DRAFT)


def test_states_are_each_ranks_own_even_beside_latents(node: NodeThread) -> None:
    keys, ranks = host.hashes(1), {"is_mla_model": True, "tp_size": 2}
    there = PoolTransfer(PoolName.MAMBA, torch.tensor([2]), keys=keys)
    for rank, found in ((0, True), (1, False)):
        with host.backend(node, host.mla_pool(), tp_rank=rank, **ranks) as storage:
            storage.register_mem_host_pool_v2(host.mamba_pool(), PoolName.MAMBA)
            if rank == 0:
                storage.batch_set_v2([there])
            assert storage.batch_get_v2([there]) == {PoolName.MAMBA: [found]}


def test_a_kv_pool_without_memory_leaves_it_to_the_others(node: NodeThread) -> None:
    anchor, side = LogicalHostPool(128, host.PAGE), host.mha_pool()
    keys = host.hashes(3)
    with host.backend(node, anchor) as storage:
        storage.register_mem_host_pool_v2(anchor, PoolName.KV)
        storage.register_mem_host_pool_v2(side, PoolName.DEEPSEEK_V4_C4)
        assert storage.batch_exists(keys) == 0
        assert storage.batch_set_v1(keys, host.slots(side, [0, 1, 2])) == [True] * 3
        want = [window(None, ALL, PoolName.DEEPSEEK_V4_C4)]
        assert storage.batch_exists_v2(keys, want).kv_hit_pages == 0
        kept = PoolTransfer(PoolName.DEEPSEEK_V4_C4, host.slots(side, [0, 1]), keys=keys[:2])
        assert storage.batch_set_v2([kept]) == {PoolName.DEEPSEEK_V4_C4: [True] * 2}
        assert storage.batch_exists_v2(keys, want).kv_hit_pages == 2


def test_a_dead_nodes_side_pools_hold_nothing(start_process: Callable[..., NodeProcess]) -> None:
    node = start_process(memory=16 * MIB)
    anchor, side = LogicalHostPool(128, host.PAGE), host.mha_pool()
    keys, where = host.hashes(2), host.slots(side, [0, 1])
    with host.backend(node, anchor, settings={"get_timeout": 0.5, "put_timeout": 0.5}) as storage:
        storage.register_mem_host_pool_v2(side, PoolName.DEEPSEEK_V4_C4)
        there = PoolTransfer(PoolName.DEEPSEEK_V4_C4, where, keys=keys)
        assert storage.batch_set_v2([there]) == {there.name: [True] * 2}
        assert storage.batch_exists_v2(keys, [there]).kv_hit_pages == 2
        node.kill()
        assert storage.batch_exists_v2(keys, [there]).kv_hit_pages == 0
        assert storage.batch_get_v2([there]) == {there.name: [False] * 2}
        assert storage.batch_set_v2([there]) == {there.name: [False] * 2}


@pytest.mark.parametrize("layout", host.LAYOUTS[:3])
def test_compressed_pages_come_back(node: NodeThread, layout: str) -> None:
    """In layer_first the memory of each layer is one of its own."""
    ours, theirs = host.compressed_pool(layout), host.compressed_pool(layout)
    keys, name = host.hashes(3), PoolName.DEEPSEEK_V4_C4
    host.fill(ours, 1)
    out, into = host.slots(ours, [15, 0, 7]), host.slots(theirs, [3, 9, 0])
    for rank, pool, move in ((0, ours, out), (1, theirs, into)):
        anchor = LogicalHostPool(64, host.PAGE)
        with host.backend(node, anchor, is_mla_model=True, tp_rank=rank, tp_size=2) as storage:
            storage.register_mem_host_pool_v2(pool, name)
            there = PoolTransfer(name, move, keys=keys)
            done = storage.batch_get_v2([there]) if rank else storage.batch_set_v2([there])
            assert done == {name: [True] * 3}
    assert host.pages_at(theirs, into) == host.pages_at(ours, out)


def test_a_side_pool_without_memory_has_nothing_to_miss(node: NodeThread) -> None:
    kv, nothing = host.mha_pool(), LogicalHostPool(128, host.PAGE)
    keys, where = host.hashes(2), host.slots(kv, [0, 1])
    with host.backend(node, kv) as storage:
        storage.register_mem_host_pool_v2(nothing, PoolName.DRAFT)
        there = [PoolTransfer(PoolName.KV, where, keys=keys), PoolTransfer(PoolName.DRAFT, where, keys=keys)]
        assert storage.batch_exists_v2(keys, there[1:]).kv_hit_pages == 0
        assert storage.batch_set_v2(there) == {PoolName.KV: [True] * 2, PoolName.DRAFT: [True] * 2}
        assert storage.batch_exists_v2(keys, there[1:]).kv_hit_pages == 2


# --- tensors, by a copy ---


@pytest.mark.parametrize("interface_v1", [0, 1])
def test_tensors_come_back(node: NodeThread, interface_v1: int) -> None:
    pool = host.mha_pool()
    host.fill(pool, 5)
    keys = host.hashes(200)  # more than the buffer that they are copied through has places
    values = [pool.get_data_page(4 * (i % 30)) for i in range(200)]
    with host.backend(node, pool, settings={"interface_v1": interface_v1}) as storage:
        assert not storage.exists(keys[0])
        assert storage.get(keys[0], torch.empty_like(values[0])) is None
        assert storage.batch_set(keys, values)
        assert storage.set(keys[0], values[0])
        assert storage.exists(keys[7])
        found = storage.batch_get(keys, [torch.empty_like(v) for v in values])
        assert all(
            torch.equal(f.view(torch.uint8), v.view(torch.uint8)) for f, v in zip(found, values, strict=True)
        )
        apart = torch.empty(2, *values[1].shape, dtype=values[1].dtype).movedim(0, -1)[
            ..., 0
        ]  # not contiguous
        assert storage.get(keys[1], apart) is apart
        assert torch.equal(apart.view(torch.int16), values[1].view(torch.int16))
        assert bytes(storage.get(keys[1]).numpy()) == bytes(values[1].view(torch.uint8).numpy())
        if not interface_v1:
            assert storage.batch_exists([*keys[:3], *host.hashes(1, seed=1)]) == 3


def test_tensors_of_another_size_are_no_hit(node: NodeThread) -> None:
    pool = host.mha_pool()
    page = pool.get_data_page(0)
    with host.backend(node, pool, settings={"interface_v1": 0}) as storage:
        short, long = host.hashes(2)
        assert storage.set(short, page[:100])
        assert storage.get(short, torch.empty_like(page)) is None
        assert storage.get(short, torch.empty_like(page[:100])) is not None
        assert not storage.set(long, torch.cat([page, page]))
        assert not storage.exists(long)
        assert not storage.batch_set([long, short], [torch.cat([page, page]), page[:100]])
        with pytest.raises(LocalError, match="no tensor"):
            storage.set(long)
        with pytest.raises(LocalError, match="interface_v1"):
            storage.batch_get_v1([short], host.slots(pool, [0]))


def test_pages_and_tensors_do_not_meet(node: NodeThread) -> None:
    """A latent page is one piece, and as long as its tensor: only the key tells them apart."""
    pool = host.mla_pool()
    keys = host.hashes(2)
    with host.backend(node, pool, is_mla_model=True) as storage:
        assert storage.batch_set_v1(keys[:1], host.slots(pool, [0])) == [True]
        assert storage.set(keys[1], pool.get_data_page(0))
        assert storage.exists(keys[0])
        assert storage.exists(keys[1])
        assert storage.get(keys[0], torch.empty_like(pool.get_data_page(0))) is None
        assert storage.batch_get_v1(keys, host.slots(pool, [1, 2])) == [True, False]


def test_threads_of_all_kinds_at_once(node: NodeThread) -> None:
    """Prefetch, backup and query threads share one backend."""
    pool = host.mha_pool()
    host.fill(pool, 9)
    want = host.pages_at(pool, host.slots(pool, list(range(8))))
    failures: list[BaseException] = []
    with host.backend(node, pool, settings={"interface_v1": 1}) as storage:

        def work(number: int) -> None:
            try:
                keys = host.hashes(8, seed=number % 2)
                into = host.slots(pool, list(range(8 + 6 * number, 14 + 6 * number)))
                for _ in range(20):
                    assert storage.batch_set_v1(keys, host.slots(pool, list(range(8)))) == [True] * 8
                    assert storage.batch_exists(keys) == 8
                    assert storage.batch_get_v1(keys[:6], into) == [True] * 6
                    assert host.pages_at(pool, into) == want[:6]
                    assert storage.set(keys[number], pool.get_data_page(4 * number))
                    found = storage.get(keys[number], torch.empty_like(pool.get_data_page(0)))
                    assert found is not None
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert failures == []

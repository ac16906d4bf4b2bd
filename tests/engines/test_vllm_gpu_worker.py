"""MemKVOffloadingSpec's manager and worker by themselves: what vLLM's scheduler on CPUs does not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memkv.keys import KEY_BYTES, TAG_BYTES
from memkv.rdma.errors import LocalError
from memkv.status import Status
from memkv.store.node import NodeThread
from memkv.tickets import Ticket
from tests.nodes import address_of, until

torch = pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
pytest.importorskip("vllm", reason="vllm is not installed: script/test --engines brings it")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (  # noqa: E402
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    ReqContext,
)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory  # noqa: E402

from memkv.connectors.vllm_gpu import FACTS, SPEC, MemKVWorkerMetadata  # noqa: E402
from memkv.connectors.vllm_gpu_worker import MemKVResult, piece_key  # noqa: E402
from memkv.connectors.vllm_outcomes import Outcomes  # noqa: E402

from .test_vllm_tier import CONFIG, keys_of  # noqa: E402

pytest_plugins = "tests.nodes"

BLOCKS, PAGE, LAYERS = 16, 2048, 3
CONTEXT = ReqContext(req_id="r")
StartSpec = Callable[..., Any]


@pytest.fixture
def fabric_name() -> str:
    return "tcp"


@pytest.fixture
def start_spec(node: NodeThread) -> Iterator[StartSpec]:
    with ExitStack() as stack:

        def start(rank: int = 0, **change: Any) -> Any:
            extra = {**SPEC, FACTS: {"revision": "1"}, "nodes": address_of(node), "fabric": "tcp"}
            config = replace(CONFIG, extra_config=extra, worker_kv_bytes_per_block=LAYERS * PAGE, **change)
            config = replace(config, parallel=replace(config.parallel, rank=rank))
            spec = OffloadingSpecFactory.create_spec(config)
            stack.callback(lambda: [x.shutdown() for x in (spec._manager, spec._worker) if x is not None])
            return spec

        yield start


def caches(seed: int | None = None) -> Any:
    """A tensor for each layer; random bytes, or zeros."""
    out = []
    for layer in range(LAYERS):
        content = np.zeros((BLOCKS, PAGE), np.int8)
        if seed is not None:
            content = np.random.default_rng([seed, layer]).integers(-128, 128, content.shape, np.int8)
        out.append(CanonicalKVCacheTensor(torch.from_numpy(content), PAGE))
    return CanonicalKVCaches(out, [[CanonicalKVCacheRef(i, PAGE) for i in range(LAYERS)]])


def gpu(*blocks: int) -> Any:
    return GPULoadStoreSpec(list(blocks), group_sizes=[len(blocks)], block_indices=[0])


def finished(worker: Any) -> MemKVResult:
    results: list[MemKVResult] = []
    until(lambda: results.extend(worker.get_finished()) or results)
    (result,) = results
    return result


def test_where_all_workers_have_the_same_bytes_one_stores_for_all(start_spec: StartSpec) -> None:
    """A model with latent attention (MLA) under tensor parallelism."""
    first, second = (start_spec(rank, replicated_layout=True) for rank in range(2))
    stored, loaded = caches(seed=1), caches()
    manager, keys = first.get_manager(), keys_of(3)
    assert first.replicated_layout, "so that vLLM lets only rank 0 store"
    out = manager.prepare_store(keys, CONTEXT)
    first.get_worker(stored).submit_store(1, gpu(4, 5, 6), out.store_spec)
    assert finished(first.get_worker(stored)).success
    second.get_worker(loaded).submit_load(2, manager.prepare_load(keys, CONTEXT), gpu(9, 2, 7))
    assert finished(second.get_worker(loaded)).success
    for a, b in zip(stored.tensors, loaded.tensors, strict=True):
        assert torch.equal(a.tensor[[4, 5, 6]], b.tensor[[9, 2, 7]])
        assert int(b.tensor.count_nonzero()) == int(a.tensor[[4, 5, 6]].count_nonzero())


def test_ranks_do_not_share_otherwise(start_spec: StartSpec) -> None:
    first, second = (start_spec(rank) for rank in range(2))
    manager, keys = first.get_manager(), keys_of(3)
    out = manager.prepare_store(keys, CONTEXT)
    first.get_worker(caches(seed=1)).submit_store(1, gpu(4, 5, 6), out.store_spec)
    assert finished(first._worker).success
    worker = second.get_worker(caches())
    worker.submit_load(2, manager.prepare_load(keys, CONTEXT), gpu(1, 2, 3))
    result = finished(worker)
    assert (result.success, result.failed, result.blocks) == (False, [0, 1, 2], [1, 2, 3])


def test_a_job_of_another_shape_fails_and_says_which_blocks(start_spec: StartSpec) -> None:
    spec, keys = start_spec(), keys_of(3)
    worker, manager = spec.get_worker(caches()), spec.get_manager()
    for where in (gpu(1, 2), gpu(1, 2, 3, 4), GPULoadStoreSpec([1, 2, 3], [1, 2], [0, 0])):
        blocks = manager.prepare_load(keys, CONTEXT)
        assert worker.submit_load(1, blocks, where)
        result = finished(worker)
        assert (result.success, result.failed) == (False, [0, 1, 2])
        assert result.blocks == where.block_ids.tolist()
        manager.failed({result.number: result.failed})
        manager.complete_load(keys, CONTEXT)


def test_a_block_outside_the_caches_is_a_failed_job(start_spec: StartSpec) -> None:
    spec = start_spec()
    worker, manager = spec.get_worker(caches()), spec.get_manager()
    worker.submit_store(1, gpu(BLOCKS), manager.prepare_store(keys_of(1), CONTEXT).store_spec)
    assert not finished(worker).success


def test_an_empty_job_is_done(start_spec: StartSpec) -> None:
    worker = start_spec().get_worker(caches())
    worker.submit_load(1, start_spec().get_manager().prepare_load([], CONTEXT), gpu())
    assert finished(worker).success


def test_wait_returns_when_the_job_is_over(start_spec: StartSpec) -> None:
    spec = start_spec()
    worker, manager = spec.get_worker(caches(seed=1)), spec.get_manager()
    worker.submit_store(7, gpu(*range(BLOCKS)), manager.prepare_store(keys_of(BLOCKS), CONTEXT).store_spec)
    worker.wait({7, 8})
    (result,) = worker.get_finished()
    assert (result.job_id, result.success, result.transfer_size) == (7, True, BLOCKS * LAYERS * PAGE)


def test_pages_longer_than_the_namespaces_blocks_are_refused(start_spec: StartSpec) -> None:
    spec = start_spec(groups=CONFIG.groups)
    long = CanonicalKVCacheTensor(torch.zeros((2, LAYERS * PAGE + 1), dtype=torch.int8), LAYERS * PAGE + 1)
    with pytest.raises(LocalError, match="page"):
        spec.get_worker(CanonicalKVCaches([long], [[CanonicalKVCacheRef(0, LAYERS * PAGE + 1)]]))


def test_failures_of_a_job_of_before_a_reset_are_nobodys(start_spec: StartSpec) -> None:
    manager, keys = start_spec().get_manager(), keys_of(2)
    old = manager.prepare_store(keys, CONTEXT).store_spec
    manager.reset_cache()
    new = manager.prepare_store(keys, CONTEXT)
    assert new.keys_to_store == keys
    assert new.store_spec.digests != old.digests
    manager.failed({old.number: [0, 1]})
    manager.complete_store(keys, CONTEXT)
    assert list(manager._kept) == keys


def test_keys_of_pieces_are_apart_and_at_the_same_node() -> None:
    keys = {piece_key(i, n, length).tobytes() for n in (2, 80) for i in range(n) for length in (64, 65)}
    assert len(keys) == 2 * (1 + 79) + 1, "the last piece has its block's key"
    assert bytes(KEY_BYTES) in keys
    assert {key[:TAG_BYTES] for key in keys} == {bytes(TAG_BYTES)}


def test_the_log_says_why_once_and_says_nothing_of_misses(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = Outcomes("load")
    status = np.array([Status.HIT, Status.MISS, Status.STALE, Status.COLD], np.uint8)
    assert outcomes.good(Ticket(done=True, status=status), 4).tolist() == [True, False, False, False]
    assert caplog.text == ""
    late = np.array([Status.HIT, Status.TIMEOUT], np.uint8)
    for _ in range(3):
        assert outcomes.good(Ticket(done=True, status=late), 2).tolist() == [True, False]
        assert not outcomes.good(Ticket(done=True, error=LocalError("closed")), 2).any()
    assert caplog.text.count("1 of 2 blocks failed: TIMEOUT") == 1
    assert caplog.text.count("2 of 2 blocks failed: closed") == 1


def test_only_what_a_node_keeps_is_stored() -> None:
    kept = {Status.STORED, Status.EXISTS}
    status = np.array(list(Status), np.uint8)
    good = Outcomes("store").good(Ticket(done=True, status=status), len(status))
    assert {Status(s) for s in status[good]} == kept


def test_what_several_workers_say_of_a_job_is_put_together() -> None:
    one = MemKVWorkerMetadata({1: 1}, failed={5: [2]})
    other = MemKVWorkerMetadata({1: 1, 2: 1}, failed={5: [0, 2], 6: [1]})
    both = one.aggregate(other).aggregate(OffloadingWorkerMetadata({2: 1}))
    assert both.completed_jobs == {1: 2, 2: 2}
    assert both.failed == {5: [0, 2], 6: [1]}

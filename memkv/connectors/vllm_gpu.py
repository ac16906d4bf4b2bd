"""vLLM without a host tier: GPU ↔ memkv. A connector and its offloading spec. docs/engines/vllm.md

    MemKVConnector        vLLM's OffloadingConnector, in which a load may fail
    MemKVOffloadingSpec   makes the manager (vllm_gpu_manager.py) and the worker (vllm_gpu_worker.py)

vLLM's own OffloadingConnector (0.33) asserts that every transfer succeeds, and a failed load would end the
engine. So there is a connector of our own, which is that one but for what becomes of a failure: the request
computes the blocks that have not come, and does not find them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingSpec
from vllm.v1.kv_offload.config import OffloadingConfig

from ..rdma.errors import LocalError
from .settings import Settings
from .vllm_gpu_manager import MemKVManager
from .vllm_gpu_worker import MemKVResult, MemKVWorker
from .vllm_identity import check_hash_algorithm, identity, model_facts

SPEC = {"spec_name": "MemKVOffloadingSpec", "spec_module_path": "memkv.connectors.vllm_gpu"}
FACTS = "_memkv"  # in the extra config: what the connector tells the spec of the model
ENGINES_OWN = (
    *SPEC,
    FACTS,
    "block_size",
    "blocks_per_chunk",
    "offload_prompt_only",
    "self_describing_kv_events",
    "sync_load_budget_bytes",
)


class MemKVOffloadingSpec(OffloadingSpec):
    """Made by vLLM's OffloadingSpecFactory, for :class:`MemKVConnector`.

    :raises LocalError: a setting that cannot be meant, or another connector.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        facts = self.extra_config.get(FACTS)
        if facts is None:
            raise LocalError(
                "MemKVOffloadingSpec is not for OffloadingConnector, which ends the engine if a load fails",
                '"kv_connector": "MemKVConnector", "kv_connector_module_path": "memkv.connectors.vllm_gpu"',
            )
        if config.cache.blocks_per_chunk != 1:
            raise LocalError(
                "memkv keeps single blocks of the GPU", "leave block_size and blocks_per_chunk out"
            )
        if not config.worker_kv_bytes_per_block:
            raise LocalError("this model has no KV cache to keep")
        self.settings = Settings.read(self.extra_config, ignore=ENGINES_OWN)
        self.replicated_layout = config.replicated_layout  # then one worker stores for all
        self._facts: Mapping[str, str] = facts
        self._manager: MemKVManager | None = None
        self._worker: MemKVWorker | None = None

    def get_manager(self) -> MemKVManager:
        if self._manager is None:
            parallel = self.config.parallel
            ranks = 1 if self.replicated_layout else parallel.world_size
            identities = [
                identity(
                    replace(self.config, parallel=replace(parallel, rank=rank)),
                    self.settings,
                    "pieces",
                    self._facts,
                )
                for rank in range(ranks)
            ]
            peer = self.settings.connect(identities[0], self.config.worker_kv_bytes_per_block)
            self._manager = MemKVManager(peer, identities, self.settings)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> MemKVWorker:
        if self._worker is None:
            mine = identity(self.config, self.settings, "pieces", self._facts)
            block_bytes = self.config.worker_kv_bytes_per_block
            peer = self.settings.connect(mine, block_bytes)
            try:
                self._worker = MemKVWorker(peer, mine, kv_caches, block_bytes, self.settings)
            except BaseException:
                peer.close()
                raise
        return self._worker


@dataclass
class MemKVWorkerMetadata(OffloadingWorkerMetadata):
    """With what workers could not load or store: job → places in its digests."""

    failed: dict[int, list[int]] = field(default_factory=dict)

    def aggregate(self, other: Any) -> MemKVWorkerMetadata:
        both = super().aggregate(other)
        failed = dict(self.failed)
        for number, places in getattr(other, "failed", {}).items():
            failed[number] = sorted({*failed.get(number, ()), *places})
        return MemKVWorkerMetadata(both.completed_jobs, both.transfer_stats, failed)


class MemKVConnectorWorker(OffloadingConnectorWorker):
    """vLLM's, in which a transfer may fail."""

    def __init__(self, spec: MemKVOffloadingSpec, vllm_config: Any, kv_cache_config: Any) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        # Block ids are unique in a cache group only: with more of them, vLLM takes whole requests.
        self._by_block = len(kv_cache_config.kv_cache_groups) == 1
        self._failed: dict[int, list[int]] = {}
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        assert self.worker is not None
        received: set[str] = set()
        for result in self.worker.get_finished():
            assert isinstance(result, MemKVResult)
            is_load = result.job_id in self._load_jobs
            request = self._load_jobs.pop(result.job_id, None)
            stats = self._connector_worker_meta.transfer_stats
            if result.success:
                (stats.load if is_load else stats.store).record(result.transfer_size, result.transfer_time)
            else:
                self._failed[result.number] = result.failed
                if is_load and self._by_block:
                    self._failed_blocks.update(result.blocks)
                elif request is not None:
                    self._failed_requests.add(request)
            self._connector_worker_meta.mark_completed(result.job_id)
            if request is not None:
                received.add(request)
        return set(), received

    def take_failed_requests(self) -> set[str]:
        out, self._failed_requests = self._failed_requests, set()
        return out

    def take_failed_blocks(self) -> set[int]:
        out, self._failed_blocks = self._failed_blocks, set()
        return out

    def build_connector_worker_meta(self) -> MemKVWorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        failed, self._failed = self._failed, {}
        return MemKVWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failed)


class MemKVConnector(OffloadingConnector):
    """Loaded by vLLM's KVConnectorFactory.

    :raises LocalError: a configuration in which a failed load would fail its request, blocks could not be
        found by others, or a failure not be told to vLLM; it names the option.
    """

    connector_worker: Any

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check(vllm_config, kv_cache_config)
        name_spec(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_worker is not None:
            spec = self.connector_worker.spec
            self.connector_worker = MemKVConnectorWorker(spec, vllm_config, kv_cache_config)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        results.failed_recving = self.connector_worker.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        blocks: set[int] = self.connector_worker.take_failed_blocks()
        return blocks

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, MemKVWorkerMetadata) and meta.failed:
            manager = self.scheduler.manager
            with manager.lock:
                manager.failed(meta.failed)
        super().update_connector_output(connector_output)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """All layers of a block beside each other: then it is one piece. vLLM takes it where the attention
        backend can, and says so where not.
        """
        return "BLHNC"

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any) -> Any:
        name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *args)


def name_spec(vllm_config: Any) -> None:
    """Puts the spec and what it has to know of the model into the extra config, once in each process."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    for name, value in SPEC.items():
        if extra.setdefault(name, value) != value:
            raise LocalError(f"MemKVConnector with {name} {extra[name]!r}", f"leave {name} out")
    extra.setdefault(FACTS, model_facts(vllm_config))


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """:raises LocalError: see :class:`MemKVConnector`."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    check_hash_algorithm(vllm_config.cache_config.prefix_caching_hash_algo)
    if transfer.kv_load_failure_policy != "recompute":
        raise LocalError(
            "a request whose blocks cannot be loaded would fail",
            '"kv_load_failure_policy": "recompute" in --kv-transfer-config',
        )
    if parallel.pipeline_parallel_size > 1:
        raise LocalError(
            "MemKVConnector does not know pipeline parallelism", "take the memkv tier: docs/engines/vllm.md"
        )
    if kv_cache_config.hisparse_host_num_blocks is not None:
        raise LocalError("MemKVConnector does not know caches that are partly in host memory (HiSparse)")
    if int(transfer.kv_connector_extra_config.get("sync_load_budget_bytes", 0)):
        # vLLM 0.33 takes the token of the next step, which was planned before the failure was known; and of
        # a model with several cache groups it cannot be told at all.
        raise LocalError(
            "vLLM would go on with what a failed synchronous load has left",
            "leave sync_load_budget_bytes out",
        )

"""vLLM's secondary tier: memkv below vLLM's own tier of host memory. docs/engines/vllm.md

A row of the host tier, which is a chunk of all workers of the engine together, is one block. The host tier is
one buffer that is registered once; blocks are READ into it and pulled out of it without a copy in between.
vLLM calls all of this in its scheduler: nothing here waits but :meth:`MemKVTier.drain_jobs` and
:meth:`MemKVTier.shutdown`, which are to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ..rdma.errors import LocalError, MemKVError
from ..tickets import Ticket
from .settings import Settings
from .vllm_identity import hashes_are_shared, identity
from .vllm_lookups import Lookups
from .vllm_outcomes import Outcomes

log = logging.getLogger("memkv.vllm")


class MemKVTier(SecondaryTierManager):
    """Made by vLLM's SecondaryTierFactory, from ``{"type": "memkv", "nodes": …}`` in ``secondary_tiers``.

    :param revision: the model's, if nodes are shared by engines that serve several: vLLM does not tell it.
    :param locality: for vLLM's ``kv_load_tiers``. :param settings: see memkv.connectors.settings.
    :raises MemKVError: a setting that cannot be meant, or no node can be reached.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        revision: str = "",
        locality: str = "REMOTE",
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality)
        self._settings = Settings.read(settings)
        if primary_kv_view.nbytes == 0:
            raise LocalError("the host tier is empty", "cpu_bytes_to_use in kv_connector_extra_config")
        # By address: vLLM releases its view in the end, and cannot while another one is held.
        address = np.frombuffer(primary_kv_view, np.uint8).ctypes.data
        self._identity = identity(offloading_spec.config, self._settings, "rows", {"revision": revision})
        self._peer = self._settings.connect(self._identity, self._block_size_bytes)
        try:
            self._rows = self._peer.register((address, primary_kv_view.nbytes))
        except BaseException:
            self._peer.close()
            raise
        self._lookups = Lookups(self._peer, self._identity.keys, self._settings.get_timeout)
        self._loading: dict[int, list[OffloadKey]] = {}  # by job
        self._results: deque[tuple[JobResult, TransferJob]] = deque()
        self._under_way = 0
        self._idle = threading.Condition()
        self._outcomes = {True: Outcomes("load"), False: Outcomes("store")}  # by whether it is a load
        self._off: bool | None = None  # not known before the first request
        log.info("memkv tier: namespace %s, fabric %s", self._peer.namespace, self._peer.stats()["fabric"])

    # --- requests ---

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        if self._off is None:
            self._off = not hashes_are_shared()
            if self._off:
                log.error(
                    "the memkv tier is off: with this hash algorithm every process has block hashes of its "
                    "own, and no other could find what this one stores. Set --prefix-caching-hash-algo "
                    "sha256_cbor, or the same PYTHONHASHSEED for all processes"
                )
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.release(req_context.req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        held = False if self._off else self._lookups.lookup(key, req_context.req_id)
        if held is None:
            return LookupResult.RETRY
        return LookupResult.HIT if held else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    # --- jobs ---

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._settings.put_timeout, durability=self._settings.durability)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._loading[job_metadata.job_id] = list(job_metadata.keys)
        self._submit(job_metadata, self._settings.get_timeout, exact=True)

    def _submit(self, job: TransferJob, timeout: float, **options: Any) -> None:
        """Starts a job; whatever becomes of it is in ``_results`` in the end."""
        with self._idle:
            self._under_way += 1
        done = partial(self._done, job, time.monotonic())
        if not len(job.keys):
            done(Ticket(done=True, status=np.empty(0, np.uint8)))
            return
        try:
            if self._off:
                raise LocalError("the memkv tier is off")
            keys = self._identity.keys(job.keys)
            offsets = np.asarray(job.chunk_ids, np.uint64) * np.uint64(self._block_size_bytes)
            slices = self._rows.slices(offsets, self._block_size_bytes)
            submit = self._peer.submit_get if job.is_promotion else self._peer.submit_put
            submit(keys, slices, timeout=timeout, then=done, **options)
        except MemKVError as error:
            done(Ticket(done=True, error=error))

    def _done(self, job: TransferJob, started: float, ticket: Ticket) -> None:
        """On the control thread, or where a job could not start. Nobody touches the rows any more."""
        good = self._outcomes[job.is_promotion].good(ticket, len(job.keys))
        result = JobResult(
            job_id=job.job_id,
            success=bool(good.all()),
            successful_keys=[key for key, ok in zip(job.keys, good.tolist(), strict=True) if ok],
            transfer_time=time.monotonic() - started,
            transfer_bytes=int(good.sum()) * self._block_size_bytes,
        )
        with self._idle:
            self._results.append((result, job))
            self._under_way -= 1
            self._idle.notify_all()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        out = []
        while self._results:
            result, job = self._results.popleft()
            good: Collection[OffloadKey] = result.successful_keys or ()
            if job.is_promotion:
                if not result.success:
                    self._lookups.mark(set(self._loading[job.job_id]).difference(good), held=False)
                del self._loading[job.job_id]
            else:
                self._lookups.mark(good, held=True)
            out.append(result)
        return out

    def drain_jobs(self) -> None:
        """Waits until no job is under way: until their deadlines at most."""
        with self._idle:
            self._idle.wait_for(lambda: not self._under_way)

    def shutdown(self) -> None:
        self._peer.close()

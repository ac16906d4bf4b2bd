"""GPU ↔ memkv, on the side of vLLM's scheduler: which blocks to load, which to store.

A vLLM block is one memkv block for each worker and each tensor that it spans (vllm_gpu_worker.py). The
scheduler looks up one of them for each worker, the last; a load is a hit only if all of them are.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

from ..keys import Keys
from ..peer import Peer
from .identity import Identity
from .settings import Settings
from .vllm_lookups import Lookups

KEPT = 1 << 16  # blocks of which we remember that they are held
KEPT_SECONDS = 60.0  # and for how long: then they are offered to the nodes again, which may have evicted them


@dataclass(slots=True)
class MemKVBlocks(LoadStoreSpec):
    """The memkv side of a job, sent to the workers.

    :param namespace: the scheduler's, which has to be the worker's. :param number: of the job, for
        :meth:`MemKVManager.failed`. :param digests: of its blocks, in the order of the GPU blocks on its
        other side.
    """

    namespace: str
    number: int
    digests: list[bytes]


class MemKVManager(OffloadingManager):
    """Called by vLLM's scheduler only. Nothing waits but :meth:`shutdown`.

    :param identities: one for each worker that keeps pieces of its own.
    """

    def __init__(self, peer: Peer, identities: Sequence[Identity], settings: Settings) -> None:
        self._peer = peer
        self._identities = identities
        self._epoch = b""
        self._lookups = Lookups(peer, self._keys_of, settings.get_timeout)
        self._numbers = itertools.count()
        self._jobs: dict[int, list[OffloadKey]] = {}
        self._loads: dict[str, int] = {}  # request → job; a request has one load at a time
        self._stores: dict[OffloadKey, int] = {}  # block → job
        self._lost: set[OffloadKey] = set()  # under way, and a worker could not store it
        self._kept: OrderedDict[OffloadKey, float] = OrderedDict()  # held as we know, and since when

    def _digests(self, keys: Iterable[bytes]) -> list[bytes]:
        return [key + self._epoch for key in keys]

    def _keys_of(self, keys: Sequence[bytes]) -> Keys:
        digests = self._digests(keys)
        return np.concatenate([identity.keys(digests) for identity in self._identities])

    # --- requests ---

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.release(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        held = self._lookups.lookup(key, req_context.req_id)
        if held is None:
            return LookupResult.RETRY
        return LookupResult.HIT if held else LookupResult.MISS

    # --- jobs ---

    def _job(self, keys: list[OffloadKey]) -> MemKVBlocks:
        number = next(self._numbers)
        self._jobs[number] = keys
        return MemKVBlocks(self._peer.namespace, number, self._digests(keys))

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        blocks = self._job(list(keys))
        self._loads[req_context.req_id] = blocks.number
        return blocks

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        number = self._loads.pop(req_context.req_id, None)
        if number is not None:
            self._jobs.pop(number, None)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Blocks that are held already, as far as we know, are left out: vLLM offers a prompt's blocks anew
        for every request that has them.
        """
        now = time.monotonic()
        known = [key in self._stores or self._is_kept(key, now) for key in keys]
        wanted = [key for key, left_out in zip(keys, known, strict=True) if not left_out]
        blocks = self._job(wanted)
        if wanted:
            self._stores.update(dict.fromkeys(wanted, blocks.number))
        else:
            del self._jobs[blocks.number]
        return PrepareStoreOutput(keys_to_store=wanted, store_spec=blocks, evicted_keys=[])

    def _is_kept(self, key: OffloadKey, now: float) -> bool:
        since = self._kept.get(key)
        return since is not None and now - since < KEPT_SECONDS

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """All workers are done with these. What one of them could not store was told by :meth:`failed`."""
        stored = [key for key in keys if success and key in self._stores and key not in self._lost]
        now = time.monotonic()
        for key in stored:
            self._kept[key] = now
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        self._lookups.mark(stored, held=True)
        for key in keys:
            self._jobs.pop(self._stores.pop(key, -1), None)
        self._lost.difference_update(keys)

    def failed(self, jobs: Mapping[int, Iterable[int]]) -> None:
        """Blocks that a worker could not load or store: job → places in its digests. They are not looked up
        again for the requests that failed on them, and stored again when they are offered.
        """
        for number, places in jobs.items():
            keys = self._jobs.get(number)
            if keys is None:
                continue  # of before a reset
            bad = [keys[place] for place in places]
            self._lookups.mark(bad, held=False)
            for key in bad:
                self._kept.pop(key, None)
                if self._stores.get(key) == number:
                    self._lost.add(key)

    # --- ends ---

    def reset_cache(self) -> None:
        """What was stored until now is never found again, by this engine: vLLM asks for this when weights
        have changed under the same name. From here on it shares nothing with others.
        """
        self._epoch = os.urandom(16)
        self._lookups.clear()
        for state in (self._jobs, self._loads, self._stores, self._lost, self._kept):
            state.clear()

    def shutdown(self) -> None:
        self._peer.close()

"""SGLang's HiCache storage backend: pages of its host pools, kept on memkv's nodes. docs/engines/sglang.md

SGLang loads :class:`MemKVHiCacheStorage` by name (backend ``dynamic``). Its prefetch threads ask how long a
prefix is held and fetch it into the host pool, its backup thread hands over what is kept there. Every pool
has a peer and a namespace of its own (:mod:`.sglang_pool`); :mod:`.sglang_identity` says what names a block.

A method raises only for what is a mistake in the program or its configuration. A miss, a node that is gone
and a deadline are pages that are not there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from ..rdma.errors import LocalError, MemKVError
from .identity import Identity
from .settings import Settings
from .sglang_identity import identity_of
from .sglang_metrics import Metrics
from .sglang_pages import Flags, ending_windows
from .sglang_pool import FlatBlocks, PoolBlocks, check, memory_of, pieces_of

log = logging.getLogger("memkv.sglang")

# Names in the backend's extra configuration that are SGLang's own.
SGLANG = (
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "allocator",
    "tp_lcm_size",
    "file_storage_path",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
)


class MemKVHiCacheStorage(HiCacheStorage):
    """:param storage_config: ranks, model, and the extra configuration: memkv's settings among SGLang's.
    :param kwargs: what SGLang's loader of dynamic backends adds: nothing, in 0.5.23.
    :raises LocalError: a setting that is unknown, or cannot be meant.

    Nodes are connected to when a host pool is registered: if none can be used SGLang does not start.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        extra = storage_config.extra_config or {}
        self.storage_config = storage_config
        self.settings = Settings.read(extra, ignore=SGLANG)
        self.zero_copy = bool(extra.get("interface_v1", 0))  # SGLang reads it so
        self._anchor: Any = None
        self._without_kv = False  # the KV pool has no memory: all data are in side pools
        self._kv_pages: PoolBlocks | None = None
        self._pools: dict[str, PoolBlocks | None] = {}  # None: a pool without layers on this rank
        self._flat: FlatBlocks | None = None
        self._flat_lock = threading.Lock()  # while it is made
        self._metrics = Metrics(storage_config.enable_storage_metrics)

    # --- host pools ---

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Connects to the nodes, and registers the memory of the KV pool, once and whole.

        A pool without memory, whose data are all in side pools, is only remembered.
        :raises MemKVError: no node can be used, or the memory cannot be registered. LocalError: a layout
            whose pages cannot be moved without a copy.
        """
        if self._anchor is not None:
            raise LocalError("a second KV pool", "one backend for each cache controller")
        super().register_mem_pool_host(mem_pool_host)
        self._anchor = mem_pool_host
        check(mem_pool_host)
        self._without_kv = not memory_of(mem_pool_host)
        if self.zero_copy:
            self._kv_pages = self._open(PoolName.KV, mem_pool_host)
        elif not self._without_kv:
            self._flat_blocks()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Registers a side pool: Mamba states, sliding windows, an indexer, a draft model's KV."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool is self._anchor:
            return
        if host_pool_name in self._pools:
            raise LocalError(f"a second host pool of the name {host_pool_name}")
        self._pools[host_pool_name] = self._open(host_pool_name, host_pool)

    def _open(self, name: str, pool: Any) -> PoolBlocks | None:
        check(pool)
        if not memory_of(pool):
            return None
        pieces = pieces_of(pool)
        identity = self._identity(name, pool, [int(size) for size in pieces.size])
        blocks = PoolBlocks(self.settings, identity, pool, pieces)
        log.info(
            "host pool %s: %d pages of %d bytes, %s in %d pieces each, in namespace %s",
            name,
            pieces.pages,
            pieces.page_bytes,
            pool.layout,
            len(pieces),
            blocks.peer.namespace,
        )
        return blocks

    def _identity(self, name: str, pool: Any, sizes: list[int]) -> Identity:
        if self._anchor is None:
            raise LocalError("no KV pool is registered yet", "register_mem_pool_host()")
        return identity_of(
            self.storage_config,
            pool,
            name=name,
            page_tokens=int(self._anchor.page_size),
            sizes=sizes,
            salt=self.settings.salt,
        )

    def _kv(self) -> PoolBlocks | None:
        """None for a KV pool that has no memory."""
        if self._anchor is None:
            raise LocalError("no KV pool is registered yet", "register_mem_pool_host()")
        if self._kv_pages is None and not self._without_kv:
            raise LocalError("the KV pool's memory is not registered", '"interface_v1": 1')
        return self._kv_pages

    def _pool(self, name: str) -> PoolBlocks | None:
        if name in self._pools:
            return self._pools[name]
        if name != PoolName.KV:
            raise LocalError(f"no host pool {name} is registered", "register_mem_host_pool_v2()")
        return self._kv()

    # --- pages of the KV pool, without a copy ---

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many pages are held from the first on, without a gap: the prefix that can be fetched."""
        if not self.zero_copy and not self._without_kv:
            flat = self._flat_blocks()
            return flat.match(flat.keys(keys))
        pages = self._kv()
        return pages.match_pages(keys) if pages else 0

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Fetches pages into the KV pool: whether each is there now. If not, its content is undefined.

        :param host_indices: int64 tensor: the pool's slots of all tokens of these pages, in order.
        """
        pages = self._kv()
        if pages is None:
            return [True] * len(keys)
        with self._metrics.fetching() as moved:
            done = pages.get_pages(keys, host_indices)
            moved.pages, moved.page_bytes = int(done.sum()), pages.pieces.page_bytes
        return _plain(done)

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Has pages of the KV pool kept: whether each is. They must not change before this returns."""
        pages = self._kv()
        if pages is None:
            return [True] * len(keys)
        with self._metrics.keeping() as moved:
            done = pages.put_pages(keys, host_indices)
            moved.pages, moved.page_bytes = int(done.sum()), pages.pieces.page_bytes
        return _plain(done)

    # --- pages of several pools: hybrid models ---

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Sequence[PoolTransfer] | None = None,
        extra_info: Any = None,
    ) -> PoolTransferResult:
        """At which lengths the prefix can be restored: where the KV pool has all of it, and every side pool
        what it needs at that length (all pages, or the last few).
        """
        kv = len(keys) if self._without_kv else self.batch_exists(keys, extra_info)
        hits: dict[str, int] = {PoolName.KV: kv} if kv else {}
        restorable = np.ones(kv, np.bool_)
        for transfer in pool_transfers or ():
            if not restorable.any() or transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # block groups never decide, and a pool that is not named says nothing
            pages = self._pool(transfer.name)
            held = pages.held_pages(keys[:kv]) if pages else np.ones(kv, np.bool_)
            window = len(transfer.keys or ()) or 1
            trailing = transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES
            good = ending_windows(held, window if trailing else kv)
            if good.any():
                hits[transfer.name] = int(np.flatnonzero(good)[-1]) + 1
            restorable &= good
        lengths = (np.flatnonzero(restorable) + 1).tolist()
        return PoolTransferResult(lengths[-1] if lengths else 0, hits, lengths)

    def batch_get_v2(
        self, transfers: Sequence[PoolTransfer], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Fetches pages into several pools: for each pool whether each page is there now."""
        return {t.name: self._move(t, PoolBlocks.get_pages) for t in transfers}

    def batch_set_v2(
        self, transfers: Sequence[PoolTransfer], extra_info: Any = None
    ) -> dict[str, list[bool]]:
        """Has pages of several pools kept: for each pool whether each page is."""
        return {t.name: self._move(t, PoolBlocks.put_pages) for t in transfers}

    def _move(self, transfer: PoolTransfer, how: Any) -> list[bool]:
        keys = transfer.keys or []
        pages = self._pool(transfer.name)
        if not keys or pages is None:
            return [True] * len(keys)
        if transfer.host_indices is None:
            raise LocalError(f"pages of {transfer.name} without host indices")
        return _plain(how(pages, keys, transfer.host_indices))

    # --- tensors anywhere, by a copy: what SGLang calls without interface_v1 ---

    def _flat_blocks(self) -> FlatBlocks:
        """Tensors of up to a page, each one block. They are no pieces of a pool, nor the other way round."""
        with self._flat_lock:
            if self._flat is None:
                if self._anchor is None or self._without_kv:
                    raise LocalError("no KV pool with memory is registered", "register_mem_pool_host()")
                size = self._anchor.get_dummy_flat_data_page().nbytes
                self._flat = FlatBlocks(self.settings, self._identity("kv, flat", self._anchor, [size]), size)
            return self._flat

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The target, filled; without one a tensor of bytes. None if it is not held, or of another size."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """For each key what :meth:`get` returns."""
        targets = [None] * len(keys) if target_locations is None else list(target_locations)
        if len(targets) != len(keys):
            raise LocalError(f"{len(targets)} tensors for {len(keys)} keys")
        flat = self._flat_blocks()
        with self._metrics.fetching() as moved:
            found = flat.get_tensors(keys, targets)
            moved.pages, moved.page_bytes = sum(f is not None for f in found), flat.block_bytes
        return found

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Whether the tensor is kept now."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether all of the tensors are kept now."""
        if values is None or len(values) != len(keys) or any(v is None for v in values):
            raise LocalError(f"no tensor for each of {len(keys)} keys")
        flat = self._flat_blocks()
        with self._metrics.keeping() as moved:
            done = flat.put_tensors(keys, values)
            moved.pages, moved.page_bytes = int(done.sum()), flat.block_bytes
        return bool(done.all())

    def exists(self, key: str) -> bool:
        """Whether there is a page of this key, or a tensor that was set."""
        if self.zero_copy and self.batch_exists([key]):
            return True
        flat = self._flat_blocks()
        return bool(flat.match(flat.keys([key])))

    # --- the rest ---

    def clear(self) -> None:
        """:raises MemKVError: always. Blocks are shared, and no user of them knows which are its own."""
        raise MemKVError(
            "a namespace cannot be emptied by one of its users", 'another "namespace" or "salt" begins anew'
        )

    def get_stats(self) -> Any:
        """SGLang's StorageMetrics since the last call: pages of each batch and GB/s."""
        return self._metrics.take()

    def close(self) -> None:
        """Gives the pools' memory back and leaves the nodes. May be called twice."""
        for blocks in (self._kv_pages, *self._pools.values(), self._flat):
            if blocks is not None:
                blocks.close()


def _plain(flags: Flags) -> list[bool]:
    out: list[bool] = flags.tolist()
    return out

"""LMCache's in-process storage plug-in: below its CPU tier, chunks kept on memkv nodes.

    storage_plugins: ["memkv"]
    extra_config:
      storage_plugin.memkv.module_path: memkv.connectors.lmcache_plugin
      storage_plugin.memkv.class_name: MemKVStorageBackend
      memkv.nodes: "node-1:7420"

Chunks are loaded into memory of the CPU tier, which is registered once. A chunk's key does not say how many
tokens it has; the length of its block does. docs/engines/lmcache.md.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from ..batches import Keys
from ..gets import prefix
from ..peer import Statuses
from ..rdma.errors import LocalError, MemKVError
from ..status import Status, kept
from .lmcache_keys import Layout, engine_digest, identity_of, layout_of, layout_of_object
from .lmcache_sites import Holds, Site, Sites, read_lock_ttl
from .settings import Settings

log = logging.getLogger("memkv.lmcache")

PREFIX = "memkv."
OnComplete = Callable[[CacheEngineKey], None]


class MemKVStorageBackend(StoragePluginInterface):
    """Made by LMCache's launcher. Nodes that cannot be reached are misses, and are tried again.

    :raises LocalError: a setting that cannot be meant, or a mode of LMCache's that cannot be served: layer by
        layer it has no way to say that a chunk it was promised is gone.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        if config is None or metadata is None:
            raise LocalError("LMCache's config and metadata are needed")
        if config.use_layerwise:
            raise LocalError("memkv does not serve LMCache layer by layer", "use_layerwise: false")
        extra = config.extra_config or {}
        given = {k.removeprefix(PREFIX): v for k, v in extra.items() if k.startswith(PREFIX)}
        self._settings = Settings.read(given, ignore=("lock_ttl",))
        self._format = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
        self._chunk_tokens = int(config.chunk_size)
        self._sites = Sites(self._settings)
        self._holds = Holds(read_lock_ttl(given.get("lock_ttl")))
        self._lock = threading.Lock()
        self._putting: set[CacheEngineKey] = set()
        self._unpinning: list[CacheEngineKey] = []
        self._warned = False
        self._closed = False
        if config.pre_caching_hash_algorithm == "builtin" and "PYTHONHASHSEED" not in os.environ:
            log.warning(
                "LMCache hashes tokens with Python's own hash, and PYTHONHASHSEED is not set: no other "
                "process will find what this one stores. Set it to the same number everywhere, and "
                "pre_caching_hash_algorithm to sha256_cbor"
            )
        if local_cpu_backend is not None:
            self._close_before(local_cpu_backend)

    def _close_before(self, cpu: Any) -> None:
        """LMCache closes its CPU tier first, and with it unmaps the memory that batches may be in."""
        close = cpu.close

        def close_both() -> None:
            self.close()
            close()

        cpu.close = close_both

    def __str__(self) -> str:
        return type(self).__name__

    # --- which blocks these are ---

    def _layout(self, tokens: int) -> Layout:
        return layout_of(self.metadata.get_shapes(tokens), self.metadata.get_dtypes())

    def _site(self) -> Site:
        """The site of full chunks, as they are now: LMCache knows the groups of its layers late."""
        layout = self._layout(self._chunk_tokens)
        return self._sites.get(layout.text, partial(self._identity, layout), layout.nbytes)

    def _identity(self, layout: Layout) -> Any:
        labels = {
            "chunk_tokens": str(self._chunk_tokens),
            "format": self._format.name,
            "hash": str(self.config.pre_caching_hash_algorithm),
        }
        return identity_of("engine", self.metadata.model_name, layout, self._settings.salt, labels)

    def _keys(self, site: Site, keys: Sequence[CacheEngineKey]) -> Keys:
        return site.keys(map(engine_digest, keys))

    # --- lookup ---

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """How many of ``keys`` are held, counted from the first one without a gap; with ``pin`` those are
        held for ``lock_ttl`` seconds, or until they are unpinned.
        """
        site = self._site()
        peer = site.wait()
        if peer is None or not keys:
            return 0
        blocks = self._keys(site, keys)
        try:
            if not pin:
                return peer.match(blocks, timeout=self._settings.get_timeout)
            asked_at = time.monotonic()
            status = peer.pin(blocks, self._holds.ttl, timeout=self._settings.get_timeout)
        except MemKVError as exc:
            log.warning("lookup of %d chunks: %s", len(keys), exc)
            return 0
        pinned = status == Status.DONE
        # FULL: it is there, and the node has as many pins as it allows.
        held = prefix(np.where(pinned | (status == Status.ERROR_FULL), np.uint8(Status.HIT), status))
        kept = np.flatnonzero(pinned[:held])
        self._holds.add(site, [keys[i] for i in kept], blocks[kept], asked_at)
        if pinned[held:].any():
            site.unpin(blocks[held:][pinned[held:]])
        return held

    async def batched_async_contains(
        self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False
    ) -> int:
        return await asyncio.to_thread(self.batched_contains, keys, pin)

    def pin(self, key: CacheEngineKey) -> bool:
        return self.contains(key, pin=True)

    def unpin(self, key: CacheEngineKey) -> bool:
        """LMCache does this key by key: what comes before its loop's next turn goes in one message."""
        with self._lock:
            self._unpinning.append(key)
            first = len(self._unpinning) == 1
        if first:
            self._soon(self._unpin_all)
        return True

    def _unpin_all(self) -> None:
        with self._lock:
            keys, self._unpinning = self._unpinning, []
        self._holds.release(keys)

    def _soon(self, call: Callable[[], None]) -> None:
        """On LMCache's loop, if it runs; else now."""
        if self.loop is not None and self.loop.is_running():
            try:
                self.loop.call_soon_threadsafe(call)
                return
            except RuntimeError:  # closed just now
                pass
        call()

    # --- load ---

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        return self._load([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        return self._load(keys)

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey], transfer_spec: Any = None
    ) -> list[MemoryObj]:
        """The chunks up to the first that is missing. The pins of the lookup before it are given back: on
        this way LMCache does not do that.
        """
        try:
            objects = await asyncio.to_thread(self._load, keys)
        finally:
            self._holds.release(keys)
        held = next((i for i, obj in enumerate(objects) if obj is None), len(objects))
        for obj in objects[held:]:
            if obj is not None:
                obj.ref_count_down()
        return [obj for obj in objects[:held] if obj is not None]

    def _load(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        out: list[MemoryObj | None] = [None] * len(keys)
        site = self._site()
        peer = site.wait()
        if peer is None or not keys or self.local_cpu_backend is None:
            return out
        objects = self._allocate(len(keys))
        taken = 0
        try:
            blocks = self._keys(site, keys[: len(objects)])
            status, lengths = site.fetch(peer, blocks, objects)
            for i, obj in enumerate(objects):
                taken = i + 1
                out[i] = self._accept(obj, int(lengths[i]) if status[i] == Status.HIT else 0)
        except MemKVError as exc:
            log.warning("load of %d chunks: %s", len(keys), exc)
        finally:
            for obj in objects[taken:]:
                obj.ref_count_down()
        return out

    def _allocate(self, n: int) -> list[MemoryObj]:
        """Memory for n full chunks of the CPU tier, or for as many as there is room now."""
        shapes, dtypes = self.metadata.get_shapes(self._chunk_tokens), self.metadata.get_dtypes()
        objects: list[MemoryObj] = []
        for _ in range(n):
            obj = self.local_cpu_backend.allocate(shapes, dtypes, self._format, busy_loop=False)
            if obj is None:
                log.warning("LMCache's CPU memory is full: %d of %d chunks are loaded", len(objects), n)
                break
            objects.append(obj)
        return objects

    def _accept(self, obj: MemoryObj, length: int) -> MemoryObj | None:
        """The object, cut to the tokens that its block has. A length that no chunk can have is a miss."""
        size = obj.get_size()
        if length == size:
            return obj
        part = None
        tokens, rest = divmod(length * self._chunk_tokens, size)
        if tokens and not rest and self.config.save_unfull_chunk:
            shapes, dtypes = self.metadata.get_shapes(tokens), self.metadata.get_dtypes()
            part = self.local_cpu_backend.allocate(shapes, dtypes, self._format, busy_loop=False)
            if part is not None:
                ctypes.memmove(part.data_ptr, obj.data_ptr, length)
        elif length:
            log.warning("a block of %d bytes, where chunks have up to %d: not used", length, size)
        obj.ref_count_down()
        return part

    # --- store ---

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        with self._lock:
            return key in self._putting

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: OnComplete | None = None,
    ) -> None:
        """Starts to store them, in the background; objects are referenced until that is over."""
        chosen: list[tuple[CacheEngineKey, MemoryObj]] = []
        with self._lock:
            for key, obj in zip(keys, objs, strict=False):
                if key not in self._putting and not self._closed and self._is_chunk(obj):
                    self._putting.add(key)
                    obj.ref_count_up()
                    chosen.append((key, obj))
        if not chosen:
            return
        site = self._site()
        blocks = self._keys(site, [key for key, _ in chosen])
        site.transfer(
            True, blocks, [obj for _, obj in chosen], partial(self._put, chosen, on_complete_callback)
        )

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: OnComplete | None = None,
    ) -> None:
        self.batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback)

    def _is_chunk(self, obj: MemoryObj) -> bool:
        """Whether this is what a get would make of its block."""
        shape = obj.meta.shape
        if len(shape) == 4 and obj.meta.fmt == self._format and 0 < shape[2] <= self._chunk_tokens:
            layout = self._layout(shape[2])
            if layout_of_object(obj) == layout and obj.get_size() == layout.nbytes:
                return True
        if not self._warned:
            self._warned = True
            log.warning(
                "not stored: an object %s in format %s, where chunks are %s in format %s",
                layout_of_object(obj).text,
                obj.meta.fmt,
                self._layout(self._chunk_tokens).text,
                self._format,
            )
        return False

    def _put(
        self,
        chosen: list[tuple[CacheEngineKey, MemoryObj]],
        on_complete: OnComplete | None,
        status: Statuses,
    ) -> None:
        good = kept(status)
        with self._lock:
            self._putting.difference_update(key for key, _ in chosen)
        for _, obj in chosen:
            obj.ref_count_down()
        if not good.all():
            log.warning("%d of %d chunks were not stored", len(good) - int(good.sum()), len(good))
        if on_complete is not None:
            done = [chosen[i][0] for i in np.flatnonzero(good)]
            self._soon(partial(_complete, on_complete, done))

    # --- the rest ---

    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        return self.batched_remove([key], force) == 1

    def batched_remove(self, keys: list[CacheEngineKey], force: bool = True) -> int:
        """Deletes from the nodes, for all that share them. How many there were."""
        site = self._site()
        peer = site.wait()
        if peer is None or not keys:
            return 0
        try:
            status = peer.delete(self._keys(site, keys))
        except MemKVError as exc:
            log.warning("removal of %d chunks: %s", len(keys), exc)
            return 0
        return int((status == Status.DONE).sum())

    def touch_cache(self) -> None:
        """Gets tell the nodes what is in use."""

    def get_allocator_backend(self) -> Any:
        """:raises LocalError: in a scheduler, which has no memory."""
        if self.local_cpu_backend is None:
            raise LocalError("LMCache has no CPU tier in this process", "max_local_cpu_size: above 0")
        return self.local_cpu_backend

    def close(self) -> None:
        """When this returns nobody reads or writes LMCache's memory any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._holds.release_all()
        self._sites.close()


def _complete(on_complete: OnComplete, keys: list[CacheEngineKey]) -> None:
    for key in keys:
        try:
            on_complete(key)
        except Exception:
            log.exception("what was to be called after %s was stored", key)

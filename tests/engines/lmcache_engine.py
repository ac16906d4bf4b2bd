"""For tests of the in-process plug-in: LMCache's engine on a CPU, with a connector that copies a KV cache in
host memory where the real ones copy a GPU's.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata

from memkv.connectors.lmcache_plugin import MemKVStorageBackend
from tests.nodes import address_of, until

CHUNK = 16  # tokens
LAYERS, HEADS, HEAD = 4, 2, 32
NBYTES = 2 * LAYERS * CHUNK * HEADS * HEAD * 2  # of a chunk in bfloat16
_numbers = itertools.count()

METADATA = LMCacheMetadata(
    model_name="meta-llama/Llama-3.1-8B",
    world_size=2,
    local_world_size=2,
    worker_id=1,
    local_worker_id=1,
    kv_dtype=torch.bfloat16,
    kv_shape=(LAYERS, 2, CHUNK, HEADS, HEAD),
    role="worker",
    chunk_size=CHUNK,
)


class HostConnector(GPUConnectorInterface):
    """The KV cache of a sequence: (2, layers, tokens, heads · head size), token i at place i."""

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(obj, start, end, **kwargs)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        memory_obj.tensor.copy_(kwargs["kvcaches"][:, :, start:end])

    def batched_to_gpu(
        self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any
    ) -> None:
        for obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(obj, start, end, **kwargs)

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        kwargs["kvcaches"][:, :, start:end].copy_(memory_obj.tensor)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, LAYERS, num_tokens, HEADS * HEAD])

    def initialize_kvcaches_ptr(self, **kwargs: Any) -> None: ...


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 32000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def kv_of(n: int, seed: int | None = None, dtype: Any = torch.bfloat16) -> torch.Tensor:
    """A KV cache of n tokens: random, or zeros without a seed."""
    if seed is None:
        return torch.zeros(2, LAYERS, n, HEADS * HEAD, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LAYERS, n, HEADS * HEAD, generator=generator).to(dtype)


def config_of(node: Any, fabric: str, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    plugin = {
        "storage_plugin.memkv.module_path": "memkv.connectors.lmcache_plugin",
        "storage_plugin.memkv.class_name": "MemKVStorageBackend",
        "memkv.nodes": address_of(node),
        "memkv.fabric": fabric,
    }
    defaults = {"chunk_size": CHUNK, "local_cpu": True, "max_local_cpu_size": 0.03}
    options = defaults | {"storage_plugins": ["memkv"], "extra_config": plugin | (extra or {})} | options
    return LMCacheEngineConfig.from_defaults(**options)


class Host:
    """An engine's worker on a host of its own: nothing of its CPU tier is shared with another's."""

    def __init__(self, config: Any, **metadata: Any) -> None:
        self.metadata = replace(METADATA, **metadata)
        self.name = f"memkv-{next(_numbers)}"
        self.engine = LMCacheEngineBuilder.get_or_create(
            self.name, config, self.metadata, HostConnector(), lambda t, r: None, lambda o, r: o
        )
        self.engine.post_init()

    @property
    def backend(self) -> MemKVStorageBackend:
        backend = self.engine.storage_manager.storage_backends["memkv"]
        assert isinstance(backend, MemKVStorageBackend)
        return backend

    def store(self, tokens: list[int], kv: torch.Tensor) -> None:
        """And waits until the nodes have it."""
        self.engine.store(tokens, kvcaches=kv)
        until(lambda: not self.backend._putting, what="stored")

    def lookup(self, tokens: list[int], pin: bool = False) -> int:
        """Tokens that are held, of whatever tier."""
        found: int = self.engine.lookup(tokens, lookup_id="request", pin=pin)
        return found

    def retrieve(self, tokens: list[int], dtype: Any = torch.bfloat16) -> tuple[int, torch.Tensor]:
        """(how many tokens were retrieved, the KV cache)."""
        return self.retrieve_into(tokens, kv_of(len(tokens), dtype=dtype))

    def retrieve_into(self, tokens: list[int], kv: torch.Tensor) -> tuple[int, torch.Tensor]:
        mask = self.engine.retrieve(tokens, kvcaches=kv)
        n = int(mask.sum())
        assert mask[:n].all()
        return n, kv

    def cpu_objects(self) -> int:
        """Objects of the CPU tier that are allocated."""
        cpu = self.engine.storage_manager.local_cpu_backend
        return int(cpu.memory_allocator.pin_allocator.num_active_allocations)

    def close(self) -> None:
        LMCacheEngineBuilder.destroy(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

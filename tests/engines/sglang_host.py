"""SGLang's own pools, configuration and cache controller, on the CPU, for tests of its storage backend."""

# ruff: noqa: E402 - the engine is imported where it is known to be there

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ..nodes import address_of
from .conftest import stub_torchvision

pytest.importorskip("torch", reason="torch is not installed: script/test --engines brings it")
pytest.importorskip("sglang", reason="sglang is not installed: script/test --engines brings it")
stub_torchvision()

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.runtime_context import get_context, get_parallel

from memkv.connectors.sglang import MemKVHiCacheStorage

PAGE = 4  # tokens
TOKENS = 64
MEMORY = 1 << 30  # bytes that pools may book, whatever this machine has left

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


# --- pools ---


def mha_pool(
    layout: str = "page_first",
    *,
    page: int = PAGE,
    heads: int = 2,
    layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    dim: int = 16,
    v_dim: int = 16,
) -> Any:
    """The host pool over a device pool of keys and values, as SGLang's assembler makes it."""
    device = MHATokenToKVPool(
        size=TOKENS,
        page_size=page,
        dtype=dtype,
        head_num=heads,
        head_dim=dim,
        v_head_dim=v_dim,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    info = device.get_device_pool_infos()[0].buffer_info
    return _host(get_mha_host_pool_cls(info), info, page, layout, device)


def mla_pool(layout: str = "page_first", *, page: int = PAGE, layers: int = 3, **more: Any) -> Any:
    """The host pool of latents."""
    device = MLATokenToKVPool(
        size=TOKENS,
        page_size=page,
        dtype=torch.bfloat16,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    info = device.get_device_pool_infos()[0].buffer_info
    return _host(MLATokenToKVPoolHost, info, page, layout, device, target_layer_num=layers, **more)


def _host(cls: Any, info: Any, page: int, layout: str, device: Any, **more: Any) -> Any:
    with host_memory_budget_scope(MEMORY):
        pool = cls(
            info,
            2.0,
            0,
            page,
            layout,
            pin_memory=False,
            device="cpu",
            device_capacity_tokens=device.size,
            start_layer=device.start_layer,
            end_layer=device.end_layer,
            **more,
        )
    pool.under_test = device  # for a controller
    return pool


def mamba_pool(states: int = 16, layers: int = 2) -> Any:
    """The host pool of recurrent states: a page is one state."""
    info = MambaStateBufferInfo(
        temporal=torch.zeros(layers, states, 4, 8), conv=(torch.zeros(layers, states, 6, 3),)
    )
    with host_memory_budget_scope(MEMORY):
        return MambaPoolHost(info, 2.0, 0, device_capacity=states, pin_memory=False, layout="page_first")


def compressed_pool(layout: str, layers: int = 3, pages: int = 16) -> Any:
    """One of the side pools of a model without KV of its own: a row of bytes a page and layer."""
    with host_memory_budget_scope(MEMORY):
        return DeepSeekV4PagedHostPool(
            "c4",
            [torch.zeros(pages, 96, dtype=torch.uint8)] * layers,
            96,
            pages,
            PAGE,
            layout,
            pin_memory=False,
        )


def tensors(pool: Any) -> list[torch.Tensor]:
    """A pool's memory."""
    found = pool.get_hybrid_pool_buffer() if hasattr(pool, "get_hybrid_pool_buffer") else [pool.kv_buffer]
    return [t for t in found if t.numel()]


def fill(pool: Any, seed: int) -> None:
    """The whole pool with bytes of which no two pages' are alike."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors(pool):
        data = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def wipe(pool: Any) -> None:
    for tensor in tensors(pool):
        tensor.zero_()


def page_bytes(pool: Any, slot: int) -> bytes:
    """A page, as the pool itself hands it out; the slot is its first token's."""
    try:
        page = pool.get_data_page(slot, flat=True)
    except NotImplementedError:  # keys and values of different widths
        at = slot // pool.page_size if pool.layout == "page_first_direct" else slot
        end = at + (1 if pool.layout == "page_first_direct" else pool.page_size)
        page = torch.cat([b[at:end].reshape(-1) for b in (pool.k_buffer, pool.v_buffer)])
    return bytes(page.contiguous().view(torch.uint8).numpy())


def pages_at(pool: Any, indices: torch.Tensor) -> list[bytes]:
    return [page_bytes(pool, int(i)) for i in indices[:: pool.page_size]]


def slots(pool: Any, pages: list[int]) -> torch.Tensor:
    """The slots of all tokens of these pages."""
    first = torch.tensor(pages, dtype=torch.int64) * pool.page_size
    return (first[:, None] + torch.arange(pool.page_size)).reshape(-1)


# --- the backend ---


def hashes(n: int, seed: int = 0) -> list[str]:
    """What SGLang names pages by: SHA-256 in hexadecimal."""
    return [f"{seed:032x}{i:032x}" for i in range(n)]


def extra_config(*nodes: Any, **settings: Any) -> dict[str, Any]:
    """--hicache-storage-backend-extra-config, for these nodes."""
    return {
        "backend_name": "memkv",
        "module_path": "memkv.connectors.sglang",
        "class_name": "MemKVHiCacheStorage",
        "interface_v1": 1,
        "nodes": ",".join(address_of(node) for node in nodes),
        **settings,
    }


def storage_config(extra: dict[str, Any], **changes: Any) -> HiCacheStorageConfig:
    facts: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": True,
        "model_name": "meta-llama/Llama-3-70B",
        "extra_config": extra,
    }
    return HiCacheStorageConfig(**{**facts, **changes})


@contextlib.contextmanager
def backend(
    node: Any, pool: Any, *, settings: dict[str, Any] | None = None, **config: Any
) -> Iterator[MemKVHiCacheStorage]:
    """A backend as SGLang makes it: by the factory's loader, with the pool registered."""
    extra = extra_config(node, **(settings or {}))
    made = StorageBackendFactory.create_backend("dynamic", storage_config(extra, **config), pool)
    try:
        made.register_mem_pool_host(pool)
        made.on_host_pools_registered()
        yield made
    finally:
        made.close()


# --- the controller ---


@contextlib.contextmanager
def controller(
    pool: Any,
    extra: dict[str, Any],
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    sides: dict[Any, Any] | None = None,
) -> Iterator[HybridCacheController]:
    """SGLang's cache controller with its storage threads, over a host pool, as a scheduler makes it."""
    device = pool.under_test
    allocator = PagedTokenToKVPoolAllocator(device.size, pool.page_size, device.dtype, "cpu", device, False)
    entries = [
        PoolEntry(PoolName.KV, pool, device, layer_mapper=lambda layer: layer, is_primary_index_anchor=True)
    ]
    entries += [
        PoolEntry(name, side, None, layer_mapper=lambda layer: layer) for name, side in (sides or {}).items()
    ]
    ranks = {
        "tp_rank": tp_rank,
        "tp_size": tp_size,
        "attn_tp_rank": tp_rank,
        "attn_tp_size": tp_size,
        "moe_tp_size": tp_size,
        "pp_rank": 0,
        "attn_dcp_rank": 0,
    }
    with get_context().override_server_args(), get_parallel().override(**ranks):
        made = HybridCacheController(
            allocator,
            HostPoolGroup(entries),
            pool.page_size,
            None,
            threading.Event(),
            io_backend="direct",
            storage_backend="dynamic",
            prefetch_threshold=pool.page_size,
            model_name="meta-llama/Llama-3-70B",
            storage_backend_extra_config=extra,
            enable_storage_metrics=True,
        )
        try:
            yield made
        finally:
            made.detach_storage_backend()

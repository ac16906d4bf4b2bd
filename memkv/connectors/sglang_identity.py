"""What the pages of an SGLang host pool are of: what is not the same in two deployments has other keys."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool, DeepSeekV4StateHostPool
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.runtime_context import get_model

from ..rdma.errors import LocalError
from .identity import Identity

ENGINE = "sglang-hicache-1"  # the number: of this file's choice of what counts

REPLICATED = (MLATokenToKVPoolHost, DSAIndexerPoolHost, DeepSeekV4PagedHostPool, DeepSeekV4StateHostPool)

# Of a pool, where it has them. The sizes of its pieces say the rest.
FACTS = (
    "layer_num",
    "target_layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "storage_format_tag",
    "num_mamba_layers",
    "temporal_dtype",
    "temporal_state_shape",
    "conv_dtype",
    "conv_state_shapes",
    "indexer_dtype",
)
# Of the engine's configuration: a pool of float8 says only that its elements are bytes.
CONFIGURED = ("kv_cache_dtype", "quantization", "revision")


def replicated(config: HiCacheStorageConfig, pool: Any) -> bool:
    """Whether every tensor-parallel rank holds the same pages: of latent attention and what is derived from
    it, if layers are not spread over ranks. Beside it Mamba states, and heads such as a draft model's, are
    each rank's own; and so is what is not known here.
    """
    device = getattr(pool, "device_pool", None)
    spread = getattr(pool, "_layer_shard_enabled", False) or getattr(device, "layer_shard_enabled", False)
    return config.is_mla_model and not spread and isinstance(pool, REPLICATED)


def identity_of(
    config: HiCacheStorageConfig, pool: Any, *, name: str, page_tokens: int, sizes: list[int], salt: str
) -> Identity:
    """:param name: of the pool. :param page_tokens: of the pages that SGLang hashes. :param sizes: bytes of
    each piece of a page.

    :raises LocalError: the engine does not say which model it serves.
    """
    if not config.model_name:
        raise LocalError("SGLang does not say which model these pages are of", "--served-model-name")
    shared = replicated(config, pool)
    labels = {
        "pool": str(name),
        "class": type(pool).__name__,
        "page_tokens": str(page_tokens),
        "pieces": ",".join(f"{len(list(same))}x{size}" for size, same in groupby(sizes)),
        "attn_cp": f"{config.attn_cp_rank}/{config.attn_cp_size}",
        "ranks": "replicated" if shared else "sharded",
        **{fact: str(value) for fact in FACTS if (value := getattr(pool, fact, None)) is not None},
        **{f"engine_{k}": v for k, v in _configured().items()},
    }
    return Identity(
        engine=ENGINE,
        model=config.model_name,
        dtype=str(pool.dtype).removeprefix("torch."),
        layout=str(pool.layout),
        block_tokens=int(pool.page_size),
        tp_rank=0 if shared else config.tp_rank,
        tp_size=1 if shared else config.tp_size,
        pp_rank=config.pp_rank,
        pp_size=config.pp_size,
        salt=salt,
        labels=labels,
    )


def _configured() -> dict[str, str]:
    try:
        model = get_model()
    except ValueError:  # no engine around it
        return {}
    return {name: str(value) for name in CONFIGURED if (value := getattr(model, name, None)) is not None}

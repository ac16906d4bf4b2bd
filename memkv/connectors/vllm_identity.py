"""What a vLLM block is of, from what vLLM tells offloading backends; and whether its hashes can be shared.

vLLM names a block by a hash chained over its tokens, the LoRA adapter's name and path, images and the
request's cache salt; all else that its bytes depend on is in the identity. Layouts have changed from one
version of vLLM to the next without a new name, so the version, without its patch level, is part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import vllm
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.config import OffloadingConfig

from ..rdma.errors import LocalError
from .identity import Identity
from .settings import Settings

ENGINE = "vllm-" + ".".join(vllm.__version__.split(".")[:2])


def identity(
    config: OffloadingConfig, settings: Settings, holds: str, extra: Mapping[str, str] | None = None
) -> Identity:
    """The identity of one worker's blocks, or with ``holds`` "rows" of those of all workers together.

    :param holds: "rows" of the host tier, or "pieces" of one worker's caches: what a memkv block is.
    :param extra: labels for what the configuration of offloading does not say, such as the model's revision.
    """
    parallel, cache = config.parallel, config.cache
    labels = {
        "holds": holds,
        "groups": _digest([[g.group_id, g.tokens_per_block, *g.layer_names] for g in config.groups]),
        "windows": json.dumps([g.sliding_window_size_in_chunks for g in config.groups]),
        "tokens_per_hash": str(cache.tokens_per_hash),
        "blocks_per_chunk": str(cache.blocks_per_chunk),
        "worker_bytes": str(config.worker_kv_bytes_per_block),
        "parallel": f"world {parallel.world_size} tp {parallel.tp_size} pp {parallel.pp_size} "
        f"pcp {parallel.pcp_size} dcp {parallel.dcp_size}",
        "replicated": str(config.replicated_layout),
        "canonical": str(config.canonical_layout),
    }
    for name, value in (extra or {}).items():
        labels[f"model.{name}"] = value
    stages = parallel.pp_size
    workers = max(1, parallel.world_size // stages)  # of one stage: tensor and context parallel
    rank = 0 if holds == "rows" or config.replicated_layout else parallel.rank
    return Identity(
        engine=ENGINE,
        model=config.model.name,
        dtype=config.model.dtype,
        layout=config.kv_cache_layout or "unresolved",
        block_tokens=config.groups[0].tokens_per_block * cache.blocks_per_chunk,
        tp_rank=rank % workers,
        tp_size=workers,
        pp_rank=rank // workers,
        pp_size=stages,
        salt=settings.salt,
        labels=labels,
    )


def model_facts(vllm_config: Any) -> dict[str, str]:
    """What the keys and values of a model depend on besides its name, for ``extra``: only a connector sees
    it, not a tier.
    """
    model = vllm_config.model_config
    drafter = vllm_config.speculative_config
    overrides = model.hf_overrides
    if callable(overrides):
        overrides = f"{overrides.__module__}.{overrides.__qualname__}"
    return {
        "revision": str(model.revision),
        "quantization": str(model.quantization),
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "hf_overrides": json.dumps(overrides, sort_keys=True, default=str),
        "drafter": "" if drafter is None else f"{drafter.model} {drafter.revision}",
        "plain_layers": json.dumps(sorted(vllm_config.cache_config.kv_cache_dtype_skip_layers)),
        "interleave": str(vllm_config.parallel_config.cp_kv_cache_interleave_size),
        "hash": vllm_config.cache_config.prefix_caching_hash_algo,
    }


def check_hash_algorithm(algorithm: str) -> None:
    """:raises LocalError: block hashes of ``--prefix-caching-hash-algo`` would be this process's own."""
    if not algorithm.startswith("sha256") and "PYTHONHASHSEED" not in os.environ:
        raise LocalError(
            f"with --prefix-caching-hash-algo {algorithm} every process has block hashes of its own, and no "
            "other could find what this one stores",
            "--prefix-caching-hash-algo sha256_cbor, or the same PYTHONHASHSEED for all processes",
        )


def hashes_are_shared() -> bool:
    """Whether other processes make the block hashes that this one does. Known once vLLM has made its first:
    the seed is drawn after connectors are made.
    """
    seed = kv_cache_utils.get_none_hash_seed()
    return "PYTHONHASHSEED" in os.environ or seed == kv_cache_utils.DEFAULT_NONE_HASH_SEED


def _digest(content: Any) -> str:
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

"""What KV of a transformers model is of: its configuration, its weights, the shape of its cache.

Two models of one name must not share a block. So a block's identity has, beside name and revision, a digest
of the configuration and one of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..rdma.errors import LocalError
from .identity import Identity

LAYOUT = "layer,kv,head,token,dim"
SAMPLE = (
    1024  # values of each tensor that the weights' digest looks at, from its start, and as many from its end
)

# Of a configuration: where it came from, who wrote it, and what concerns only what is done with the logits.
NOT_OF_KV = (
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


# Kinds of RoPE whose angles change with the length of the sequence that is computed.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of the KV of a token: ``layers`` times K and V of ``heads`` times ``dim`` values."""

    layers: int
    heads: int
    dim: int

    def block_bytes(self, block_tokens: int, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.heads * self.dim * block_tokens * int(dtype.itemsize)


def cache_shape(config: PreTrainedConfig) -> CacheShape:
    """The shape of a model's KV cache.

    :raises LocalError: a layer keeps something else than all K and V of full attention, such as a sliding
        window's, from which a prefix cannot be cut.
    """
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if others or not layers:
        raise LocalError(
            f"{config.model_type}: its cache has layers of {', '.join(sorted(others)) or 'no kind'}",
            "memkv keeps full attention (DynamicLayer): windows and recurrent states are not made of blocks",
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return CacheShape(len(layers), heads, dim)


def check(config: PreTrainedConfig, *, text_only: bool) -> None:
    """Whether KV follows from the token ids before it, and from nothing else.

    :raises LocalError: it does not: inputs besides token ids (``text_only`` promises that there are none), or
        position embeddings that depend on the length of the whole prompt.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise LocalError(f"{config.model_type}: its KV depends on what the encoder was given, too")
    if text is not config and not text_only:
        raise LocalError(
            f"{config.model_type}: images and the like are in its KV, and not in the token ids",
            "text_only=True if no prompt has any",
        )
    if longer := rope_types(text) & LENGTH_DEPENDENT:
        raise LocalError(f"{config.model_type}: with {min(longer)} RoPE its K depend on the prompt's length")


def rope_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of rotary embedding in a configuration, which may have one for each kind of layer."""
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None)
        for part in [given, *(given.values() if isinstance(given, dict) else ())]:
            if isinstance(part, dict):
                found |= {str(part[key]) for key in ("rope_type", "type") if key in part}
    return found


def config_digest(config: PreTrainedConfig) -> str:
    """Of everything in a configuration that KV may depend on; the same in every process."""

    def of_kv(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(k): of_kv(v) for k, v in value.items() if k not in NOT_OF_KV}

    text = json.dumps(of_kv(config.to_dict()), sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """Of names, shapes and samples of all parameters: other weights of the same shape have another, whether
    trained on, quantised, or with an adapter. It reads a few megabytes, not all.

    :raises LocalError: weights are on no device (``meta``): they are loaded piece by piece.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "meta":
            raise LocalError(f"{name} is on no device", "give fingerprint= a text of your own")
        flat = tensor.detach().reshape(-1)
        some = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()


def identity(
    config: PreTrainedConfig,
    *,
    name: str,
    revision: str,
    fingerprint: str,
    dtype: torch.dtype,
    block_tokens: int,
    salt: str,
    labels: Mapping[str, str],
) -> Identity:
    """The identity of a model's blocks. ``fingerprint``: of its weights. LocalError as for Identity."""
    shape = cache_shape(config)
    own: dict[str, Any] = {
        "config": config_digest(config),
        "weights": fingerprint,
        "layers": str(shape.layers),
        "kv_heads": str(shape.heads),
        "head_dim": str(shape.dim),
    }
    if clash := own.keys() & labels.keys():
        raise LocalError(f"the label {min(clash)!r} is memkv's own", "labels=: another name")
    return Identity(
        engine="transformers",
        model=f"{name}@{revision}" if revision else name,
        dtype=str(dtype).removeprefix("torch."),
        layout=LAYOUT,
        block_tokens=block_tokens,
        salt=salt,
        labels={**labels, **own},
    )

"""A model's shape: its parameters, bytes of KV cache, and the arithmetic of prefill and decode.

Formulas and their sources stand in docs/costs.md. Dense decoder-only transformers with grouped-query
attention and gated MLPs: the Llama family and what shares its ``config.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rdma.errors import LocalError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes as ``config.json`` names them. ``dtype_bytes``: of a weight and of an element of the KV cache."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype_bytes: int = 2
    tied: bool = False  # one matrix is input embedding and output head

    @property
    def matmul_params(self) -> int:
        """Weights of the layers that every token is multiplied with."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_params(self) -> int:
        """Weights of the output head, which only a token that is sampled from is multiplied with."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All weights, with embeddings and norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.matmul_params + self.head_params * (1 if self.tied else 2) + norms

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.params * self.dtype_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def prefill_flops(self, tokens: int, cached: int = 0) -> float:
        """FLOPs of computing a prompt's last ``tokens`` tokens behind ``cached`` ones.

        Two for each weight and token; and in each layer, for each pair of a token and one that it attends to,
        two for QKᵀ and two for the weighted sum of V, times heads times head_dim. A token attends to itself
        and all before it.
        """
        pairs = cached * tokens + tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return float(2 * self.matmul_params * tokens + 2 * self.head_params + attention)

    def decode_bytes(self, context: float, batch: int) -> float:
        """Bytes that a GPU reads for one token of one of ``batch`` sequences: its share of the weights (all
        but the input embedding) and its own KV cache."""
        weights = (self.matmul_params + self.head_params) * self.dtype_bytes
        return weights / batch + self.kv_bytes * context


LLAMA_3_8B = Shape(
    name="llama-3-8b",
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
)
LLAMA_3_70B = Shape(
    name="llama-3-70b",
    layers=80,
    hidden=8192,
    intermediate=28672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
)
SHAPES = {shape.name: shape for shape in (LLAMA_3_8B, LLAMA_3_70B)}

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


def load(name: str) -> Shape:
    """A preset, or what a model's ``config.json`` says. LocalError names what it lacks."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    knob = f"--model takes {', '.join(SHAPES)} or a model's config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LocalError(f"the model {name} cannot be read: {error}", knob) from None
    if not isinstance(raw, dict):
        raise LocalError(f"{name} is no JSON object", knob)
    return _from_config(raw, path.parent.name or path.stem, name)


def _from_config(raw: dict[str, Any], title: str, where: str) -> Shape:
    """Keys of Hugging Face's LlamaConfig."""

    def number(key: str, default: int | None = None) -> int:
        value = raw.get(key, default)
        if type(value) is not int or value < 1:
            raise LocalError(
                f"{where}: {key} is {value!r}", "a dense decoder's config.json, with whole numbers from 1"
            )
        return value

    if any(raw.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise LocalError(f"{where}: a mixture of experts", "the formulas are of dense decoders")
    if raw.get("kv_lora_rank"):
        raise LocalError(
            f"{where}: multi-head latent attention", "the formulas are of grouped-query attention"
        )
    dtype = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    if dtype not in _DTYPES:
        raise LocalError(f"{where}: torch_dtype is {dtype!r}", f"one of {', '.join(_DTYPES)}")
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return Shape(
        name=title,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads) if raw.get("head_dim") else hidden // heads,
        vocab=number("vocab_size"),
        dtype_bytes=_DTYPES[dtype],
        tied=bool(raw.get("tie_word_embeddings", False)),
    )

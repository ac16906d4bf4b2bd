"""Shapes of dense decoder-only transformers (Llama's kind), by name or from a ``config.json``, and what
follows from one: parameters, bytes of KV cache, the arithmetic of prefill and decode.

Formulas and their sources: docs/costs.md and docs/ttft.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..rdma.errors import LocalError

# Names in a config that mean KV or layers of another kind.
REFUSED = {
    "kv_lora_rank": "has multi-head latent attention",
    "num_experts": "is a mixture of experts",
    "num_local_experts": "is a mixture of experts",
    "n_routed_experts": "is a mixture of experts",
}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """``layers`` are those that are run, ``of_layers`` those that the model has. ``dtype_bytes``: of a weight
    and of an element of the KV cache, where nobody says otherwise. ``tied``: embedding and head are one.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    dtype_bytes: int = 2
    tied: bool = False
    rope_theta: float = 10000.0
    eps: float = 1e-5
    of_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            if getattr(self, name) < 1:
                raise LocalError(f"{self.name}: {name} is {getattr(self, name)}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise LocalError(
                f"{self.name}: {self.heads} heads of {self.head_dim} over {self.kv_heads} KV heads",
                "heads: a multiple of KV heads; head dimension: even",
            )
        if not self.of_layers:
            object.__setattr__(self, "of_layers", self.layers)

    def cut(self, layers: int) -> Shape:
        """The same with only so many of its layers. :raises LocalError: it has not so many."""
        if layers > self.of_layers:
            raise LocalError(f"{self.name} has {self.of_layers} layers", f"--layers 1 to {self.of_layers}")
        return replace(self, layers=layers)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def matmul_params(self) -> int:
        """Weights of the layers' matrices, which every token is multiplied with."""
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

    def kv_bytes(self, tokens: int = 1, dtype_bytes: int = 0) -> int:
        """Bytes of K and V of so many tokens, in all layers. ``dtype_bytes`` 0: the shape's own."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (dtype_bytes or self.dtype_bytes) * tokens

    def prefill_flops(self, tokens: int, cached: int = 0) -> int:
        """FLOPs of computing a prompt's last ``tokens`` behind ``cached`` ones, up to one row of logits.

        Kaplan et al. 2020 (arXiv 2001.08361, table 1): two for each weight and token; and in each layer, for
        each pair of a token and one that it attends to, two for QKᵀ and two for the sum of V, times heads
        times head_dim. A token attends to itself and all before it. Norms, RoPE and softmax are left out.
        """
        pairs = tokens * cached + tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * self.matmul_params * tokens + attention + 2 * self.head_params

    def decode_bytes(self, context: float, batch: int) -> float:
        """Bytes that a GPU reads for one token of one of ``batch`` sequences: its share of the weights (all
        but the input embedding) and its own KV cache."""
        weights = (self.matmul_params + self.head_params) * self.dtype_bytes
        return weights / batch + self.kv_bytes() * context

    def describe(self) -> str:
        part = "" if self.layers == self.of_layers else f" (ONLY these of {self.of_layers})"
        return (
            f"{self.name}: {self.layers} layers{part}, hidden {self.hidden}, {self.heads} heads and "
            f"{self.kv_heads} KV heads of {self.head_dim}, intermediate {self.intermediate}, "
            f"vocabulary {self.vocab}; {self.params / 1e6:.4g} million weights"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _llama3(name: str, layers: int, hidden: int, heads: int, intermediate: int) -> Shape:
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocab=128256,
        rope_theta=500000.0,
    )


# Small enough for a processor that is emulated, at a few thousand operations for a byte of KV.
TINY = Shape(
    name="tiny", layers=2, hidden=256, heads=8, kv_heads=2, head_dim=32, intermediate=512, vocab=1024
)
LLAMA_3_8B = _llama3("llama-3-8b", 32, 4096, 32, 14336)
LLAMA_3_70B = _llama3("llama-3-70b", 80, 8192, 64, 28672)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in (TINY, LLAMA_3_8B, LLAMA_3_70B)}


def find(name: str) -> Shape:
    """A shape by name, or from a Hugging Face ``config.json`` (or the folder that has one).

    :raises LocalError: there is none, or it is of a model that this is no shape of.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    knob = f"--model takes {', '.join(SHAPES)} or a model's config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LocalError(f"the model {name} cannot be read: {error}", knob) from None
    if not isinstance(config, dict):
        raise LocalError(f"{path} is no JSON object", knob)
    return from_config(config, str(config.get("_name_or_path") or path.parent.name or path.stem))


def from_config(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a model's configuration describes, with the names of Hugging Face's LlamaConfig.

    :raises LocalError: as :func:`find`.
    """

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise LocalError(
                f"{name}: {key} is {value!r}", "--model: a dense decoder's config.json, whole numbers from 1"
            )
        return value

    for key, why in REFUSED.items():
        if config.get(key):
            raise LocalError(f"{name} {why} ({key})", "--model: a dense transformer of Llama's kind")
    others = set(config.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise LocalError(f"{name} has layers of other kinds: {', '.join(sorted(others))}", "--model: another")
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise LocalError(f"{name}: torch_dtype is {dtype!r}", f"one of {', '.join(DTYPES)}")
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    rope = config.get("rope_parameters") or {}
    return Shape(
        name=name,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        intermediate=number("intermediate_size"),
        vocab=number("vocab_size"),
        dtype_bytes=DTYPES[dtype],
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        eps=float(config.get("rms_norm_eps") or 1e-5),
    )

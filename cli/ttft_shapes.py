"""Shapes of decoder-only transformers (Llama's kind), by name or from a ``config.json``, and what follows:
bytes of KV, floating point operations of a prefill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..rdma.errors import LocalError

NEEDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Names in a config that mean KV or layers of another kind than those of cli/transformer.py.
REFUSED = {
    "kv_lora_rank": "keeps latent KV (MLA)",
    "num_experts": "is a mixture of experts",
    "num_local_experts": "is a mixture of experts",
    "n_routed_experts": "is a mixture of experts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """``layers`` are those that are run, ``of_layers`` those that the model has."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
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
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """All of them, of the layers that are run; embedding and head are two matrices."""
        return self.layers * self.layer_weights + 2 * self.vocab * self.hidden

    def kv_bytes(self, tokens: int, dtype_bytes: int) -> int:
        """K and V of so many tokens, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes * tokens

    def prefill_flops(self, tokens: int, start: int = 0) -> int:
        """Operations that computing ``tokens`` behind ``start`` earlier ones takes, up to one row of logits.

        Kaplan et al. 2020 (arXiv 2001.08361, table 1): two for each weight and token; two for each of Q·K and
        P·V, head dimension, and pair of a query and a key that it sees. Norms, RoPE and softmax are left out.
        """
        pairs = tokens * start + tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * self.layers * self.layer_weights * tokens + attention + 2 * self.hidden * self.vocab

    def describe(self) -> str:
        part = "" if self.layers == self.of_layers else f" (ONLY these of {self.of_layers})"
        return (
            f"{self.name}: {self.layers} layers{part}, hidden {self.hidden}, {self.heads} heads and "
            f"{self.kv_heads} KV heads of {self.head_dim}, intermediate {self.intermediate}, "
            f"vocabulary {self.vocab}; {self.weights / 1e6:.4g} million weights"
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


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        # Small enough for a processor that is emulated, at a few thousand operations for a byte of KV.
        Shape(
            name="tiny",
            layers=2,
            hidden=256,
            heads=8,
            kv_heads=2,
            head_dim=32,
            intermediate=512,
            vocab=1024,
        ),
        _llama3("llama-3-8b", 32, 4096, 32, 14336),
        _llama3("llama-3-70b", 80, 8192, 64, 28672),
    )
}


def find(name: str) -> Shape:
    """A shape by name, or from a Hugging Face ``config.json`` (or the folder that has one).

    :raises LocalError: there is none, or it is of a model that this is no shape of.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        known = ", ".join(SHAPES)
        raise LocalError(f"--model {name}: {error}", f"--model: one of {known}, or a config.json") from None
    if not isinstance(config, dict):
        raise LocalError(f"{path}: no object", "--model: a model's config.json")
    return from_config(config, str(config.get("_name_or_path") or path.parent.name or path.stem))


def from_config(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a model's configuration describes. :raises LocalError: as :func:`find`."""
    if missing := [key for key in NEEDS if not isinstance(config.get(key), int)]:
        raise LocalError(f"{name}: no {', '.join(missing)} in its configuration", "--model: a config.json")
    for key, why in REFUSED.items():
        if config.get(key):
            raise LocalError(f"{name} {why} ({key})", "--model: a dense transformer of Llama's kind")
    others = set(config.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise LocalError(f"{name} has layers of other kinds: {', '.join(sorted(others))}", "--model: another")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    return Shape(
        name=name,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        eps=float(config.get("rms_norm_eps") or 1e-5),
    )

"""A decoder-only transformer in NumPy: RMSNorm, RoPE, grouped-query attention, SwiGLU (Llama's arithmetic).

It has random weights from a seed, the same in every process, and float32 throughout. It exists so that what
memkv saves can be measured on a machine that has nothing else: its prefill is a real one, through BLAS, and
its logits tell whether the KV that it was given is right.

KV lies in pages, and a page is a block of memkv, so that blocks are got into place and nothing is unpacked:

    pages   (blocks, layers, 2, KV heads, block tokens, head dimension), C-contiguous

      │◄───────────────── block 0 ─────────────────►│◄── block 1 ─ …
      │ layer 0           │ layer 1           │ …   │
      │ K       │ V       │ K       │ V       │     │
      │ h0 │ h1 │ h0 │ h1 │ …                            each head: its tokens one after the other

A prompt is computed in chunks: see :func:`chunks`. The same chunks make the same calls of BLAS with the same
shapes, so two processes on one machine get the same bits, whether the KV before a chunk was computed there or
fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.memory import HostMemory
from .shapes import Shape

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
NORM_SPREAD = 0.1  # norms' weights are this far from one: a norm that is left out shows
SAMPLE_BYTES = 4096  # of each matrix, in the fingerprint


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights: matrices are (inputs, outputs). ``qkv`` has q, k and v side by side, ``gate_up``
    gate and up.
    """

    norm1: Any
    qkv: Any
    out: Any
    norm2: Any
    gate_up: Any
    down: Any


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights: ``embed`` (vocabulary, hidden), ``head`` (hidden, vocabulary)."""

    embed: Any
    layers: tuple[Layer, ...]
    norm: Any
    head: Any
    fingerprint: str  # of samples of all of it: other weights have another


def draw(shape: Shape, seed: int, convert: Callable[[Floats], Any] = lambda array: array) -> Weights:
    """Random weights; inputs of unit variance give outputs of unit variance.

    :param convert: what becomes of each array as soon as it is drawn (to a GPU, say).
    """
    digest = blake2b(repr((shape.layers, shape.rope_theta, shape.eps)).encode(), digest_size=8)

    def matrix(place: int, which: int, rows: int, columns: int, fan: int) -> Any:
        rng = np.random.Generator(np.random.SFC64([seed, place, which]))
        array = rng.random((rows, columns), np.float32)
        array -= np.float32(0.5)
        array *= np.float32(np.sqrt(12.0 / fan))
        digest.update(repr(array.shape).encode() + array.reshape(-1)[: SAMPLE_BYTES // 4].tobytes())
        return convert(array)

    def norm(place: int, which: int) -> Any:
        rng = np.random.Generator(np.random.SFC64([seed, place, which]))
        array = 1 + np.float32(NORM_SPREAD) * rng.standard_normal(shape.hidden, np.float32)
        digest.update(array.tobytes())
        return convert(array)

    hidden, inner, q = shape.hidden, shape.intermediate, shape.heads * shape.head_dim
    wide = q + 2 * shape.kv_heads * shape.head_dim
    layers = tuple(
        Layer(
            norm(i, 0),
            matrix(i, 1, hidden, wide, hidden),
            matrix(i, 2, q, hidden, q),
            norm(i, 3),
            matrix(i, 4, hidden, 2 * inner, hidden),
            matrix(i, 5, inner, hidden, inner),
        )
        for i in range(shape.layers)
    )
    last = shape.of_layers
    embed = matrix(last, 0, shape.vocab, hidden, 1)
    head = matrix(last, 1, hidden, shape.vocab, hidden)
    return Weights(embed, layers, norm(last, 2), head, digest.hexdigest())


def chunks(tokens: int, start: int, chunk: int, block: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the chunks in which tokens from ``start`` on are computed.

    The tokens behind the last full block that leaves at least one token are a chunk of their own: it is what
    is left to compute when every block was fetched. ``chunk`` and ``start`` are multiples of ``block``.
    """
    tail = restorable(tokens, block)
    while start < tail:
        yield start, min(start + chunk, tail)
        start = min(start + chunk, tail)
    yield start, tokens


def restorable(tokens: int, block: int) -> int:
    """Of a prompt, how many tokens can come from full blocks: the last is always left to compute."""
    return (tokens - 1) // block * block


class NumpyModel:
    """The transformer with its pages. ``dtype_bytes``: of KV. One prompt at a time."""

    backend = "numpy"
    dtype = "float32"
    dtype_bytes = 4

    def __init__(self, shape: Shape, seed: int, *, longest: int, block: int, chunk: int) -> None:
        """:param longest: tokens that there is room for. :param block: tokens of a page."""
        self.shape, self.block, self.chunk = shape, block, chunk
        self.weights = draw(shape, seed)
        self._memory = HostMemory(-(-longest // block) * self.block_bytes)
        self.pages: Floats = self._memory.array[: -(-longest // block) * self.block_bytes].view(np.float32)
        self.pages = self.pages.reshape(-1, shape.layers, 2, shape.kv_heads, block, shape.head_dim)
        half = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
        self._inverse = (1.0 / shape.rope_theta**half).astype(np.float32)

    @property
    def block_bytes(self) -> int:
        return self.shape.kv_bytes(self.block, self.dtype_bytes)

    @property
    def memory(self) -> Any:
        """What a peer registers: all pages."""
        return self._memory.array

    def describe(self) -> str:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        name = f"{blas.get('name', 'no BLAS')} {blas.get('version', '')}"
        threads = os.environ.get("OPENBLAS_NUM_THREADS") or "as many as it likes"
        return f"NumPy {np.__version__}, {name}, threads: {threads}, float32"

    def forget(self) -> None:
        """Spoils all pages: what is not computed or fetched anew shows in the logits."""
        self.pages.fill(np.nan)

    def prefill(self, tokens: Tokens, start: int = 0) -> Floats:
        """Computes a prompt from ``start`` on, where pages hold what is before: (vocabulary,) logits of the
        token after the last.
        """
        x: Floats = np.empty(0, np.float32)
        for first, end in chunks(len(tokens), start, self.chunk, self.block):
            x = self._extend(tokens[first:end], first)
        last = _norm(x[-1:], self.weights.norm, self.shape.eps) @ self.weights.head
        return np.asarray(last[0], np.float32)

    def sync(self) -> None:
        """Waits for what was launched: nothing here."""

    def _extend(self, tokens: Tokens, start: int) -> Floats:
        """One chunk through all layers: (tokens, hidden). Its KV goes into the pages."""
        s, count = self.shape, len(tokens)
        ends = np.cumsum([s.heads, s.kv_heads]) * s.head_dim
        angle = np.arange(start, start + count, dtype=np.float32)[:, None] * self._inverse
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        x: Floats = self.weights.embed[tokens]
        for i, w in enumerate(self.weights.layers):
            q, k, v = np.split(_norm(x, w.norm1, s.eps) @ w.qkv, ends, axis=1)
            q = _rotate(q.reshape(count, s.heads, s.head_dim), cos, sin)
            self._write(i, 0, start, _rotate(k.reshape(count, s.kv_heads, s.head_dim), cos, sin))
            self._write(i, 1, start, v.reshape(count, s.kv_heads, s.head_dim))
            x = x + self._attend(q, i, start) @ w.out
            gate, up = np.split(_norm(x, w.norm2, s.eps) @ w.gate_up, 2, axis=1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w.down
        return x

    def _attend(self, q: Floats, layer: int, start: int) -> Floats:
        """Each query sees the keys up to its own: (tokens, heads × head dimension)."""
        s, count = self.shape, len(q)
        k, v = (self._read(layer, j, start + count) for j in (0, 1))
        grouped: Floats = q.reshape(count, s.kv_heads, s.group, s.head_dim).transpose(1, 2, 0, 3)
        grouped = grouped.reshape(s.kv_heads, s.group * count, s.head_dim)
        scores: Floats = grouped @ k.transpose(0, 2, 1)
        scores *= np.float32(s.head_dim**-0.5)
        own = scores.reshape(s.kv_heads, s.group, count, start + count)[..., start:]
        own += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        out: Floats = scores @ v
        out /= scores.sum(axis=-1, keepdims=True)
        out = out.reshape(s.kv_heads, s.group, count, s.head_dim).transpose(2, 0, 1, 3)
        return out.reshape(count, s.heads * s.head_dim)

    def _write(self, layer: int, which: int, start: int, values: Floats) -> None:
        """(tokens, KV heads, head dimension) into pages; ``start`` is the first token of one."""
        first, full = start // self.block, len(values) // self.block
        whole = values[: full * self.block].reshape(full, self.block, *values.shape[1:])
        self.pages[first : first + full, layer, which] = whole.transpose(0, 2, 1, 3)
        rest = values[full * self.block :]
        if len(rest):
            self.pages[first + full, layer, which, :, : len(rest)] = rest.transpose(1, 0, 2)

    def _read(self, layer: int, which: int, tokens: int) -> Floats:
        """(KV heads, tokens, head dimension) out of pages."""
        some = self.pages[: -(-tokens // self.block), layer, which].transpose(1, 0, 2, 3)
        return some.reshape(self.shape.kv_heads, -1, self.shape.head_dim)[:, :tokens]


def _norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + np.float32(eps)) * weight, np.float32)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """RoPE on (tokens, heads, head dimension): the first half pairs with the second, as Llama's weights of
    Hugging Face have it.
    """
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

"""The transformer of cli/transformer.py in torch: the same weights and pages, on a CPU or on a GPU.

On a CPU in float32, on a GPU in bfloat16 with norms and RoPE in float32. Pages are one tensor, which a peer
registers: on a GPU blocks go from its memory and into it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..rdma.errors import LocalError
from .shapes import Shape
from .transformer import Floats, Tokens, chunks, draw

try:
    import torch
    from torch.nn import functional
except ImportError:
    raise LocalError("torch is not installed", "--backend numpy, or an environment that has torch") from None


class TorchModel:
    """See :class:`~memkv.cli.transformer.NumpyModel`. :param device: "cpu" or "cuda"."""

    def __init__(self, shape: Shape, seed: int, *, device: str, longest: int, block: int, chunk: int) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise LocalError("torch sees no GPU", "--backend numpy or torch; memkv-node doctor")
        self.shape, self.block, self.chunk = shape, block, chunk
        self.backend = "cuda" if device == "cuda" else "torch"
        self.dtype, self._dtype = (
            ("bfloat16", torch.bfloat16) if device == "cuda" else ("float32", torch.float32)
        )
        self.dtype_bytes = self._dtype.itemsize
        self._device = torch.device(device)
        with torch.inference_mode():
            self.weights = draw(
                shape, seed, lambda array: torch.from_numpy(array).to(self._device, self._dtype)
            )
        blocks = -(-longest // block)
        self.pages = torch.zeros(
            (blocks, shape.layers, 2, shape.kv_heads, block, shape.head_dim),
            dtype=self._dtype,
            device=self._device,
        )
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self._inverse = (1.0 / shape.rope_theta**half).to(self._device)

    @property
    def block_bytes(self) -> int:
        return self.shape.kv_bytes(self.block, self.dtype_bytes)

    @property
    def memory(self) -> Any:
        nbytes = self.pages.nbytes
        if self._device.type == "cuda":
            return self.pages.view(torch.uint8).reshape(-1)
        return (self.pages.data_ptr(), nbytes)

    def describe(self) -> str:
        if self._device.type == "cuda":
            return f"torch {torch.__version__} on {torch.cuda.get_device_name()}, {self.dtype}"
        return f"torch {torch.__version__} on {torch.get_num_threads()} threads, {self.dtype}"

    def forget(self) -> None:
        self.pages.fill_(float("nan"))

    def sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def prefill(self, tokens: Tokens, start: int = 0) -> Floats:
        x = torch.empty(0)
        ids = torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device)
        with torch.inference_mode():
            for first, end in chunks(len(tokens), start, self.chunk, self.block):
                x = self._extend(ids[first:end], first)
            logits = _norm(x[-1:], self.weights.norm, self.shape.eps) @ self.weights.head
            out: Floats = logits[0].float().cpu().numpy()
        return out

    def _extend(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        s, count = self.shape, len(tokens)
        widths = [n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)]
        places = torch.arange(start, start + count, dtype=torch.float32, device=self._device)
        angle = places[:, None] * self._inverse
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        x = self.weights.embed[tokens]
        for i, w in enumerate(self.weights.layers):
            q, k, v = (_norm(x, w.norm1, s.eps) @ w.qkv).split(widths, dim=1)
            q = _rotate(q.reshape(count, s.heads, s.head_dim), cos, sin)
            self._write(i, 0, start, _rotate(k.reshape(count, s.kv_heads, s.head_dim), cos, sin))
            self._write(i, 1, start, v.reshape(count, s.kv_heads, s.head_dim))
            x = x + self._attend(q, i, start) @ w.out
            gate, up = (_norm(x, w.norm2, s.eps) @ w.gate_up).chunk(2, dim=1)
            x = x + (functional.silu(gate) * up) @ w.down
        return x

    def _attend(self, q: torch.Tensor, layer: int, start: int) -> torch.Tensor:
        s, count = self.shape, len(q)
        k, v = (self._read(layer, j, start + count).repeat_interleave(s.group, 0) for j in (0, 1))
        mask = None
        if start:  # else plainly causal, for which there are faster kernels
            ones = torch.ones(count, start + count, dtype=torch.bool, device=self._device)
            mask = ones.tril_(start)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None
        )
        return out[0].transpose(0, 1).reshape(count, s.heads * s.head_dim)

    def _write(self, layer: int, which: int, start: int, values: torch.Tensor) -> None:
        first, full = start // self.block, len(values) // self.block
        whole = values[: full * self.block].reshape(full, self.block, *values.shape[1:])
        self.pages[first : first + full, layer, which] = whole.transpose(1, 2)
        rest = values[full * self.block :]
        if len(rest):
            self.pages[first + full, layer, which, :, : len(rest)] = rest.transpose(0, 1)

    def _read(self, layer: int, which: int, tokens: int) -> torch.Tensor:
        some = self.pages[: -(-tokens // self.block), layer, which].transpose(0, 1)
        return some.reshape(self.shape.kv_heads, -1, self.shape.head_dim)[:, :tokens]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

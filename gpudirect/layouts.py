"""The KV caches of vLLM and SGLang, as layouts of pages (:class:`memkv.gpudirect.pages.Layout`).

Each constructor takes the engine's tensors (torch, CuPy, or anything with ``__cuda_array_interface__``, or a
:class:`Span`) and looks at their strides, not only at their shapes: engines permute.

``vllm_kv_first``
    a layer each, [2, blocks, block size, heads, dim]. vLLM, ``v1/attention/backends/flash_attn.py``,
    ``get_kv_cache_shape``; by ``get_kv_cache_stride_order`` also with heads before tokens (HND).
``vllm_block_first``
    a layer each, [blocks, 2, block size, heads, dim]. The same of ``flashinfer.py``.
``vllm_mla``
    a layer each, [blocks, block size, latent]. The same of ``mla/common.py``.
``vllm_standard``
    a layer's view each, [B, H, N, C], C being keys and values of a head together; in memory LBHNC, LBNHC,
    LHBNC, BLHNC, BLNHC or BHLNC. vLLM's RFC 42082, ``v1/kv_cache_layout.py``, ``KVCacheLayout``.
``sglang_mha``
    keys and values apart, a layer each, [tokens, heads, dim]. SGLang, ``srt/mem_cache/memory_pool.py``,
    ``MHATokenToKVPool``.
``sglang_mla``
    a layer each, [tokens, 1, latent]. The same, ``MLATokenToKVPool``.

vLLM's scheduler may count blocks of several kernel blocks; these tables want the tensors' own block numbers.
SGLang's pools have one page more than the pool's size, the first, for padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.errors import LocalError
from .pages import Layout


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's place. ``strides`` in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def span(tensor: Any) -> Span:
    """Where a tensor lies on the GPU.

    :raises LocalError: not a tensor in GPU memory.
    """
    if isinstance(tensor, Span):
        return tensor
    if getattr(tensor, "is_cuda", False):  # torch, whose bfloat16 has no array interface
        size = int(tensor.element_size())
        strides = tuple(int(s) * size for s in tensor.stride())
        return Span(int(tensor.data_ptr()), tuple(int(n) for n in tensor.shape), strides, size)
    interface = getattr(tensor, "__cuda_array_interface__", None)
    if interface is None:
        raise LocalError(f"a {type(tensor).__name__} is no tensor in GPU memory")
    shape, size = tuple(interface["shape"]), int(interface["typestr"][2:])
    strides = interface.get("strides") or tuple(
        size * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))
    )
    return Span(int(interface["data"][0]), shape, tuple(strides), size)


def vllm_kv_first(layers: Sequence[Any]) -> Layout:
    """[2, blocks, block size, heads, dim] for each layer; parts: keys, values of layer 0, of layer 1, …"""
    return _layout(
        [_of(t, 5, "[2, blocks, block size, heads, dim]") for t in layers], page=1, apart=(0,), order="NHD"
    )


def vllm_block_first(layers: Sequence[Any]) -> Layout:
    """[blocks, 2, block size, heads, dim] for each layer; parts as in :func:`vllm_kv_first`."""
    return _layout(
        [_of(t, 5, "[blocks, 2, block size, heads, dim]") for t in layers], page=0, apart=(1,), order="NHD"
    )


def vllm_mla(layers: Sequence[Any]) -> Layout:
    """[blocks, block size, latent] for each layer; a part for each."""
    return _layout([_of(t, 3, "[blocks, block size, latent]") for t in layers], page=0, apart=(), order="ND")


def vllm_standard(layers: Sequence[Any]) -> Layout:
    """[B, H, N, C] views for each layer; a part for each, or for each head of each, where heads lie apart."""
    return _layout([_of(t, 4, "[B, H, N, C]") for t in layers], page=0, apart=(), order="HND")


def sglang_mha(keys: Sequence[Any], values: Sequence[Any], page_size: int) -> Layout:
    """[tokens, heads, dim] for each layer, keys and values; parts: keys, values of layer 0, of layer 1, …

    :param page_size: tokens of a page, SGLang's ``--page-size``, 1 to 64.
    """
    if len(keys) != len(values):
        raise LocalError(f"keys of {len(keys)} layers, values of {len(values)}")
    return sglang_mla([t for pair in zip(keys, values, strict=True) for t in pair], page_size)


def sglang_mla(layers: Sequence[Any], page_size: int) -> Layout:
    """[tokens, 1, latent] for each layer; a part for each."""
    return _layout(
        [_paged(_of(t, 3, "[tokens, heads, dim]"), page_size) for t in layers], page=0, apart=(), order="NHD"
    )


def sglang_pages(indices: npt.ArrayLike, page_size: int) -> npt.NDArray[np.int32]:
    """(…, pages) page numbers for (…, tokens) indices of a token pool: whole pages, in order.

    :raises LocalError: the indices are not whole pages.
    """
    slots = np.asarray(indices)
    if slots.ndim < 1 or slots.shape[-1] % page_size:
        raise LocalError(f"{slots.shape} token indices are not whole pages of {page_size}")
    by_page = slots.reshape(*slots.shape[:-1], -1, page_size)
    if (by_page[..., :1] % page_size).any() or (by_page != by_page[..., :1] + np.arange(page_size)).any():
        raise LocalError(f"token indices that are not whole pages of {page_size}, in order")
    return (by_page[..., 0] // page_size).astype(np.int32)


def _of(tensor: Any, ndim: int, shape: str) -> Span:
    out = span(tensor)
    if len(out.shape) != ndim:
        raise LocalError(f"a tensor of shape {out.shape}", f"{shape} is what this layout is made of")
    return out


def _paged(tokens: Span, page_size: int) -> Span:
    """[tokens, …] as [pages, page size, …]; tokens behind the last whole page are left out."""
    if not 1 <= page_size <= tokens.shape[0]:
        raise LocalError(f"pages of {page_size} tokens in a pool of {tokens.shape[0]}")
    return Span(
        tokens.address,
        (tokens.shape[0] // page_size, page_size, *tokens.shape[1:]),
        (tokens.strides[0] * page_size, tokens.strides[0], *tokens.strides[1:]),
        tokens.itemsize,
    )


def _layout(tensors: Sequence[Span], *, page: int, apart: tuple[int, ...], order: str) -> Layout:
    """The layout of tensors whose axis ``page`` counts pages; each index of the axes ``apart`` is a part, and
    so is each index of an axis that does not lie densely around what is inside of it.

    ``order`` names the inner axes: N tokens, H heads, D their content. The layout's name has them as they lie
    in a block: NHD, HND (page by page), or H/ND where each head is a part.
    """
    if not tensors:
        raise LocalError("a cache of no layers")
    alike = {(t.shape, t.strides, t.itemsize) for t in tensors}
    if len(alike) > 1:
        raise LocalError("layers of different shapes", "one layout for each shape; they are different blocks")
    shape, strides, run = tensors[0].shape, tensors[0].strides, tensors[0].itemsize
    inner = [a for a in range(len(shape)) if a != page and a not in apart]
    dense: list[int] = []
    for axis in sorted(inner, key=lambda a: (strides[a], shape[a])):
        if shape[axis] > 1 and strides[axis] != run:
            break
        run *= shape[axis]
        dense.append(axis)
    parts = [*apart, *(a for a in inner if a not in dense)]
    if any(strides[a] <= 0 for a in (page, *parts) if shape[a] > 1):
        raise LocalError(f"a tensor with strides {strides}", "a cache that is not broadcast or reversed")
    offsets = [
        sum(i * strides[a] for i, a in zip(index, parts, strict=True))
        for index in itertools.product(*(range(shape[a]) for a in parts))
    ]
    where = dict(zip(order, inner, strict=True))
    heads, tokens = where.get("H", -1), where["N"]
    if heads in parts and shape[heads] > 1:
        name = "H/ND"
    elif heads in dense and min(shape[heads], shape[tokens]) > 1 and strides[heads] > strides[tokens]:
        name = "HND"
    else:
        name = "NHD"
    return Layout(
        name, tuple(t.address + o for t in tensors for o in offsets), strides[page], run, shape[page]
    )

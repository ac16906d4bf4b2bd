"""Pages of an SGLang host pool as memkv's blocks: where their pieces lie, their keys, which pages are whole.

A page is one *piece* for MLA, a K and a V piece in the page-first layouts, one per layer (and K, V) in
layer_first: whatever lies in one stretch of memory. Every piece is a block of its own, so that it moves
straight between pool and node; a page counts only where all of its pieces do. Arrays are page-major.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..keys import KEY_BYTES, Keys
from ..rdma.errors import LocalError
from .identity import piece_mask

Flags = npt.NDArray[np.bool_]
Meta = Callable[[npt.NDArray[np.int64]], tuple[Sequence[int], Sequence[int]]]


@lru_cache
def _masks(pieces: int) -> Keys:
    """(pieces, 16): zero for the first piece."""
    out = np.zeros((pieces, KEY_BYTES), np.uint8)
    for i in range(1, pieces):
        out[i] = piece_mask(i.to_bytes(4, "little"), b"memkv-piece-v1")
    out.flags.writeable = False
    return out


def piece_keys(keys: Keys, pieces: int) -> Keys:
    """(n · pieces, 16) keys of the pieces of n pages, from the pages' own."""
    if pieces == 1:
        return keys
    return (keys[:, None, :] ^ _masks(pieces)).reshape(-1, 16)


def whole(pieces_ok: Flags, pieces: int) -> Flags:
    """(n,): the pages all of whose pieces are well."""
    out: Flags = np.all(pieces_ok.reshape(-1, pieces), axis=1)
    return out


def ending_windows(held: Flags, window: int) -> Flags:
    """(n,): at i, whether the last ``window`` pages of the first i + 1 are held (all of them, if fewer)."""
    missing = np.concatenate(([0], np.cumsum(~held)))
    ends = np.arange(1, len(held) + 1)
    out: Flags = missing[ends] == missing[np.maximum(ends - max(1, window), 0)]
    return out


@dataclass(frozen=True, slots=True)
class Pieces:
    """Piece j of page p lies at ``base[j] + p * stride[j]`` and is ``size[j]`` bytes long."""

    pages: int
    base: npt.NDArray[np.uint64]
    stride: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.base)

    @property
    def longest(self) -> int:
        return int(self.size.max())

    @property
    def page_bytes(self) -> int:
        return int(self.size.sum())

    def at(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """(n, pieces) addresses."""
        return self.base + pages.astype(np.uint64)[:, None] * self.stride

    @classmethod
    def learn(cls, meta: Meta, slots: int, page_size: int) -> Pieces:
        """From what the pool says of its first, second and last page (``get_page_buffer_meta``).

        :param slots: tokens of the pool; :param page_size: tokens of a page.
        :raises LocalError: these pages do not lie at one distance, so that no formula says where a page is.
        """
        pages = slots // page_size
        if pages < 1:
            raise LocalError(f"a host pool of {slots} tokens, where a page has {page_size}", "--hicache-size")
        tried = np.unique(np.array([0, min(1, pages - 1), pages - 1], np.int64))
        indices = (tried[:, None] * page_size + np.arange(page_size)).reshape(-1)
        told = meta(indices)
        pointers, sizes = (np.asarray(t, np.uint64) for t in told)
        if not pointers.size or pointers.size % len(tried) or sizes.shape != pointers.shape:
            raise LocalError(f"{pointers.size} pieces in {len(tried)} pages of a host pool")
        pointers, sizes = pointers.reshape(len(tried), -1), sizes.reshape(len(tried), -1)
        stride = pointers[1] - pointers[0] if len(tried) > 1 else np.zeros_like(pointers[0])
        out = cls(pages, pointers[0], stride, sizes[0])
        if (out.at(tried) != pointers).any() or (sizes != sizes[0]).any() or not sizes.all():
            raise LocalError(
                "the pages of this host pool do not lie at one distance",
                "--hicache-mem-layout: page_first, page_first_direct or layer_first",
            )
        return out


def pages_of(indices: npt.NDArray[np.int64], n: int, page_size: int, pages: int) -> npt.NDArray[np.int64]:
    """(n,) page numbers, from the slots of n pages' tokens.

    :raises LocalError: not n pages' slots, or not those of pages inside the pool.
    """
    if indices.ndim != 1 or len(indices) != n * page_size:
        raise LocalError(f"{indices.shape} host indices for {n} keys of {page_size} tokens each")
    first = indices[::page_size]
    number, rest = np.divmod(first, page_size)
    if rest.any() or (n and (number.min() < 0 or number.max() >= pages)):
        raise LocalError(f"host indices that are no pages of a pool of {pages} pages of {page_size} tokens")
    return number

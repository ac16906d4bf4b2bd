"""Scatter and gather: pages of an engine's paged KV cache into contiguous blocks, and back, in one launch.

A block holds some consecutive pages of a sequence, and of each page every *part*: a layer's keys, its values,
or whatever the cache keeps apart. It is packed part by part, pages in order::

    block   ├─ part 0 ────────────────────┼─ part 1 ────────────────────┼─ …      parts · pages · run bytes
            │ page a │ page b │ page c │… │ page a │ page b │ page c │… │

Where pages hold tokens in order, so does each part, whatever the size of a page: blocks of engines with
different page sizes, or with keys and values in one tensor or two, are the same bytes. Heads before tokens
(HND) are another order, and belong into the name of the layout (:class:`memkv.keys.KeySpace`).

The layouts that engines use, and where they say so, are in ``layouts.py``; the kernels are in
``kernels/pages.cu``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.errors import LocalError
from . import kernels

WIDTHS = (16, 8, 4, 2, 1)  # bytes that a lane moves at once
THREADS = 256
AT_ONCE = 4  # vectors that a thread has under way: pages.cu
MOST_VECTORS = (1 << 31) - 1  # of a launch: what the kernel's divisions are exact for

Addresses = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Layout:
    """A paged KV cache: page p of part i is ``run`` contiguous bytes at ``bases[i] + p * stride``.

    :ivar name: of the order of bytes in a block: ``NHD``, ``HND`` or ``H/ND`` (``layouts.py``).
    :ivar bases: device address of page 0, part by part.
    :ivar stride: bytes from a page to the next. :ivar pages: how many there are.
    """

    name: str
    bases: tuple[int, ...]
    stride: int
    run: int
    pages: int

    def __post_init__(self) -> None:
        if not self.bases or self.run < 1 or not 1 <= self.pages < 1 << 31:
            raise LocalError(f"a cache of {len(self.bases)} parts, {self.pages} pages of {self.run} bytes")
        if self.pages > 1 and self.stride < self.run:
            raise LocalError(f"pages of {self.run} bytes overlap: they are {self.stride} bytes apart")

    def block_bytes(self, pages: int) -> int:
        """Bytes of a block of so many pages."""
        return len(self.bases) * pages * self.run


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: blocks ``first`` to ``first + blocks`` of the call, by vectors of ``width`` bytes.

    ``numbers`` are the kernel's scalar arguments between the tables and the counter, in its order.
    """

    first: int
    blocks: int
    width: int
    vectors: int
    numbers: tuple[Any, ...]

    def grid(self, processors: int) -> int:
        """Blocks of threads: enough for all vectors, at most as many as run at once, times two."""
        return min(-(-self.vectors // (THREADS * AT_ONCE)), processors * 16)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift) so that ``n * multiplier >> 32 + shift`` is ``n // divisor`` for n below 2³¹.

    With 2^shift < divisor ≤ 2^(shift+1), the multiplier is 2^(32+shift) / divisor rounded up: below 2³², and
    what the rounding adds to the result is n / 2^(32+shift) at most, less than 1 / divisor. A divisor of 1 is
    none (0, 0): the kernel does not divide.
    """
    if divisor == 1:
        return 0, 0
    shift = (divisor - 1).bit_length() - 1
    return -(-(1 << 32 + shift) // divisor), shift


def launches(layout: Layout, blocks: Addresses, each: int, parts: range) -> Iterator[Launch]:
    """The launches of a call: one, unless it moves 2³¹ vectors or more.

    :param blocks: addresses. :param each: pages of a block. :param parts: those that are moved, in a row.
    """
    skip = parts.start * each * layout.run
    common = math.gcd(layout.run, layout.stride, skip, *layout.bases[parts.start : parts.stop])
    common = math.gcd(common, int(np.gcd.reduce(blocks)))
    width = next(w for w in WIDTHS if common % w == 0)
    run = layout.run // width
    vectors = len(parts) * each * run
    if vectors > MOST_VECTORS:
        raise LocalError(f"a block of {vectors} vectors of {width} bytes", "blocks are shorter than 4 GiB")
    most = MOST_VECTORS // vectors
    divisors = [np.uint32(x) for divisor in (run, each, len(parts)) for x in (divisor, *reciprocal(divisor))]
    for first in range(0, len(blocks), most):
        count = min(most, len(blocks) - first)
        fixed = np.uint64(layout.stride), np.uint32(layout.pages - 1), np.uint64(skip)
        yield Launch(first, count, width, count * vectors, (*fixed, np.uint32(count * vectors), *divisors))


def gather(
    layout: Layout, pages: Any, blocks: npt.ArrayLike, *, parts: range | None = None, stream: Any = None
) -> Any:
    """Starts to pack pages into blocks.

    :param pages: (n, pages of a block) page numbers: an integer array on the host, where one that does not
        exist is an error at once, or an int32 CuPy array, where it is left out and counted.
    :param blocks: (n,) device addresses of the blocks, each with room for ``layout.block_bytes(...)``; on
        the host.
    :param parts: only these, e.g. of one layer, ``range(2 * layer, 2 * layer + 2)``; they go to the same
        places as in a whole block.
    :param stream: as :func:`memkv.gpudirect.kernels.on` takes it; the current one if None.
    :returns: a CuPy array of one uint32, filled in stream order: vectors left out because their page does not
        exist. Anything but 0 means that blocks are not whole.
    :raises LocalError: no CuPy, or arguments that do not fit.
    """
    return _move("gather", layout, pages, blocks, parts, stream)


def scatter(
    layout: Layout, pages: Any, blocks: npt.ArrayLike, *, parts: range | None = None, stream: Any = None
) -> Any:
    """Starts to unpack blocks into pages, the reverse of :func:`gather`, with the same arguments.

    No page may occur twice: what it then holds is a mixture.
    """
    return _move("scatter", layout, pages, blocks, parts, stream)


def prepare(
    layout: Layout, pages: npt.ArrayLike, blocks: npt.ArrayLike, parts: range | None
) -> tuple[Pages, Addresses, range]:
    """The arguments of a call with its page table on the host, checked.

    :raises LocalError: shapes that do not fit, pages or parts that the cache does not have.
    """
    table = np.asarray(pages)
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iu":
        raise LocalError(
            f"a page table of shape {table.shape}, {table.dtype}", "integers, (blocks, pages of each)"
        )
    lowest, highest = int(table.min()), int(table.max())
    if lowest < 0 or highest >= layout.pages:
        bad = lowest if lowest < 0 else highest
        raise LocalError(f"page {bad} of a cache of {layout.pages} pages")
    return np.ascontiguousarray(table, np.int32), *_places(layout, table.shape[0], blocks, parts)


def _places(
    layout: Layout, count: int, blocks: npt.ArrayLike, parts: range | None
) -> tuple[Addresses, range]:
    places = np.atleast_1d(np.asarray(blocks, np.uint64))
    if places.shape != (count,) or (places == 0).any():
        raise LocalError(f"{count} rows of pages, but block addresses of shape {places.shape}")
    which = range(len(layout.bases)) if parts is None else parts
    if not which or which.step != 1 or which.start < 0 or which.stop > len(layout.bases):
        raise LocalError(f"parts {which} of {len(layout.bases)}")
    return places, which


def _move(
    name: str, layout: Layout, pages: Any, blocks: npt.ArrayLike, parts: range | None, stream: Any
) -> Any:
    cupy = kernels.cupy()
    with kernels.on(stream):
        if isinstance(pages, cupy.ndarray):
            if pages.ndim != 2 or not pages.size:
                raise LocalError(f"a page table of shape {pages.shape}", "(blocks, pages of each)")
            places, which = _places(layout, pages.shape[0], blocks, parts)
            listed, each = cupy.ascontiguousarray(pages, cupy.int32), pages.shape[1]
        else:
            listed, places, which = prepare(layout, pages, blocks, parts)
            each = listed.shape[1]
        # One upload: a counter, the bases, the addresses, and the page table if it is not there yet.
        head = np.concatenate([[0], np.array(layout.bases[which.start : which.stop]), places]).astype(
            np.uint64
        )
        if isinstance(listed, np.ndarray):
            rows = np.concatenate([head.view(np.uint8), listed.view(np.uint8).ravel()])
            up = cupy.asarray(rows)
            at_pages = int(up.data.ptr) + head.nbytes
        else:
            up = cupy.asarray(head.view(np.uint8))
            at_pages = int(listed.data.ptr)
        at, n_bases = int(up.data.ptr), len(which)
        processors = kernels.multiprocessors(int(cupy.cuda.runtime.getDevice()))
        for part in launches(layout, places, each, which):
            tables = (
                np.uint64(at + 8),
                np.uint64(at + 8 * (1 + n_bases + part.first)),
                np.uint64(at_pages + 4 * each * part.first),
            )
            kernel = kernels.function("pages", f"mkv_{name}_{part.width}")
            kernel((part.grid(processors),), (THREADS,), (*tables, *part.numbers, np.uint64(at)))
        return up[:4].view(cupy.uint32)

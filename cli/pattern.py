"""What benchmarks put into blocks: bytes that follow from the key, so that whoever gets a block can tell
whether it is right.

Word i of a block (64 bits, little-endian) is ``seed(key) + i · STEP``, modulo 2⁶⁴; a last part of a word is
cut off. Filling is one addition per word, checking one subtraction and one comparison, both by numpy at the
speed of memory. A byte that differs, a block in another's place and a block that is shifted all show.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_ROWS_BYTES = 1 << 20  # compared at once: stays in a cache


def seeds(keys: Bytes) -> Words:
    """(n,) one seed per (n, 16) key."""
    halves = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    out: Words = halves[:, 1] * _MIX ^ halves[:, 0]
    return out


def ramp(block_bytes: int) -> Words:
    """What every block of this size has in common; made once and passed on."""
    return np.arange(-(-block_bytes // 8), dtype=np.uint64) * STEP


def fill(out: Bytes, keys: Bytes, common: Words) -> None:
    """Writes the content of ``keys`` into ``out``, shape (n, block bytes)."""
    block_bytes = out.shape[1]
    whole = block_bytes % 8 == 0
    for row, seed in zip(out, seeds(keys), strict=True):
        if whole:
            np.add(common, seed, out=row.view(np.uint64))
        else:
            row[:] = (common + seed).view(np.uint8)[:block_bytes]


def wrong(got: Bytes, keys: Bytes, common: Words) -> npt.NDArray[np.bool_]:
    """(n,) whether each row of ``got``, shape (n, block bytes), is anything but the content of its key."""
    n, block_bytes = got.shape
    out = np.zeros(n, np.bool_)
    whole = block_bytes // 8
    chunk = max(1, _ROWS_BYTES // 8)
    for i, seed in enumerate(seeds(keys)):
        words = got[i, : whole * 8].view(np.uint64)
        for at in range(0, whole, chunk):
            if not np.array_equal(words[at : at + chunk] - seed, common[at : min(at + chunk, whole)]):
                out[i] = True
                break
        if block_bytes % 8:
            last = (common[whole:] + seed).view(np.uint8)[: block_bytes % 8]
            out[i] |= not np.array_equal(got[i, whole * 8 :], last)
    return out

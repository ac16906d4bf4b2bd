"""XXH3-64 (seed 0) of more than 240 bytes, by numpy: as the kernel sees it, sums of stripes, step by step."""

from __future__ import annotations

import numpy as np

from memkv.gpudirect.kernels import LAST_AT, MERGE_AT, words

P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
MASK = (1 << 64) - 1
SWAP = np.arange(8) ^ 1


def _taken(stripes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What (n, 8) words add to the eight accumulators under (n, 8) keys, in any order of stripes."""
    mixed = stripes ^ keys
    low, high = mixed & np.uint64(0xFFFFFFFF), mixed >> np.uint64(32)
    return (low * high + stripes[:, SWAP]).sum(axis=0, dtype=np.uint64)


def xxh3_long(data: bytes) -> int:
    """XXH3_64 of ``data``, longer than 240 bytes."""
    n = len(data)
    secret = np.array(words(0, 24), np.uint64)
    keys = np.lib.stride_tricks.sliding_window_view(secret, 8)  # of stripe i: from word i on
    acc = np.array([P32_3, *P64[:4], P32_2, P64[4], P32_1], np.uint64)
    whole = np.frombuffer(data[: n // 64 * 64], "<u8").reshape(-1, 8)
    steps, left = (n - 1) // 1024, (n - 1) % 1024 // 64
    with np.errstate(over="ignore"):
        for i in range(steps):
            acc += _taken(whole[16 * i : 16 * i + 16], keys[:16])
            acc = (acc ^ acc >> np.uint64(47) ^ secret[16:24]) * np.uint64(P32_1)
        acc += _taken(whole[16 * steps : 16 * steps + left], keys[:left])
        acc += _taken(
            np.frombuffer(data[-64:], "<u8").reshape(1, 8), np.array([words(LAST_AT, 8)], np.uint64)
        )
    total, merge = n * P64[0], words(MERGE_AT, 8)
    for i in range(0, 8, 2):
        product = (int(acc[i]) ^ merge[i]) * (int(acc[i + 1]) ^ merge[i + 1])
        total += (product & MASK) ^ (product >> 64)
    total &= MASK
    total ^= total >> 37
    total = total * 0x165667919E3779F9 & MASK
    return total ^ total >> 32

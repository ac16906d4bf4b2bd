"""The formats that nodes and peers agree on, for numpy: the mirror of ``store/native/layout.h``.

Drawings and meanings are in ``docs/layout.md``; a test holds the three together. This module imports nothing
of the node (not even its compiled core), because peers need it too. Everything is little-endian.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

KEY_BYTES = 16
BUCKET_SLOTS = 8
INDEX_HEADER = 4096
LINE_BYTES = 64
OFFSET_UNIT = 512
SLAB_MAX_BYTES = 1 << 30
LAYOUT_VERSION = 1
CHUNK_BYTES = 16384
LINE_MAGIC = 0x4C564B4D
COLD_MAGIC = 0x43564B4D
EPOCH_MAGIC = 0x45564B4D

SLOT_EMPTY = 0
SLOT_LIVE = 1
SLOT_FLASH = 2
LOCATION_MOVED = 8

SLOT = np.dtype([("key", "u1", (KEY_BYTES,)), ("generation", "<u4"), ("length", "<u4"), ("location", "<u8")])
BUCKET = np.dtype([("slot", SLOT, (BUCKET_SLOTS,))])
LINE = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("flags", "<u2"),
        ("key", "u1", (KEY_BYTES,)),
        ("length", "<u4"),
        ("spare0", "<u4"),
        ("checksum", "<u8"),
        ("spare1", "<u8", (2,)),
        ("generation", "<u8"),
    ]
)
COLD = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("flags", "<u2"),
        ("key", "u1", (KEY_BYTES,)),
        ("length", "<u4"),
        ("namespace_id", "<u4"),
        ("incarnation", "<u8"),
        ("sequence", "<u8"),
        ("checksum", "<u8"),
        ("slab_epoch", "<u8"),
        ("device", "<u8"),
        ("offset", "<u8"),
        ("spare", "<u8", (4,)),
        ("check", "<u8"),
        ("tail", "<u8"),
    ]
)
EPOCH = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("spare0", "<u2"),
        ("incarnation", "<u8"),
        ("epoch", "<u8"),
        ("table", "<u8"),
        ("buckets", "<u8"),
        ("spare1", "<u8", (3,)),
    ]
)

U64 = NDArray[np.uint64]


def _u64(x: ArrayLike) -> U64:
    return np.asarray(x, dtype=np.uint64)


def pack_location(state: ArrayLike, slab: ArrayLike, offset: ArrayLike, moved: ArrayLike = 0) -> U64:
    """Location words; ``offset`` is the payload's in bytes, a multiple of 512."""
    units = _u64(offset) // np.uint64(OFFSET_UNIT)
    return _u64(
        _u64(state) | _u64(moved) << np.uint64(3) | _u64(slab) << np.uint64(4) | units << np.uint64(24)
    )


def location_state(location: ArrayLike) -> U64:
    return _u64(location) & np.uint64(7)


def location_moved(location: ArrayLike) -> U64:
    return _u64(location) >> np.uint64(3) & np.uint64(1)


def location_slab(location: ArrayLike) -> U64:
    return _u64(location) >> np.uint64(4) & np.uint64(0xFFFFF)


def location_offset(location: ArrayLike) -> U64:
    """Offset of the payload in its slab, in bytes."""
    return (_u64(location) >> np.uint64(24) & np.uint64(0x1FFFFF)) * np.uint64(OFFSET_UNIT)


def key_words(keys: NDArray[Any]) -> U64:
    """Keys, as (n, 16) bytes or n items of 16 bytes, as (n, 2) little-endian words."""
    words: U64 = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    return words


def mix64(x: U64) -> U64:
    """Stafford's variant 13 of the 64-bit mixer, as in SplitMix64, over an array."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def candidates(keys: NDArray[Any], salt: int, buckets: int) -> U64:
    """The two candidate buckets of each key: (n, 2). ``buckets`` is a power of two, at least 2."""
    words = key_words(keys)
    turned = (salt << 32 | salt >> 32) & 0xFFFFFFFFFFFFFFFF
    h = mix64(mix64(words[:, 0] ^ np.uint64(salt)) + words[:, 1])
    g = mix64(h ^ np.uint64(turned))
    out: U64 = np.stack([h, g], axis=1) & np.uint64(buckets - 1)
    out[:, 1] ^= out[:, 1] == out[:, 0]
    return out

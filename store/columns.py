"""Columns of the control protocol: numpy arrays to packed little-endian bytes and back, checked both ways."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .framing import LocalProtocolError
from .messages import KEY_BYTES, MAX_BATCH, Durability, Put

_DTYPES: dict[int, Any] = {1: np.uint8, 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def pack_keys(keys: npt.NDArray[np.uint8]) -> bytes:
    """The column of (n, 16) uint8 keys. LocalProtocolError for another shape or dtype, or n > MAX_BATCH."""
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
        raise LocalProtocolError(f"keys of shape {keys.shape}, {keys.dtype}, where (n, 16) uint8 is due")
    return _bounded(keys).tobytes()


def unpack_keys(column: bytes) -> npt.NDArray[np.uint8]:
    """(n, 16) uint8, a read-only view of the column. LocalProtocolError if its length is no multiple of
    16.
    """
    if len(column) % KEY_BYTES:
        raise LocalProtocolError(f"a column of keys of {len(column)} bytes")
    return np.frombuffer(column, np.uint8).reshape(-1, KEY_BYTES)


def pack_column(values: npt.ArrayLike, size: Literal[1, 4, 8]) -> bytes:
    """A column of n unsigned integers of ``size`` bytes each from any one-dimensional array or sequence of
    integers. LocalProtocolError if a value does not fit, the shape is wrong, or n > MAX_BATCH.
    """
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise LocalProtocolError(f"a column from an array of shape {array.shape}, {array.dtype}")
    if int(array.min()) < 0 or int(array.max()) >= 1 << 8 * size:
        raise LocalProtocolError(f"a value that does not fit {size} unsigned bytes")
    return _bounded(array).astype(_DTYPES[size], copy=False).tobytes()


def unpack_column(column: bytes, size: Literal[1, 4, 8]) -> npt.NDArray[Any]:
    """(n,) uint8, uint32 or uint64, a read-only view. LocalProtocolError if the length is no multiple."""
    if len(column) % size:
        raise LocalProtocolError(f"a column of {len(column)} bytes, where a multiple of {size} is due")
    return np.frombuffer(column, _DTYPES[size])


def _bounded(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(array) > MAX_BATCH:
        raise LocalProtocolError(f"{len(array)} blocks in one message, where {MAX_BATCH} are allowed")
    return array


class PutColumns(NamedTuple):
    """The columns of a Put as arrays of one row per block."""

    keys: npt.NDArray[np.uint8]  # (n, 16)
    lengths: npt.NDArray[np.uint32]  # bytes
    regions: npt.NDArray[np.uint32]  # ids of offered regions
    offsets: npt.NDArray[np.uint64]  # bytes into them
    checksums: npt.NDArray[np.uint64] | None

    def message(
        self, request: int, namespace: int, durability: Durability = "memory", deadline_ms: int = 0
    ) -> Put:
        """The Put that carries them. LocalProtocolError if they disagree or do not fit."""
        return Put(
            request,
            namespace,
            pack_keys(self.keys),
            pack_column(self.lengths, 4),
            pack_column(self.regions, 4),
            pack_column(self.offsets, 8),
            b"" if self.checksums is None else pack_column(self.checksums, 8),
            durability,
            deadline_ms,
        )

    @classmethod
    def of(cls, put: Put) -> PutColumns:
        """Read-only views of a Put's columns."""
        return cls(
            unpack_keys(put.keys),
            unpack_column(put.lengths, 4),
            unpack_column(put.regions, 4),
            unpack_column(put.offsets, 8),
            unpack_column(put.checksums, 8) if put.checksums else None,
        )

"""Payload checksums on the GPU: for blocks that a device wrote straight into GPU memory, past every CPU.

The definition is the one of the CPU (``docs/layout.md``, "Checksum"), the kernels are in
``kernels/checksum.cu``. A batch takes one upload of three words a block and two launches; nothing waits.
Blocks at multiples of 16 bytes are read in the widest loads there are; others give the same checksum, slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.errors import LocalError
from ..store.layout import CHUNK_BYTES
from . import kernels

WARPS = 8  # of a block of threads: checksum.cu, THREADS
BLOCKS_EACH = 16  # blocks of threads for each processor at most: four that run, and four times as many

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a batch is divided.

    :ivar most: chunks of the longest block.
    :ivar pitch: words from one block's list of chunk hashes to the next's: even, so that each list can be
        read 16 bytes at a time.
    """

    blocks: int
    most: int
    pitch: int

    def grids(self, processors: int) -> tuple[int, int]:
        """Blocks of threads of the two launches."""
        most = processors * BLOCKS_EACH
        return (
            min(-(-self.blocks * self.most // WARPS), most),
            min(-(-self.blocks // WARPS), most),
        )


def plan(lengths: Words) -> Plan:
    """The division of a batch of blocks with these lengths (at least one)."""
    most = -(-int(lengths.max()) // CHUNK_BYTES)
    return Plan(len(lengths), most, (most + 2) // 2 * 2)


def batch(
    pointers: npt.ArrayLike, lengths: npt.ArrayLike, expected: npt.ArrayLike | None = None
) -> tuple[Words, Plan]:
    """What is uploaded, (2 or 3, n) uint64, and how it is divided.

    :raises LocalError: arrays that do not fit each other, null pointers, blocks of 4 GiB or more.
    """
    rows = [_words(pointers, "pointers"), _words(lengths, "lengths")]
    if len(rows[1]) == 1:
        rows[1] = np.broadcast_to(rows[1], rows[0].shape)
    if expected is not None:
        rows.append(_words(expected, "expected checksums"))
    if any(len(row) != len(rows[0]) for row in rows):
        raise LocalError(f"as many lengths and checksums as blocks, not {[len(row) for row in rows]}")
    table = np.stack(rows)
    if (table[0] == 0).any() or (table[1] >> np.uint64(32)).any():
        raise LocalError("a block at address 0, or of 4 GiB or more")
    return table, plan(table[1])


def _words(values: npt.ArrayLike, what: str) -> Words:
    try:
        out = np.atleast_1d(np.asarray(values, dtype=np.uint64))
    except (OverflowError, TypeError, ValueError) as exc:
        raise LocalError(f"{what}: {exc}") from None
    if out.ndim != 1 or not out.size:
        raise LocalError(f"{what} of shape {out.shape}", "one for each block, at least one")
    return out


def checksums(pointers: npt.ArrayLike, lengths: npt.ArrayLike, *, stream: Any = None) -> Any:
    """Starts to compute the checksums of blocks in GPU memory.

    :param pointers: (n,) device addresses, on the host, of the current device. The blocks must stay as they
        are until the stream has come past.
    :param lengths: (n,) bytes, or one for all; on the host.
    :param stream: where it runs, as :func:`memkv.gpudirect.kernels.on` takes it; the current one if None.
    :returns: (n,) uint64, a CuPy array that is filled in stream order.
    :raises LocalError: no CuPy, or arguments that do not fit. :raises MemKVError: the kernels do not compile.
    """
    return _run(pointers, lengths, None, stream)[0]


def verify(
    pointers: npt.ArrayLike, lengths: npt.ArrayLike, expected: npt.ArrayLike, *, stream: Any = None
) -> Any:
    """The same, compared with the checksums that are due.

    :param expected: (n,) uint64 as the live lines have them, on the host.
    :returns: (n,) uint8, a CuPy array that is filled in stream order: 1 where the checksum agrees, else 0.
    """
    return _run(pointers, lengths, expected, stream)[1]


def _run(pointers: npt.ArrayLike, lengths: npt.ArrayLike, expected: Any, stream: Any) -> tuple[Any, Any]:
    host, how = batch(pointers, lengths, expected)
    cupy = kernels.cupy()
    with kernels.on(stream):
        processors = kernels.multiprocessors(int(cupy.cuda.runtime.getDevice()))
        grids = how.grids(processors)
        table = cupy.asarray(host)
        hashes = cupy.empty((how.blocks, how.pitch), cupy.uint64)
        out = cupy.empty(how.blocks, cupy.uint64)
        verdicts = cupy.empty(how.blocks, cupy.uint8)
        count, pitch, threads = np.uint32(how.blocks), np.uint32(how.pitch), (WARPS * 32,)
        if how.most:
            kernels.function("checksum", "mkv_chunks")(
                (grids[0],), threads, (table[0], table[1], count, np.uint32(how.most), pitch, hashes)
            )
        due = table[2] if expected is not None else np.uint64(0)
        kernels.function("checksum", "mkv_verdicts")(
            (grids[1],), threads, (table[1], count, pitch, hashes, out, due, verdicts)
        )
    return out, verdicts

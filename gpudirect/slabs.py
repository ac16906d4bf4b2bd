"""GPU memory that memkv owns: a few large allocations, registered once, cut into blocks.

Registering costs milliseconds and BAR1 space, so nobody wants it for every array; and memory of CuPy's or
torch's pools may be cut up, given back or mapped anew under a registration. A slab comes from ``cuMemAlloc``,
which is what ``cudaMalloc`` is: never from a pool, never ``cudaMallocAsync``. Its length is a multiple of 2
MiB.

    slabs = Slabs(0, register=peer.register)
    block = slabs.take(64 << 20)
    kv = block.array((32, 1024, 1024), "float16")      # of CuPy; torch.as_tensor(block) for torch
    peer.get_into(keys, block.slices(offsets, block_bytes))
    block.close(stream)                                 # reused once the stream has come so far
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..rdma.errors import DeviceError, LocalError
from . import driver
from .order import Before

UNIT = 2 << 20  # what slabs are multiples of: GPU pages are 64 KiB or 2 MiB
SLAB_BYTES = 256 << 20
GRAIN = 512  # what blocks are multiples of, like cudaMalloc's own


class Space:
    """Which parts of ``nbytes`` are free. A block begins at a multiple of its own size rounded up to a power
    of two, between :data:`GRAIN` and :data:`UNIT`, so it never straddles more pages than it must.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._start = [0] if nbytes else []  # of each free stretch, ascending
        self._size = [nbytes] if nbytes else []
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return sum(self._size)

    @property
    def empty(self) -> bool:
        return not self._taken

    def take(self, nbytes: int) -> int | None:
        """Where a new block begins, or None: the lowest place that it fits in."""
        if nbytes <= 0:
            raise LocalError(f"a block of {nbytes} bytes")
        size = -(-nbytes // GRAIN) * GRAIN
        align = min(UNIT, 1 << (size - 1).bit_length())
        for i, (start, length) in enumerate(zip(self._start, self._size, strict=True)):
            at = -(-start // align) * align
            if at + size > start + length:
                continue
            parts = [(start, at - start), (at + size, start + length - at - size)]
            parts = [p for p in parts if p[1]]
            self._start[i : i + 1] = [s for s, _ in parts]
            self._size[i : i + 1] = [n for _, n in parts]
            self._taken[at] = size
            return at
        return None

    def give(self, start: int) -> None:
        """Frees a block, and joins it with what is free beside it."""
        size = self._taken.pop(start, None)
        if size is None:
            raise LocalError(f"no block begins at {start}")
        i = bisect.bisect(self._start, start)
        if i < len(self._start) and start + size == self._start[i]:
            size += self._size[i]
            del self._start[i], self._size[i]
        if i and self._start[i - 1] + self._size[i - 1] == start:
            self._size[i - 1] += size
        else:
            self._start.insert(i, start)
            self._size.insert(i, size)


class _Bytes:
    """Something that CuPy, torch and memkv take for a GPU array of bytes."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


class Slab(_Bytes):
    """One allocation. ``buffer`` is what registering it gave."""

    def __init__(self, cuda: driver.Driver, device: int, nbytes: int) -> None:
        self._cuda = cuda
        self.device = device
        self.nbytes = nbytes
        with cuda.on(device):
            self.address = cuda.mem_alloc(nbytes)
        self.space = Space(nbytes)
        self.buffer: Any = None

    def close(self) -> None:
        """Withdraws it, then frees it."""
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None
        if self.address:
            with self._cuda.on(self.device):
                self._cuda.mem_free(self.address)
            self.address = 0


class Block(_Bytes):
    """A part of a slab. Arrays of it keep it alive, and keep no other from being put in its place once it is
    closed.
    """

    def __init__(self, slabs: Slabs, slab: Slab, offset: int, nbytes: int) -> None:
        self._slabs = slabs
        self.slab = slab
        self.offset = offset  # in the slab
        self.nbytes = nbytes
        self.closed = False

    @property
    def address(self) -> int:  # type: ignore[override]
        if self.closed:
            raise LocalError("this block is closed")
        return self.slab.address + self.offset

    @property
    def buffer(self) -> Any:
        """The slab's buffer: slices of it count from the slab's start (:meth:`slices` does not)."""
        return self.slab.buffer

    def slices(self, offsets: Any, lengths: Any) -> Any:
        """Slices for gets and puts.

        :param offsets: bytes from the start of this block. :param lengths: bytes; one for all, or one each.
        :raises LocalError: a slice is not inside the block, or the slabs are not registered.
        """
        if self.slab.buffer is None or self.closed:
            raise LocalError("this block is closed, or its slabs were not registered", "Slabs(register=…)")
        start = np.atleast_1d(np.asarray(offsets, np.uint64))
        size = np.broadcast_to(np.asarray(lengths, np.uint64), start.shape)
        end = np.uint64(self.nbytes)
        if (start > end).any() or (size > end - np.minimum(start, end)).any():
            raise LocalError(f"a slice ends beyond the block's {self.nbytes} bytes")
        return self.slab.buffer.slices(start + np.uint64(self.offset), lengths)

    def array(self, shape: Any = None, dtype: Any = "uint8") -> Any:
        """A CuPy array over this block. :raises LocalError: no CuPy here, or it does not fit."""
        try:
            import cupy
        except ImportError:
            raise LocalError(
                "CuPy is not installed", "pip install cupy-cuda12x; or torch.as_tensor(block)"
            ) from None
        kind = np.dtype(dtype)
        shape = (self.nbytes // kind.itemsize,) if shape is None else shape
        memory = cupy.cuda.UnownedMemory(self.address, self.nbytes, self, device_id=self.slab.device)
        out = cupy.ndarray(shape, kind, memptr=cupy.cuda.MemoryPointer(memory, 0))
        if out.nbytes > self.nbytes:
            raise LocalError(f"{out.nbytes} bytes do not fit into a block of {self.nbytes}")
        return out

    def close(self, stream: Any = None) -> None:
        """Gives the block back.

        :param stream: the stream on which it was last used: it is not handed out again before that has come
            as
            far as it is now. None: nothing uses it any more. Batches over it must have returned.
        """
        if not self.closed:
            self.closed = True
            self._slabs._give(self, stream)


class Slabs:
    """Blocks on one device.

    :param device: its ordinal. :param slab_bytes: of a new slab; larger blocks get one of their own.
    :param limit: bytes of all slabs together; None: as much as the device has.
    :param register: called with every new slab (``peer.register``); what it returns is closed with the slab.
    :raises DriverMissing: no CUDA here.
    """

    def __init__(
        self,
        device: int = 0,
        *,
        slab_bytes: int = SLAB_BYTES,
        limit: int | None = None,
        register: Callable[[Slab], Any] | None = None,
    ) -> None:
        self._cuda = driver.load()
        self.device = device
        self._slab_bytes = slab_bytes
        self._limit = limit
        self._register = register
        self._slabs: list[Slab] = []
        self._pending: list[tuple[Before, Slab, int]] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(s.nbytes for s in self._slabs)

    def take(self, nbytes: int) -> Block:
        """A block of at least ``nbytes``, its contents undefined.

        :raises DeviceError: the limit is reached, or the device has no more. :raises LocalError: no such
            size.
        """
        with self._lock:
            self._collect()
            for slab in self._slabs:
                at = slab.space.take(nbytes)
                if at is not None:
                    return Block(self, slab, at, nbytes)
            slab = self._grow(nbytes)
            at = slab.space.take(nbytes)
            assert at is not None
            return Block(self, slab, at, nbytes)

    def _grow(self, nbytes: int) -> Slab:
        size = -(-max(nbytes, self._slab_bytes) // UNIT) * UNIT
        if self._limit is not None and self.nbytes + size > self._limit:
            raise DeviceError(
                f"{self.nbytes} bytes of slabs are in use, and {size} more are over the limit", 12, "limit="
            )
        slab = Slab(self._cuda, self.device, size)
        try:
            if self._register is not None:
                slab.buffer = self._register(slab)
        except BaseException:
            slab.close()
            raise
        self._slabs.append(slab)
        return slab

    def _give(self, block: Block, stream: Any) -> None:
        with self._lock:
            if stream is None:
                block.slab.space.give(block.offset)
            else:
                self._pending.append((Before(self._cuda, self.device, stream), block.slab, block.offset))

    def _collect(self) -> None:
        """What streams are done with is free again."""
        waiting = []
        for before, slab, offset in self._pending:
            if before.reached():
                before.close()
                slab.space.give(offset)
            else:
                waiting.append((before, slab, offset))
        self._pending = waiting

    def close(self) -> None:
        """Withdraws and frees all slabs. :raises LocalError: a block is still in use; nothing was done
        then."""
        with self._lock:
            self._collect()
            if used := sum(not s.space.empty for s in self._slabs):
                raise LocalError(f"{used} slabs have blocks that are not closed, or streams that use them")
            while self._slabs:
                self._slabs.pop().close()

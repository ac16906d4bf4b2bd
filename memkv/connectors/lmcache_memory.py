"""The memory that LMCache's objects lie in: registered once per arena, copied through where that cannot be.

LMCache cuts its objects out of one arena, or a few. Each is registered when it is described or first met, and
from then on a batch's slices are arithmetic on addresses.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batches import Keys
from ..buffers import SLICE, Buffer, Slices
from ..peer import Peer, Statuses
from ..rdma.errors import MemKVError
from ..status import Status

log = logging.getLogger("memkv.lmcache")

BOUNCE_BYTES = 64 << 20  # copied through at a time
Numbers = npt.NDArray[np.uint64]


def places(objects: Sequence[Any]) -> tuple[Numbers, Numbers]:
    """(addresses, sizes in bytes) of MemoryObjs.

    :raises NotImplementedError: LMCache's, for objects that are not in memory (GDS).
    """
    n = len(objects)
    addresses = np.fromiter((o.data_ptr for o in objects), np.uint64, n)
    return addresses, np.fromiter((o.get_size() for o in objects), np.uint64, n)


class Regions:
    """What one peer has registered."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._lock = threading.Lock()
        self._buffers: list[Buffer] = []  # by address; replaced together with the arrays, never changed
        self._starts: Numbers = np.empty(0, np.uint64)
        self._ends: Numbers = np.empty(0, np.uint64)
        self._owners: list[Any] = []  # keep the memory where it is
        self._refused: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._buffers)

    def add(self, address: int, nbytes: int, owner: Any = None) -> None:
        """Registers an arena, unless that was done or tried before; a refusal is logged with its reason."""
        with self._lock:
            at = np.array([address], np.uint64), np.array([nbytes], np.uint64)
            if self._find(*at) is not None or (address, nbytes) in self._refused:
                return
            try:
                buffer = self.peer.register((address, nbytes))
            except (MemKVError, OSError) as exc:
                self._refused.add((address, nbytes))
                log.warning(
                    "%d bytes of LMCache's memory at %#x cannot be registered, blocks are copied through: %s",
                    nbytes,
                    address,
                    exc,
                )
                return
            self._owners.append(owner)
            buffers = sorted([*self._buffers, buffer], key=lambda b: b.address)
            starts = np.array([b.address for b in buffers], np.uint64)
            self._buffers, self._starts = buffers, starts
            self._ends = starts + np.array([b.nbytes for b in buffers], np.uint64)

    def cover(self, objects: Sequence[Any]) -> None:
        """Registers the arenas that these objects were cut out of."""
        for obj in objects:
            tensor = obj.raw_tensor
            if tensor is None or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            # One that lies alone is not worth it: its memory is another one for the next object.
            if storage.nbytes() >= 2 * obj.get_size():
                self.add(storage.data_ptr(), storage.nbytes(), storage)

    def _find(self, addresses: Numbers, sizes: Numbers) -> npt.NDArray[np.intp] | None:
        if not self._buffers:
            return None
        at = np.searchsorted(self._starts, addresses, side="right").astype(np.intp) - 1
        inside = (at >= 0) & (addresses + sizes <= self._ends[at])
        return at if inside.all() else None

    def slices(self, addresses: Numbers, sizes: Numbers) -> Slices | None:
        """Where these are, or None if not all of them are in what is registered."""
        with self._lock:
            at, buffers, starts = self._find(addresses, sizes), self._buffers, self._starts
        if at is None:
            return None
        if len(buffers) == 1:
            return buffers[0].slices(addresses - starts[0], sizes)
        out = np.empty(len(addresses), SLICE)
        for i in np.unique(at):
            mine = at == i
            out[mine] = buffers[i].slices(addresses[mine] - starts[i], sizes[mine])
        return out


# --- memory that could not be registered ---


def in_host_memory(objects: Sequence[Any]) -> bool:
    """Whether the CPU can copy out of and into these."""
    tensors = [o.raw_tensor for o in objects]
    return all(t is not None and t.device.type == "cpu" for t in tensors)


def put_through(
    peer: Peer, keys: Keys, addresses: Numbers, sizes: Numbers, *, timeout: float, durability: str
) -> Statuses:
    """A blocking put from memory that is not registered."""
    status = np.full(len(keys), Status.ERROR_INTERNAL, np.uint8)
    for part, memory, offsets, buffer in _bounce(peer, sizes):
        for address, size, offset in zip(addresses[part], sizes[part], offsets, strict=True):
            ctypes.memmove(memory.ctypes.data + int(offset), int(address), int(size))
        slices = buffer.slices(offsets, sizes[part])
        status[part] = peer.put_from(keys[part], slices, timeout=timeout, durability=durability)
    return status


def get_through(
    peer: Peer,
    keys: Keys,
    addresses: Numbers,
    sizes: Numbers,
    *,
    timeout: float,
    lengths: npt.NDArray[np.uint32],
) -> Statuses:
    """A blocking get into memory that is not registered. ``lengths``: see :meth:`memkv.Peer.get_into`."""
    status = np.full(len(keys), Status.ERROR_INTERNAL, np.uint8)
    for part, memory, offsets, buffer in _bounce(peer, sizes):
        found = np.zeros(len(offsets), np.uint32)
        slices = buffer.slices(offsets, sizes[part])
        status[part] = peer.get_into(keys[part], slices, timeout=timeout, lengths=found)
        lengths[part] = found
        for i in np.flatnonzero(status[part] == Status.HIT):
            ctypes.memmove(int(addresses[part][i]), memory.ctypes.data + int(offsets[i]), int(found[i]))
    return status


def _bounce(peer: Peer, sizes: Numbers) -> Iterator[tuple[slice, npt.NDArray[np.uint8], Numbers, Buffer]]:
    """(which objects, memory for them, where in it each is, the same registered), a few at a time."""
    start = 0
    while start < len(sizes):
        fits = int(np.searchsorted(np.cumsum(sizes[start:]), BOUNCE_BYTES, side="right"))
        part = slice(start, start + max(1, fits))
        ends = np.cumsum(sizes[part])
        memory = np.empty(int(ends[-1]), np.uint8)
        buffer = peer.register(memory)
        try:
            yield part, memory, ends - sizes[part], buffer
        finally:
            buffer.close()
        start = part.stop

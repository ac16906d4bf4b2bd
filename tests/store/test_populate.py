"""Pages that are brought in before they are needed: those of the next slabs, and no others."""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np
import pytest

from memkv.rdma.memory import HostMemory
from memkv.store import populate
from memkv.store.native._store import ffi, lib

SLAB = 4 << 20
SLABS = 6

_libc = ctypes.CDLL(None, use_errno=True)


def resident(address: int, length: int) -> int:
    """How many bytes there have pages."""
    pages = np.zeros(length // mmap.PAGESIZE, np.uint8)
    out = pages.ctypes.data_as(ctypes.c_void_p)
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), out):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def test_the_next_slabs_are_brought_in_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(SLABS * SLAB, huge=False)
    try:
        populate.populate(memory.address, mmap.PAGESIZE)
        if not resident(memory.address, mmap.PAGESIZE):
            pytest.skip("this kernel has no MADV_POPULATE_WRITE (Linux 5.14 has)")
        monkeypatch.setattr(populate, "AHEAD_BYTES", 2 * SLAB)
        arena = lib.mkv_arena_new(ffi.cast("void *", memory.address), memory.nbytes, SLAB, 1)
        ahead = populate.Ahead(arena, SLAB)
        until = time.monotonic() + 20
        while resident(memory.address, 2 * SLAB) < 2 * SLAB:
            assert time.monotonic() < until
            time.sleep(0.01)
        ahead.wake()  # nothing was taken
        time.sleep(0.05)
        ahead.close()
        assert resident(memory.address + 2 * SLAB, (SLABS - 2) * SLAB) == 0
        lib.mkv_arena_free(arena)
    finally:
        memory.close()


def test_where_the_next_slabs_lie() -> None:
    memory = HostMemory(3 * SLAB, huge=False)
    arena = lib.mkv_arena_new(ffi.cast("void *", memory.address), memory.nbytes, SLAB, 1)
    address = ffi.new("uint64_t *")
    for i in range(3):
        assert lib.mkv_arena_next(arena, i, address) == 0
        assert address[0] == memory.address + i * SLAB
    assert lib.mkv_arena_next(arena, 3, address) < 0
    lib.mkv_arena_free(arena)
    memory.close()

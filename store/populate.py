"""Has the kernel bring in the arena's next pages before they are needed.

A fresh page is zeroed when it is first touched, at a few GB/s at best; a put that had to wait for a whole
slab of them would take a hundred times as long as its neighbours. So a thread keeps AHEAD_BYTES of the slabs
that will be taken next brought in, and no more: memory that nobody uses stays with the system.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from .native._store import ffi, lib

AHEAD_BYTES = 1 << 30
CHUNK_BYTES = 16 << 20  # between two looks at whether the node stops
_MADV_POPULATE_WRITE = 23  # Linux 5.14; linux/mman.h

_libc = ctypes.CDLL(None)


def populate(address: int, length: int) -> None:
    """Brings in all pages now. A kernel before 5.14 cannot, which does no harm: they come one by one."""
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


class Ahead:
    """The thread. ``wake`` after slabs have been taken, ``close`` before the arena goes.

    :param arena: of the C core. :param slab_bytes: of its slabs.
    """

    def __init__(self, arena: Any, slab_bytes: int) -> None:
        self._arena = arena
        self._slab_bytes = slab_bytes
        self._wake = threading.Event()
        self._wake.set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-populate", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, within a chunk's time."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        done: set[int] = set()  # addresses of slabs that were brought in once: they stay so
        address = ffi.new("uint64_t *")
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            for i in range(-(-AHEAD_BYTES // self._slab_bytes)):
                if lib.mkv_arena_next(self._arena, i, address):
                    break
                if address[0] not in done:
                    self._bring_in(int(address[0]))
                    done.add(int(address[0]))

    def _bring_in(self, address: int) -> None:
        for at in range(0, self._slab_bytes, CHUNK_BYTES):
            if self._closed:
                return
            populate(address + at, min(CHUNK_BYTES, self._slab_bytes - at))

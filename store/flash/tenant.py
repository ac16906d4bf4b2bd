"""A namespace's part of flash: its segments and blocks found again, new segments, and what it tells.

Everything here may block (a segment is written down before it is used), so it is called in the pool.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

import numpy as np

from ..layout import BUCKET_SLOTS
from ..native._store import ffi, lib
from . import format as f
from .opened import OpenDevice, Records
from .sharing import Place
from .store import FlashStore

log = logging.getLogger("memkv.flash")


class Tenant:
    """Made before the namespace's first slab is ready.

    :param ns: the namespace's core. :param name: what flash remembers of it.
    """

    def __init__(self, store: FlashStore, ns: Any, name: f.Name) -> None:
        self.store = store
        self.name = name
        self._ns = ns
        rc = lib.mkv_ns_flash_attach(ns, store.flash, name.incarnation)
        if rc:
            raise MemoryError(f"namespace {name.name} cannot use flash: error {-rc}")
        store.sharing.join(self)

    # --- what was there before ---

    @property
    def expected(self) -> int:
        """Blocks that there may be at most after :meth:`restore`."""
        header = self.name.align
        return sum(d.super.segment_bytes // (header + s.payload) for d, s in self._segments())

    def _segments(self) -> list[tuple[OpenDevice, f.Segment]]:
        return self.store.segments_of(self.name.id)

    def make_room_for(self, blocks: int) -> None:
        """An index that so many blocks fill by half, while no session knows of any."""
        span = ffi.new("struct mkv_span *")
        lib.mkv_ns_table(self._ns, span)
        capacity = int(span.buckets) * BUCKET_SLOTS
        while capacity < 2 * blocks:
            self.double_index()
            capacity *= 2

    def double_index(self) -> None:
        """A larger index at once, while no session knows of any."""
        old, new = ffi.new("struct mkv_span *"), ffi.new("struct mkv_span *")
        lib.mkv_ns_table(self._ns, old)
        rc = lib.mkv_ns_table_prepare(self._ns, new) or lib.mkv_ns_table_switch(self._ns, new.id)
        if rc:
            why = os.strerror(-rc)
            raise MemoryError(f"namespace {self.name.name}: the index cannot grow: {why}")
        lib.mkv_ns_table_drop(self._ns, old.id)

    def restore(self, scan: bool = False) -> None:
        """Takes up the namespace's segments: from snapshots where a device has one, else by a scan that goes
        on after this has returned.

        :param scan: all of them by a scan.
        :raises MemoryError: then nothing may be served: what was deleted could be found later.
        """
        imported = np.zeros(0, f.RECORD) if scan else self.store.records_of(self.name.id)
        for d, segment in self._segments():
            how = 1 if scan or d.records is None else 2
            if not d.failed:
                self._take_up(d, segment, how)
        if scan:
            return
        records = ffi.from_buffer("struct mkv_flash_record[]", imported) if len(imported) else ffi.NULL
        taken = 0
        while taken < len(imported):
            taken += int(lib.mkv_ns_flash_import(self._ns, records + taken, len(imported) - taken))
            if taken < len(imported):
                self.double_index()
        lib.mkv_ns_flash_imported(self._ns)
        if len(imported):
            log.info("namespace %s: %d blocks from snapshots", self.name.name, self.stats()["flash_blocks"])

    def _take_up(self, d: OpenDevice, segment: f.Segment, scan: int) -> None:
        handle = int(lib.mkv_ns_segment_add(self._ns, d.span(segment), scan))
        if handle == -errno.EINVAL:  # written by another version, perhaps: nobody can say what lies there
            why = f"namespace {self.name.name} has no blocks of up to {segment.payload} bytes"
            self.store.forget(d, segment, why)
        elif handle != -errno.EIO:  # a device that has failed since is out, with all that is on it
            self._check(d, segment, handle)

    def _check(self, d: OpenDevice, segment: f.Segment, handle: int) -> None:
        if handle < 0:
            where = f"segment {segment.number} of {d.device.path}"
            raise MemoryError(f"namespace {self.name.name}: {where} cannot be used: {os.strerror(-handle)}")

    def scanning(self) -> int:
        """Header pages still to be looked at; until it is 0 there may be blocks that are not known yet."""
        return int(lib.mkv_ns_scanning(self._ns))

    # --- growing, and giving ---

    def grow(self) -> int:
        """Passes on a segment that was asked for and has become empty, and gives every size class that wants
        one a segment, as far as there are any; returns how many. Where none is free, others are asked.
        """
        self.store.sharing.collect(self)
        taken = 0
        while payload := int(lib.mkv_ns_segment_wanted(self._ns)):
            found = self.store.take_segment(self.name.id, payload, self.name.align)
            if found is not None:
                self.add(*found)
                taken += 1
            else:
                self.store.sharing.ask(self, payload)
        return taken

    def add(self, d: OpenDevice, segment: f.Segment) -> None:
        """A new segment of its own. :raises MemoryError: it cannot be used."""
        self._check(d, segment, int(lib.mkv_ns_segment_add(self._ns, d.span(segment), 0)))

    def promise(self, payload: int) -> None:
        """One is on its way for this size class: its blocks wait."""
        lib.mkv_ns_segment_promised(self._ns, payload)

    def deny(self, payload: int) -> None:
        """There is none for this size class: it gets along with what it has, if it has any."""
        lib.mkv_ns_segment_denied(self._ns, payload)

    def give_up(self, devices: int) -> bool:
        """Begins to empty a segment on one of these devices (bits). False: it cannot now."""
        return int(lib.mkv_ns_segment_give_up(self._ns, devices)) == 0

    def given_up(self) -> Place | None:
        """The segment that has become empty since, once."""
        out = ffi.new("struct mkv_segment *")
        if lib.mkv_ns_segment_given_up(self._ns, out):
            return None
        return int(out.device), int(out.number)

    # --- stopping, and what it tells ---

    def close(self) -> None:
        """Before the namespace's core is freed."""
        self.store.sharing.leave(self)

    def export(self) -> Records:
        """All blocks on flash, ``device`` being the engine's index. Nothing changes meanwhile."""
        n = int(lib.mkv_ns_flash_export(self._ns, ffi.NULL, 0))
        records = np.zeros(n, f.RECORD)
        if n:
            out = ffi.from_buffer("struct mkv_flash_record[]", records, require_writable=True)
            n = min(n, int(lib.mkv_ns_flash_export(self._ns, out, n)))
        records = records[:n]
        records["namespace"] = self.name.id
        return records

    def stats(self) -> dict[str, int]:
        out = ffi.new("struct mkv_ns_flash_stats *")
        lib.mkv_ns_flash_stats(self._ns, out)
        names = (name for name, _ in ffi.typeof("struct mkv_ns_flash_stats").fields)
        return {f"flash_{name}": int(getattr(out, name)) for name in names}

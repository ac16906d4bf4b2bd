"""A device that is in use: its superblock, its segments, and reading its tables."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...rdma.errors import MemKVError
from ..native._store import ffi
from . import format as f
from .device import Device

log = logging.getLogger("memkv.flash")

Records = npt.NDArray[np.void]


@dataclass(eq=False)
class OpenDevice:
    """A device in use. ``records`` are what its snapshot held, until the namespaces have taken them; None:
    its segments have to be scanned.
    """

    device: Device
    super: f.Superblock
    io: int  # index in the I/O engine
    segments: dict[int, f.Segment]
    records: Records | None
    failed: str = ""
    turn: int = field(default=0)

    @property
    def usable(self) -> int:
        """Segments that lie within the device as it is now (it may have been truncated)."""
        whole = (self.device.nbytes - self.super.data_at) // self.super.segment_bytes
        return int(max(0, min(self.super.segments, whole)))

    @property
    def shortened(self) -> str:
        """What is missing of a device that has become smaller since it was formatted; empty if nothing is."""
        if self.usable >= self.super.segments:
            return ""
        lost = self.super.segments - self.usable
        return f"it ends at {self.device.nbytes} of {self.super.size} bytes: {lost} segments are out of use"

    @property
    def trouble(self) -> str:
        """Why it, or a part of it, is out of use; empty if all is well."""
        return self.failed or self.shortened

    @property
    def free(self) -> int:
        """Segments that nobody has."""
        return 0 if self.failed else max(0, self.usable - len(self.segments))

    def takes(self, payload: int, align: int) -> bool:
        """Whether blocks of this size class can lie here."""
        return align % self.device.sector == 0 and align + payload <= self.super.segment_bytes

    def span(self, segment: f.Segment) -> Any:
        """The segment as C knows it."""
        out = ffi.new("struct mkv_segment *")
        out.offset = self.super.segment_offset(segment.number)
        out.bytes, out.epoch, out.payload = self.super.segment_bytes, segment.epoch, segment.payload
        out.device, out.number = self.io, segment.number
        return out


def pack_table(block: f.Superblock, segments: dict[int, f.Segment]) -> bytes:
    """A device's whole segment table."""
    table = b"".join(f.pack_segment(segments.get(n), block.secret) for n in range(block.segments))
    return table.ljust(block.snapshot_at - block.segments_at, b"\0")


def read_names(device: Device, block: f.Superblock) -> tuple[int, list[f.Name]] | None:
    both = [device.read(block.names_at + i * f.NAMES_BYTES, f.NAMES_BYTES) for i in (0, 1)]
    whole = [t for t in (f.parse_names(raw, block.secret) for raw in both) if t is not None]
    return max(whole, key=lambda t: t[0], default=None)


def read_snapshot(device: Device, block: f.Superblock) -> Records | None:
    """The records of a clean device; None: it has to be scanned."""
    try:
        page = device.read(block.snapshot_at, f.PAGE)
        count = f.snapshot_count(page, block.snapshot, block.secret)
        if count is None:
            return np.zeros(0, f.RECORD) if block.boot == 0 else None
        length = -(-count * f.RECORD.itemsize // f.PAGE) * f.PAGE
        body = device.read(block.snapshot_at + f.PAGE, length) if length else b""
        records = f.parse_snapshot(page, body, block.secret)
    except MemKVError as exc:
        log.error("flash %s: no snapshot: %s", device.path, exc)
        return None
    if records is None:
        log.error("flash %s: the snapshot is damaged", device.path)
    return records

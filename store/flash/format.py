"""The bytes of a flash device that are not blocks: superblock, namespace table, segment table, snapshot.

Drawn in docs/layout.md, "A flash device"; a test compares. Pure: bytes in, values out, and back. Every
structure carries a check, so that a torn or foreign one is told from a good one; what is written more than
once has two places in turn, but for the segment table, whose records are smaller than a sector.

::

    0       4 KiB    8 KiB          +64 KiB        +64 KiB
    │ super A │ super B │ namespaces A │ namespaces B │ segment table │ snapshot │ segment 0 │ segment 1 │ …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...rdma.errors import MemKVError
from ..native._store import ffi, lib

PAGE = 4096
MIB = 1 << 20
MAGIC = int.from_bytes(b"MKVFLASH", "little")
NAMES_MAGIC = int.from_bytes(b"MKVNAMES", "little")
SNAPSHOT_MAGIC = int.from_bytes(b"MKVSNAPS", "little")
VERSION = 1
CLEAN = 1  # flag: stopped in order; the snapshot of this generation is whole
STARTING = 2  # flag: the store has not gone on under this mark yet, see marks.py
NAMES_BYTES = 64 << 10
MAX_NAMESPACES = NAMES_BYTES // 512 - 1
SEGMENT_MIN = 4 * MIB
SEGMENT_MAX = 1 << 30

SUPER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("flags", "<u4"),
        ("store", "V16"),  # identity of the store: the same on all its devices
        ("identity", "<u8"),  # of this device
        ("index", "<u4"),  # this device's place in the store
        ("count", "<u4"),  # devices of the store at its last start
        ("size", "<u8"),  # bytes of the device that are used
        ("segment_bytes", "<u8"),
        ("segments", "<u4"),
        ("spare0", "<u4"),
        ("secret", "<u8"),  # keys the checks of cold records
        ("boot", "<u8"),  # starts so far, and losses of other devices
        ("start", "<u8"),  # random, of the last of these; both together are the mark, see marks.py
        ("prior_boot", "<u8"),  # the mark before, while STARTING
        ("prior_start", "<u8"),
        ("generation", "<u8"),  # of this superblock: the higher of two good ones counts
        ("snapshot", "<u8"),  # generation that the snapshot must name
        ("names_at", "<u8"),
        ("segments_at", "<u8"),
        ("snapshot_at", "<u8"),
        ("snapshot_bytes", "<u8"),
        ("data_at", "<u8"),
        ("check", "<u8"),
    ]
)
NAME = np.dtype(
    [
        ("id", "<u4"),
        ("block_bytes", "<u4"),
        ("align", "<u4"),
        ("length", "<u4"),  # of the name
        ("grace_ns", "<u8"),
        ("incarnation", "<u8"),
        ("salt", "<u8"),
        ("name", "V256"),
        ("spare", "V216"),
    ]
)
NAMES_HEAD = np.dtype(
    [("magic", "<u8"), ("generation", "<u8"), ("count", "<u4"), ("spare", "<u4"), ("check", "<u8")]
)
SEGMENT = np.dtype(
    [
        ("namespace", "<u4"),
        ("spare", "<u4"),
        ("payload", "<u8"),  # of its size class
        ("epoch", "<u8"),  # of this assignment; 0: free
        ("check", "<u8"),
    ]
)
SNAPSHOT = np.dtype(
    [("magic", "<u8"), ("generation", "<u8"), ("count", "<u8"), ("checksum", "<u8"), ("check", "<u8")]
)
RECORD = np.dtype(
    [
        ("key", "V16"),
        ("checksum", "<u8"),
        ("sequence", "<u8"),
        ("offset", "<u8"),
        ("device", "<u4"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("namespace", "<u4"),
        ("spare", "<u4", (2,)),
    ]
)


class FormatError(MemKVError):
    """What lies on the device is not, or not whole, what it should be."""


_NUMBERS = sorted({*(SUPER.names or ())} - {"magic", "version", "flags", "store", "spare0", "check"})


def checksum(data: bytes | bytearray | memoryview | npt.NDArray[Any], key: int = 0) -> int:
    """The block checksum (docs/layout.md) of ``data``, with an eight-byte key before it."""
    whole = key.to_bytes(8, "little") + bytes(data)
    return int(lib.mkv_checksum(ffi.from_buffer(whole), len(whole)))


def _sealed(record: npt.NDArray[np.void], key: int) -> bytes:
    """A single record with its trailing ``check`` filled in."""
    raw = bytearray(record.tobytes())
    raw[-8:] = checksum(raw[:-8], key).to_bytes(8, "little")
    return bytes(raw)


def _good(raw: bytes, key: int) -> bool:
    return checksum(raw[:-8], key) == int.from_bytes(raw[-8:], "little")


@dataclass(frozen=True, slots=True)
class Superblock:
    """See SUPER; lengths and places in bytes."""

    store: bytes
    identity: int
    index: int
    count: int
    size: int
    segment_bytes: int
    segments: int
    secret: int
    boot: int
    start: int
    prior_boot: int
    prior_start: int
    generation: int
    snapshot: int
    clean: bool
    starting: bool
    segments_at: int
    snapshot_at: int
    snapshot_bytes: int
    data_at: int
    names_at: int = 2 * PAGE

    def pack(self) -> bytes:
        """One page."""
        r = np.zeros((), SUPER)
        r["magic"], r["version"] = MAGIC, VERSION
        r["flags"] = CLEAN * self.clean | STARTING * self.starting
        r["store"] = np.void(self.store)
        for name in _NUMBERS:
            r[name] = getattr(self, name)
        return _sealed(r, MAGIC).ljust(PAGE, b"\0")

    @classmethod
    def parse(cls, page: bytes) -> Superblock | None:
        """The superblock on a page; None if there is no whole one.

        :raises FormatError: a good one of a version that this program does not know.
        """
        raw = page[: SUPER.itemsize]
        r = np.frombuffer(raw, SUPER)[0]
        if int(r["magic"]) != MAGIC or not _good(raw, MAGIC):
            return None
        if int(r["version"]) != VERSION:
            raise FormatError(
                f"flash format version {int(r['version'])}, this program knows {VERSION}", "upgrade it"
            )
        values = {name: int(r[name]) for name in _NUMBERS}
        flags = int(r["flags"])
        return cls(
            store=r["store"].tobytes(),
            clean=bool(flags & CLEAN),
            starting=bool(flags & STARTING),
            **values,
        )

    def next(self, **changes: Any) -> Superblock:
        """The one that replaces it, in the other place."""
        return replace(self, generation=self.generation + 1, **changes)

    def place(self) -> int:
        """Where on the device it goes: the two places take turns."""
        return self.generation % 2 * PAGE

    def segment_offset(self, number: int) -> int:
        return self.data_at + number * self.segment_bytes


def plan(
    nbytes: int, *, store: bytes, identity: int, index: int, count: int, secret: int, segment_bytes: int = 0
) -> Superblock:
    """Lays out a device of ``nbytes``.

    :param segment_bytes: 0: a 256th of the device; of small ones a sixteenth, up to 64 MiB; 4 MiB to 1 GiB.
    :raises FormatError: too small.
    """
    if not segment_bytes:
        wanted = max(nbytes // 256, min(nbytes // 16, 64 * MIB)) // MIB * MIB
        segment_bytes = min(max(wanted, SEGMENT_MIN), SEGMENT_MAX)
    if segment_bytes % PAGE or not PAGE * 4 <= segment_bytes <= SEGMENT_MAX:
        raise FormatError(
            f"segments of {segment_bytes} bytes", "--segment-bytes: a multiple of 4096, up to 1G"
        )
    segments_at = 2 * PAGE + 2 * NAMES_BYTES
    table = -(-(nbytes // segment_bytes) * SEGMENT.itemsize // PAGE) * PAGE
    snapshot_at = segments_at + table
    snapshot_bytes = max(nbytes // 1024 // PAGE * PAGE, 64 * PAGE)
    data_at = -(-(snapshot_at + snapshot_bytes) // MIB) * MIB
    segments = (nbytes - data_at) // segment_bytes if nbytes > data_at else 0
    if segments < 2:
        raise FormatError(
            f"{nbytes >> 10} KiB hold no two segments of {segment_bytes >> 10} KiB",
            "a larger device, or smaller --segment-bytes",
        )
    return Superblock(
        store=store,
        identity=identity,
        index=index,
        count=count,
        size=data_at + segments * segment_bytes,
        segment_bytes=segment_bytes,
        segments=segments,
        secret=secret,
        boot=0,
        start=0,
        prior_boot=0,
        prior_start=0,
        generation=2,
        snapshot=0,
        clean=True,
        starting=False,
        segments_at=segments_at,
        snapshot_at=snapshot_at,
        snapshot_bytes=snapshot_bytes,
        data_at=data_at,
    )


@dataclass(frozen=True, slots=True)
class Name:
    """A namespace as the store remembers it. Its incarnation changes when it is dropped."""

    id: int
    name: str
    block_bytes: int
    align: int
    grace_ns: int
    incarnation: int
    salt: int


def pack_names(names: Sequence[Name], generation: int, secret: int) -> bytes:
    """The namespace table, NAMES_BYTES long."""
    if len(names) > MAX_NAMESPACES:
        raise FormatError(f"{len(names)} namespaces, {MAX_NAMESPACES} fit on flash")
    table = np.zeros(len(names), NAME)
    for row, name in zip(table, names, strict=True):
        raw = name.name.encode()
        if len(raw) > NAME["name"].itemsize:
            raise FormatError(f"a name of {len(raw)} bytes", f"{NAME['name'].itemsize} fit on flash")
        row["id"], row["block_bytes"], row["align"], row["length"] = (
            name.id,
            name.block_bytes,
            name.align,
            len(raw),
        )
        row["grace_ns"], row["incarnation"], row["salt"] = name.grace_ns, name.incarnation, name.salt
        row["name"] = np.void(raw.ljust(256, b"\0"))
    head = np.zeros((), NAMES_HEAD)
    head["magic"], head["generation"], head["count"] = NAMES_MAGIC, generation, len(names)
    body = table.tobytes()
    head["check"] = checksum(head.tobytes()[:-8] + body, secret)
    return head.tobytes().ljust(512, b"\0") + body.ljust(NAMES_BYTES - 512, b"\0")


def parse_names(raw: bytes, secret: int) -> tuple[int, list[Name]] | None:
    """(generation, namespaces); None if the table is not whole."""
    head = np.frombuffer(raw[: NAMES_HEAD.itemsize], NAMES_HEAD)[0]
    count = int(head["count"])
    if int(head["magic"]) != NAMES_MAGIC or count > MAX_NAMESPACES:
        return None
    body = raw[512 : 512 + count * NAME.itemsize]
    if checksum(raw[: NAMES_HEAD.itemsize - 8] + body, secret) != int(head["check"]):
        return None
    out = []
    for row in np.frombuffer(body, NAME):
        name = row["name"].tobytes()[: int(row["length"])].decode()
        fields = (int(row[f]) for f in ("block_bytes", "align", "grace_ns", "incarnation", "salt"))
        out.append(Name(int(row["id"]), name, *fields))
    return int(head["generation"]), out


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that is assigned: to a namespace, for payloads of one size class."""

    number: int
    namespace: int
    payload: int
    epoch: int


def pack_segment(segment: Segment | None, secret: int) -> bytes:
    """One record of the segment table; None: free."""
    r = np.zeros((), SEGMENT)
    if segment:
        r["namespace"], r["payload"], r["epoch"] = segment.namespace, segment.payload, segment.epoch
    return _sealed(r, secret)


def parse_segments(raw: bytes, secret: int) -> list[Segment]:
    """The assigned segments of a table; records that are not whole count as free."""
    out = []
    for number, row in enumerate(
        np.frombuffer(raw[: len(raw) // SEGMENT.itemsize * SEGMENT.itemsize], SEGMENT)
    ):
        if int(row["epoch"]) and _good(row.tobytes(), secret):
            out.append(Segment(number, int(row["namespace"]), int(row["payload"]), int(row["epoch"])))
    return out


def pack_snapshot(records: npt.NDArray[np.void], generation: int, secret: int) -> bytes:
    """Header page and records, a whole number of pages."""
    body = records.tobytes()
    head = np.zeros((), SNAPSHOT)
    head["magic"], head["generation"], head["count"] = SNAPSHOT_MAGIC, generation, len(records)
    head["checksum"] = checksum(body, secret)
    raw = _sealed(head, secret).ljust(PAGE, b"\0") + body
    return raw.ljust(-(-len(raw) // PAGE) * PAGE, b"\0")


def snapshot_count(page: bytes, generation: int, secret: int) -> int | None:
    """The number of records of the snapshot whose header page this is; None unless it is whole and of that
    generation.
    """
    raw = page[: SNAPSHOT.itemsize]
    head = np.frombuffer(raw, SNAPSHOT)[0]
    good = (
        int(head["magic"]) == SNAPSHOT_MAGIC and int(head["generation"]) == generation and _good(raw, secret)
    )
    return int(head["count"]) if good else None


def parse_snapshot(page: bytes, body: bytes, secret: int) -> npt.NDArray[np.void] | None:
    """The records; None if they do not agree with the header's checksum."""
    head = np.frombuffer(page[: SNAPSHOT.itemsize], SNAPSHOT)[0]
    raw = body[: int(head["count"]) * RECORD.itemsize]
    if checksum(raw, secret) != int(head["checksum"]):
        return None
    return np.frombuffer(raw, RECORD).copy()

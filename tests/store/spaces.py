"""A namespace with an arena of its own, driven as a node drives it and read as a peer reads it."""

import errno
import mmap
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from memkv.store import layout
from memkv.store.native._store import ffi, lib

HOUR = 3_600_000_000_000  # a grace period in which the timer does not tick by itself
GRACE_TICKS = 5


def key_of(n: int) -> bytes:
    return random.Random(n).randbytes(16)


def payload_of(key: bytes, length: int) -> bytes:
    return (key * (length // 16 + 1))[:length]


def in_c(n: int) -> int:
    """A negative errno, as the C core returns it."""
    return -n


@dataclass(slots=True)
class Found:
    """What a peer finds under a key: the slot's word and the extent that it names."""

    slab: int
    offset: int  # of the payload
    generation: int
    length: int


class Space:
    """A namespace. ``tick`` makes ticks by hand, unless a short ``grace_ns`` has the timer make them."""

    def __init__(
        self,
        slabs: int = 4,
        slab_bytes: int = 16384,
        block_bytes: int = 2048,
        align: int = 512,
        grace_ns: int = HOUR,
    ) -> None:
        self.memory = mmap.mmap(-1, slabs * slab_bytes)
        self.align = align
        self.slab_bytes = slab_bytes
        self.bytes: Any = np.frombuffer(self.memory, np.uint8)
        self.base = int(self.bytes.ctypes.data)
        self.salt = 0x1234_5678_9ABC_DEF0
        self.arena = lib.mkv_arena_new(ffi.cast("void *", self.base), len(self.memory), slab_bytes, 77)
        assert self.arena != ffi.NULL
        self.ns = lib.mkv_ns_new(self.arena, 3, block_bytes, align, grace_ns, self.salt)
        assert self.ns != ffi.NULL
        self.slab_at: dict[int, int] = {}  # slab id to its place in `bytes`
        self.old_tables: list[int] = []

    def close(self) -> None:
        lib.mkv_ns_free(self.ns)
        lib.mkv_arena_free(self.arena)

    # --- what a node does ---

    def stats(self) -> Any:
        out = ffi.new("struct mkv_ns_stats *")
        lib.mkv_ns_stats(self.ns, out)
        return out[0]

    def check(self) -> None:
        assert (line := lib.mkv_ns_check(self.ns)) == 0, line

    def tick(self, n: int = 1) -> None:
        for _ in range(n):
            lib.mkv_ns_tick_now(self.ns)
            self.check()

    def take_slab(self) -> int:
        span = ffi.new("struct mkv_span *")
        rc: int = lib.mkv_ns_slab_take(self.ns, span)
        if rc:
            return rc
        assert span.id not in self.slab_at
        assert span.bytes == self.slab_bytes
        self.slab_at[span.id] = span.address - self.base
        return int(span.id)

    def serve_slabs(self) -> int:
        """Takes every slab that is wanted, and makes it ready: how many."""
        n = 0
        while (slab := self.take_slab()) > 0:
            assert lib.mkv_ns_slab_ready(self.ns, slab) == 0
            n += 1
        return n

    def serve_retired(self) -> list[int]:
        out = ffi.new("uint64_t *")
        gone: list[int] = []
        while lib.mkv_ns_slab_retired(self.ns, out) == 0:
            gone.append(int(out[0]))
        for slab in gone:
            del self.slab_at[slab]
            assert lib.mkv_ns_slab_released(self.ns, slab) == 0
        return gone

    def table(self) -> Any:
        span = ffi.new("struct mkv_span *")
        assert lib.mkv_ns_table(self.ns, span) == 0
        return span

    def grow_table(self) -> None:
        before = self.table()
        span = ffi.new("struct mkv_span *")
        assert lib.mkv_ns_table_prepare(self.ns, span) == 0
        assert span.buckets == 2 * before.buckets
        assert lib.mkv_ns_table_switch(self.ns, span.id) == 0
        self.old_tables.append(before.id)

    def drop_tables(self) -> None:
        for version in self.old_tables:
            assert lib.mkv_ns_table_drop(self.ns, version) == 0
        self.old_tables.clear()

    def serve(self) -> None:
        """All chores."""
        chores = lib.mkv_ns_chores(self.ns)
        if chores & lib.MKV_CHORE_SLAB:
            self.serve_slabs()
        if chores & lib.MKV_CHORE_RETIRE:
            self.serve_retired()
        if chores & lib.MKV_CHORE_TABLE:
            self.grow_table()
            self.drop_tables()

    # --- what a put does ---

    def begin(self, key: bytes, length: int) -> tuple[int, Any]:
        fill = ffi.new("struct mkv_fill *")
        return lib.mkv_fill_begin(self.ns, key, length, fill), fill

    def publish(self, fill: Any, key: bytes) -> int:
        payload = ffi.cast("void *", fill.address)
        return int(lib.mkv_fill_publish(self.ns, fill, key, lib.mkv_checksum(payload, fill.length)))

    def abandon(self, fill: Any) -> None:
        lib.mkv_fill_abandon(self.ns, fill)

    def put(self, key: bytes, payload: bytes) -> int:
        status, fill = self.begin(key, len(payload))
        if status != lib.MKV_PENDING:
            return status
        ffi.memmove(ffi.cast("void *", fill.address), payload, len(payload))
        return self.publish(fill, key)

    def put_patiently(self, key: bytes, payload: bytes) -> int:
        """Does the chores and waits for quarantines, as a node does."""
        for _ in range(50):
            status = self.put(key, payload)
            if status != lib.MKV_ERROR_FULL:
                return status
            if not self.serve_slabs():
                self.serve()
                self.tick()
        return status

    # --- batches ---

    def lookup(self, *keys: bytes) -> list[int]:
        status = ffi.new("uint8_t[]", len(keys))
        lib.mkv_ns_lookup(self.ns, b"".join(keys), len(keys), status)
        return list(status)

    def holds(self, key: bytes) -> bool:
        return self.lookup(key) == [lib.MKV_HIT]

    def match(self, *keys: bytes) -> int:
        return int(lib.mkv_ns_match(self.ns, b"".join(keys), len(keys)))

    def touch(self, *keys: bytes) -> int:
        return int(lib.mkv_ns_touch(self.ns, b"".join(keys), len(keys)))

    def pin(self, *keys: bytes, ttl_ns: int = HOUR) -> list[int]:
        status = ffi.new("uint8_t[]", len(keys))
        lib.mkv_ns_pin(self.ns, b"".join(keys), len(keys), ttl_ns, status)
        return list(status)

    def unpin(self, *keys: bytes) -> list[int]:
        status = ffi.new("uint8_t[]", len(keys))
        lib.mkv_ns_unpin(self.ns, b"".join(keys), len(keys), status)
        return list(status)

    def delete(self, *keys: bytes) -> list[int]:
        status = ffi.new("uint8_t[]", len(keys))
        lib.mkv_ns_delete(self.ns, b"".join(keys), len(keys), status)
        return list(status)

    # --- what a peer does: READs of raw memory, and nothing else ---

    def find(self, key: bytes) -> Found | None:
        table = self.table()
        return find_in(table.address, table.buckets, key, self.salt)

    def extent(self, found: Found) -> tuple[Any, Any]:
        """Views of the live line and of the payload."""
        at = self.slab_at[found.slab] + found.offset
        line = self.bytes[at - layout.LINE_BYTES : at].view(layout.LINE)[0]
        return line, self.bytes[at : at + found.length]

    def get(self, key: bytes) -> bytes | None:
        found = self.find(key)
        if found is None:
            return None
        line, payload = self.extent(found)
        assert line["magic"] == layout.LINE_MAGIC
        assert line["key"].tobytes() == key
        assert line["length"] == found.length
        assert line["generation"] & 0xFFFFFFFF == found.generation != 0
        assert int(line["checksum"]) == lib.mkv_checksum(payload.tobytes(), found.length)
        return bytes(payload.tobytes())


def read(address: int, length: int) -> bytes:
    return bytes(ffi.buffer(ffi.cast("uint8_t *", address), length)[:])


def read_bucket(address: int, bucket: int) -> Any:
    raw = read(address + layout.INDEX_HEADER + bucket * layout.BUCKET.itemsize, layout.BUCKET.itemsize)
    return np.frombuffer(raw, layout.BUCKET)["slot"][0]


def pick(slots: Any, key: bytes) -> Found | None:
    for slot in slots:
        if layout.location_state(slot["location"]) == layout.SLOT_LIVE and slot["key"].tobytes() == key:
            return Found(
                int(layout.location_slab(slot["location"])),
                int(layout.location_offset(slot["location"])),
                int(slot["generation"]),
                int(slot["length"]),
            )
    return None


def find_in(address: int, buckets: int, key: bytes, salt: int) -> Found | None:
    for bucket in layout.candidates(np.frombuffer(key, np.uint8).reshape(1, 16), salt, buckets)[0]:
        if found := pick(read_bucket(address, int(bucket)), key):
            return found
    return None


ENOENT, EAGAIN, ENOSPC, EEXIST, EBUSY, ENOMEM, EALREADY = map(
    in_c,
    (
        errno.ENOENT,
        errno.EAGAIN,
        errno.ENOSPC,
        errno.EEXIST,
        errno.EBUSY,
        errno.ENOMEM,
        errno.EALREADY,
    ),
)

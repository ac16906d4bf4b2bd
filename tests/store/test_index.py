"""The index against a dictionary, and what a reader sees of it while it changes."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memkv.store import layout
from memkv.store.native._store import ffi, lib

from .spaces import EAGAIN, EEXIST, ENOENT, ENOSPC, GRACE_TICKS, Found, key_of, pick, read_bucket

pytestmark = pytest.mark.asan

SALT = 0x0123_4567_89AB_CDEF


class Index:
    """An index, written through the C core and read as a peer reads it: by whole buckets of raw memory."""

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.ix = lib.mkv_index_new(buckets, SALT, 1, 99)
        self.address = int(ffi.cast("uintptr_t", lib.mkv_index_base(self.ix)))
        self.epoch = 0
        self.made = 0

    def close(self) -> None:
        lib.mkv_index_free(self.ix)

    def check(self) -> None:
        assert lib.mkv_index_check(self.ix) == 0

    def entry(self, key: bytes) -> Found:
        """A new entry, unlike all before."""
        self.made += 1
        return Found(self.made % 1000, self.made % 4096 * 512, self.made, self.made % 77 + 1)

    def insert(self, key: bytes, found: Found) -> int:
        slot = ffi.new("struct mkv_slot *")
        slot.key = key
        slot.generation = found.generation
        slot.length = found.length
        slot.location = lib.mkv_location(layout.SLOT_LIVE, found.slab, found.offset)
        return int(lib.mkv_index_insert(self.ix, slot))

    def insert_patiently(self, key: bytes, found: Found, graces: int = 64) -> int:
        """Waits while room is being made."""
        for _ in range(graces):
            if (rc := self.insert(key, found)) != EAGAIN:
                return rc
            self.tick(GRACE_TICKS)
        return EAGAIN

    def remove(self, key: bytes) -> int:
        return int(lib.mkv_index_remove(self.ix, key))

    def tick(self, n: int = 1) -> int:
        freed = 0
        for _ in range(n):
            self.epoch += 1
            freed += lib.mkv_index_tick(self.ix, self.epoch, 1, 0)
        return freed

    def candidates(self, key: bytes) -> tuple[int, int]:
        out = ffi.new("uint64_t[2]")
        lib.mkv_candidates(key, SALT, self.buckets, out)
        return out[0], out[1]

    def read(self, bucket: int) -> Any:
        return read_bucket(self.address, bucket)

    def find(self, key: bytes) -> Found | None:
        for bucket in self.candidates(key):
            if found := pick(self.read(bucket), key):
                return found
        return None

    @property
    def entries(self) -> int:
        return int(lib.mkv_index_entries(self.ix))

    @property
    def copies(self) -> int:
        return int(lib.mkv_index_copies(self.ix))


@pytest.fixture
def index(request: pytest.FixtureRequest) -> Iterator[Index]:
    ix = Index(getattr(request, "param", 64))
    yield ix
    ix.close()


class IndexMachine(RuleBasedStateMachine):
    """Two buckets hold sixteen keys: insertions soon meet full buckets and displacements."""

    @initialize(log=st.integers(1, 3))
    def make(self, log: int) -> None:
        self.index = Index(1 << log)
        self.model: dict[bytes, Found] = {}
        # What a slow reader holds: bucket images, the tick they are from, and what was there then.
        self.images: list[Any] = []
        self.image_epoch = 0
        self.known_since: dict[bytes, Found] = {}
        self.take_images()

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()

    @rule()
    def take_images(self) -> None:
        self.images = [self.index.read(b).copy() for b in range(self.index.buckets)]
        self.image_epoch = self.index.epoch
        self.known_since = dict(self.model)

    @rule(n=st.integers(0, 60))
    def insert(self, n: int) -> None:
        key = key_of(n)
        found = self.index.entry(key)
        full = all((self.index.read(b)["location"] != 0).all() for b in self.index.candidates(key))
        rc = self.index.insert(key, found)
        if key in self.model:
            assert rc == EEXIST
        elif full:
            assert rc in (EAGAIN, ENOSPC)
        else:
            assert rc == 0
            self.model[key] = found

    @rule(n=st.integers(0, 60))
    def remove(self, n: int) -> None:
        key = key_of(n)
        assert self.index.remove(key) == (0 if key in self.model else ENOENT)
        self.model.pop(key, None)
        self.known_since.pop(key, None)

    @rule(n=st.integers(1, 6))
    def tick(self, n: int) -> None:
        self.index.tick(n)

    @invariant()
    def every_key_is_found_and_no_other(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        assert self.index.entries == len(self.model)
        for n in range(61):
            assert self.index.find(key_of(n)) == self.model.get(key_of(n))

    @invariant()
    def a_slow_reader_misses_nothing_within_the_grace_period(self) -> None:
        """It saw one of two buckets at the time of the images and sees the other one now, or the reverse."""
        if not hasattr(self, "index") or self.index.epoch - self.image_epoch >= GRACE_TICKS:
            return
        for key, found in self.known_since.items():
            a, b = self.index.candidates(key)
            for then, now in ((a, b), (b, a)):
                assert found in (pick(self.images[then], key), pick(self.index.read(now), key))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("index", [4, 16, 128, 2048, 8192], indirect=True)
def test_more_than_nine_tenths_full_before_the_first_failure(index: Index) -> None:
    rng = random.Random(index.buckets)
    slots = index.buckets * layout.BUCKET_SLOTS
    while index.insert_patiently(key := rng.randbytes(16), index.entry(key)) == 0:
        pass
    assert index.entries / slots > 0.9
    index.check()


@pytest.mark.parametrize("index", [1024, 16384], indirect=True)
def test_nobody_waits_below_five_eighths_even_if_no_grace_period_passes(index: Index) -> None:
    """Which is where a namespace asks for a larger table."""
    rng = random.Random(1)
    for _ in range(index.buckets * layout.BUCKET_SLOTS * 5 // 8):
        key = rng.randbytes(16)
        assert index.insert(key, index.entry(key)) == 0


@pytest.mark.parametrize("index", [4096], indirect=True)
def test_relief_ahead_of_need_lets_nobody_wait_below_three_quarters_if_time_passes(index: Index) -> None:
    """Eight tables, a thousandth of the slots per tick; without relief some insertion waits earlier."""
    slots = index.buckets * layout.BUCKET_SLOTS
    for seed in range(8):
        rng = random.Random(seed)
        keys = [rng.randbytes(16) for _ in range(slots * 3 // 4)]
        for n, key in enumerate(keys):
            assert index.insert(key, index.entry(key)) == 0
            if n % (slots // 1000) == 0:
                index.tick()
        for key in keys:
            index.remove(key)


BUSY = 5  # a bucket that the tests below crowd


def moved_in(index: Index, bucket: int) -> list[bytes]:
    return [s.tobytes() for s in index.read(bucket) if layout.location_moved(s["location"])]


def crowd(index: Index) -> list[bytes]:
    """Inserts keys that may lie in one bucket until that had to displace one of them."""
    rng = random.Random(3)
    keys: list[bytes] = []
    while not moved_in(index, BUSY):
        key = rng.randbytes(16)
        if BUSY in index.candidates(key) and index.insert(key, index.entry(key)) == 0:
            keys.append(key)
    return keys


def test_a_moved_copy_stays_readable_for_five_ticks_and_goes_with_the_fifth(index: Index) -> None:
    index.tick(3)
    crowd(index)
    moved = moved_in(index, BUSY)
    copies = index.copies
    assert index.tick(GRACE_TICKS - 1) == 0
    assert moved_in(index, BUSY) == moved
    assert index.tick() == copies
    assert index.copies == 0


def test_a_displaced_key_stands_in_both_of_its_buckets_with_one_location(index: Index) -> None:
    crowd(index)
    (moved,) = (s for s in index.read(BUSY) if layout.location_moved(s["location"]))
    a, b = index.candidates(moved["key"].tobytes())
    there = pick(index.read(a + b - BUSY), moved["key"].tobytes())
    assert there == pick(index.read(BUSY), moved["key"].tobytes()) == index.find(moved["key"].tobytes())


def test_removing_a_displaced_key_leaves_no_copy(index: Index) -> None:
    for key in crowd(index):
        assert index.remove(key) == 0
        assert index.find(key) is None
    assert index.copies == 0
    assert index.entries == 0


def test_a_slot_used_again_is_not_cleared_when_its_former_copy_expires(index: Index) -> None:
    """The slot of a moved copy is emptied with its key, filled again, and displaced from again."""
    crowd(index)
    (moved,) = (s for s in index.read(BUSY) if layout.location_moved(s["location"]))
    place = [s.tobytes() for s in index.read(BUSY)].index(moved.tobytes())
    index.tick(GRACE_TICKS - 1)
    assert index.remove(moved["key"].tobytes()) == 0
    rng = random.Random(8)
    while not (again := index.read(BUSY)[place])["location"] & layout.LOCATION_MOVED:
        key = rng.randbytes(16)
        if BUSY not in index.candidates(key) or index.insert(key, index.entry(key)):
            continue
        # Only the displacement of this very slot will do: let the others of the bucket go.
        for slot in index.read(BUSY):
            if (
                layout.location_moved(slot["location"])
                and slot.tobytes() != index.read(BUSY)[place].tobytes()
            ):
                index.remove(slot["key"].tobytes())
    index.tick()  # the first copy's time is over, the second's is not
    assert index.read(BUSY)[place].tobytes() == again.tobytes()
    index.check()


def test_a_tick_writes_the_epoch_line(index: Index) -> None:
    index.tick(7)
    line = ffi.cast("struct mkv_epoch *", index.address)
    assert (line.magic, line.version) == (layout.EPOCH_MAGIC, layout.LAYOUT_VERSION)
    assert (line.epoch, line.table, line.incarnation, line.buckets) == (7, 1, 99, index.buckets)


@pytest.mark.parametrize("buckets", [0, 1, 3, 48])
def test_the_number_of_buckets_is_a_power_of_two(buckets: int) -> None:
    assert lib.mkv_index_new(buckets, SALT, 1, 99) == ffi.NULL


@pytest.mark.parametrize("index", [64], indirect=True)
def test_readers_beside_a_writer_find_every_key_that_stays(index: Index) -> None:
    """Readers scan raw buckets while other keys come, go and move."""
    rng = random.Random(4)
    staying = [rng.randbytes(16) for _ in range(200)]
    expected = {}
    for key in staying:
        expected[key] = index.entry(key)
        assert index.insert_patiently(key, expected[key]) == 0
    stop = threading.Event()
    wrong: list[bytes] = []

    def reading(seed: int) -> None:
        pick_one = random.Random(seed)
        while not stop.is_set():
            key = pick_one.choice(staying)
            epoch = index.epoch
            a, b = index.candidates(key)
            found = pick(index.read(b), key) or pick(index.read(a), key)
            if index.epoch - epoch < GRACE_TICKS - 1 and found != expected[key]:
                wrong.append(key)

    readers = [threading.Thread(target=reading, args=(seed,)) for seed in range(2)]
    for thread in readers:
        thread.start()
    coming: list[bytes] = []
    for i in range(20000):
        key = rng.randbytes(16)
        if index.insert(key, index.entry(key)) == 0:
            coming.append(key)
        if len(coming) > 200:
            assert index.remove(coming.pop(rng.randrange(len(coming)))) == 0
        if i % 50 == 0:
            index.tick()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert lib.mkv_index_displacements(index.ix) > 100
    index.check()

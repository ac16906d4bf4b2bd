"""The C core of the flash tier: everything against a plain model, and what a crash may and may not leave."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memkv.store import layout
from memkv.store.native._store import ffi, lib

from ..flashes import EVERY, Disks, FlashSpace
from ..spaces import Found, key_of, payload_of

pytestmark = pytest.mark.asan

PENDING, HIT, MISS, STORED, EXISTS, DONE = (
    lib.MKV_PENDING,
    lib.MKV_HIT,
    lib.MKV_MISS,
    lib.MKV_STORED,
    lib.MKV_EXISTS,
    lib.MKV_DONE,
)
TIMEOUT, CORRUPT, FULL, DEVICE = lib.MKV_TIMEOUT, lib.MKV_CORRUPT, lib.MKV_ERROR_FULL, lib.MKV_ERROR_DEVICE
EMPTY, LIVE, FLASH = layout.SLOT_EMPTY, layout.SLOT_LIVE, layout.SLOT_FLASH
PAYLOADS = (512, 1 << 60)  # a span that leaves out what `settle` reads


# --- everything against a model ---


class FlashMachine(RuleBasedStateMachine):
    """Small enough for everything to run out: DRAM, cells, segments, index. A crash may come at any time."""

    LENGTHS = st.sampled_from([1, 512, 700, 1500, 2047, 2048])
    KEYS = st.integers(0, 40).map(key_of)

    @initialize(
        slabs=st.integers(2, 4),
        devices=st.integers(1, 3),
        segments=st.integers(2, 4),
        align=st.sampled_from([512, 4096]),
    )
    def make(self, slabs: int, devices: int, segments: int, align: int) -> None:
        self.disks = Disks(devices, segments, 8192 if align == 512 else 32768)
        self.shape: dict[str, Any] = {"slabs": slabs, "align": align, "slab_bytes": self.disks.segment_bytes}
        self.model: dict[bytes, bytes] = {}  # what is held, unless it was evicted from flash
        self.durable: set[bytes] = set()
        self.deleted: set[bytes] = set()  # acknowledged, and not put since
        self.pins: dict[bytes, int] = {}
        self.fresh: set[bytes] = set()  # put since evictions were last noticed
        self.told: list[tuple[Found, bytes]] = []  # places that readers remember
        self.faults = 0
        self.start(None)

    def start(self, records: Any) -> None:
        self.told.clear()
        self.pins.clear()
        self.faults = 0
        self.steps = 0
        self.space = FlashSpace(self.disks, records=records, seed=self.disks.boots, **self.shape)
        self.space.serve()
        self.space.settle()
        self.evicted = self.losses()

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.space.close()
            self.disks.close()

    def losses(self) -> tuple[int, int, int]:
        """Evictions from flash and from DRAM, and slabs that went."""
        stats = self.space.stats()
        return self.space.flash_stats().evictions, stats.evictions, stats.slabs_retired

    def notice_evictions(self) -> None:
        """What is gone was evicted from flash; or from DRAM, or with its slab, if flash had no place."""
        self.space.settle()
        flash, dram, retired = self.losses()
        gone = [key for key in self.model if not self.space.holds(key)]
        flash_gone, dram_gone = flash - self.evicted[0], dram - self.evicted[1]
        assert len(gone) >= flash_gone - len(self.fresh)
        assert len(gone) <= flash_gone + dram_gone or retired > self.evicted[2]
        slab_gone = retired > self.evicted[2]  # with it what flash had no place for, pinned or not
        self.evicted = flash, dram, retired
        for key in gone:
            assert key not in self.pins or (slab_gone and key not in self.durable)
            self.forget(key)
        self.fresh.clear()

    def forget(self, key: bytes) -> None:
        del self.model[key]
        self.durable.discard(key)
        self.pins.pop(key, None)

    # --- operations ---

    def put_now(self, key: bytes, length: int) -> None:
        held = self.space.holds(key)
        status = self.space.put(key, payload_of(key, length))
        if status == STORED:
            assert not held
            self.model[key] = payload_of(key, length)
            self.durable.discard(key)
            self.deleted.discard(key)
            self.fresh.add(key)
        else:
            assert status == FULL or (status == EXISTS and held)

    @rule(keys=st.lists(KEYS, min_size=3, max_size=12), length=LENGTHS)
    def put(self, keys: list[bytes], length: int) -> None:
        for key in keys:
            self.put_now(key, length)
            self.space.serve_slabs()
            self.notice_evictions()
            if len(keys) % 2:
                lib.mkv_ns_tick_now(self.space.ns)
                self.notice_evictions()

    @rule(keys=st.lists(KEYS, min_size=3, max_size=12), length=LENGTHS)
    def put_more(self, keys: list[bytes], length: int) -> None:
        self.put(keys, length)

    @rule(key=KEYS)
    def make_durable(self, key: bytes) -> None:
        known = key in self.model
        status = self.space.make_durable(key)
        assert known or status == MISS
        self.notice_evictions()  # writes that waited for others to be durable have their turn
        assert status in (DONE, DEVICE) or (status == MISS and key not in self.model)
        if status == DONE and key in self.model:
            self.durable.add(key)

    @rule(keys=st.lists(KEYS, max_size=4), prefetch=st.booleans())
    def stage(self, keys: list[bytes], prefetch: bool) -> None:
        answers = self.space.stage(*keys, prefetch=prefetch)
        for key, (status, found) in zip(keys, answers, strict=True):
            if status == HIT:
                assert self.space.fetch(found, key) in (None, self.model[key])
                self.told.append((found, key))
            elif status == MISS:
                assert key not in self.model or not self.space.holds(key)
            else:
                assert status == TIMEOUT
                assert key in self.model
        self.notice_evictions()

    @rule(data=st.data(), generation=st.sampled_from([0, 0, 0, 1]))
    def unstage(self, data: st.DataObject, generation: int) -> None:
        """A reader lets go of a place, and forgets it; others remember it. Or it names a wrong one."""
        if self.told:
            found, key = self.told.pop(data.draw(st.integers(0, len(self.told) - 1)))
            wrong = replace(found, generation=found.generation ^ generation)
            told_twice = (found, key) in self.told
            assert not (self.space.unstage((key, wrong)) and (generation or told_twice))

    @rule(keys=st.lists(KEYS, max_size=4))
    def touch(self, keys: list[bytes]) -> None:
        assert self.space.touch(*keys) == sum(key in self.model for key in keys)

    @rule(key=KEYS)
    def pin(self, key: bytes) -> None:
        (status,) = self.space.pin(key)
        assert (status == MISS) == (key not in self.model)
        if status == DONE:
            self.pins[key] = self.pins.get(key, 0) + 1
        else:
            assert status in (MISS, FULL)

    @rule(key=KEYS)
    def unpin(self, key: bytes) -> None:
        assert self.space.unpin(key) == [DONE if key in self.pins else MISS]
        if self.pins.get(key, 0) > 1:
            self.pins[key] -= 1
        else:
            self.pins.pop(key, None)

    @rule(keys=st.lists(KEYS, max_size=4, unique=True), acknowledge=st.booleans())
    def delete(self, keys: list[bytes], acknowledge: bool) -> None:
        assert self.space.delete(*keys) == [DONE if key in self.model else MISS for key in keys]
        for key in set(keys) & set(self.model):
            self.forget(key)
        if acknowledge:
            self.patient_barrier()
            self.deleted |= set(keys)

    def patient_barrier(self) -> None:
        number = self.space.barrier()
        for _ in range(40):
            self.space.settle()
            if self.space.is_over(number):
                return
            lib.mkv_ns_tick_now(self.space.ns)  # a header that could not be zeroed is tried again
            self.notice_evictions()
        raise AssertionError("the barrier is never over")

    @rule(key=KEYS, length=LENGTHS)
    def put_and_delete_at_once(self, key: bytes, length: int) -> None:
        """The write may not have begun, be under way, or be over."""
        self.put_now(key, length)
        if key in self.model:
            self.forget(key)
        self.space.delete(key)
        self.notice_evictions()

    @rule(n=st.integers(1, 6))
    def tick(self, n: int) -> None:
        for _ in range(n):
            lib.mkv_ns_tick_now(self.space.ns)
            self.notice_evictions()

    @rule()
    def serve(self) -> None:
        self.space.serve()
        self.notice_evictions()

    @rule()
    def retire(self) -> None:
        lib.mkv_ns_slab_retire(self.space.ns, 0)
        self.notice_evictions()

    @rule(
        data=st.data(),
        steps=st.lists(
            st.sampled_from(["put", "delete", "tick", "retire", "touch", "pin"]), min_size=2, max_size=12
        ),
        length=LENGTHS,
    )
    def while_writes_hang(self, data: st.DataObject, steps: list[str], length: int) -> None:
        """What the device has is neither freed nor lost, whatever is asked for meanwhile."""
        self.space.fault(lib.MKV_FAULT_HELD, lib.MKV_IO_WRITE)
        for step in steps:
            key = data.draw(self.KEYS)
            if step == "put":
                self.put_now(key, length)
                self.space.serve_segments()
            elif step == "delete":
                self.pins.pop(key, None)
                if self.space.delete(key) == [DONE]:
                    self.forget(key)
            elif step == "tick":
                lib.mkv_ns_tick_now(self.space.ns)
            elif step == "retire":
                lib.mkv_ns_slab_retire(self.space.ns, 0)
            elif step == "touch":
                self.space.touch(key)
            elif self.space.pin(key) == [DONE]:
                self.pins[key] = self.pins.get(key, 0) + 1
            self.space.check()
        lib.mkv_flashio_fault_clear(self.space.io)
        self.notice_evictions()

    @rule()
    def give_a_segment_back(self) -> None:
        lib.mkv_ns_segment_give_up(self.space.ns, EVERY)
        self.notice_evictions()

    @rule()
    def scrub(self) -> None:
        checked, bad = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        cursor, seen = 0, 0
        while (cursor := lib.mkv_ns_scrub(self.space.ns, cursor, 3, checked, bad)) or checked[0]:
            seen += checked[0]
            assert bad[0] == 0
            if not cursor:
                break
        assert seen == self.space.flash_stats().blocks

    # --- faults ---

    @precondition(lambda self: self.faults < 8)
    @rule(key=KEYS, length=LENGTHS)
    def write_error(self, key: bytes, length: int) -> None:
        """The block is written elsewhere, or to where it was refused first."""
        self.faults += 1
        self.space.fault(lib.MKV_FAULT_ERROR, lib.MKV_IO_WRITE, error=-errno.EIO, times=1)
        self.put_now(key, length)
        self.notice_evictions()
        lib.mkv_flashio_fault_clear(self.space.io)

    @precondition(lambda self: self.faults < 8)
    @rule(key=KEYS, flip=st.booleans())
    def read_error(self, key: bytes, flip: bool) -> None:
        if self.space.state(key) != FLASH:
            return
        self.faults += 1
        kind = lib.MKV_FAULT_FLIP if flip else lib.MKV_FAULT_ERROR
        self.space.fault(kind, lib.MKV_IO_READ, error=-errno.EIO, times=1, span=PAYLOADS)
        ((status, _),) = self.space.stage(key)
        lib.mkv_flashio_fault_clear(self.space.io)
        if status in (CORRUPT, DEVICE):
            assert status == (CORRUPT if flip else DEVICE)
            assert not self.space.holds(key)
            self.forget(key)
        else:
            assert status in (HIT, TIMEOUT)
        self.notice_evictions()

    # --- ends ---

    @precondition(lambda self: self.steps > 8)
    @rule()
    def restart(self) -> None:
        self.space.serve()
        on_flash = {key for key in self.model if self.space.make_durable(key) == DONE}
        self.space.wait_barrier(sync=True)
        self.space.settle()
        on_flash = {key for key in on_flash if self.space.holds(key)}  # some had to make room since
        records = self.space.stop()
        self.start(records)
        assert {key for key in map(key_of, range(41)) if self.space.holds(key)} == on_flash
        self.model = {key: self.model[key] for key in on_flash}
        self.durable = on_flash

    @precondition(lambda self: self.steps > 8)
    @rule(keys=st.lists(KEYS, max_size=5), length=LENGTHS, seed=st.integers(0, 1 << 30))
    def crash(self, keys: list[bytes], length: int, seed: int) -> None:
        for key in keys:  # these may be on their way
            self.put_now(key, length)
        durable = {key for key in self.durable if self.space.holds(key)}
        lengths = {key: len(payload) for key, payload in self.model.items()}
        self.space.crash(seed)
        self.start(None)
        self.model.clear()
        for key in map(key_of, range(41)):
            held = self.space.holds(key)
            assert held or key not in durable
            assert not (held and key in self.deleted)
            if held:
                slot = self.space.slot(key)
                self.model[key] = payload_of(key, int(slot["length"]))
                assert key not in durable or lengths[key] == slot["length"]
        self.durable.clear()
        self.fresh.clear()
        for key in list(self.model):
            ((status, found),) = self.space.stage(key)
            if status == CORRUPT:
                assert key not in durable
                del self.model[key]
            else:
                assert status in (HIT, TIMEOUT)
                if status == HIT:  # an older image may have taken the place of a torn one
                    assert key not in durable or lengths[key] == found.length
                    self.model[key] = payload_of(key, found.length)
                    assert self.space.fetch(found, key) == self.model[key]
        self.notice_evictions()

    # --- what holds at any time ---

    @invariant()
    def the_core_agrees_with_itself(self) -> None:
        if hasattr(self, "space"):
            self.steps += 1
            self.space.settle()
            self.space.check()

    @invariant()
    def a_peer_finds_what_was_put_and_nothing_else(self) -> None:
        if hasattr(self, "space"):
            for key in map(key_of, range(41)):
                assert self.space.holds(key) == (key in self.model)
                assert self.space.get(key) in (None, self.model.get(key))
                assert self.space.match(key) == (key in self.model)

    @invariant()
    def who_remembers_a_place_reads_the_block_or_nothing(self) -> None:
        if hasattr(self, "space"):
            for found, key in self.told:
                assert self.space.fetch(found, key) in (None, payload_of(key, found.length))


TestFlashMachine = FlashMachine.TestCase
TestFlashMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

"""The flash of a node over real files: made, opened again, damaged, lost and come back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.rdma.errors import DeviceError, LocalError, MemKVError
from memkv.rdma.memory import HostMemory
from memkv.store.config import FlashPath
from memkv.store.flash import device as device_module
from memkv.store.flash import format as f
from memkv.store.flash.device import Device
from memkv.store.flash.prepare import format_devices
from memkv.store.flash.store import FlashStore

MIB = 1 << 20
SIZE = 24 * MIB
NAME = f.Name(1, "one", 65536, 4096, 10**9, 77, 88)
Open = Callable[..., FlashStore]


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    memory = HostMemory(2 * MIB, False)
    yield memory
    memory.close()


@pytest.fixture
def open_store(memory: HostMemory) -> Iterator[Open]:
    """Opens a store of these paths; closed in the end."""
    stores: list[FlashStore] = []

    def make(*paths: Path, size: int = SIZE, **settings: Any) -> FlashStore:
        wanted = [FlashPath(path, size) for path in paths]
        span = (memory.address, memory.nbytes)
        stores.append(FlashStore(wanted, span, dirty_max=MIB, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return tmp_path / "a"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return tmp_path / "b"


def no_records() -> Any:
    return np.zeros(0, f.RECORD)


def records_on(store: FlashStore, *numbers: int) -> Any:
    """A record per number, on the first device, of namespace 1."""
    out = np.zeros(len(numbers), f.RECORD)
    out["namespace"], out["device"], out["length"] = 1, store.devices[0].io, 100
    out["sequence"] = numbers
    return out


def in_use(store: FlashStore) -> dict[str, set[tuple[int, int]]]:
    """By device: segments that are assigned, and to whom."""
    return {d.device.path.name: {(n, s.namespace) for n, s in d.segments.items()} for d in store.devices}


def scribble(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def superblock_of(path: Path) -> f.Superblock | None:
    device = Device(path)
    try:
        return device.superblock()
    finally:
        device.close()


# --- making -----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_made_and_written_through(a: Path, open_store: Open) -> None:
    told: list[tuple[str, int, int]] = []
    store = open_store(a, progress=lambda *step: told.append(step))
    assert a.stat().st_size == SIZE
    assert a.stat().st_blocks * 512 >= SIZE, "holes would be filled by later writes, which change metadata"
    assert told[-1] == (str(a), SIZE, SIZE)
    assert store.devices[0].super.boot == 1
    assert store.devices[0].free == store.devices[0].super.segments > 1
    assert not store.degraded()


def test_format_refuses_what_it_does_not_know_and_touches_nothing(a: Path, b: Path) -> None:
    a.write_bytes(b"letters to grandmother".ljust(SIZE, b"\0"))
    b.write_bytes(bytes(SIZE))
    before = a.read_bytes()
    with pytest.raises(LocalError, match=r"something that memkv does not know.*--force"):
        format_devices([FlashPath(b, 0), FlashPath(a, 0)])
    assert a.read_bytes() == before
    assert superblock_of(b) is None
    assert len(format_devices([FlashPath(b, 0), FlashPath(a, 0)], force=True)) == 2
    assert superblock_of(a) is not None
    with pytest.raises(LocalError, match="a memkv store"):
        format_devices([FlashPath(a, 0)])


def test_what_is_at_the_very_end_counts_too(a: Path) -> None:
    a.write_bytes(bytes(SIZE - 100) + b"metadata of a raid".ljust(100, b"\0"))
    with pytest.raises(LocalError, match="does not know"):
        format_devices([FlashPath(a, 0)])


def test_a_format_that_fails_leaves_no_file(a: Path, b: Path) -> None:
    with pytest.raises(f.FormatError, match="no two segments"):
        format_devices([FlashPath(a, 8 * MIB)])
    assert not a.exists()
    b.write_bytes(bytes(4096))
    with pytest.raises(f.FormatError):
        format_devices([FlashPath(b, 0)])
    assert b.exists()


def test_segments_of_a_chosen_size(a: Path, open_store: Open) -> None:
    format_devices([FlashPath(a, SIZE)], segment_bytes=256 << 10)
    assert open_store(a).devices[0].super.segment_bytes == 256 << 10


def test_a_store_is_not_made_over_something_unknown(a: Path, b: Path, open_store: Open) -> None:
    a.write_bytes(b"x" * SIZE)
    store = open_store(a, b)
    assert list(store.unusable) == [str(a)]
    assert "something else" in store.degraded()
    assert a.read_bytes() == b"x" * SIZE
    with pytest.raises(DeviceError, match=r"no flash device can be used.*memkv-node format"):
        open_store(a)


def test_paths_that_cannot_be(a: Path, tmp_path: Path, open_store: Open) -> None:
    with pytest.raises(DeviceError, match=r"No such file.*PATH:SIZE makes a file"):
        open_store(a, size=0)
    with pytest.raises(DeviceError, match="Is a directory"):
        open_store(tmp_path, size=0)
    with pytest.raises(LocalError, match="neither a file nor a block device"):
        open_store(Path("/dev/null"), size=0)


def test_a_file_system_that_copies_on_write_is_refused(
    a: Path, monkeypatch: pytest.MonkeyPatch, open_store: Open
) -> None:
    monkeypatch.setattr(device_module, "_file_system", lambda fd: 0x9123683E)
    with pytest.raises(LocalError, match=r"btrfs, which copies on write.*ext4 or xfs"):
        open_store(a)
    assert not a.exists()


# --- starting again ---------------------------------------------------------------------------------------


def test_every_start_counts_and_marks_the_device_as_not_clean(a: Path, open_store: Open) -> None:
    for boot in (1, 2, 3):
        store = open_store(a)
        block = superblock_of(a)
        assert block is not None
        assert (block.boot, block.clean) == (boot, False)
        store.close()


def test_a_clean_stop_leaves_a_snapshot(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.remember(NAME)
    segment = store.take_segment(1, 65536)
    store.save(lambda: records_on(store, 5, 6, 7))
    store.close()
    again = open_store(a)
    assert again.names == {1: NAME}
    assert [s for _, s in again.segments_of(1)] == [segment[1] if segment else None]
    assert again.records_of(1)["sequence"].tolist() == [5, 6, 7]
    assert again.records_of(2).tolist() == []
    again.close()
    last = open_store(a)  # nobody said save
    assert last.devices[0].records is None
    assert last.segments_of(1)


def test_a_damaged_snapshot_means_a_scan(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.remember(NAME)
    store.take_segment(1, 65536)
    store.save(lambda: records_on(store, 5))
    at = store.devices[0].super.snapshot_at
    store.close()
    scribble(a, at + f.PAGE + 3, b"\xff")
    again = open_store(a)
    assert again.devices[0].records is None
    assert len(again.segments_of(1)) == 1


@pytest.mark.parametrize("copy", [0, 1])
def test_one_superblock_of_two_is_enough(a: Path, open_store: Open, copy: int) -> None:
    store = open_store(a)
    store.remember(NAME)
    store.close()
    scribble(a, copy * f.PAGE, b"\xff" * 64)
    again = open_store(a)
    assert again.names == {1: NAME}
    assert not again.unusable


def test_without_any_superblock_a_device_is_out_and_the_rest_serves(
    a: Path, b: Path, open_store: Open
) -> None:
    open_store(a, b).close()
    scribble(a, 0, b"\xff" * 64)
    scribble(a, f.PAGE, b"\xff" * 64)
    store = open_store(a, b)
    assert list(store.unusable) == [str(a)]
    assert [d.device.path for d in store.devices] == [b]
    assert store.describe()[str(a)]["failed"] == store.unusable[str(a)]


def test_a_newer_format_is_left_alone(a: Path, b: Path, open_store: Open, monkeypatch: Any) -> None:
    open_store(a, b).close()
    monkeypatch.setattr(f, "VERSION", 2)
    device = Device(a)
    block = f.plan(SIZE, store=b"s" * 16, identity=1, index=0, count=1, secret=1)
    device.write(0, block.pack() * 2)
    device.close()
    monkeypatch.undo()
    before = a.read_bytes()
    store = open_store(a, b)
    assert "version 2" in store.unusable[str(a)]
    assert a.read_bytes() == before


def test_a_device_that_was_truncated_down_to_its_tables_is_not_all_well(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.remember(NAME)
    store.take_segment(1, 65536)
    tables = store.devices[0].super.data_at
    store.close()
    os.truncate(a, tables)
    again = open_store(a)
    assert "it ends at" in again.degraded()
    assert "it ends at" in str(again.describe()[str(a)]["shortened"])
    assert again.devices[0].free == 0
    assert again.segments_lost == 1
    assert again.take_segment(1, 65536) is None


@pytest.mark.parametrize("copy", [0, 1])
def test_a_damaged_namespace_table_falls_back(a: Path, b: Path, open_store: Open, copy: int) -> None:
    store = open_store(a, b)
    store.remember(NAME)
    at = store.devices[0].super.names_at + copy * f.NAMES_BYTES
    store.close()
    scribble(a, at, b"\xff" * 64)
    assert open_store(a, b).names == {1: NAME}


def test_namespaces_stand_on_every_device(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a)
    store.remember(NAME)
    store.close()
    open_store(a, b).close()  # a new one joins
    assert open_store(b).names == {1: NAME}


def test_segments_of_namespaces_that_nobody_knows_are_free(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.take_segment(9, 65536)
    store.close()
    again = open_store(a)
    assert in_use(again) == {"a": set()}
    again.close()
    assert open_store(a).highest_id == 0


# --- one store, several devices ---------------------------------------------------------------------------


def test_segments_go_to_the_device_with_most_room(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a, b)
    store.remember(NAME)
    taken = [store.take_segment(1, 65536) for _ in range(4)]
    assert sorted(t[0].device.path.name for t in taken if t) == ["a", "a", "b", "b"]
    epochs = [(t[0].io, t[1].epoch) for t in taken if t]
    assert len(set(epochs)) == 4
    before = in_use(store)
    store.close()
    again = open_store(b, a)  # in any order
    assert in_use(again) == before
    more = again.take_segment(1, 65536)
    assert more is not None
    assert (more[0].io, more[1].epoch) not in epochs


def test_when_all_are_taken_there_is_none(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.remember(NAME)
    n = store.devices[0].free
    assert all(store.take_segment(1, 65536) for _ in range(n))
    assert store.take_segment(1, 65536) is None
    assert store.devices[0].free == 0


def test_some_are_kept_for_size_classes_that_have_none(a: Path, open_store: Open) -> None:
    format_devices([FlashPath(a, SIZE)], segment_bytes=128 << 10)
    store = open_store(a)
    kept = store.devices[0].free // 64
    assert kept > 0
    while store.take_segment(1, 65536):
        pass
    assert store.devices[0].free == kept
    assert store.take_segment(2, 65536) is not None
    assert store.take_segment(1, 32768) is not None


def test_a_segment_has_to_hold_at_least_one_block(a: Path, open_store: Open) -> None:
    store = open_store(a)
    assert store.take_segment(1, store.devices[0].super.segment_bytes - 4096) is not None
    assert store.take_segment(1, store.devices[0].super.segment_bytes) is None


def test_small_alignment_needs_small_sectors(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.devices[0].device.sector = 4096
    assert store.take_segment(1, 65536, 512) is None
    assert store.take_segment(1, 65536, 4096) is not None


def test_devices_of_two_stores_are_refused(a: Path, b: Path, open_store: Open) -> None:
    open_store(a).close()
    open_store(b).close()
    with pytest.raises(LocalError, match="different stores"):
        open_store(a, b)
    assert not open_store(a).unusable  # nothing is locked, nothing has changed


def test_a_device_that_another_node_uses_is_refused(
    a: Path, b: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "LOCK_SECONDS", 0.1)
    open_store(a)
    with pytest.raises(DeviceError, match="in use by another node"):
        open_store(b, a)
    with pytest.raises(DeviceError, match="in use by another node"):
        format_devices([FlashPath(a, 0)], force=True)


def test_the_lock_is_waited_for_because_a_killed_node_may_still_be_writing(a: Path, open_store: Open) -> None:
    store = open_store(a)
    threading.Timer(0.3, store.close).start()
    began = time.monotonic()
    open_store(a)
    assert time.monotonic() - began > 0.2


# --- what was deleted must not return ---------------------------------------------------------------------


def grown(store: FlashStore) -> None:
    store.remember(NAME)
    for _ in range(4):
        assert store.take_segment(1, 65536)


def test_a_device_that_was_away_begins_empty(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a, b)
    grown(store)
    store.save(no_records)
    store.close()
    alone = open_store(a)
    assert len(alone.segments_of(1)) == 2
    alone.save(no_records)
    alone.close()
    both = open_store(a, b)
    assert {len(x) for x in in_use(both).values()} == {0, 2}
    assert both.names == {1: NAME}
    both.close()
    assert {len(x) for x in in_use(open_store(b, a)).values()} == {0, 2}  # and stays so


def test_of_two_that_went_on_without_each_other_one_begins_empty(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a, b)
    grown(store)
    store.close()
    open_store(a).close()
    open_store(b).close()
    both = open_store(a, b)
    assert {len(x) for x in in_use(both).values()} == {0, 2}


@pytest.mark.parametrize("writes", range(5))
def test_a_kill_among_the_marks_of_a_start_loses_nothing(
    a: Path, b: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    store = open_store(a, b)
    grown(store)
    before = in_use(store)
    store.close()
    good, left = FlashStore._write_super, [writes]

    def killed(self: FlashStore, d: Any, block: f.Superblock) -> bool:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return good(self, d, block)

    monkeypatch.setattr(FlashStore, "_write_super", killed)
    if writes < 4:
        with pytest.raises(KeyboardInterrupt):
            open_store(a, b)
    else:
        open_store(a, b).close()
    monkeypatch.undo()
    assert in_use(open_store(a, b)) == before


def test_a_device_that_is_lost_under_way_begins_empty(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a, b)
    grown(store)
    store.fail(store.devices[0], "pulled out")
    assert store.look(10**18)
    assert store.settle()
    assert not store.look(10**18)
    assert "pulled out" in store.degraded()
    assert all(d is store.devices[1] for d, _ in [store.take_segment(1, 65536)] if d)
    store.close()
    again = open_store(a, b)
    assert in_use(again)["a"] == set()
    assert len(in_use(again)["b"]) == 3


def test_the_loss_of_the_last_device_cannot_be_recorded(a: Path, open_store: Open) -> None:
    store = open_store(a)
    store.fail(store.devices[0], "pulled out")
    assert not store.settle()


def test_a_write_error_takes_a_device_out(a: Path, b: Path, open_store: Open) -> None:
    store = open_store(a, b)
    os.close(store.devices[0].device.fd)
    store.devices[0].device.fd = os.open(a, os.O_RDONLY)
    store.remember(NAME)
    assert store.devices[0].failed
    assert store.settle()
    assert [d.device.path for d in store.devices if not d.failed] == [b]
    assert store.names == {1: NAME}


@pytest.mark.parametrize("left", [SIZE // 2, MIB, 8192, 100])
def test_a_truncated_device_does_not_stop_the_rest(a: Path, b: Path, open_store: Open, left: int) -> None:
    store = open_store(a, b)
    store.remember(NAME)
    while store.take_segment(1, 65536):
        pass
    store.save(no_records)
    total = len(store.segments_of(1))
    store.close()
    os.truncate(a, left)
    again = open_store(a, b)
    assert again.names == {1: NAME}
    assert len(in_use(again)["b"]) == total // 2
    if str(a) not in again.unusable:
        d = next(d for d in again.devices if d.device.path == a)
        assert d.super.segment_offset(max(d.segments, default=0)) <= left or not d.segments
    again.close()
    os.truncate(a, SIZE)  # it comes back, but not what was on it
    last = open_store(a, b)
    assert len(in_use(last).get("a", set())) < total // 2


def test_a_torn_write_of_the_segment_table_loses_no_other_segment(
    a: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_devices([FlashPath(a, SIZE)], segment_bytes=128 << 10)
    store = open_store(a)
    store.remember(NAME)
    for _ in range(20):
        store.take_segment(1, 65536)
    before = in_use(store)["a"]
    good = Device.write

    def torn(self: Device, offset: int, data: bytes) -> None:
        old = self.read(offset, len(data))
        good(self, offset, data[:512] + old[512:])
        raise DeviceError("torn", 5)

    monkeypatch.setattr(Device, "write", torn)
    assert store.take_segment(1, 65536) is None
    monkeypatch.undo()
    store.close()
    assert in_use(open_store(a))["a"] == before


def test_tables_that_cannot_be_read_make_a_device_unusable(
    a: Path, b: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(a, b).close()
    good = Device.read

    def bad(self: Device, offset: int, length: int) -> bytes:
        if self.path == a and offset >= 2 * f.PAGE:
            raise DeviceError("a bad sector", 5)
        return good(self, offset, length)

    monkeypatch.setattr(Device, "read", bad)
    store = open_store(a, b)
    assert "a bad sector" in store.unusable[str(a)]
    assert [d.device.path for d in store.devices] == [b]


# --- what it tells ----------------------------------------------------------------------------------------


def test_it_tells_of_engine_and_devices(a: Path, open_store: Open) -> None:
    store = open_store(a, threads=2)
    engine, reason = store.engine()
    assert engine == "threads"
    assert reason
    facts = store.describe()[str(a)]
    assert facts["segments_free"] == facts["segments"]
    assert facts["failed"] == ""
    assert isinstance(facts["direct"], bool)


def test_nothing_is_open_after_a_start_that_failed(a: Path, b: Path, open_store: Open) -> None:
    open_store(a).close()
    open_store(b).close()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(MemKVError):
            open_store(a, b)
    assert set(os.listdir("/proc/self/fd")) == before

"""Segments that change hands: the rule by itself, wishes over namespaces that are made up, and on a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv.store import messages as m
from memkv.store.columns import pack_keys
from memkv.store.flash import format as f
from memkv.store.flash import sharing as sharing_module
from memkv.store.flash.opened import OpenDevice
from memkv.store.flash.sharing import RATIO, Class, Place, Sharing, giver_of
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from .raw import RawPeer, keys_of
from .test_flash_node import Filler, read, stage
from .test_puts import BLOCK, eventually

MIB = 1 << 20
STORED, HIT, MISS, DONE = lib.MKV_STORED, lib.MKV_HIT, lib.MKV_MISS, lib.MKV_DONE
ERROR_DEVICE = lib.MKV_ERROR_DEVICE
Connect = Callable[..., RawPeer]
Start = Callable[..., NodeThread]


# --- the rule ---


@pytest.mark.parametrize(
    ("held", "wanted", "giver"),
    [
        ({}, (1, 10), None),
        ({(1, 10): 8}, (2, 10), 1),  # a namespace that came late
        ({(1, 10): 8}, (1, 20), 1),  # a class that came late
        ({(1, 10): 8}, (1, 10), None),  # nobody has any but who asks
        ({(1, 10): 1}, (2, 10), None),  # nobody gives the last
        ({(1, 10): 1, (1, 20): 1}, (2, 10), None),
        ({(1, 10): 5, (2, 10): 4}, (2, 10), None),  # the giver would have fewer than who asked
        ({(1, 10): 6, (2, 10): 4}, (2, 10), 1),
        ({(1, 10): 6, (2, 10): 9, (3, 10): 4}, (3, 10), 2),  # who has most
        ({(1, 10): 3, (2, 10): 1, (2, 20): 1, (2, 30): 1}, (2, 40), 1),  # has none: from whoever can
        ({(1, 10): 5, (2, 10): 4}, (2, 20), 2),  # its own namespace's, if the other has not two more
        ({(1, 10): RATIO, (1, 20): 1}, (1, 20), None),
        ({(1, 10): RATIO + 1, (1, 20): 1}, (1, 20), 1),
    ],
)
def test_who_gives(held: dict[Class, int], wanted: Class, giver: int | None) -> None:
    assert giver_of(Counter(held), wanted) == giver


CLASSES = st.tuples(st.integers(1, 4), st.sampled_from([10, 20, 30]))


@given(st.dictionaries(CLASSES, st.integers(1, 30)), st.lists(CLASSES, min_size=200, max_size=200))
def test_exchanges_leave_nobody_without_and_come_to_an_end(
    have: dict[Class, int], wanting: list[Class]
) -> None:
    held = Counter(have)
    total = held.total()

    def exchange(wanted: Class) -> bool:
        giver = giver_of(held, wanted)
        if giver is None:
            return False
        most = max((c for c in held if c[0] == giver), key=lambda c: held[c])
        assert held[most] > 1
        assert most != wanted
        held[most] -= 1
        held[wanted] += 1
        return True

    for wanted in wanting:
        exchange(wanted)
    turns = 0
    while [wanted for wanted in sorted(set(wanting)) if exchange(wanted)]:
        turns += 1
        assert turns < 200
    assert held.total() == total
    if total >= 2 * len(set(wanting) | set(have)):
        assert all(held[wanted] for wanted in wanting)


# --- wishes ---


class Fake:
    """A namespace; what it was told."""

    def __init__(self, id: int, shelf: FakeShelf) -> None:
        self.name = f.Name(id, f"ns{id}", 100, 512, 10**9, 1, 1)
        self.shelf = shelf
        self.able = True
        self.giving: list[int] = []  # devices that were named
        self.empty: Place | None = None
        self.told: list[str] = []
        shelf.sharing.join(self)

    def give_up(self, devices: int) -> bool:
        if self.able and not self.giving:
            self.giving.append(devices)
            return True
        return False

    def given_up(self) -> Place | None:
        place, self.empty = self.empty, None
        if place:
            self.giving.clear()
        return place

    def gives(self) -> None:
        """What it was asked for is empty."""
        assert self.giving
        self.empty = next(p for p, c in self.shelf.assigned.items() if c[0] == self.name.id)
        self.shelf.sharing.collect(self)

    def add(self, d: OpenDevice, segment: f.Segment) -> None:
        if not self.able:
            raise MemoryError("no")
        self.told.append(f"added {segment.payload}")

    def promise(self, payload: int) -> None:
        self.told.append(f"promised {payload}")

    def deny(self, payload: int) -> None:
        self.told.append(f"denied {payload}")


class FakeShelf:
    """Segments of one device, all of which namespace 1 has for blocks of 10 bytes."""

    def __init__(self, segments: int = 4) -> None:
        self.now = 0.0
        self.sharing = Sharing(self, lambda: self.now)
        self.assigned: dict[Place, Class] = {(0, n): (1, 10) for n in range(segments)}
        self.failed = False

    def held(self) -> Counter[Class]:
        return Counter(self.assigned.values())

    def devices_for(self, payload: int, align: int) -> int:
        return 0 if payload > 1000 else 1

    def hand_over(self, place: Place, namespace: int, payload: int) -> tuple[OpenDevice, f.Segment] | None:
        del self.assigned[place]
        if self.failed or not payload:
            return None
        self.assigned[place] = namespace, payload
        device: Any = None
        return device, f.Segment(place[1], namespace, payload, 1)


def test_a_wish_is_promised_and_carried_out() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    assert late.told == ["promised 20"]
    assert giver.giving == [1]
    shelf.sharing.ask(late, 20)  # once more: it is the same wish
    giver.gives()
    assert late.told == ["promised 20", "promised 20", "added 20"]
    assert shelf.held() == {(1, 10): 3, (2, 20): 1}
    assert not shelf.sharing.waiting
    assert shelf.sharing.exchanged == 1


def test_wishes_wait_for_one_another() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    shelf.sharing.ask(late, 30)
    giver.gives()
    assert late.told == ["promised 20", "promised 30", "added 20"]
    giver.gives()
    assert late.told[-1] == "added 30"
    assert not shelf.sharing.waiting


def test_blocks_do_not_wait_for_ever_and_have_their_segment_when_it_comes() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    shelf.now = sharing_module.PATIENCE_SECONDS - 1
    shelf.sharing.look()
    assert late.told == ["promised 20"]
    shelf.now += 2
    for _ in range(3):
        shelf.sharing.look()
    assert late.told == ["promised 20", "denied 20"]
    shelf.sharing.ask(late, 20)
    assert late.told[-1] == "denied 20"
    giver.gives()
    assert late.told[-1] == "added 20"


def test_nobody_can_give_now_and_later_somebody_can() -> None:
    """While its scan goes on a namespace gives nothing."""
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    giver.able = False
    shelf.sharing.ask(late, 20)
    assert late.told == ["promised 20"]
    giver.able = True
    shelf.sharing.look()
    giver.gives()
    assert late.told[-1] == "added 20"


def test_what_cannot_be_is_denied_at_once() -> None:
    shelf = FakeShelf(1)
    Fake(1, shelf)
    late = Fake(2, shelf)
    shelf.sharing.ask(late, 20)  # there is but one segment
    shelf.sharing.ask(late, 2000)  # no device takes such blocks
    assert late.told == ["denied 20", "denied 2000"]
    assert not shelf.sharing.waiting


def test_a_segment_of_a_device_that_fails_meanwhile_is_replaced_by_another() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    shelf.failed = True
    giver.gives()
    assert giver.giving
    shelf.failed = False
    giver.gives()
    assert late.told == ["promised 20", "added 20"]
    assert shelf.held() == {(1, 10): 2, (2, 20): 1}


def test_a_segment_that_cannot_be_used_is_free_again() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    late.able = False
    giver.gives()
    assert late.told[-1] == "denied 20"
    assert shelf.held() == {(1, 10): 3}


def test_who_has_left_is_not_asked() -> None:
    shelf = FakeShelf()
    giver, late = Fake(1, shelf), Fake(2, shelf)
    shelf.sharing.ask(late, 20)
    shelf.sharing.leave(late)
    assert not shelf.sharing.waiting
    giver.gives()
    assert late.told == ["promised 20"]
    assert shelf.held() == {(1, 10): 3}
    late = Fake(2, shelf)
    shelf.sharing.leave(giver)
    shelf.sharing.ask(late, 20)
    assert not giver.giving
    assert late.told[-1] == "denied 20"


# --- on a node ---

LARGE = 2 * BLOCK


@pytest.fixture
def start(start_node: Start, tmp_path: Path) -> Start:
    """A node with 8 MiB of memory over 32 MiB of flash: seven segments of 4 MiB, or so."""

    def make(**settings: Any) -> NodeThread:
        flash = f"{tmp_path / 'flash'}:32M"
        return start_node(**({"memory": 8 * MIB, "flash": (flash,)} | settings))

    return make


def two(node: NodeThread, connect: Connect) -> tuple[Filler, Filler]:
    """Two namespaces: both have memory, and the one that writes first will have all of the flash."""
    return Filler(connect(node), "early"), Filler(connect(node), "late")


def segments(peer: RawPeer, name: str) -> int:
    return int(peer.stats(name)["flash_segments"])


def put_large(filler: Filler, numbers: range, **named: Any) -> list[int]:
    """Blocks of twice the length, one at a time."""
    out = []
    for n in numbers:
        request = filler.peer.put(filler.info, keys_of(n), filler.region.id, LARGE, **named)
        out += filler.peer.statuses(request)
    return out


def cold_ones(filler: Filler, numbers: range) -> list[int]:
    """Those in flash only."""
    filler.info = filler.peer.open(filler.info.name)  # the index has grown
    return filler.in_flash_only(filler.peer.open_get(filler.info), numbers)


def check(filler: Filler, numbers: list[int]) -> None:
    """That these blocks are there, and what they should be."""
    reader = filler.peer.open_get(filler.info)
    for number in numbers:
        ((status, slot),) = stage(filler.peer, filler.info, keys_of(number))
        assert status == HIT
        assert read(reader, slot, filler.peer, filler.info) == filler.content(number).tobytes()


def test_a_late_namespace_gets_its_part_of_flash(start: Start, connect: Connect) -> None:
    early, late = two(start(), connect)
    early.put(range(600))
    all_of_them = segments(early.peer, "early")
    assert all_of_them >= 6
    assert late.put(range(32), durability="flash") == [STORED] * 32
    assert late.stats()["flash_blocks"] == 32
    eventually(lambda: segments(early.peer, "early") < all_of_them)
    late.put(range(32, 300), durability="flash")
    eventually(lambda: abs(segments(late.peer, "late") - segments(early.peer, "early")) <= 2, 20)
    assert segments(late.peer, "late") + segments(early.peer, "early") <= all_of_them + 1
    for filler, last in ((early, 600), (late, 300)):
        there = [n for n, status in enumerate(filler.lookup(range(last))) if status == HIT]
        check(filler, there[:50])


def test_a_late_size_class_gets_a_segment_and_its_durable_puts_are_kept(
    start: Start, connect: Connect
) -> None:
    node = start(block_bytes=LARGE)
    filler = Filler(connect(node))
    filler.put(range(600))
    before = filler.stats()
    assert put_large(filler, range(10_000, 10_020), durability="flash") == [STORED] * 20
    assert filler.flash()["lost_memory_acks"] == 0
    after = filler.stats()
    assert after["flash_evictions"] > before["flash_evictions"]
    filler.peer.close()
    node.stop()
    again = connect(start())
    assert again.on_keys(m.Lookup, again.open(), keys_of(*range(10_000, 10_020))) == [HIT] * 20
    assert again.ask(m.Stats).sections["flash"]["scanned"] == 0


def test_pinned_blocks_stay_when_a_segment_is_given(start: Start, connect: Connect) -> None:
    filler, late = two(start(), connect)
    filler.put(range(600))
    cold = cold_ones(filler, range(600))[:20]
    pins = filler.peer.ask(m.Pin, filler.info.namespace, pack_keys(keys_of(*cold)), 60_000)
    assert set(pins.statuses) == {DONE}
    assert late.put(range(100), durability="flash") == [STORED] * 100
    assert filler.lookup(range(600)).count(HIT) < 600
    check(filler, cold)


def test_where_everything_is_pinned_durable_puts_are_told_so_in_time(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every segment has a pinned block, so none becomes empty until the pins go."""
    monkeypatch.setattr(sharing_module, "PATIENCE_SECONDS", 0.2)
    filler, late = two(start(), connect)
    filler.put(range(410))
    eventually(lambda: filler.flash()["dirty_blocks"] == 0)
    some = range(0, 410, 4)
    pins = filler.peer.ask(m.Pin, filler.info.namespace, pack_keys(keys_of(*some)), 60_000)
    assert set(pins.statuses) == {DONE}
    assert late.put(range(1), durability="flash") == [ERROR_DEVICE]
    assert late.lookup(range(1)) == [HIT]
    assert filler.lookup(range(0, 410, 4)) == [HIT] * len(some)
    assert filler.peer.ask(m.Unpin, filler.info.namespace, pack_keys(keys_of(*some))).statuses
    eventually(lambda: late.stats()["flash_blocks"] == 1)  # what had no place is written then
    check(late, [0])

"""Loss of power: of what a device had in its cache anything may be on the medium, in any order, or nothing.

The store is the real one; its devices keep writes in a volatile cache (flashio.h) until they are flushed. A
cut comes between any two steps, with requests under way, in the middle of a start, of a clean stop, or of a
write of a table. Afterwards: what was durable is there and exact, what was deleted (acknowledged after its
barrier) does not return, nothing is served that was never put under that key.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from memkv.store import layout
from memkv.store.native._store import lib

from .machine import Machine, Power, PowerOff, make_devices

pytestmark = pytest.mark.asan

KEYS = 30
LENGTHS = (2048, 1500, 700)
NOT_DURABLE = (
    lib.MKV_MISS,
    lib.MKV_PENDING,
    lib.MKV_ERROR_DEVICE,
)  # evicted already, or nowhere to be written


def key_of(id: int) -> bytes:
    return random.Random(id).randbytes(16)


def payload_of(id: int, put: int) -> bytes:
    return random.Random(f"{id}/{put}").randbytes(LENGTHS[id % len(LENGTHS)])


@dataclass
class Block:
    """What is known of a block. ``possible``: puts that may be seen; ``durable``: one of them must be."""

    id: int
    begun: int = 0
    possible: set[int] = field(default_factory=set)
    durable: bool = False
    held: bool = False  # until the power goes
    doubt: bool = False  # found by a scan, not promised: its payload may be torn, as who reads it finds out

    @property
    def key(self) -> bytes:
        return key_of(self.id)


def wait_for_scan(machine: Machine) -> None:
    machine.wait(lambda: not machine.scanning())


class Story:
    """What happens to a store over many starts, and the truth about its blocks."""

    def __init__(self, paths: list[Path], power: Power, seed: int, evicts: bool) -> None:
        self.paths, self.power, self.evicts = paths, power, evicts
        self.random = power.random = random.Random(seed)
        self.blocks = [Block(i) for i in range(KEYS)]
        self.pending: list[tuple[int, Block, int]] = []  # barriers: number, block, puts that it buries
        self.cuts = self.in_start = self.in_table = self.shuts = self.checked = self.durable = 0
        self.machine: Machine | None = None
        self.expect = False

    # --- starts and ends ---

    def start(self) -> Machine:
        while True:
            self.power.on = True
            self.power.after = self.random.randrange(8) if self.random.random() < 0.2 else None
            try:
                self.machine = Machine(self.paths, self.random.randrange(1 << 30))
                return self.machine
            except PowerOff:
                self.in_start += 1
                self.cuts += 1

    def cut(self) -> None:
        assert self.machine is not None
        self.machine.cut(self.random.randrange(1 << 30))
        self.lost()

    def lost(self) -> None:
        self.machine = None
        self.cuts += 1
        self.pending.clear()
        self.durable += sum(b.durable for b in self.blocks)
        for block in self.blocks:
            block.held = block.durable
            block.doubt = not block.durable

    def round(self, steps: int) -> None:
        """A start, life, an end."""
        machine = self.start()
        self.expect = False
        try:
            if self.random.random() < 0.7:
                machine.wait(lambda: not machine.scanning())
                self.expect = True
                self.look_at_all(machine)
            self.power.after = self.random.randrange(3) if self.random.random() < 0.3 else None
            for _ in range(self.random.randrange(steps)):
                self.step(machine)
            if self.random.random() < 0.1:
                machine.wait(lambda: not machine.scanning())
                machine.shut()
                self.stopped()
            else:
                self.cut()
        except PowerOff:
            self.in_table += 1
            self.cut()

    def stopped(self) -> None:
        self.machine = None
        self.shuts += 1
        self.pending.clear()
        for block in self.blocks:  # all that was dirty has been written
            block.durable = block.held = block.held and not self.evicts

    # --- what happens ---

    def step(self, machine: Machine) -> None:
        if not self.expect and not machine.scanning():
            self.expect = True
        act = self.random.choices(
            (self.put, self.promise, self.delete, self.get, self.tick, self.sync, self.hint),
            (30, 20, 12, 25, 10, 3, 5),
        )[0]
        act(machine, self.random.choice(self.blocks))
        self.acknowledge(machine)
        machine.serve()

    def put(self, machine: Machine, block: Block) -> bool:
        block.begun += 1
        block.possible.add(block.begun)
        status = machine.put_patiently(block.key, payload_of(block.id, block.begun))
        if status == lib.MKV_STORED:
            assert self.evicts or not (self.expect and block.held), f"{block} was taken again"
        else:
            block.possible.discard(block.begun)
            assert status in (lib.MKV_EXISTS, lib.MKV_ERROR_FULL), status
            assert status != lib.MKV_EXISTS or block.possible, f"{block} is there"
        block.doubt &= status != lib.MKV_STORED
        there = status in (lib.MKV_STORED, lib.MKV_EXISTS)
        block.held |= there and not block.doubt
        return there

    def promise(self, machine: Machine, block: Block) -> None:
        """A put with durability flash."""
        if self.put(machine, block):
            status = machine.make_durable(block.key)
            if block.doubt and status == lib.MKV_MISS and self.put(machine, block):  # as put.c does
                status = machine.make_durable(block.key)
            # where there are more size classes than segments, some have none
            assert status == lib.MKV_DONE or (self.evicts and status in NOT_DURABLE), status
            if status == lib.MKV_DONE and not self.evicts:
                block.durable = block.held = True
                block.doubt = False

    def delete(self, machine: Machine, block: Block) -> None:
        known, held = self.expect, block.held
        block.durable = block.held = False
        (status,) = machine.delete(block.key)
        assert self.evicts or not (known and held) or status == lib.MKV_DONE, f"{block}: {status}"
        self.pending.append((machine.barrier(), block, block.begun))
        if self.random.random() < 0.5:
            machine.wait(lambda: self.is_over(machine))

    def is_over(self, machine: Machine) -> bool:
        """The last barrier; while a scan goes on it is not waited for."""
        machine.serve()
        return bool(machine.scanning()) or machine.is_over(self.pending[-1][0])

    def acknowledge(self, machine: Machine) -> None:
        """Barriers that are over: those deletes can be relied on."""
        over = [p for p in self.pending if machine.is_over(p[0])]
        for entry in over:
            _, block, puts = entry
            block.possible = {put for put in block.possible if put > puts}
            self.pending.remove(entry)

    def get(self, machine: Machine, block: Block) -> None:
        known = self.expect
        got = machine.get(block.key)
        if got is None:
            ((status, found),) = machine.stage(block.key)
            got = machine.fetch(found, block.key) if status == lib.MKV_HIT else None
            if status not in (lib.MKV_HIT, lib.MKV_TIMEOUT):
                assert not known or not block.held or self.evicts, f"{block} is lost: {status}"
        if got is not None:
            self.checked += 1
            block.doubt = False
            assert any(got == payload_of(block.id, put) for put in block.possible), f"{block} is wrong"

    def look_at_all(self, machine: Machine) -> None:
        """What must be there is, what must not is not, and all of it is right."""
        for block in self.blocks:
            if block.durable:
                assert machine.state(block.key) != layout.SLOT_EMPTY, f"{block} is lost"
            if not block.possible:
                assert machine.state(block.key) == layout.SLOT_EMPTY, f"{block} has returned"
            self.get(machine, block)

    def tick(self, machine: Machine, block: Block) -> None:
        machine.tick(self.random.randrange(1, 6))

    def sync(self, machine: Machine, block: Block) -> None:
        """Writes everything."""
        if self.expect and not self.evicts:
            machine.wait_barrier(sync=True)
            for one in self.blocks:
                one.durable |= one.held

    def hint(self, machine: Machine, block: Block) -> None:
        machine.touch(block.key)
        machine.pin(block.key, ttl_ns=self.random.choice((1, 10**6)))


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Power:
    return Power(monkeypatch)


def tell(tmp_path: Path, power: Power, seed: int, cuts: int, devices: int, evicts: bool) -> Story:
    # Three size classes, of segments of 32 KiB: a dozen blocks each.
    folder = tmp_path / f"{seed}-{devices}-{evicts}"
    folder.mkdir()
    paths = make_devices(folder, devices, (4 if evicts else 12) // devices, 1 << 15)
    story = Story(paths, power, seed, evicts)
    try:
        while story.cuts < cuts:
            story.round(60)
    finally:
        if story.machine is not None:
            story.machine.cut(0)
    return story


@pytest.mark.parametrize("evicts", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("devices", [1, 2])
def test_power_cuts_at_any_moment(tmp_path: Path, power: Power, devices: int, evicts: bool) -> None:
    story = tell(tmp_path, power, 40 + devices, 15, devices, evicts)
    assert story.checked
    print(
        f"{story.cuts} cuts, {story.in_start} in a start, {story.in_table} in a table,"
        f" {story.checked} looked at"
    )
    if not evicts:
        assert story.durable > 15


def test_a_torn_image_is_not_durable_because_it_is_put_again(tmp_path: Path) -> None:
    """A memory-durable block was being written when the power went: its header arrived, its payload did not.
    After the scan it seems to be there. Whoever puts it again, and demands that it is durable, has the
    payload: he must not be told that it is not needed.
    """
    paths, block, seed = make_devices(tmp_path, 1, 4, 1 << 15), Block(0), 0
    payload = payload_of(0, 1)
    found = False
    while not found:  # until it is the payload that is torn
        machine = Machine(paths, seed := seed + 1)
        machine.fault(lib.MKV_FAULT_TORN, lib.MKV_IO_WRITE, times=1)
        assert machine.put_patiently(block.key, payload) == lib.MKV_STORED
        machine.wait_barrier(sync=True)
        machine.cut(1)
        machine = Machine(paths, seed)
        wait_for_scan(machine)
        found = machine.state(block.key) == layout.SLOT_FLASH
        if not found:
            machine.cut(1)
    assert machine.put_patiently(block.key, payload) == lib.MKV_EXISTS
    assert machine.make_durable(block.key) == lib.MKV_MISS
    assert machine.put_patiently(block.key, payload) == lib.MKV_STORED
    assert machine.make_durable(block.key) == lib.MKV_DONE
    got = machine.get(block.key) or machine.staged(block.key)
    machine.cut(1)
    assert got == payload


def test_a_put_during_the_scan_does_not_cost_the_durable_block(tmp_path: Path) -> None:
    """A durable block, a crash, and before the scan has come upon the block it is put again, as `memory`.
    That is written, and torn by another crash: the first image was whole, and promised.
    """
    block, payload, torn = Block(0), payload_of(0, 1), 0

    def slow_scan(machine: Machine) -> None:
        machine.fault(lib.MKV_FAULT_HELD, lib.MKV_IO_READ)
        machine.fault(lib.MKV_FAULT_TORN, lib.MKV_IO_WRITE, times=1)

    for seed in range(2, 12):  # some are torn in the header: that costs nothing
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths = make_devices(folder, 1, 8, 1 << 15)
        machine = Machine(paths, 1)
        assert machine.put_patiently(block.key, payload) == lib.MKV_STORED
        assert machine.make_durable(block.key) == lib.MKV_DONE
        machine.cut(1)
        machine = Machine(paths, seed, before=slow_scan)
        assert machine.put_patiently(block.key, payload) == lib.MKV_STORED
        machine.clean()
        lib.mkv_flashio_fault_clear(machine.io)
        wait_for_scan(machine)
        machine.check()
        machine.cut(seed)
        machine = Machine(paths, seed)
        wait_for_scan(machine)
        machine.check()
        got = machine.staged(block.key)
        torn += machine.device(0).corrupt
        machine.check()
        machine.cut(1)
        assert got == payload
    assert torn


@pytest.mark.slow  # 800 cuts, a minute
@pytest.mark.parametrize("evicts", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_power_cuts(tmp_path: Path, power: Power, devices: int, evicts: bool, seed: int) -> None:
    tell(tmp_path, power, seed, 20, devices, evicts)

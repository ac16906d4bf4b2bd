"""Staging: blocks to and from a device that no NIC can reach go through pinned, registered host slots.

::

    get    READs of later groups ──►│ slot │ slot │ slot │──► H2D copies of earlier ones ──► device memory
    put    device memory ──► D2H copies of later groups ──►│ slot │ slot │──► the node pulls earlier ones

A *group* is a run of a batch's blocks that share one slot (a block longer than a slot takes several adjacent
ones). Each group goes through on its own: it takes a slot, is READ (or copied), copied (or pulled), and gives
the slot back; so that with some slots all parts are busy at once. What is done for a group is done by a
handful of array operations and one call into C, however many blocks it has.

A group into a device is an ordinary verified get into the slot; what is copied out of it are HITs and
nothing else, so that the slice of a key that is none stays untouched. A slot is used again only when the
copies out of it are over, or when the node has acknowledged the put: whoever was late is waited for. A batch
never has more than a few slots per node, so that a node that hangs does not stop what others are asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..rdma.errors import LocalError
from ..rdma.memory import HostMemory
from .copier import COPY, LATE, Device, Lane, Outcome
from .slots import Slots

SLOT_BYTES, SLOTS = 8 << 20, 8  # 64 MiB: some slots being READ, some being copied, some ready
ALIGN = 64  # where blocks begin in a slot
MIN_GROUP = 1 << 20  # bytes: a batch is not cut into smaller groups than that
MOST_BLOCKS = 2048  # of a group
READING = 2  # groups per node that are being READ at once
PULLING = 4  # groups per node that are being copied out or pulled at once; of few slots, half at most

Addresses = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Settings:
    """How much host memory is set aside for each device, and for each direction."""

    slot_bytes: int = SLOT_BYTES
    slots: int = SLOTS

    def __post_init__(self) -> None:
        if self.slot_bytes < ALIGN or self.slot_bytes % ALIGN or not 2 <= self.slots <= 4096:
            raise LocalError(
                f"{self.slots} staging slots of {self.slot_bytes} bytes",
                f"staging_slots: 2 to 4096; staging_slot_bytes: a multiple of {ALIGN}",
            )

    @property
    def nbytes(self) -> int:
        return self.slot_bytes * self.slots


class Blocks(Protocol):
    """Blocks of a batch that are on one device and on one node; ``index`` and ``part`` count among them."""

    node: str
    address: Addresses  # (n,) in device memory
    room: Addresses  # (n,) bytes: what a block takes, or may take, in a slot

    def failed(self, index: Places, rc: int) -> None:
        """These could not be copied: the driver's error, or CLOSED."""

    def late(self, index: Places) -> None:
        """For these there was no time."""


# Gets the blocks of a part to these offsets in the ring, within some seconds: their lengths, 0 where no HIT.
Fetch = Callable[[slice, Addresses, float], Awaitable[Addresses]]
# Puts blocks from these offsets in the ring, within some seconds; ends when nobody reads them any more.
Store = Callable[[Places, Addresses, float], Awaitable[None]]


class Way:
    """One direction of a device: its ring of slots, and the lane that copies."""

    def __init__(self, device: Device, settings: Settings, into_device: bool) -> None:
        self.device = device
        self.settings = settings
        self.per_node = min(READING if into_device else PULLING, settings.slots // 2)
        self.memory = HostMemory(settings.nbytes)
        device.pin(self.memory.address, self.memory.nbytes)
        try:
            self.lane: Lane = device.lane(into_device)
        except BaseException:
            device.unpin(self.memory.address)
            raise
        self.slots = Slots(settings.slots)
        self._permits: dict[str, Slots] = {}

    @property
    def address(self) -> int:
        return self.memory.address

    def permits(self, node: str) -> Slots:
        """What a group for ``node`` needs one of before it takes slots."""
        return self._permits.setdefault(node, Slots(self.per_node))

    def groups(self, room: Addresses) -> list[tuple[int, int]]:
        """Cuts blocks of these sizes into groups: [start, stop)."""
        total = int(_padded(room).sum())
        return self._cut(room, min(self.settings.slot_bytes, max(MIN_GROUP, -(-total // 4))))

    def portions(self, room: Addresses) -> list[tuple[int, int]]:
        """The same, into what half of all slots hold."""
        return self._cut(room, self.settings.nbytes // 2)

    def _cut(self, room: Addresses, target: int) -> list[tuple[int, int]]:
        ends = np.cumsum(_padded(room))
        out, start, done = [], 0, 0
        while start < len(room):
            stop = int(np.searchsorted(ends, np.uint64(done + target), "right"))  # no int: it would cast ends
            stop = min(max(stop, start + 1), start + MOST_BLOCKS)
            out.append((start, stop))
            start, done = stop, int(ends[stop - 1])
        return out

    def places(self, room: Addresses) -> tuple[Addresses, int]:
        """Offsets of a group's blocks from its first slot, and how many slots they take."""
        padded = _padded(room)
        ends = np.cumsum(padded)
        return ends - padded, max(1, -(-int(ends[-1]) // self.settings.slot_bytes))

    def stats(self) -> dict[str, Any]:
        lane = self.lane.stats()
        out: dict[str, Any] = {"slots_free": self.slots.free, "pages": self.memory.pages} | lane
        if lane["last_error"]:
            out["last_error"] = self.device.explain(lane["last_error"])
        return out

    def close(self) -> None:
        """Nothing may be under way, and the ring is no fabric's region any more."""
        self.lane.close()
        self.device.unpin(self.memory.address)


def _padded(room: Addresses) -> Addresses:
    out: Addresses = (room + np.uint64(ALIGN - 1)) // np.uint64(ALIGN) * np.uint64(ALIGN)
    return out


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


async def get(way: Way, blocks: Blocks, fetch: Fetch, until: float) -> None:
    """Brings blocks into device memory. Ends when no copy into it is under way any more.

    :param until: time.monotonic(): no READ and no copy is begun after that.
    """

    async def one(start: int, stop: int, offset: Addresses, first: int, n: int, permit: int) -> None:
        permitted = True
        try:
            lengths = await fetch(slice(start, stop), offset, _left(until))
            permits.give(permit, 1)
            permitted = False
            which = np.flatnonzero(lengths)
            if len(which):
                copies = np.empty(len(which), COPY)
                copies["dst"] = blocks.address[start:stop][which]
                copies["src"] = offset[which] + np.uint64(way.address)
                copies["nbytes"] = lengths[which]
                outcome = await way.lane.copy(copies, _left(until))
                _report(blocks, which + start, outcome)
        finally:
            if permitted:
                permits.give(permit, 1)
            way.slots.give(first, n)

    permits = way.permits(blocks.node)
    await _through(way, permits, blocks, until, one)


async def put(way: Way, blocks: Blocks, store: Store, until: float) -> None:
    """Has blocks in device memory kept. Ends when nobody reads device memory any more."""

    async def one(start: int, stop: int, offset: Addresses, first: int, n: int, permit: int) -> None:
        try:
            copies = np.empty(stop - start, COPY)
            copies["dst"] = offset + np.uint64(way.address)
            copies["src"] = blocks.address[start:stop]
            copies["nbytes"] = blocks.room[start:stop]
            outcome = await way.lane.copy(copies, _left(until))
            index = np.arange(start, stop)
            _report(blocks, index, outcome)
            if outcome.ok.any():
                await store(index[outcome.ok], offset[outcome.ok], _left(until))
        finally:
            permits.give(permit, 1)
            way.slots.give(first, n)

    permits = way.permits(blocks.node)
    await _through(way, permits, blocks, until, one)


def _report(blocks: Blocks, index: Places, outcome: Outcome) -> None:
    bad = index[~outcome.ok]
    if len(bad) and outcome.rc == LATE:
        blocks.late(bad)
    elif len(bad):
        blocks.failed(bad, outcome.rc)


async def _through(way: Way, permits: Slots, blocks: Blocks, until: float, one: Any) -> None:
    """Lets one group after the other in, as slots become free, and waits for all of them."""
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    try:
        for start, stop in way.groups(blocks.room):
            offset, n = way.places(blocks.room[start:stop])
            first = -1
            if (permit := await permits.take(1, _left(until))) >= 0:
                first = await way.slots.take(n, _left(until))
                if first < 0:
                    permits.give(permit, 1)
            if first < 0:
                blocks.late(np.arange(start, len(blocks.room)))
                break
            offset += np.uint64(first * way.settings.slot_bytes)
            tasks.append(loop.create_task(one(start, stop, offset, first, n, permit)))
    finally:
        ended = await _all(tasks)
    for task in ended:
        task.result()


async def _all(tasks: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    """Waits for all of them, also where it is cancelled: they have slots, and copies under way."""
    pending = set(tasks)
    cancelled: asyncio.CancelledError | None = None
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
    return tasks

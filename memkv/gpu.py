"""A peer's dealings with GPU memory: which batches touch it, and how their blocks get there and back.

A batch may have slices in host memory, in GPU memory that the fabric reaches, and in GPU memory that is
staged. It is taken apart by device and node, each part goes its way, all of them at once, and the statuses
come together again. Everything here but what says otherwise runs on the control thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from .batches import Batch, Keys, check_slices
from .buffers import SLICE, Buffer, Slices
from .control import Control
from .gets import Gets
from .gpudirect import staging
from .gpudirect.copier import Device, Mark, open_device
from .gpudirect.staging import Addresses, Places
from .rdma.errors import DeviceError, LocalError
from .rdma.fabric import Region
from .requests import Requests, check_put
from .status import Status

if TYPE_CHECKING:
    from .gets import Route

log = logging.getLogger("memkv.peer")

T = TypeVar("T")
Statuses = npt.NDArray[np.uint8]
Found = tuple[Statuses, npt.NDArray[np.uint32]]  # statuses and lengths, by key

SHORTEST_NAP, LONGEST_NAP = 20e-6, 1e-3  # seconds between looks at an application's stream


@dataclass(slots=True)
class Stage:
    """One direction of one device: the way through its slots, and the ring as a region of the fabric's."""

    way: staging.Way
    region: Region


class Gpu:
    """See the module.

    :param route: which link has which keys. :param settings: of the rings of slots.
    """

    def __init__(
        self, control: Control, gets: Gets, requests: Requests, route: Route, settings: staging.Settings
    ) -> None:
        self._control = control
        self._gets = gets
        self._requests = requests
        self._route = route
        self.settings = settings
        self.buffers: dict[int, Buffer] = {}  # those in GPU memory, by id
        self._devices: dict[str, Device] = {}
        self._stages: dict[tuple[str, bool], Stage] = {}
        self._lock = threading.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()

    # --- devices ---

    @property
    def used(self) -> bool:
        """Whether GPU memory was ever registered."""
        return bool(self._stages or self.buffers)

    def device(self, name: str) -> Device:
        """From any thread. :raises DeviceError: it cannot be used, and why."""
        with self._lock:
            if name not in self._devices:
                self._devices[name] = open_device(name)
            return self._devices[name]

    def stage(self, name: str, into: bool, register: Callable[[staging.Way], Region]) -> None:
        """Readies slots for a device, ``into`` it or out of it; from any thread but the control thread.

        :param register: makes the ring a region of the fabric's.
        """
        device = self.device(name)
        with self._lock:
            if (name, into) in self._stages:
                return
            way = staging.Way(device, self.settings, into)
            try:
                region = register(way)
            except BaseException:
                way.close()
                raise

            async def attach() -> None:
                way.lane.attach(asyncio.get_running_loop())

            self._stages[name, into] = Stage(way, region)
            self._control.call(attach(), None)

    def check_blocks(self) -> None:
        """:raises LocalError: the namespace's blocks do not fit into the slots."""
        sessions = [link.session for link, _ in self._route(np.zeros((1, 16), np.uint8))]
        longest = max((int(s.info.block_bytes) for s in sessions if s is not None), default=0)
        if longest > self.settings.nbytes:
            raise LocalError(
                f"blocks of {longest} bytes do not fit into {self.settings.slots} staging slots of "
                f"{self.settings.slot_bytes} bytes",
                "staging_slot_bytes, staging_slots",
            )

    def stats(self) -> dict[str, Any]:
        """Slots and bytes of every device, and every buffer's rungs."""
        devices: dict[str, Any] = {}
        for (name, into), stage in list(self._stages.items()):
            entry = devices.setdefault(name, {"staging_bytes": self.settings.nbytes})
            entry["get" if into else "put"] = stage.way.stats()
        buffers = [
            {
                "id": b.id,
                "nbytes": b.nbytes,
                "device": b.device,
                "get": {"rung": b.get_rung.name, "reason": b.get_rung.reason},
                "put": {"rung": b.put_rung.name, "reason": b.put_rung.reason},
            }
            for b in list(self.buffers.values())
        ]
        return {"devices": devices, "buffers": buffers}

    async def settle(self) -> None:
        """Waits until no batch that is under way now uses GPU memory any more."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))

    async def detach(self) -> None:
        """Nothing is under way, and nothing will be."""
        for stage in self._stages.values():
            stage.way.lane.detach()

    def close(self) -> None:
        """From the thread that closes the peer, after its loop has ended."""
        for stage in self._stages.values():
            stage.region.close()
            stage.way.close()
        self._stages.clear()

    # --- batches ---

    def concerns(self, slices: Any, stream: Any) -> bool:
        """Whether a batch is for this module; from any thread."""
        if stream is not None:
            return True
        if not self.buffers or getattr(slices, "dtype", None) != SLICE:
            return False
        return not self.buffers.keys().isdisjoint(np.unique(slices["region"]).tolist())

    def _mark(self, slices: Slices, stream: Any) -> Mark | None:
        """Where ``stream`` is now."""
        if stream is None:
            return None
        found = (self.buffers.get(r) for r in np.unique(slices["region"]).tolist())
        names = {b.device for b in found if b is not None} or set(self._devices)
        if not names:
            raise LocalError("stream= without a slice in GPU memory", "Peer.register takes GPU memory")
        if len(names) > 1:
            raise LocalError(
                f"stream= with slices on {sorted(names)}", "a batch for each device, with its own stream"
            )
        return self.device(names.pop()).mark(stream)

    def get(
        self, keys: Keys, slices: Slices, seconds: float, checksum: bool, stream: Any
    ) -> Callable[[], Coroutine[Any, Any, Found]]:
        """A get with slices anywhere: what to run on the control thread. This itself is called on the
        caller's, and notes where ``stream`` is now.
        """
        check_slices(slices, len(keys))
        until = time.monotonic() + seconds
        mark = self._mark(slices, stream)

        async def work() -> Found:
            status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)
            lengths = np.zeros(len(keys), np.uint32)

            async def plain(index: Places) -> None:
                batch = Batch(keys[index], slices[index], checksum, False)
                await self._gets.run_async(batch, until - time.monotonic())
                status[index], lengths[index] = batch.status, batch.lengths

            async def staged(stage: Stage, part: _Part) -> None:
                async def fetch(some: slice, offset: Addresses, seconds: float) -> Addresses:
                    index = part.index[some]
                    slots = _slices(offset, stage.region.id, part.room[some])
                    got = Batch(keys[index], slots, checksum, False)
                    await self._gets.run_async(got, seconds)
                    status[index], lengths[index] = got.status, got.lengths
                    return np.where(got.status == Status.HIT, got.lengths, 0).astype(np.uint64)

                await staging.get(stage.way, part, fetch, until)

            await self._each(_Batch(keys, slices, status, True), mark, until, plain, staged)
            return status, lengths

        return partial(self._tracked, work, mark)

    def put(
        self,
        keys: Keys,
        slices: Slices,
        seconds: float,
        durability: str,
        checksums: npt.NDArray[np.uint64] | None,
        stream: Any,
    ) -> Callable[[], Coroutine[Any, Any, Statuses]]:
        """A put with slices anywhere. See :meth:`get`."""
        check_put(keys, slices, checksums)
        until = time.monotonic() + seconds
        mark = self._mark(slices, stream)

        async def work() -> Statuses:
            status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)

            async def keep(index: Places, where: Slices, seconds: float) -> None:
                sums = None if checksums is None else checksums[index]
                status[index] = await self._requests.put(keys[index], where, seconds, durability, sums)

            async def plain(index: Places) -> None:
                await keep(index, slices[index], until - time.monotonic())

            async def staged(stage: Stage, part: _Part) -> None:
                async def store(some: Places, offset: Addresses, seconds: float) -> None:
                    slots = _slices(offset, stage.region.id, part.room[some])
                    await keep(part.index[some], slots, seconds)

                await staging.put(stage.way, part, store, until)

            await self._each(_Batch(keys, slices, status, False), mark, until, plain, staged)
            return status

        return partial(self._tracked, work, mark)

    async def _tracked(self, work: Callable[[], Coroutine[Any, Any, T]], mark: Mark | None) -> T:
        task: Any = asyncio.current_task()
        self._under_way.add(task)
        try:
            return await work()
        finally:
            self._under_way.discard(task)
            if mark is not None:
                mark.close()

    async def _each(
        self,
        batch: _Batch,
        mark: Mark | None,
        until: float,
        plain: Callable[[Places], Coroutine[Any, Any, None]],
        staged: Callable[[Stage, _Part], Coroutine[Any, Any, None]],
    ) -> None:
        """Takes a batch apart and waits for all its parts. It takes no slot before ``mark`` is reached: what
        waits for a stream is in nobody's way.
        """
        if (why := await _wait(mark, until)) is not None:
            batch.status[:] = why
            return
        rest = np.ones(len(batch.keys), np.bool_)
        ways = []
        for region in np.unique(batch.slices["region"]).tolist():
            buffer = self.buffers.get(region)
            if buffer is None or not buffer.is_staged(batch.into):
                continue
            mine = batch.slices["region"] == region
            rest &= ~mine
            if not self._is_there(buffer):
                batch.status[mine] = Status.ERROR_BOUNDS
                continue
            stage = self._stages[buffer.device, batch.into]
            ways += [staged(stage, part) for part in self._parts(batch, buffer, np.flatnonzero(mine))]
        if rest.any():
            ways.append(plain(np.flatnonzero(rest)))
        for outcome in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _is_there(self, buffer: Buffer) -> bool:
        """False where the application has freed the memory: who knows whose it is by now."""
        if not buffer.allocation_id:
            return True
        same = self._devices[buffer.device].allocation_id(buffer.address) == buffer.allocation_id
        if not same:
            log.error("buffer %d on %s was freed while it was registered", buffer.id, buffer.device)
        return same

    def _parts(self, batch: _Batch, buffer: Buffer, index: Places) -> list[_Part]:
        """The blocks at ``index``, all in one buffer, by node. Those that cannot be staged get their status
        here.
        """
        where = batch.slices[index]
        outside = where["offset"] + where["length"].astype(np.uint64) > np.uint64(buffer.nbytes)
        batch.status[index[outside]] = Status.ERROR_BOUNDS
        index = index[~outside]
        out = []
        for link, chosen in self._route(batch.keys[index]) if len(index) else []:
            part = index if chosen is None else index[chosen]
            if (session := link.session) is None:
                batch.status[part] = Status.ERROR_UNREACHABLE
                continue
            longest = int(session.info.block_bytes)
            room = batch.slices["length"][part].astype(np.uint64)
            if batch.into:
                room = np.minimum(room, np.uint64(longest))
            too_large = room > np.uint64(min(longest, self.settings.nbytes))
            batch.status[part[too_large]] = Status.ERROR_TOO_LARGE
            part, room = part[~too_large], room[~too_large]
            if len(part):
                address = batch.slices["offset"][part] + np.uint64(buffer.address)
                device = self._devices[buffer.device]
                out.append(_Part(batch, part, link.address, address, room, device))
        return out


@dataclass(slots=True)
class _Batch:
    keys: Keys
    slices: Slices
    status: Statuses
    into: bool


class _Part:
    """:class:`staging.Blocks` of a batch. Statuses go to where those of the batch are."""

    def __init__(
        self,
        batch: _Batch,
        index: Places,
        node: str,
        address: Addresses,
        room: Addresses,
        device: Device,
    ) -> None:
        self.batch, self.index, self.device = batch, index, device
        self.node, self.address, self.room = node, address, room

    def late(self, index: Places) -> None:
        self.batch.status[self.index[index]] = Status.TIMEOUT

    def failed(self, index: Places, rc: int) -> None:
        self.batch.status[self.index[index]] = Status.ERROR_COPY
        way = "into" if self.batch.into else "out of"
        why = self.device.explain(rc) if rc > 0 else "the peer was closed"
        log.error("%d blocks could not be copied %s %s: %s", len(index), way, self.device.name, why)


def _slices(offset: Addresses, region: int, length: Addresses) -> Slices:
    out = np.empty(len(offset), SLICE)
    out["offset"], out["region"], out["length"] = offset, region, length
    return out


async def _wait(mark: Mark | None, until: float) -> Status | None:
    """Waits for a place in the application's stream; why that was in vain, or None."""
    started = now = time.monotonic()
    try:
        while mark is not None and not mark.reached():
            if now > until:
                return Status.TIMEOUT
            await asyncio.sleep(min(max((now - started) / 8, SHORTEST_NAP), LONGEST_NAP))
            now = time.monotonic()
    except DeviceError as exc:
        log.error("%s", exc)
        return Status.ERROR_COPY
    return None

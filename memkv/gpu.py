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
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from .batches import Batch, Keys, check_slices
from .buffers import SLICE, Buffer, Slices
from .control import Control
from .gets import Gets
from .gpu_gets import get_staged
from .gpudirect import staging
from .gpudirect.copier import Device, Mark, open_device
from .gpudirect.staging import Addresses, Places
from .parts import Part, Stage, Whole, parts, slices_of, was_freed
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

    def _check_verifiable(self, slices: Slices) -> None:
        for region in np.unique(slices["region"]).tolist():
            buffer = self.buffers.get(region)
            if buffer is None or buffer.window(True) is None:
                continue
            if why := self.device(buffer.device).unverifiable():
                raise LocalError(
                    f"checksum=True, for blocks that go straight to {buffer.device}: {why}",
                    "connect(…, checksum=True): then its memory is staged, and the CPU verifies",
                )

    def get(
        self, keys: Keys, slices: Slices, seconds: float, checksum: bool, stream: Any
    ) -> Callable[[], Coroutine[Any, Any, Found]]:
        """A get with slices anywhere: what to run on the control thread. This itself is called on the
        caller's, and notes where ``stream`` is now.
        """
        check_slices(slices, len(keys))
        if checksum:
            self._check_verifiable(slices)
        until = time.monotonic() + seconds
        mark = self._mark(slices, stream)

        async def work() -> Found:
            status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)
            lengths = np.zeros(len(keys), np.uint32)

            async def plain(index: Places) -> None:
                batch = Batch(keys[index], slices[index], checksum, False)
                await self._gets.run_async(batch, until - time.monotonic())
                status[index], lengths[index] = batch.status, batch.lengths

            async def direct(device: Device, index: Places) -> None:
                due = np.zeros(len(index), np.uint64) if checksum else None
                address = self._addresses(slices[index])
                batch = Batch(keys[index], slices[index], False, False, checksums=due)
                await self._gets.run_async(batch, until - time.monotonic())
                await self._make_sure(device, batch, address)
                status[index], lengths[index] = batch.status, batch.lengths

            async def staged(stage: Stage, part: Part) -> None:
                await get_staged(self._gets, stage, part, lengths, checksum, until)

            await self._each(Whole(keys, slices, status, True), mark, until, plain, direct, staged)
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

            async def direct(_: Device, index: Places) -> None:
                await plain(index)

            async def staged(stage: Stage, part: Part) -> None:
                async def store(some: Places, offset: Addresses, seconds: float) -> None:
                    slots = slices_of(offset, stage.region.id, part.room[some])
                    await keep(part.index[some], slots, seconds)

                await staging.put(stage.way, part, store, until)

            await self._each(Whole(keys, slices, status, False), mark, until, plain, direct, staged)
            return status

        return partial(self._tracked, work, mark)

    def _addresses(self, slices: Slices) -> Addresses:
        out: Addresses = slices["offset"].copy()
        for region in np.unique(slices["region"]).tolist():
            out[slices["region"] == region] += np.uint64(self.buffers[region].address)
        return out

    async def _make_sure(self, device: Device, batch: Batch, address: Addresses) -> None:
        """What a NIC has written into GPU memory: visible from now on, and verified where asked for."""
        hits = np.flatnonzero(batch.status == Status.HIT)
        if not len(hits):
            return
        try:
            device.visible()
            if batch.checksums is not None:
                words = address[hits], batch.lengths[hits].astype(np.uint64), batch.checksums[hits]
                agreed = await asyncio.to_thread(device.verify, *words)
                batch.status[hits[~agreed]] = Status.CORRUPT
        except Exception:  # of the driver, of CuPy
            log.exception("%d blocks on %s could not be made sure of", len(hits), device.name)
            batch.status[hits] = Status.ERROR_COPY

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
        batch: Whole,
        mark: Mark | None,
        until: float,
        plain: Callable[[Places], Coroutine[Any, Any, None]],
        direct: Callable[[Device, Places], Coroutine[Any, Any, None]],
        staged: Callable[[Stage, Part], Coroutine[Any, Any, None]],
    ) -> None:
        """Takes a batch apart and waits for all its parts. It takes no slot before ``mark`` is reached: what
        waits for a stream is in nobody's way.
        """
        if (why := await _wait(mark, until)) is not None:
            batch.status[:] = why
            return
        rest = np.ones(len(batch.keys), np.bool_)
        ways = []
        reached: dict[str, list[Places]] = {}
        for region in np.unique(batch.slices["region"]).tolist():
            buffer = self.buffers.get(region)
            if buffer is None or buffer.rung(batch.into).name == "none":
                continue
            mine = batch.slices["region"] == region
            rest &= ~mine
            device, index = self._devices[buffer.device], np.flatnonzero(mine)
            if was_freed(buffer, device, batch.into):
                batch.status[index] = Status.ERROR_BOUNDS
            elif buffer.window(batch.into) is not None:
                reached.setdefault(buffer.device, []).append(index)
            else:
                stage = self._stages[buffer.device, batch.into]
                some = parts(batch, buffer, device, index, self._route, self.settings.nbytes)
                ways += [staged(stage, part) for part in some]
        ways += [direct(self._devices[name], np.concatenate(found)) for name, found in reached.items()]
        if rest.any():
            ways.append(plain(np.flatnonzero(rest)))
        for outcome in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


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

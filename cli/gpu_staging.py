"""The staging pipeline by itself, for ``memkv-bench gpu``: groups, slots and copies, with a fabric that takes
no time. What it reaches against plain copies is what staging costs; a node and a network come with
``memkv-bench get --memory cuda:0``.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..gpudirect import staging
from ..gpudirect.copier import Device
from ..gpudirect.staging import Addresses, Places
from ..rdma.errors import DeviceError
from .sample import Sample

LONGEST = 60.0  # seconds, of a pass


class Pass:
    """:class:`staging.Blocks`: equal blocks, one after the other in device memory."""

    node = "bench"

    def __init__(self, device: Device, address: int, size: int, count: int) -> None:
        self.device = device
        self.address: Addresses = address + np.arange(count, dtype=np.uint64) * np.uint64(size)
        self.room: Addresses = np.full(count, size, np.uint64)

    def failed(self, index: Places, rc: int) -> None:
        raise DeviceError(f"{len(index)} blocks could not be copied: {self.device.explain(rc)}")

    def late(self, index: Places) -> None:
        raise DeviceError(f"{len(index)} blocks were not copied within {LONGEST:.0f} s")


class Pipeline:
    """One direction of a GPU's staging, over blocks of one size in device memory. Close it.

    :param rig: a :class:`~memkv.cli.gpu_rig.GpuRig`. :param address: of ``size * count`` bytes on it.
    """

    def __init__(self, rig: Any, address: int, size: int, count: int, into: bool) -> None:
        self.rig, self.into, self.size, self.count = rig, into, size, count
        self.base = address
        self.blocks = Pass(rig.device, address, size, count)
        self.way = staging.Way(rig.device, staging.Settings(), into)
        self._runner = asyncio.Runner()
        self._runner.run(self._attach())
        self._noise = np.random.default_rng(size).integers(0, 256, self.way.memory.nbytes, np.uint8)
        if into:
            self.way.memory.array[:] = self._noise

    async def _attach(self) -> None:
        self.way.lane.attach(asyncio.get_running_loop())

    def turn(self, seconds: float) -> Sample:
        """Whole passes until the clock has run for ``seconds``."""
        total = Sample()
        while total.ns < seconds * 1e9:
            start = time.perf_counter_ns()
            self._runner.run(self._get(None) if self.into else self._put(None))
            ns = time.perf_counter_ns() - start
            total.add(Sample(nbytes=self.size * self.count, ns=ns, times_us=[ns / 1000], hits=self.count))
        return total

    async def _get(self, where: Addresses | None) -> None:
        """:param where: receives the offset in the ring that each block came from."""

        async def fetch(part: slice, offset: Addresses, seconds: float) -> Addresses:
            if where is not None:
                where[part] = offset
            return self.blocks.room[part]

        await staging.get(self.way, self.blocks, fetch, time.monotonic() + LONGEST)

    async def _put(self, check: npt.NDArray[np.bool_] | None, expected: Any = None) -> None:
        """:param check: receives which blocks are in the ring as ``expected``, (count, size), has them."""

        async def store(index: Places, offset: Addresses, seconds: float) -> None:
            if check is None:
                return
            ring = self.way.memory.array
            for i, at in zip(index.tolist(), offset.tolist(), strict=True):
                check[i] = np.array_equal(ring[at : at + self.size], expected[i])

        await staging.put(self.way, self.blocks, store, time.monotonic() + LONGEST)

    def wrong(self) -> int:
        """Blocks of one more pass that did not come out as they went in. Not timed."""
        if self.into:
            where = np.zeros(self.count, np.uint64)
            self.rig.fill(self.base, np.zeros(self.size * self.count, np.uint8))
            self._runner.run(self._get(where))
            got = self.rig.read(self.base, self.size * self.count).reshape(self.count, self.size)
            return sum(
                not np.array_equal(row, self._noise[at : at + self.size])
                for row, at in zip(got, where.tolist(), strict=True)
            )
        rows = np.resize(self._noise, self.size * self.count + 1)[1:].reshape(self.count, self.size)
        self.rig.fill(self.base, np.ascontiguousarray(rows))
        right = np.zeros(self.count, np.bool_)
        self._runner.run(self._put(right, rows))
        return int((~right).sum())

    def close(self) -> None:
        async def detach() -> None:
            self.way.lane.detach()

        self._runner.run(detach())
        self._runner.close()
        self.way.close()

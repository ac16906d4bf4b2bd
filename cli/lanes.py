"""A lane: one thread's part of a load, which it works off in stretches.

In a stretch the lane carries out batches while the clock runs. Then, while it stands, it compares its buffer
with what the keys demand. From pass to pass a block goes to another place, so that what an earlier pass left
there is never right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from ..batches import Batch
from ..peer import Peer
from ..status import Status
from . import pattern
from .places import open_place
from .sample import GOOD_GET, GOOD_PUT, Keys, Plan, Sample, Statuses

STRETCH_NS = 50_000_000  # at least so long
TIMEOUT = 120.0  # of one batch: a benchmark waits rather than measure timeouts

clock = time.perf_counter_ns


class Lane:
    """Keys, and a buffer with a place for each. :param number: among all lanes of all processes."""

    def __init__(self, peer: Peer, plan: Plan, number: int, keys: Keys) -> None:
        self.peer, self.plan, self.keys = peer, plan, keys
        self.place = open_place(plan.gpu, len(keys), plan.size)
        self.memory, self.rows = self.place.memory, self.place.rows
        self.clear()
        try:
            self.buffer = peer.register(self.place.buffer)
        except BaseException:
            self.place.close()
            raise
        self.slices = self.buffer.split(plan.size)[: len(keys)]
        self._common = pattern.ramp(plan.size)
        self._turn = 0
        self._debt = 0.0  # of puts, in a mixed load
        self._next_new = 1 << 40 | number << 32  # numbers of blocks that were never put

    def close(self) -> None:
        self.buffer.close()
        self.place.close()

    def clear(self) -> None:
        """Zeroes the buffer."""
        self.rows[:] = 0
        self.place.push()

    def heading(self) -> dict[str, Any]:
        """Where the blocks lie, and how they get there."""
        return self.place.heading(self.buffer)

    # --- one stretch each ---

    def prepare(self) -> Sample:
        """Puts the keys."""
        sample = Sample()
        pattern.fill(self.rows, self.keys, self._common)
        self.place.push()
        for keys, slices in self._batches(self.keys, 0):
            sample.judge(self.peer.put_from(keys, slices, timeout=TIMEOUT), GOOD_PUT)
        return sample

    def get(self, cold: bool, checksum: bool) -> Sample:
        """Whole passes of gets until ``STRETCH_NS`` are over; the last one is verified."""
        sample = Sample()
        done: list[list[Statuses]] = []
        carry_out = self._deep if self.plan.depth > 1 else self._one_by_one
        while sample.ns < STRETCH_NS:
            batches = self._next_pass()
            start = clock()
            done.append(carry_out(batches, cold, checksum, sample.times_us))
            sample.ns += clock() - start
        for statuses in done:
            sample.judge(np.concatenate(statuses), GOOD_GET)
        sample.nbytes = sample.hits * self.plan.size
        sample.wrong = self._wrong(self.keys, np.concatenate(done[-1]), self._turn)
        return sample

    def put(self) -> Sample:
        """Puts a buffer full of new blocks; then reads them back, compares and deletes them."""
        sample = Sample()
        keys = self._new(len(self.keys))
        pattern.fill(self.rows, keys, self._common)
        self.place.push()
        carry_out = self._put_deep if self.plan.depth > 1 else self._put_one_by_one
        batches = self._batches(keys, 0)
        start = clock()
        statuses = carry_out(batches, sample.times_us)
        sample.ns = clock() - start
        sample.judge(np.concatenate(statuses), GOOD_PUT)
        sample.nbytes = sample.hits * self.plan.size
        self._read_back(keys, sample)
        return sample

    def mixed(self, put_share: float) -> tuple[Sample, Sample]:
        """A pass of gets, some replaced by puts of new blocks out of the places of those gets: (gets,
        puts)."""
        order: list[tuple[bool, Keys, Any]] = []
        fetched: list[Statuses] = []  # by key of the lane; 0 where a put took the place
        for keys, slices in self._next_pass():
            self._debt += put_share
            put = self._debt >= 1
            if put:
                self._debt -= 1
                keys = self._new(len(keys))
                content = np.empty((len(keys), self.plan.size), np.uint8)
                pattern.fill(content, keys, self._common)
                rows = (slices["offset"] // self.plan.size).astype(np.intp)
                self.rows[rows] = content
                self.place.push(rows)
            order.append((put, keys, slices))
        gets, puts = Sample(), Sample()
        stored: list[Statuses] = []
        start = clock()
        for put, keys, slices in order:
            before = clock()
            if put:
                stored.append(self.peer.put_from(keys, slices, timeout=TIMEOUT))
                puts.times_us.append((clock() - before) / 1000)
                fetched.append(np.zeros(len(keys), np.uint8))
            else:
                fetched.append(self.peer.get_into(keys, slices, timeout=TIMEOUT, checksum=self.plan.checksum))
                gets.times_us.append((clock() - before) / 1000)
        gets.ns = puts.ns = clock() - start
        got = np.concatenate(fetched)
        gets.judge(got[got != 0], GOOD_GET)
        gets.nbytes = gets.hits * self.plan.size
        gets.wrong = self._wrong(self.keys, got, self._turn)
        if stored:
            puts.judge(np.concatenate(stored), GOOD_PUT)
            puts.nbytes = puts.hits * self.plan.size
            self._read_back(np.concatenate([keys for put, keys, _ in order if put]), puts)
        return gets, puts

    # --- parts of stretches ---

    def _batches(self, keys: Keys, turn: int) -> list[tuple[Keys, Any]]:
        """Key i goes to place i + turn, round the buffer."""
        slices, n = np.roll(self.slices[: len(keys)], -turn), self.plan.batch
        return [(keys[i : i + n], slices[i : i + n]) for i in range(0, len(keys), n)]

    def _next_pass(self) -> list[tuple[Keys, Any]]:
        self._turn = (self._turn + 1) % len(self.keys)
        if len(self.keys) == 1:  # there is no other place
            self.clear()
        return self._batches(self.keys, self._turn)

    def _new(self, count: int) -> Keys:
        keys = self.plan.keys(self._next_new, count)
        self._next_new += count
        return keys

    def _one_by_one(
        self, batches: Sequence[tuple[Keys, Any]], cold: bool, checksum: bool, times_us: list[float]
    ) -> list[Statuses]:
        call: Callable[[Keys, Any], Statuses]
        if cold:  # the C core is told not to use the location cache
            call = lambda k, s: self.peer._gets.run(Batch(k, s, checksum, True), TIMEOUT).status  # noqa: E731
        else:
            call = lambda k, s: self.peer.get_into(k, s, timeout=TIMEOUT, checksum=checksum)  # noqa: E731
        statuses = []
        before = clock()
        for keys, slices in batches:
            statuses.append(call(keys, slices))
            now = clock()
            times_us.append((now - before) / 1000)
            before = now
        return statuses

    def _deep(
        self, batches: Sequence[tuple[Keys, Any]], cold: bool, checksum: bool, times_us: list[float]
    ) -> list[Statuses]:
        """The same with several batches under way."""
        get = self.peer.aio.get_into
        return self._several(
            batches, lambda keys, slices: get(keys, slices, timeout=TIMEOUT, checksum=checksum), times_us
        )

    def _put_one_by_one(self, batches: Sequence[tuple[Keys, Any]], times_us: list[float]) -> list[Statuses]:
        statuses = []
        for keys, slices in batches:
            before = clock()
            statuses.append(self.peer.put_from(keys, slices, timeout=TIMEOUT))
            times_us.append((clock() - before) / 1000)
        return statuses

    def _put_deep(self, batches: Sequence[tuple[Keys, Any]], times_us: list[float]) -> list[Statuses]:
        put = self.peer.aio.put_from
        return self._several(batches, lambda keys, slices: put(keys, slices, timeout=TIMEOUT), times_us)

    def _several(
        self,
        batches: Sequence[tuple[Keys, Any]],
        call: Callable[[Keys, Any], Awaitable[Statuses]],
        times_us: list[float],
    ) -> list[Statuses]:
        """``call`` for each batch, ``depth`` of them under way."""
        statuses: list[Statuses] = [np.zeros(0, np.uint8)] * len(batches)
        todo = list(enumerate(batches))[::-1]

        async def worker() -> None:
            while todo:
                i, (keys, slices) = todo.pop()
                before = clock()
                statuses[i] = await call(keys, slices)
                times_us.append((clock() - before) / 1000)

        async def all_of_them() -> None:
            await asyncio.gather(*(worker() for _ in range(self.plan.depth)))

        asyncio.run(all_of_them())
        return statuses

    def _wrong(self, keys: Keys, status: Statuses, turn: int) -> int:
        """Hits among ``keys`` whose place does not hold what it should; 0 if nothing is to be verified."""
        if not self.plan.verify:
            return 0
        n = len(keys)
        self.place.pull()
        bad = pattern.wrong(self.rows[:n], np.roll(keys, turn, axis=0), self._common)
        return int((bad & np.roll(status == Status.HIT, turn)).sum())

    def wrong_rows(self, count: int) -> int:
        """How many of the first rows do not hold the first keys' blocks."""
        self.place.pull()
        return int(pattern.wrong(self.rows[:count], self.keys[:count], self._common).sum())

    def _read_back(self, keys: Keys, sample: Sample) -> None:
        """Gets what was put, to other places than it came from, compares, and deletes it."""
        if self.plan.verify:
            if len(keys) == 1:
                self.clear()
            status = np.concatenate(
                [self.peer.get_into(k, s, timeout=TIMEOUT) for k, s in self._batches(keys, 1)]
            )
            back = Sample(wrong=self._wrong(keys, status, 1))
            back.judge(status, GOOD_GET)
            sample.count(back, hits=False)
        self.peer.delete(keys, timeout=TIMEOUT)

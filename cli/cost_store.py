"""memkv as the cost model sees it: a memory tier, a flash tier, and links that take time.

A put begins when its blocks have been computed; pulled, they are in memory, and are written behind to flash.
What leaves memory is found on flash. A hit on flash is read, sent, and kept in memory. Nodes are taken
together: their sizes and bandwidths add up, and blocks spread evenly.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .cost_caches import Cache, cache
from .cost_setup import DIRTY_SHARE, Setup


@dataclass(slots=True)
class Link:
    """Something that carries bytes one after the other. Uses must come in order of time."""

    bandwidth: float
    free: float = 0.0
    nbytes: int = 0

    def ends(self, now: float, nbytes: int) -> float:
        """When ``nbytes`` would be through."""
        return max(now, self.free) + nbytes / self.bandwidth if nbytes else now

    def send(self, now: float, nbytes: int) -> float:
        """When they are through."""
        if not nbytes:
            return now
        self.free = self.ends(now, nbytes)
        self.nbytes += nbytes
        return self.free

    def busy(self, seconds: float) -> float:
        """Share of so long a time that the bytes took; above 1: more than it can carry."""
        return self.nbytes / self.bandwidth / seconds


@dataclass(slots=True)
class Plan:
    """What a request would get: blocks by tier, in the prompt's order, and when they would be there."""

    memory: list[int] = field(default_factory=list)
    flash: list[int] = field(default_factory=list)
    ready: float = 0.0

    def __len__(self) -> int:
        return len(self.memory) + len(self.flash)


class Store:
    """All nodes. ``instant``: puts are visible at once, and nothing takes time or comes too late."""

    def __init__(self, setup: Setup, *, instant: bool = False) -> None:
        n = setup.nodes
        self._setup, self._instant = setup, instant
        self.memory: Cache = cache(setup.policy, setup.blocks(n * setup.node_memory))
        self.flash: Cache = cache(setup.policy, setup.blocks(n * setup.node_flash))
        self.out, self.into = Link(n * setup.wire), Link(n * setup.wire)
        self.read, self.write = Link(n * setup.flash_read), Link(n * setup.flash_write)
        self.dropped = 0
        self._dirty = DIRTY_SHARE * n * setup.node_memory
        self._coming: list[tuple[float, tuple[int, ...]]] = []  # puts that begin later: a heap, by when
        self._pulled: deque[tuple[float, list[int]]] = deque()  # by the time at which they are whole

    def put(self, ids: tuple[int, ...], at: float) -> None:
        """Keeps blocks that are complete at some later time."""
        heapq.heappush(self._coming, (at, ids))
        if self._instant:
            self.settle(at)

    def settle(self, now: float) -> None:
        """Carries out what has come by ``now``."""
        while self._coming and self._coming[0][0] <= now:
            at, ids = heapq.heappop(self._coming)
            self._pull(ids, at)
        while self._pulled and self._pulled[0][0] <= now:
            self._keep(self._pulled.popleft()[1])

    def _pull(self, ids: tuple[int, ...], at: float) -> None:
        """Begins to pull what is not held. All of a put is dropped if it would come too late, or if flash is
        behind by as much as may be dirty."""
        new = [id for id in ids if id not in self.memory and id not in self.flash]
        nbytes = len(new) * self._setup.block_bytes
        late = self.into.ends(at, nbytes) > at + self._setup.deadline
        behind = (self.write.free - at) * self.write.bandwidth > self._dirty
        if not self._instant and (late or (self.flash.capacity and behind)):
            self.dropped += len(new)
            return
        done = self.into.send(at, nbytes)
        if self.flash.capacity:
            self.write.send(at, nbytes)
        self._pulled.append((at if self._instant else done, new))

    def _keep(self, ids: list[int]) -> None:
        for id in reversed(ids):  # of blocks put together, those at the end go first
            self.memory.add(id)
            if self.flash.capacity:
                self.flash.add(id)

    def plan(self, ids: Sequence[int], now: float, counted: int | None = None) -> Plan:
        """What is held of these blocks without a gap, and in time; nothing changes. ``counted``: so many are
        held, as a real replay found; the model only says in which tier."""
        plan = Plan(ready=now)
        memory, flash = self.memory, self.flash
        for id in ids[:counted]:
            if id in memory:
                plan.memory.append(id)
            elif id in flash or counted is not None:
                plan.flash.append(id)
            else:
                break
        if not self._instant:
            self._cut(plan, ids, now)
            plan.ready = self._ready(plan, now)
        return plan

    def _ready(self, plan: Plan, now: float) -> float:
        size = self._setup.block_bytes
        asked = now + self._setup.lookup
        if not len(plan):
            return asked
        read = asked
        if plan.flash:
            read = self.read.ends(asked, len(plan.flash) * size) + self._setup.flash_latency
        return max(read, self.out.ends(asked, len(plan) * size))

    def _cut(self, plan: Plan, ids: Sequence[int], now: float) -> None:
        """Leaves out what would come after the deadline: it is recomputed, as after a miss."""
        late = now + self._setup.lookup + self._setup.deadline
        while len(plan) and self._ready(plan, now) > late:
            last = ids[len(plan) - 1]
            (plan.flash if plan.flash and plan.flash[-1] == last else plan.memory).pop()

    def get(self, plan: Plan, now: float) -> float:
        """Fetches what was planned, and says when it is there."""
        size = self._setup.block_bytes
        for id in plan.memory:
            self.memory.touch(id)
        for id in plan.flash:
            self.flash.add(id)
            self.memory.add(id)
        if self._instant:
            return now
        ready = self._ready(plan, now)
        self.read.send(now + self._setup.lookup, len(plan.flash) * size)
        self.out.send(now + self._setup.lookup, len(plan) * size)
        return ready

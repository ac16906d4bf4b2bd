"""The command restart: what a node needs to find its blocks on flash again, after a clean stop and after
SIGKILL.

A node that stopped in order has left a snapshot; one that was killed reads the header of every extent, while
it serves already. Times are from the start of its process, Python included, and so a row tells how long an
empty node takes.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..peer import Peer
from ..rdma.errors import LocalError, MemKVError
from ..rdma.memory import HostMemory
from ..status import FIRST_ERROR, Status
from . import pattern
from .cluster import NodeProcess, Wish, arena_bytes, extent_bytes
from .flash_rig import FlashRig, FlashStats, room
from .lanes import TIMEOUT
from .report import Row, Steps
from .rig import heading, open_peer
from .sample import GOOD_PUT, Plan, Sample, Statuses

FIND_SECONDS = 600.0
LOOK_SECONDS = 0.002  # between two looks for what is still missing
ASKED = 16384  # keys of one look
NOTES = (
    "Seconds from the start of the process: until it serves, until the first hit, until all are found;",
    "medians over rounds. empty: a store without blocks. stop: of the node before, SIGTERM or SIGKILL.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command's options; sizes in bytes, ``memory`` 0 for a part of the blocks."""

    wish: Wish
    flash: str
    force: bool
    memory: int
    size: int
    blocks: int
    batch: int
    rounds: int
    verify: bool


@dataclass(slots=True)
class Times:
    """Of one way to stop and start, round by round, in seconds."""

    what: str
    stop: list[float] = field(default_factory=list)
    serves: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    outcome: Sample = field(default_factory=Sample)

    def row(self, settings: Settings, blocks: int) -> Row:
        row = Row(what=self.what, size=settings.size)
        row.hits, row.misses = self.outcome.hits, self.outcome.misses
        row.errors = self.outcome.errors + self.outcome.wrong + self.outcome.misses
        row.note = self.outcome.first_error
        if self.outcome.misses:
            row.note = f"{self.outcome.misses} blocks that were durable are gone"
        if self.outcome.wrong:
            row.note = f"{self.outcome.wrong} blocks with wrong bytes"
        row.extra["blocks"] = blocks
        for name in ("stop", "serves", "first", "found"):
            times: list[float] = getattr(self, name)
            row.extra[f"{name}_s"] = median(times) if times else None
        return row


def run(settings: Settings) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes."""
    if settings.wish.nodes:
        raise LocalError("nodes that exist are not stopped for a benchmark", "leave --nodes out")
    salt = secrets.token_hex(4)
    plan = Plan(
        size=settings.size, batch=settings.batch, blocks=settings.blocks, verify=settings.verify, salt=salt
    )
    least = room(settings.blocks, settings.size)
    with Steps() as steps, FlashRig(settings.flash, least, force=settings.force, steps=steps) as store:
        bench = _Restart(settings, plan, store, steps)
        try:
            bench.run()
        finally:
            bench.close()
    blocks = [0, plan.blocks, plan.blocks]
    rows = [times.row(settings, n) for times, n in zip(bench.times, blocks, strict=True)]
    return bench.head, rows, list(NOTES)


class _Restart:
    def __init__(self, settings: Settings, plan: Plan, store: FlashRig, steps: Steps) -> None:
        self.settings, self.plan, self.store, self.steps = settings, plan, store, steps
        self.memory = settings.memory or max(
            arena_bytes(4 * settings.batch, settings.size), plan.blocks * extent_bytes(settings.size) // 8
        )
        self.keys = plan.keys(0, plan.blocks)
        self.times = [Times("empty"), Times("snapshot"), Times("scan")]
        self.head: dict[str, Any] = {}
        self.node: NodeProcess | None = None
        self.places = HostMemory(plan.batch * plan.size)
        self.rows = self.places.array[: plan.batch * plan.size].reshape(plan.batch, plan.size)
        self._common = pattern.ramp(plan.size)

    def run(self) -> None:
        empty, snapshot, scan = self.times
        for _ in range(self.settings.rounds):
            self.steps.now("starting without blocks")
            empty.serves.append(self._start().start_seconds)
            empty.stop.append(self._node.stop())
        self._start()
        self._fill()
        self.steps.add(2 * self.settings.rounds)
        for _ in range(self.settings.rounds):
            for times, kill in ((snapshot, False), (scan, True)):
                self.steps.now(f"starting by {times.what}")
                times.stop.append(self._node.kill() if kill else self._node.stop())
                began = time.monotonic()
                self._start()
                self._find(times, began)
                self.steps.done()

    @property
    def _node(self) -> NodeProcess:
        assert self.node is not None
        return self.node

    def _start(self) -> NodeProcess:
        self.close()
        wish, size = self.settings.wish, self.plan.size
        self.node = NodeProcess(wish, self.memory, size, self.store.flags)
        return self.node

    def _peer(self) -> Peer:
        return open_peer(
            [self._node.address], self.settings.wish, f"restart-{self.plan.salt}", self.plan.size, channels=2
        )

    def _fill(self) -> None:
        self.steps.now(f"putting {self.plan.blocks} blocks")
        peer, sample = self._peer(), Sample()
        try:
            self.head = heading(peer, self.places) | self.store.heading() | FlashStats(peer).heading()
            slices = peer.register(self.places.array).split(self.plan.size)
            for i in range(0, self.plan.blocks, self.plan.batch):
                keys = self.keys[i : i + self.plan.batch]
                n = len(keys)
                pattern.fill(self.rows[:n], keys, self._common)
                status = peer.put_from(keys, slices[:n], timeout=TIMEOUT, durability="flash")
                sample.judge(status, GOOD_PUT)
        finally:
            peer.close()
        if sample.hits < self.plan.blocks:
            failed = self.plan.blocks - sample.hits
            raise MemKVError(f"{failed} of {self.plan.blocks} blocks could not be put: {sample.first_error}")

    def _find(self, times: Times, began: float) -> None:
        """The times since ``began``, and then every block, compared."""
        times.serves.append(self._node.start_seconds)
        peer = self._peer()
        try:
            slices = peer.register(self.places.array).split(self.plan.size)
            until = began + FIND_SECONDS
            some = self.keys[:1]
            while peer.get_into(some, slices[:1], timeout=TIMEOUT)[0] != Status.HIT:
                if time.monotonic() > until:
                    break
                some = self.keys[np.random.default_rng().integers(self.plan.blocks)][None]
                time.sleep(LOOK_SECONDS)
            times.first.append(time.monotonic() - began)
            left = self.keys
            while len(left := left[_missing(peer, left)]) and time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
            times.found.append(time.monotonic() - began)
            times.outcome.add(self._everything(peer, slices))
        finally:
            peer.close()

    def _everything(self, peer: Peer, slices: Any) -> Sample:
        sample = Sample()
        for i in range(0, self.plan.blocks, self.plan.batch):
            keys = self.keys[i : i + self.plan.batch]
            n = len(keys)
            self.rows[:n, ::8] = 0
            status: Statuses = peer.get_into(keys, slices[:n], timeout=TIMEOUT)
            sample.judge(status, (Status.HIT,))
            if self.plan.verify:
                bad = pattern.wrong(self.rows[:n], keys, self._common)
                sample.wrong += int((bad & (status == Status.HIT)).sum())
        return sample

    def close(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None


def _missing(peer: Peer, keys: Any) -> Any:
    """(n,) of those that the node does not know (yet)."""
    parts = [peer.exists(keys[i : i + ASKED], timeout=TIMEOUT) for i in range(0, len(keys), ASKED)]
    status = np.concatenate(parts)
    if (status >= FIRST_ERROR).all():
        raise MemKVError("the node does not answer any more")
    return status != Status.HIT

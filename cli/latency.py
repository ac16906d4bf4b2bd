"""The command latency: one block at a time, inside the C call and from Python, what Python adds to a call,
and what a get costs the processor (:mod:`memkv.cli.cpu`).

"In C" is from the job's start to its end, as the job itself notes them: submitting, READs, checking. It is
taken twice: back to back in a loop in C, as perftest and the bare loop take theirs, and *apart*, of calls
from Python, between which the processor forgets some and the device falls asleep. "From Python" is the whole
call of ``get_into``; what is above its time in C is what Python adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..batches import Batch, Parts
from ..channels import ReadChannel
from ..native import _peer
from ..peer import Peer
from ..rdma.devices import Selection
from ..rdma.errors import MemKVError
from ..rdma.native import _rdma
from ..session import Session
from ..status import FIRST_ERROR, Status
from . import cpu, pattern, perftest
from .cluster import Wish
from .compare import median_ratio
from .lanes import TIMEOUT, Lane
from .limits import Limit
from .report import Row, Steps
from .rig import LimitHolder, Options, Rig, heading, open_nodes, rail
from .sample import Keys

_RUN_ONE = _rdma.ffi.addressof(_rdma.lib, "mkv_run_one")
BATCHES = (1, 64, 1024)  # for what Python adds
NOTES = (
    "µs of one call, in C, back to back; ratio: p50 to the bare loop's in the same round, median of rounds.",
    "apart p50: in C too, of calls from Python; python p50: the whole of such a call.",
    "python adds: whole call less its time in C, medians of each batch size.",
    "cpu: of the thread that gets, by getrusage; user time is ours, C and Python. Waiting is asleep here.",
)


class TimedBatch(Batch):
    """A batch that notes how long its jobs were in C (with several nodes: the longest)."""

    __slots__ = ("good", "in_c_ns", "repeats")

    def __init__(self, keys: Keys, slices: Any, *, fresh: bool = False, repeats: int = 0) -> None:
        super().__init__(keys, slices, False, fresh)
        self.in_c_ns = 0
        self.repeats = np.zeros(repeats, np.uint64)  # ns of calls back to back, before the one that counts
        self.good = 0  # of these

    def load(self, session: Session, channel: ReadChannel, index: Any, timeout: float) -> Any:
        job = super().load(session, channel, index, timeout)
        if len(self.repeats):
            run_one = _peer.ffi.cast("void *", int(_rdma.ffi.cast("uintptr_t", _RUN_ONE)))
            out = _peer.ffi.from_buffer("uint64_t[]", self.repeats)
            self.good = _peer.lib.mkv_getjob_repeat(job, run_one, int(timeout * 1e9), len(out), out)
            channel.start(timeout)
        return job

    def unload(self, unknown: Parts, cold: Parts) -> None:
        jobs = [channel.job.job for _, channel, _ in self.under_way]
        self.in_c_ns += max((int(job.ended_ns) - int(job.started_ns) for job in jobs), default=0)
        super().unload(unknown, cold)


@dataclass(slots=True)
class Calls:
    """Times of one kind of call, round by round, in µs: back to back, in C, and from Python."""

    what: str
    batch: int = 1
    fresh: bool = False
    loop: list[list[float]] = field(default_factory=list)
    in_c: list[list[float]] = field(default_factory=list)
    whole: list[list[float]] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    errors: int = 0

    def back_to_back(self, peer: Peer, lane: Lane, count: int) -> None:
        """A round of ``count`` calls in a loop in C, of one block after the other."""
        times: list[float] = []
        n = len(lane.keys)
        each = min(count, 50)
        for i in range(count // each):
            part = slice(i % n, i % n + 1)
            batch = TimedBatch(lane.keys[part], lane.slices[part], fresh=self.fresh, repeats=each)
            peer._gets.run(batch, TIMEOUT)
            times += (batch.repeats / 1000).tolist()
            self.hits += batch.good
            self.errors += each - batch.good
        self.loop.append(times)

    def add(self, peer: Peer, lane: Lane, count: int) -> None:
        """A round of ``count`` calls. The bytes are compared after the round, once."""
        in_c, whole = [], []
        size, n = lane.plan.size, len(lane.keys)
        common = pattern.ramp(size)
        lane.rows[:] = 0
        last = (0, np.zeros(0, np.uint8))
        for i in range(count):
            at = i * self.batch % max(1, n - self.batch + 1)
            keys, slices = lane.keys[at : at + self.batch], lane.slices[at : at + self.batch]
            before = time.perf_counter_ns()
            batch = TimedBatch(keys, slices, fresh=self.fresh)
            peer._gets.run(batch, TIMEOUT)
            whole.append((time.perf_counter_ns() - before) / 1000)
            in_c.append(batch.in_c_ns / 1000)
            hits = int((batch.status == Status.HIT).sum())
            bad = int((batch.status >= FIRST_ERROR).sum())
            self.hits += hits
            self.errors += bad
            self.misses += len(keys) - hits - bad
            last = (at, batch.status)
        self.in_c.append(in_c)
        self.whole.append(whole)
        if lane.plan.verify:
            at, status = last
            part = slice(at, at + len(status))
            bad_bytes = pattern.wrong(lane.rows[part], lane.keys[part], common)
            self.errors += int((bad_bytes & (status == Status.HIT)).sum())


def run(
    wish: Wish, memory: int, size: int, calls: int, rounds: int, cpu_seconds: float
) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes."""
    blocks = max(BATCHES)
    options = Options(
        wish=wish,
        sizes=(size,),
        working_set=blocks * size,
        batch=64,
        seconds=1.0,
        rounds=rounds,
        memory=memory,
    )
    each = max(2, calls // rounds)
    with Steps(3 * rounds) as steps, LimitHolder(options) as holder:
        steps.now("starting")
        with open_nodes(options, size) as nodes, Rig(nodes, options, size) as rig:
            head = heading(rig.peer, rig.load.lanes[0].memory)
            limit = holder.open(rig.peer)
            rig.prepare()
            bare = _bare(limit, size, each)
            device = rail(rig.peer)
            cached, cold = Calls("get cached"), Calls("get cold", fresh=True)
            adds = [Calls(f"python adds to {n}", batch=n) for n in BATCHES]
            costs = [cpu.Cost(n) for n in cpu.BATCHES]
            bares: list[list[float]] = []
            tools: list[perftest.Outcome] = []
            lane = rig.load.lanes[0]
            for _ in range(rounds):
                steps.now("one block at a time")
                bares.append(bare())
                if device is not None and not (tools and tools[-1].value is None):
                    tools.append(_tool(device, size, each))
                for kind in (cached, cold):
                    kind.back_to_back(rig.peer, lane, each)
                    kind.add(rig.peer, lane, each)
                steps.done()
            for _ in range(rounds):
                steps.now("what Python adds")
                for kind in adds:
                    kind.add(rig.peer, lane, max(2, each // (1 if kind.batch == 1 else 4)))
                steps.done()
            with cpu.asleep():
                for _ in range(rounds):
                    steps.now("processor time")
                    for cost in costs:
                        cost.add(rig.peer, lane, cpu_seconds / rounds)
                    steps.done()
            rig.clean()
    rows = _rows(limit.what, size, bares, tools, [cached, cold])
    rows += [_added(size, kind) for kind in adds]
    rows += cpu.rows(size, costs)
    return head, rows, list(NOTES)


def _bare(limit: Limit, size: int, count: int) -> Callable[[], list[float]]:
    """Single blocks, spinning or sleeping, whichever is quicker here."""

    def once(events: bool) -> list[float]:
        return [ns / 1000 for ns in limit.latency(size, count, events=events).tolist()]

    events = min((False, True), key=lambda e: min(median(once(e)) for _ in range(2)))
    return lambda: once(events)


def _tool(device: Selection, size: int, count: int) -> perftest.Outcome:
    try:
        return perftest.read_latency(device, size, count)
    except OSError as error:
        raise MemKVError(f"ib_read_lat cannot be run: {error.strerror}") from None


def _flat(rounds: list[list[float]]) -> Any:
    return np.array([t for r in rounds for t in r])


def _rows(
    limit: str, size: int, bares: list[list[float]], tools: list[perftest.Outcome], kinds: list[Calls]
) -> list[Row]:
    rows: list[Row] = []
    limits = [median(r) for r in bares]
    tool = [t.value for t in tools if t.value is not None]
    if bares:
        rows.append(Row(what=limit, size=size, batch=1, times_us=_flat(bares), ratio=1.0))
    if tools:
        row = Row(what="ib_read_lat", size=size, batch=1, note=tools[-1].note)
        if tool:
            row.given_us["p50_us"] = median(tool)
            row.given_us["p99_us"] = median(t.p99_us for t in tools if t.p99_us is not None)
            row.note = "its typical time and 99 %, medians over rounds"
            row.ratio = median_ratio(tool, limits)
        rows.append(row)
    for kind in kinds:
        p50s = [median(r) for r in kind.loop]
        row = Row(
            what=kind.what, size=size, batch=1, times_us=_flat(kind.loop), ratio=median_ratio(p50s, limits)
        )
        row.hits, row.misses, row.errors = kind.hits, kind.misses, kind.errors
        row.extra["apart_p50_us"] = median(_flat(kind.in_c).tolist())
        row.extra["python_p50_us"] = median(_flat(kind.whole).tolist())
        if tool and len(tool) == len(p50s):
            row.extra["perftest_ratio"] = median_ratio(p50s, tool)
        rows.append(row)
    return rows


def _added(size: int, kind: Calls) -> Row:
    added = [
        w - c
        for whole, in_c in zip(kind.whole, kind.in_c, strict=True)
        for w, c in zip(whole, in_c, strict=True)
    ]
    row = Row(what=kind.what, size=size, batch=kind.batch, times_us=np.array(added))
    row.hits, row.misses, row.errors = kind.hits, kind.misses, kind.errors
    return row

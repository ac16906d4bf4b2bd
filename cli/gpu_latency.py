"""The command latency with blocks on a GPU: whole calls of get_into and put_from, one block at a time.

What a call takes within C means little here: a staged block takes turns of the fabric, the copy engine and
the control thread. So whole calls are timed, for blocks on the GPU and beside them in host memory.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..status import FIRST_ERROR
from .bench_options import Memories
from .cluster import Wish
from .compare import median_ratio
from .lanes import TIMEOUT, Lane
from .report import Row, Steps
from .rig import Options, Rig, heading, open_nodes
from .sample import GOOD_GET, GOOD_PUT

BLOCKS = 64
NOTES = (
    "µs of one call from Python, of one block; ratio: p50 to that of host memory in the same round, median.",
)


class Calls:
    """Times of one kind of call, round by round, in µs."""

    def __init__(self, what: str, lane: Lane, put: bool) -> None:
        self.what, self.lane, self.put = what, lane, put
        self.rounds: list[list[float]] = []
        self.hits = self.misses = self.errors = 0

    def add(self, count: int) -> None:
        """A round of ``count`` calls; blocks that were put are deleted after each, not timed."""
        lane, times = self.lane, []
        peer = lane.peer
        for i in range(count):
            at = slice(i % len(lane.keys), i % len(lane.keys) + 1)
            keys, slices = lane._new(1) if self.put else lane.keys[at], lane.slices[at]
            call = peer.put_from if self.put else peer.get_into
            start = time.perf_counter_ns()
            status = call(keys, slices, timeout=TIMEOUT)
            times.append((time.perf_counter_ns() - start) / 1000)
            good = int(np.isin(status, GOOD_PUT if self.put else GOOD_GET).sum())
            self.hits += good
            self.errors += int((status >= FIRST_ERROR).sum())
            self.misses += int(not good and status[0] < FIRST_ERROR)
            if self.put:
                peer.delete(keys, timeout=TIMEOUT)
        self.rounds.append(times)
        if lane.plan.verify and not self.put:
            self.errors += lane.wrong_rows(min(count, len(lane.keys)))

    def row(self, size: int, beside: Calls) -> Row:
        medians = [[float(np.median(r)) for r in c.rounds] for c in (self, beside)]
        times = np.array([t for r in self.rounds for t in r])
        row = Row(what=self.what, size=size, batch=1, times_us=times, ratio=median_ratio(*medians))
        row.hits, row.misses, row.errors = self.hits, self.misses, self.errors
        return row


def run(
    wish: Wish, memory: Memories, size: int, calls: int, rounds: int
) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes."""
    common: dict[str, Any] = {"wish": wish, "sizes": (size,), "batch": 1, "seconds": 1.0, "rounds": rounds}
    options = Options(**common, working_set=BLOCKS * size, memory=memory.arena, gpu=memory.gpu)
    each = max(2, calls // rounds)
    with Steps(4 * rounds) as steps, open_nodes(options, size) as nodes, Rig(nodes, options, size) as rig:
        steps.now("starting")
        rig.prepare()
        lane = rig.load.lanes[0]
        host = Lane(rig.peer, options.plan(size, rig.plan.salt, gpu=""), 1, lane.keys)
        try:
            kinds = [
                (Calls("get, host memory", host, False), Calls(f"get, {memory.gpu}", lane, False)),
                (Calls("put, host memory", host, True), Calls(f"put, {memory.gpu}", lane, True)),
            ]
            for _ in range(rounds):
                for kind in (k for pair in kinds for k in pair):
                    steps.now(kind.what)
                    kind.add(each)
                    steps.done()
            head = heading(rig.peer, lane.memory) | lane.heading()
        finally:
            host.close()
        rig.clean()
    return head, [kind.row(size, pair[0]) for pair in kinds for kind in pair], list(NOTES)

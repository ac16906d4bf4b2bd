"""What a replay says: its rows, beside short runs of the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..peer import Peer
from ..rdma.memory import HostMemory
from . import perftest, trace
from .cluster import Nodes, Usage, Wish
from .limits import open_limit
from .replay_player import Outcome
from .report import Row
from .rig import open_peer, rail
from .sample import Sample

LIMIT_BYTES = 32 << 20  # moved by one run of the limit


@dataclass(slots=True)
class Again:
    """Getting everything once more, and what the own nodes used in that time and in as long an idle one."""

    sample: Sample
    seconds: float
    busy: Usage | None
    idle: Usage | None
    warm_hits: int  # of the pass before, which is not timed


class Limits:
    """Short runs of the limit, before and after: ib_read_bw over verbs, else (and without perftest) the bare
    loop."""

    def __init__(self, nodes: Nodes, wish: Wish, block_bytes: int, salt: str) -> None:
        self.figures: list[float] = []
        self.what, self.note = "", ""
        self._size = block_bytes
        self._memory = HostMemory(max(LIMIT_BYTES, self._size))
        self._memory.array[:] = 1
        peer: Peer = open_peer(nodes.addresses, wish, f"replay-{salt}", self._size, channels=1)
        try:
            assert peer.fabric is not None
            self._rail, fabric = rail(peer), peer.fabric.name
            self._limit = None
            if self._rail is not None:
                self.what, self.note = "ib_read_bw", perftest.available("ib_read_bw")
            if not self.what or self.note:
                self._limit = open_limit(fabric, self._memory.nbytes, self._memory, self._rail)
                self._limit.calibrate(self._size)
                self.what = self._limit.what
        finally:
            peer.close()

    def measure(self) -> None:
        """A run more."""
        if self._limit is not None:
            self.figures += [self._limit.gbps(self._size, LIMIT_BYTES) for _ in range(3)]
            return
        assert self._rail is not None
        outcome = perftest.read_bandwidth(self._rail, self._size, LIMIT_BYTES // self._size)
        if outcome.value is not None:
            self.figures.append(outcome.value)
        self.note = outcome.note

    @property
    def gbps(self) -> float | None:
        """The mean of all runs."""
        return float(np.mean(self.figures)) if self.figures else None

    def close(self) -> None:
        """No run any more."""
        if self._limit is not None:
            self._limit.close()


def rows(
    requests: Sequence[trace.Request],
    outcomes: Sequence[Outcome],
    due: trace.Summary,
    again: Again,
    limits: Limits,
    size: int,
) -> list[Row]:
    """All of them, the totals first."""
    held = sum(o.held for o in outcomes)
    unexpected = _unexpected(requests, outcomes)
    totals = Row(what="replay", size=size, hits=held, misses=due.references - held, errors=unexpected)
    if unexpected:
        totals.note = (
            f"{unexpected} requests found something else than the trace implies: was --memory too little?"
        )
    gets, puts = Sample(), Sample()
    for o in outcomes:
        gets.add(o.get)
        puts.add(o.put)
    saved = sum(trace.saved_tokens(r, o.held) for r, o in zip(requests, outcomes, strict=True))
    totals.extra = {
        "requests": due.requests,
        "references": due.references,
        "distinct": due.distinct,
        "hit_ratio": held / max(1, due.references),
        "expected_hits": due.hits,
        "prefill_tokens_saved": saved,
        "bytes_got": gets.nbytes,
        "bytes_put": puts.nbytes,
        "mismatches": gets.wrong + again.sample.wrong,
    }
    out = [
        totals,
        Row(what="match", times_us=np.array([o.match_us for o in outcomes])),
        _sample_row("get", size, gets, limits),
        _sample_row("put", size, puts, limits),
        _sample_row("get everything", size, again.sample, limits),
        Row(what=limits.what, size=size, gbps=limits.gbps, note=limits.note or "before and after, mean"),
    ]
    if again.busy is not None and again.idle is not None:
        out.append(_cpu_row(again, again.busy, again.idle))
    return out


def _unexpected(requests: Sequence[trace.Request], outcomes: Sequence[Outcome]) -> int:
    """Requests whose hits are not those that the trace implies."""
    known: set[int] = set()
    count = 0
    for request, outcome in zip(requests, outcomes, strict=True):
        count += outcome.held != trace.prefix(request.ids, known)
        known.update(request.ids)
    return count


def _sample_row(what: str, size: int, sample: Sample, limits: Limits) -> Row:
    row = Row(
        what=what, size=size, hits=sample.hits, misses=sample.misses, errors=sample.errors + sample.wrong
    )
    row.times_us = np.array(sample.times_us)
    row.gbps = sample.gbps if sample.ns else None
    row.limit_gbps = limits.gbps
    if row.gbps is not None and limits.gbps:
        row.ratio = row.gbps / limits.gbps
    row.note = f"{sample.wrong} blocks with wrong bytes" if sample.wrong else sample.first_error
    return row


def _cpu_row(again: Again, busy: Usage, idle: Usage) -> Row:
    more, blocks = busy - idle, max(1, again.sample.hits)
    row = Row(what="node, get everything", note=f"in {again.seconds:.1f} s each, busy and idle")
    row.extra = {
        "cpu_s": busy.cpu_s,
        "cpu_s_idle": idle.cpu_s,
        "cpu_us_per_get": more.cpu_s * 1e6 / blocks,
        "switches": busy.switches,
        "switches_idle": idle.switches,
        "switches_per_get": more.switches / blocks,
    }
    return row


def by_tier(row: Row, hits: int, staged: int, size: int) -> None:
    """Divides a row's hits; a block staged for nobody any more counts for none."""
    flash = min(hits, staged)
    row.extra |= {
        "hits_memory": hits - flash,
        "hits_flash": flash,
        "bytes_memory": (hits - flash) * size,
        "bytes_flash": flash * size,
    }

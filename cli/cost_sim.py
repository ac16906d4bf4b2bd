"""The simulation: requests come, wait for a replica, are prefilled and decoded; who computes what, and when.

Each replica carries out prefills one after another in the order in which requests were given to it, at full
speed; between them it decodes (docs/costs.md says what that leaves out). So every time follows from those
before, and one pass over the trace is the whole simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .cost_caches import Lru
from .cost_setup import Setup
from .cost_store import Plan, Store
from .cost_work import Work
from .trace import BLOCK_TOKENS

Array = npt.NDArray[np.float64]
TIERS = ("hbm", "host", "memory", "flash")


@dataclass(slots=True, kw_only=True)
class Result:
    """What a case came to. Seconds, of replicas where they are busy; shares are of all replicas' time while
    requests come."""

    case: str
    load: float
    ttft: Array  # of each request
    hits: dict[str, int]  # blocks by tier
    blocks: int
    cached_tokens: int
    input_tokens: int
    output_tokens: int
    seconds: float  # that requests come
    prefill: float  # of all requests
    recompute: float  # of it, for blocks that an earlier prompt had
    decode: float
    busy: float  # share
    busy_prefill: float
    left: float  # work that is left at the end
    links: dict[str, float] = field(default_factory=dict)  # shares of memkv's
    dropped: int = 0  # blocks whose put found flash too far behind
    put_bytes: int = 0


@dataclass(slots=True)
class _Replica:
    """Its caches, and its time: prefills up to ``free``; decode work that waits for gaps."""

    hbm: Lru
    host: Lru
    free: float = 0.0
    debt: float = 0.0
    prefill: float = 0.0  # within the trace's time
    decoded: float = 0.0
    host_free: float = 0.0  # of its link to host memory

    def prefill_from(self, start: float, seconds: float, until: float) -> float:
        """Decodes in the gap before ``start``, then prefills; says when that ends."""
        self.decode(start, until)
        end = self.free = start + seconds
        self.prefill += max(0.0, min(end, until) - min(start, until))
        return end

    def decode(self, start: float, until: float) -> None:
        """Decodes from the last prefill's end on."""
        done = min(self.debt, max(0.0, min(start, until) - self.free))
        self.debt -= done
        self.decoded += done


@dataclass(slots=True)
class _Way:
    """How a replica would carry out a request."""

    replica: _Replica
    hbm: int
    host: int
    plan: Plan
    seconds: float  # of prefill
    start: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


def simulate(
    work: Work,
    setup: Setup,
    case: str,
    *,
    load: float = 1.0,
    instant: bool = False,
    held: Sequence[int] | None = None,
) -> Result:
    """Plays the trace.

    :param case: of ``cost_setup.CASES``.
    :param load: so many times as many requests in a time.
    :param instant: memkv's puts are visible at once and its links take no time: hits are those of a replay,
        which carries out one request after the other.
    :param held: leading blocks that each request found in memkv, where a real replay counted them.
    """
    return _Simulation(work, setup, case, load, instant, held).run()


class _Simulation:
    def __init__(
        self, work: Work, setup: Setup, case: str, load: float, instant: bool, held: Sequence[int] | None
    ) -> None:
        self._work, self._setup, self._case, self._load = work, setup, case, load
        self._held = held
        hbm = setup.blocks(setup.hbm_kv) if case != "none" else 0
        host = setup.blocks(setup.host_memory) if case == "host" else 0
        self._replicas = [_Replica(Lru(hbm), Lru(host)) for _ in range(setup.replicas)]
        self._store = Store(setup, instant=instant) if case == "memkv" else None
        self._until = work.seconds / load
        self._hits = dict.fromkeys(TIERS, 0)
        self._cached = 0
        self._prefill = self._recompute = self._decode = 0.0

    def run(self) -> Result:
        ttft = np.empty(len(self._work))
        for i, arrival in enumerate(self._work.arrivals):
            now = arrival / self._load
            if self._store is not None:
                self._store.settle(now)
            ttft[i] = self._carry_out(i, self._choose(i, now), now) - now
        return self._result(ttft)

    def _choose(self, i: int, now: float) -> _Way:
        if self._setup.routing == "round-robin":
            return self._way(i, self._replicas[i % len(self._replicas)], now)
        ways = [self._way(i, replica, now) for replica in self._replicas]
        return min(ways, key=lambda way: way.end)  # the first of equals

    def _way(self, i: int, replica: _Replica, now: float) -> _Way:
        """Looks a request up as a replica and memkv hold its blocks now; nothing changes."""
        ids, setup = self._work.ids[i], self._setup
        hbm = replica.hbm.leading(ids)
        host = replica.host.leading(ids[hbm:]) if replica.host.capacity else 0
        known = hbm + host
        plan, ready = Plan(), now
        if host:
            ready = max(now, replica.host_free) + host * setup.block_bytes / setup.host_bandwidth
        if self._store is not None:
            counted = None if self._held is None else max(0, self._held[i] - known)
            plan = self._store.plan(ids[known:], now, counted)
            known, ready = known + len(plan), plan.ready
        tokens, cached = self._tokens(i, known)
        start = max(now, replica.free, ready)
        return _Way(replica, hbm, host, plan, setup.prefill_seconds(tokens, cached), start)

    def _tokens(self, i: int, known: int) -> tuple[int, int]:
        """To be computed and cached. The last token is always computed: the answer begins with it."""
        total = self._work.tokens[i]
        cached = max(0, min(known * BLOCK_TOKENS, total - 1))
        return total - cached, cached

    def _carry_out(self, i: int, way: _Way, now: float) -> float:
        """Moves blocks, lets time pass, and says when the first token is there."""
        ids, setup, replica = self._work.ids[i], self._setup, way.replica
        if way.host:
            begin = max(now, replica.host_free)
            replica.host_free = begin + way.host * setup.block_bytes / setup.host_bandwidth
        if self._store is not None:
            self._store.get(way.plan, now)
        end = replica.prefill_from(way.start, way.seconds, self._until)
        decode = setup.decode_seconds(self._work.tokens[i], self._work.outputs[i])
        replica.debt += decode
        known = way.hbm + way.host + len(way.plan)
        for cache in (replica.hbm, replica.host):
            if cache.capacity:
                cache.use(reversed(ids))  # the prompt's end goes first: alone it is worth nothing
        if self._store is not None and known < len(ids):
            self._store.put(ids[known:], end)
        self._count(i, way, known, decode)
        return end

    def _count(self, i: int, way: _Way, known: int, decode: float) -> None:
        counts = (way.hbm, way.host, len(way.plan.memory), len(way.plan.flash))
        for tier, n in zip(TIERS, counts, strict=True):
            self._hits[tier] += n
        self._cached += self._tokens(i, known)[1]
        self._prefill += way.seconds
        self._decode += decode
        if known < self._work.due[i]:
            self._recompute += way.seconds - self._setup.prefill_seconds(*self._tokens(i, self._work.due[i]))

    def _result(self, ttft: Array) -> Result:
        work, until = self._work, self._until
        for replica in self._replicas:
            replica.decode(until, until)
        capacity = until * len(self._replicas)
        prefill = sum(replica.prefill for replica in self._replicas)
        decoded = sum(replica.decoded for replica in self._replicas)
        result = Result(
            case=self._case,
            load=self._load,
            ttft=ttft,
            hits=self._hits,
            blocks=sum(map(len, work.ids)),
            cached_tokens=self._cached,
            input_tokens=sum(work.tokens),
            output_tokens=sum(work.outputs),
            seconds=until,
            prefill=self._prefill,
            recompute=self._recompute,
            decode=self._decode,
            busy=(prefill + decoded) / capacity,
            busy_prefill=prefill / capacity,
            left=self._prefill + self._decode - prefill - decoded,
        )
        if (store := self._store) is not None:
            store.settle(until)
            links = {"wire_out": store.out, "wire_in": store.into}
            links |= {"flash_read": store.read, "flash_write": store.write}
            result.links = {name: link.busy(until) for name, link in links.items()}
            result.dropped, result.put_bytes = store.dropped, store.into.nbytes
        return result

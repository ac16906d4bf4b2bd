"""The command replay: a trace of prompts, played by some peers against nodes, every byte of every hit
compared.

Requests are carried out one after another in the trace's order, the peers taking turns: request i is peer i
mod n's. So what is found does not depend on timing: if nothing is evicted, each request finds exactly the
leading blocks that were in any prompt before. Each request is three calls: ``match`` its keys, ``get`` what
is held, ``put`` the rest.

Afterwards everything is got once more by each peer's share, first to warm the location caches, then measured:
what that costs the nodes is their CPU time and context switches less those of as long a time in which nothing
is asked of them.

With ``--flash`` the nodes have little memory and keep the rest on flash; nothing is lost, so the same is due.
What the nodes have staged meanwhile says how many of the hits came from there.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..keys import KeySpace, keys_from_ids
from ..peer import Peer
from ..rdma.errors import LocalError, MemKVError
from ..rdma.memory import HostMemory
from . import pattern, perftest, trace
from .cluster import Child, Nodes, Usage, Wish, arena_bytes, extent_bytes, usage
from .flash_rig import FlashRig, FlashStats, room
from .lanes import TIMEOUT, clock
from .limits import open_limit
from .report import Row, Steps
from .rig import heading, open_peer, rail
from .sample import GOOD_GET, GOOD_PUT, Keys, Sample

GENERATED_REQUESTS = 120
AGAIN_SECONDS = 2.0  # at least so long everything is got again and again
LIMIT_BYTES = 32 << 20  # moved by one run of the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command's options; sizes in bytes, ``memory`` 0 for enough."""

    wish: Wish
    memory: int
    file: Path | None
    requests: int | None
    seed: int
    block_bytes: int
    peers: int
    nodes_count: int
    batch: int
    verify: bool
    flash: str = ""
    force: bool = False
    grace_ms: int = 1000  # of nodes with flash


@dataclass(slots=True)
class Outcome:
    """What one request came to. Times in µs, 0 where there was no such call."""

    held: int
    match_us: float
    get: Sample
    put: Sample


# --- a peer's process ---


class _Player:
    """A peer with a buffer for the longest prompt."""

    def __init__(
        self, addresses: Sequence[str], settings: Settings, salt: str, longest: int, distinct: int
    ) -> None:
        self.size, self.batch, self.verify = settings.block_bytes, settings.batch, settings.verify
        self.peer = open_peer(
            addresses, settings.wish, f"replay-{salt}", self.size, channels=2, cache=2 * distinct
        )
        places = max(longest, settings.batch)
        self.memory = HostMemory(places * self.size)
        self.rows = self.memory.array[: places * self.size].reshape(places, self.size)
        self.rows[:] = 0
        self.slices = self.peer.register(self.memory.array).split(self.size)
        self.common = pattern.ramp(self.size)
        self.salt = salt

    def keys(self, ids: Sequence[int]) -> Keys:
        space = KeySpace(
            model="memkv-replay", dtype="bytes", layout=str(self.size), block_tokens=512, salt=self.salt
        )
        return keys_from_ids(np.array(ids, np.uint64), space=space)

    def request(self, ids: Sequence[int]) -> Outcome:
        """Finds, gets and puts the blocks of a prompt."""
        keys = self.keys(ids)
        before = clock()
        held = self.peer.match(keys, timeout=TIMEOUT)
        outcome = Outcome(held, (clock() - before) / 1000, Sample(), Sample())
        if held:
            outcome.get = self._get(keys[:held])
        if held < len(keys):
            outcome.put = self._put(keys[held:])
        return outcome

    def _get(self, keys: Keys) -> Sample:
        n = len(keys)
        self.rows[:n, ::8] = 0  # what an earlier request left there is not right any more
        sample = Sample()
        start = clock()
        status = self.peer.get_into(keys, self.slices[:n], timeout=TIMEOUT)
        sample.ns = clock() - start
        sample.times_us.append(sample.ns / 1000)
        sample.judge(status, GOOD_GET)
        sample.nbytes = sample.hits * self.size
        if self.verify:
            sample.wrong = int(
                (pattern.wrong(self.rows[:n], keys, self.common) & np.isin(status, GOOD_GET)).sum()
            )
        return sample

    def _put(self, keys: Keys) -> Sample:
        n = len(keys)
        pattern.fill(self.rows[:n], keys, self.common)
        sample = Sample()
        start = clock()
        status = self.peer.put_from(keys, self.slices[:n], timeout=TIMEOUT)
        sample.ns = clock() - start
        sample.times_us.append(sample.ns / 1000)
        sample.judge(status, GOOD_PUT)
        sample.nbytes = sample.hits * self.size
        return sample

    def again(self, ids: Sequence[int]) -> Sample:
        """Gets many blocks, batch by batch."""
        total = Sample()
        for i in range(0, len(ids), self.batch):
            total.add(self._get(self.keys(ids[i : i + self.batch])))
        return total


def _play(pipe: Connection, *args: Any) -> None:
    player = _Player(*args)
    try:
        pipe.send(heading(player.peer, player.memory))
        while True:
            name, argument = pipe.recv()
            pipe.send(getattr(player, name)(argument))
    finally:
        player.peer.close()


# --- the benchmark ---


def run(settings: Settings) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes."""
    if settings.file is not None:
        requests = trace.read(settings.file, settings.requests)
        name = str(settings.file)
    else:
        requests = trace.generate(settings.requests or GENERATED_REQUESTS, seed=settings.seed)
        name = f"generated conversations, seed {settings.seed}"
    if not requests:
        raise MemKVError(f"{name}: no request", "--trace FILE")
    due = trace.summarise(requests)
    salt = secrets.token_hex(4)
    size = settings.block_bytes
    blocks = _share(due.distinct, settings.nodes_count)
    memory = settings.memory or arena_bytes(blocks, size)
    if settings.flash and not settings.memory:
        memory = max(blocks * extent_bytes(size) // 10, 2 * due.longest * extent_bytes(size), 16 << 20)
    if settings.flash and settings.wish.nodes:
        raise LocalError("nodes that exist have their own flash or none", "leave --nodes or --flash out")
    with Steps(len(requests)) as steps, contextlib.ExitStack() as stack:
        stores = [
            stack.enter_context(FlashRig(text, room(blocks, size), force=settings.force, steps=steps))
            for text in _flash_paths(settings)
        ]
        steps.now("starting")

        def more(number: int) -> Sequence[str]:
            grace = ["--grace-ms", str(settings.grace_ms)]
            return [*stores[number].flags, *grace] if stores else ()

        with Nodes(
            settings.wish, memory=memory, block_bytes=size, count=settings.nodes_count, more=more
        ) as nodes:
            args = (nodes.addresses, settings, salt, due.longest, due.distinct)
            players: list[Child] = []
            try:
                players.extend(Child(_play, *args) for _ in range(settings.peers))
                head = [player.ask() for player in players].pop()
                head |= {"trace": name, "nodes": len(nodes.addresses), "peers": settings.peers}
                limits = _Limits(nodes, settings, salt)
                tiers = _Tiers(nodes, settings, salt) if stores else None
                for store in stores:
                    head |= store.heading()
                if tiers:
                    head |= tiers.stats.heading() | {"grace": f"{settings.grace_ms} ms"}
                limits.measure()
                outcomes = _requests(requests, players, steps)
                staged = tiers.since() if tiers else None
                steps.add(3)
                again = _again(requests, players, nodes, steps)
                staged_again = tiers.since() if tiers else None
                limits.measure()
                limits.close()
                if tiers:
                    tiers.close()
            finally:
                for player in players:
                    player.close()
    rows = _rows(requests, outcomes, due, again, limits, size)
    if staged is not None and staged_again is not None:
        _by_tier(rows[0], sum(o.get.hits for o in outcomes), staged, size)
        everything = next(row for row in rows if row.what == "get everything")
        _by_tier(everything, (everything.hits or 0) + again.warm_hits, staged_again, size)
    return head, rows, _notes(settings)


def _flash_paths(settings: Settings) -> list[str]:
    """One for each own node: several get PATH.0, PATH.1, …"""
    if not settings.flash:
        return []
    if settings.nodes_count == 1:
        return [settings.flash]
    path, colon, size = settings.flash.rpartition(":")
    if not (colon and size[:1].isdigit()):
        path, colon, size = settings.flash, "", ""
    return [f"{path}.{i}{colon}{size}" for i in range(settings.nodes_count)]


class _Tiers:
    """Blocks that the nodes have brought from flash, from look to look."""

    def __init__(self, nodes: Nodes, settings: Settings, salt: str) -> None:
        self._peer = open_peer(
            nodes.addresses, settings.wish, f"replay-{salt}", settings.block_bytes, channels=1
        )
        self.stats = FlashStats(self._peer)
        self._seen = self.stats.read()["staged_blocks"]

    def since(self) -> int:
        """Blocks staged since the last call."""
        before, self._seen = self._seen, self.stats.read()["staged_blocks"]
        return self._seen - before

    def close(self) -> None:
        self._peer.close()


def _by_tier(row: Row, hits: int, staged: int, size: int) -> None:
    """Divides a row's hits; a block staged for nobody any more counts for none."""
    flash = min(hits, staged)
    row.extra |= {
        "hits_memory": hits - flash,
        "hits_flash": flash,
        "bytes_memory": (hits - flash) * size,
        "bytes_flash": flash * size,
    }


def _share(blocks: int, nodes: int) -> int:
    """Of one node: tags fall unevenly."""
    return blocks if nodes == 1 else blocks * 3 // (2 * nodes) + 64


def _requests(requests: Sequence[trace.Request], players: Sequence[Child], steps: Steps) -> list[Outcome]:
    steps.now("replaying")
    outcomes = []
    for i, request in enumerate(requests):
        outcomes.append(players[i % len(players)].ask(("request", request.ids), TIMEOUT * 3))
        steps.done()
    return outcomes


@dataclass(slots=True)
class _Again:
    """Getting everything once more, and what the own nodes used in that time and in as long an idle one."""

    sample: Sample
    seconds: float
    busy: Usage | None
    idle: Usage | None
    warm_hits: int  # of the pass before, which is not timed


def _again(requests: Sequence[trace.Request], players: Sequence[Child], nodes: Nodes, steps: Steps) -> _Again:
    known = list(dict.fromkeys(id for request in requests for id in request.ids))
    shares = [known[i :: len(players)] for i in range(len(players))]

    def everything() -> Sample:
        total = Sample()
        for player, share in zip(players, shares, strict=True):
            if share:
                total.add(player.ask(("again", share), 3600.0))
        return total

    def used() -> Usage:
        return sum((usage(node.pid) for node in nodes.own), Usage(0.0, 0))

    steps.now("getting everything once more, warming up")
    warm = everything()
    steps.done()
    steps.now("getting everything once more")
    sample = Sample()
    sample.count(warm, hits=False)
    start, before = time.monotonic(), used()
    while (seconds := time.monotonic() - start) < AGAIN_SECONDS and not sample.errors:
        sample.add(everything())
    busy = used() - before
    steps.done()
    steps.now("the nodes idle for as long")
    before = used()
    if nodes.own:
        time.sleep(seconds)
    idle = used() - before
    steps.done()
    own = bool(nodes.own)
    return _Again(sample, seconds, busy if own else None, idle if own else None, warm.hits)


class _Limits:
    """Short runs of the limit, before and after: ib_read_bw over verbs, else (and without perftest) the bare
    loop."""

    def __init__(self, nodes: Nodes, settings: Settings, salt: str) -> None:
        self.figures: list[float] = []
        self.what, self.note = "", ""
        self._size = settings.block_bytes
        self._memory = HostMemory(max(LIMIT_BYTES, self._size))
        self._memory.array[:] = 1
        peer: Peer = open_peer(nodes.addresses, settings.wish, f"replay-{salt}", self._size, channels=1)
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
        return float(np.mean(self.figures)) if self.figures else None

    def close(self) -> None:
        if self._limit is not None:
            self._limit.close()


def _rows(
    requests: Sequence[trace.Request],
    outcomes: Sequence[Outcome],
    due: trace.Summary,
    again: _Again,
    limits: _Limits,
    size: int,
) -> list[Row]:
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
    rows = [
        totals,
        Row(what="match", times_us=np.array([o.match_us for o in outcomes])),
        _sample_row("get", size, gets, limits),
        _sample_row("put", size, puts, limits),
        _sample_row("get everything", size, again.sample, limits),
        Row(what=limits.what, size=size, gbps=limits.gbps, note=limits.note or "before and after, mean"),
    ]
    if again.busy is not None and again.idle is not None:
        rows.append(_cpu_row(again, again.busy, again.idle))
    return rows


def _unexpected(requests: Sequence[trace.Request], outcomes: Sequence[Outcome]) -> int:
    """Requests whose hits are not those that the trace implies."""
    known: set[int] = set()
    count = 0
    for request, outcome in zip(requests, outcomes, strict=True):
        count += outcome.held != trace.prefix(request.ids, known)
        known.update(request.ids)
    return count


def _sample_row(what: str, size: int, sample: Sample, limits: _Limits) -> Row:
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


def _cpu_row(again: _Again, busy: Usage, idle: Usage) -> Row:
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


def _notes(settings: Settings) -> list[str]:
    notes = [
        "Requests one after another in the trace's order, peers taking turns; hits: leading blocks held.",
        "GB/s and µs: of the calls alone; ratio: to the limit, with blocks of the same size.",
    ]
    if settings.flash:
        notes.append("hits by tier: flash: brought from there for the get. get everything: both passes.")
    if settings.verify:
        notes.append("Every byte of every hit was compared with its key; mismatches must be 0.")
    return notes

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
from pathlib import Path
from typing import Any

from ..rdma.errors import LocalError, MemKVError
from . import replay_player, replay_rows, trace
from .cluster import Child, Nodes, Usage, Wish, arena_bytes, extent_bytes, usage
from .flash_rig import FlashRig, FlashStats, room
from .lanes import TIMEOUT
from .replay_player import Outcome, Play
from .replay_rows import Again, Limits, by_tier
from .report import Row, Steps
from .rig import open_peer
from .sample import Sample

GENERATED_REQUESTS = 120
AGAIN_SECONDS = 2.0  # at least so long everything is got again and again


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


@dataclass(frozen=True, slots=True)
class Played:
    """What a replay came to; ``held``: leading blocks that each request found."""

    heading: dict[str, Any]
    rows: list[Row]
    notes: list[str]
    held: list[int]


def requests_of(file: Path | None, limit: int | None, seed: int) -> tuple[list[trace.Request], str]:
    """The trace in a file, or a generated one, and its name."""
    if file is not None:
        requests, name = trace.read(file, limit), str(file)
    else:
        requests = trace.generate(limit or GENERATED_REQUESTS, seed=seed)
        name = f"generated conversations, seed {seed}"
    if not requests:
        raise MemKVError(f"{name}: no request", "--trace FILE")
    return requests, name


def run(settings: Settings) -> Played:
    """Plays the trace."""
    requests, name = requests_of(settings.file, settings.requests, settings.seed)
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
            play = Play(
                addresses=nodes.addresses,
                wish=settings.wish,
                block_bytes=size,
                batch=settings.batch,
                verify=settings.verify,
                salt=salt,
                longest=due.longest,
                distinct=due.distinct,
            )
            players: list[Child] = []
            try:
                players.extend(Child(replay_player.run, play) for _ in range(settings.peers))
                head = [player.ask() for player in players].pop()
                head |= {"trace": name, "nodes": len(nodes.addresses), "peers": settings.peers}
                limits = Limits(nodes, settings.wish, size, salt)
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
    rows = replay_rows.rows(requests, outcomes, due, again, limits, size)
    if staged is not None and staged_again is not None:
        by_tier(rows[0], sum(o.get.hits for o in outcomes), staged, size)
        everything = next(row for row in rows if row.what == "get everything")
        by_tier(everything, (everything.hits or 0) + again.warm_hits, staged_again, size)
    return Played(head, rows, _notes(settings), [o.held for o in outcomes])


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


def _again(requests: Sequence[trace.Request], players: Sequence[Child], nodes: Nodes, steps: Steps) -> Again:
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
    return Again(sample, seconds, busy if own else None, idle if own else None, warm.hits)


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

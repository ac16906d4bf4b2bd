"""The processes of the attacks: a node, writers, readers; ``python -m tests.attacks.churn ROLE JSON``.

They meet in a file (:class:`Board`) where, for every block, the writer that owns it notes how often it has
begun to put it, and below which put number nothing can be seen any more. A process prints one line of JSON
when it is ready; it takes commands on stdin, one a line, and answers each with one line. At the end of stdin
it ends.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import memkv
from memkv.buffers import Slices
from memkv.native._peer import lib as peer_lib
from memkv.peer import Peer
from memkv.rdma.errors import MemKVError
from memkv.status import Status
from memkv.store.config import NodeConfig
from memkv.store.native._store import ffi
from memkv.store.native._store import lib as store_lib
from memkv.store.node import NodeThread

from .pattern import ODD_INVERSE, POISON, Counts, Ids, Ramp, first_words, keys_of

NAMESPACE = "attack"
TEST_BITS = {
    "": 0,
    "no time check": peer_lib.MKV_TEST_NO_TIME_CHECK,
    "frozen clock": peer_lib.MKV_TEST_FROZEN_CLOCK,
}
PROGRESS = 16  # processes that may show how far they are


class Board:
    """The file in which the processes meet. Each block has one writer; words are stored and loaded whole."""

    def __init__(self, path: str | Path, blocks: int) -> None:
        if not Path(path).exists():
            Path(path).write_bytes(bytes(2 * 4 * blocks + 8 * PROGRESS))
        words = np.memmap(path, np.uint32, "r+")
        self.begun: Counts = words[:blocks]
        self.floor: Counts = words[blocks : 2 * blocks]
        self.progress = words[2 * blocks :].view(np.uint64)


@dataclass(frozen=True, slots=True)
class Sort:
    """Blocks of one size: their numbers, and how many a batch takes of them."""

    nbytes: int
    first: int
    count: int
    batch: int


@dataclass(slots=True)
class Batches:
    """Random batches over all sorts of blocks, and their places in one buffer."""

    sorts: list[Sort]
    peer: Peer
    share: int = 0  # of the blocks, those whose number is `share` modulo `shares`
    shares: int = 1
    ids: Ids = field(init=False)
    slices: Slices = field(init=False)
    views: list[Any] = field(init=False)
    memory: Any = field(init=False)
    ramps: list[Ramp] = field(init=False)

    def __post_init__(self) -> None:
        starts = np.cumsum([0] + [s.nbytes * s.batch for s in self.sorts])
        self.memory = np.zeros(int(starts[-1]), np.uint8)
        buffer = self.peer.register(self.memory)
        offsets, lengths, self.views, self.ramps = [], [], [], []
        for sort, start in zip(self.sorts, starts, strict=False):
            offsets.append(int(start) + np.arange(sort.batch) * sort.nbytes)
            lengths.append(np.full(sort.batch, sort.nbytes))
            part = self.memory[int(start) : int(start) + sort.batch * sort.nbytes]
            self.views.append(part.view(np.uint64).reshape(sort.batch, -1))
            self.ramps.append(Ramp.of(sort.nbytes))
        self.slices = buffer.slices(np.concatenate(offsets), np.concatenate(lengths))
        self.ids = np.zeros(len(self.slices), np.int64)

    def choose(self, rng: np.random.Generator) -> None:
        """Another batch: ``ids`` and what belongs to them."""
        at = 0
        for s in self.sorts:
            own = s.count // self.shares
            picked = rng.choice(own, s.batch, replace=False) if own > s.batch else np.arange(s.batch) % own
            self.ids[at : at + s.batch] = s.first + picked * self.shares + self.share
            at += s.batch

    def fill(self, puts: Counts) -> None:
        at = 0
        for sort, view, ramp in zip(self.sorts, self.views, self.ramps, strict=True):
            ramp.fill(view, self.ids[at : at + sort.batch], puts[at : at + sort.batch])
            at += sort.batch

    def poison(self, puts: Counts, which: Any) -> None:
        """Overwrites the blocks at ``which`` by what must never be seen."""
        at = 0
        for sort, view, ramp in zip(self.sorts, self.views, self.ramps, strict=True):
            mine = np.flatnonzero(which[at : at + sort.batch])
            if len(mine):
                view[mine] = first_words(self.ids[at + mine], puts[at + mine] | POISON)[:, None] + ramp.ramp
            at += sort.batch

    def judge(self, status: Any, floor: Counts, begun: Counts) -> list[str]:
        wrong, at = [], 0
        for sort, view, ramp in zip(self.sorts, self.views, self.ramps, strict=True):
            mine = slice(at, at + sort.batch)
            hits = status[mine] == Status.HIT
            if hits.all():
                wrong += ramp.judge(view, self.ids[mine], floor[mine], begun[mine])
            elif hits.any():
                wrong += ramp.judge(view[hits], self.ids[mine][hits], floor[mine][hits], begun[mine][hits])
            at += sort.batch
        return wrong

    def shown(self, status: Any) -> Counts:
        """The put numbers of the HITs; 0 for the others."""
        firsts = np.concatenate([view[:, 0] for view in self.views])
        puts = (firsts ^ first_words(self.ids, np.zeros(len(self.ids), np.uint32))) * ODD_INVERSE
        return np.where(status == Status.HIT, puts, 0).astype(np.uint32)


class Commands:
    """Lines of stdin, taken by a thread so that the work goes on."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "end":
                break
        self.ended.set()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# --- the node ---


def node(spec: dict[str, Any]) -> None:
    """A store node. Commands: ``stats``, and ``flip`` with what :class:`Flip` takes."""
    config = NodeConfig(listen=("127.0.0.1", 0), huge=False, **spec["config"])
    with NodeThread(config) as thread:
        say(address="{}:{}".format(*thread.address))
        flip: Flip | None = None
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "flip":
                flip = Flip(thread, Board(spec["board"], 2), **command["with"])
                say(done=True)
            elif command["do"] == "stats":
                space = thread.node.namespaces.by_name.get(NAMESPACE)
                stats: dict[str, Any] = dict(space.stats()) if space else {}
                stats["check"] = store_lib.mkv_ns_check(space.ns) if space else 0
                stats["rounds"] = flip.rounds if flip else 0
                stats["puts_by_status"] = thread.node.counters.put_statuses()
                say(**stats)
        if flip:
            flip.stop()


class Flip:
    """The fastest writer there can be: a thread of the node's own that fills the one extent of its arena,
    publishes it as block 0, takes it away after a random time, and fills it again as soon as it is free.

    :param nbytes: of the block. :param live: (shortest, longest) time for which it is published, seconds.
    :param cut: breaks the quarantine: five ticks at once, so that the extent is free without having waited.
    """

    def __init__(
        self, thread: NodeThread, board: Board, nbytes: int, live: tuple[float, float], cut: bool
    ) -> None:
        self.ns = thread.node.namespaces.by_name[NAMESPACE].ns
        self.board, self.nbytes, self.live, self.cut = board, nbytes, live, cut
        self.rounds = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ramp, ids = Ramp.of(self.nbytes), np.zeros(1, np.int64)
        key, fill, status = keys_of(ids).tobytes(), ffi.new("struct mkv_fill *"), ffi.new("uint8_t[1]")
        while not self._stop.is_set():
            put = self.board.begun[:1] + np.uint32(1)
            if store_lib.mkv_fill_begin(self.ns, key, self.nbytes, fill) != Status.PENDING:
                time.sleep(0.0003)
                continue
            self.board.begun[:1] = put
            memory = np.frombuffer(ffi.buffer(ffi.cast("void *", fill.address), self.nbytes), np.uint64)
            ramp.fill(memory[None, :], ids, put)
            store_lib.mkv_fill_publish(self.ns, fill, key, 0)
            self._stop.wait(random.uniform(*self.live))
            store_lib.mkv_ns_delete(self.ns, key, 1, status)
            self.board.floor[:1] = put + np.uint32(1)
            for _ in range(5 if self.cut else 0):
                store_lib.mkv_ns_tick_now(self.ns)
            self.rounds += 1


# --- peers ---


def connect(spec: dict[str, Any], **options: Any) -> Peer:
    """Patiently: on an emulated machine everybody starts at once, and slowly."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return memkv.connect(spec["address"], NAMESPACE, fabric=spec["fabric"], timeout=15.0, **options)
        except MemKVError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def set_test(peer: Peer, bits: int) -> None:
    for link in peer._links:
        if link.session is not None:
            link.session.view.test = bits


def read(spec: dict[str, Any]) -> None:
    """Reads as fast as it can; judges every HIT.

    ``strict``, ``test`` (see TEST_BITS); ``place`` on the board's progress.
    """
    board = Board(spec["board"], spec["blocks"])
    rng = np.random.default_rng(spec["seed"])
    commands, counts = Commands(), np.zeros(256, np.int64)
    wrong: list[str] = []
    with connect(spec, strict=spec["strict"]) as peer:
        batches = Batches([Sort(*s) for s in spec["sorts"]], peer)
        say(ready=True)
        while not commands.ended.is_set():
            batches.choose(rng)
            set_test(peer, TEST_BITS[spec["test"]])
            floor = board.floor[batches.ids]
            status = peer.get_into(keys_of(batches.ids), batches.slices, timeout=spec.get("timeout", 5.0))
            begun = board.begun[batches.ids]
            found = batches.judge(status, floor, begun)
            if found:
                wrong += found[: 20 - len(wrong)]
                counts[255] += len(found)
            counts[:255] += np.bincount(status, minlength=255)
            board.progress[spec["place"]] = counts[[Status.HIT, Status.MISS, Status.STALE]].sum()
            if spec.get("until_wrong") and found:
                break
        (stats,) = peer.stats()["nodes"].values()
        say(
            wrong=wrong,
            wrong_count=int(counts[255]),
            gets=int(counts[[Status.HIT, Status.MISS, Status.STALE]].sum()),
            statuses={Status(int(i)).name: int(counts[i]) for i in np.flatnonzero(counts[:255])},
            outdated=stats.get("stale", 0),
            cached=stats.get("cached", 0),
            reconnects=stats["reconnects"],
        )


def write(spec: dict[str, Any]) -> None:
    """Puts and deletes as fast as it can.

    ``hasty``: puts with timeouts of a fraction of what they take, and overwrites the sources as soon as it is
    told that they timed out; then looks whether the blocks are there: whole and old, or not at all.
    """
    board = Board(spec["board"], spec["blocks"])
    rng = np.random.default_rng(spec["seed"])
    commands, counts = Commands(), np.zeros(256, np.int64)
    deleted = late = 0
    wrong: list[str] = []
    usual = 0.1
    peer = connect(spec)
    batches = Batches([Sort(*s) for s in spec["sorts"]], peer, spec["share"], spec["shares"])
    back = Batches([Sort(*s) for s in spec["sorts"]], peer) if spec["hasty"] else None
    say(ready=True)
    while not commands.ended.is_set():
        batches.choose(rng)
        ids, keys = batches.ids, keys_of(batches.ids)
        if rng.random() < spec["delete"]:
            gone = np.isin(peer.delete(keys), (Status.DONE, Status.MISS))
            board.floor[ids[gone]] = board.begun[ids[gone]] + 1
            deleted += int(gone.sum())
        puts = board.begun[ids] + np.uint32(1)
        board.begun[ids] = puts
        batches.fill(puts)
        hurry = spec["hasty"] and rng.random() < 0.8
        started = time.monotonic()
        status = peer.put_from(
            keys, batches.slices, timeout=max(0.001, usual * rng.uniform(0.02, 0.9)) if hurry else 5.0
        )
        if spec["hasty"]:
            batches.poison(puts, ~np.isin(status, (Status.STORED, Status.EXISTS)))
        if not hurry:
            usual = 0.7 * usual + 0.3 * (time.monotonic() - started)
        stored = status == Status.STORED
        board.floor[ids[stored]] = puts[stored]
        counts += np.bincount(status, minlength=256)
        if spec["hasty"]:
            board.progress[spec["place"]] = counts[Status.TIMEOUT]
        if back is not None and (status == Status.TIMEOUT).any():
            back.ids[:] = ids
            seen = peer.get_into(keys, back.slices, timeout=5.0)
            late += int((back.shown(seen) == puts)[status == Status.TIMEOUT].sum())
            wrong += back.judge(seen, board.floor[ids], puts)[: 20 - len(wrong)]
        if (status >= 16).any() and (status == Status.ERROR_FULL).sum() < (status >= 16).sum():
            if back is not None:
                peer.close()
                peer = connect(spec)
                batches = Batches([Sort(*s) for s in spec["sorts"]], peer, spec["share"], spec["shares"])
                back = Batches([Sort(*s) for s in spec["sorts"]], peer)
            else:
                time.sleep(0.01)
    peer.close()
    say(
        statuses={Status(int(i)).name: int(counts[i]) for i in np.flatnonzero(counts)},
        deleted=deleted,
        late=late,
        wrong=wrong,
    )


if __name__ == "__main__":
    {"node": node, "read": read, "write": write}[sys.argv[1]](json.loads(sys.argv[2]))

"""Peers that use a node at random, and remember what it has promised them: the truth that it is held to.

Every block has one owner, a :class:`Worker`, who alone puts and deletes it. Put n of a block differs from all
others in every word (tests/attacks/pattern.py), so that an old copy that returns is told from the right one.
What an owner remembers of each block:

    possible   puts that a get may show: begun, and not known to be gone
    held       NOTHING promised; VOLATILE: gone with the process at most; DURABLE: at no event but a delete

An acknowledged delete empties ``possible``: from then on nothing may be shown. A get that shows what is not
possible, or misses what is held, is noted in ``wrong``.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memkv.peer import Peer
from memkv.rdma.errors import MemKVError
from memkv.status import Status

from ..attacks.pattern import ODD_INVERSE, Ramp, first_words, keys_of

KIB = 1 << 10
LENGTHS = (16 * KIB, 64 * KIB)  # by the block's number: two size classes
BATCH = 8
NOTHING, VOLATILE, DURABLE = range(3)
GONE = (Status.DONE, Status.MISS)
# Of the call, or of the node's being away: they say nothing of the block.
UNKNOWN = (
    Status.TIMEOUT,
    Status.STALE,
    Status.COLD,
    Status.ERROR_LINK,
    Status.ERROR_UNREACHABLE,
    Status.ERROR_FULL,
)

Ids = npt.NDArray[np.int64]


@dataclass
class Rules:
    """What holds for all workers of a test. ``expect``: no scan is under way, so what is not found is not
    there. ``evicts``: flash is too small for all blocks, so that promises end. ``lies``: so does the device,
    and what it was to keep may be found to be wrong.
    """

    evicts: bool
    expect: bool = True
    lies: bool = False


class Ledger:
    """What all workers share: of each block the last put that was begun, and the first that may be seen."""

    def __init__(self, blocks: int, rules: Rules) -> None:
        self.rules = rules
        self.begun = np.zeros(blocks, np.uint32)
        self.floor = np.zeros(blocks, np.uint32)
        self.possible: list[set[int]] = [set() for _ in range(blocks)]
        self.held = np.zeros(blocks, np.uint8)


def length_of(id: int) -> int:
    return LENGTHS[id % len(LENGTHS)]


class Places:
    """Registered memory for one batch."""

    def __init__(self, peer: Peer) -> None:
        self.memory = np.zeros((BATCH, LENGTHS[-1]), np.uint8)
        self.buffer = peer.register(self.memory)
        self.ramps = {n: Ramp.of(n) for n in LENGTHS}

    def slices(self, ids: Ids) -> Any:
        lengths = np.array([length_of(i) for i in ids.tolist()], np.int64)
        return self.buffer.slices(np.arange(len(ids)) * LENGTHS[-1], lengths)

    def words(self, at: int, id: int) -> npt.NDArray[np.uint64]:
        return self.memory[at : at + 1, : length_of(id)].view(np.uint64)

    def fill(self, ids: Ids, puts: npt.NDArray[np.uint32]) -> None:
        for at, id in enumerate(ids.tolist()):
            self.ramps[length_of(id)].fill(self.words(at, id), ids[at : at + 1], puts[at : at + 1])

    def shown(self, at: int, id: int) -> int:
        """The put that a block seems to be of, going by its first word."""
        first = self.words(at, id)[0, :1]
        none = np.zeros(1, np.uint32)
        return int(((first ^ first_words(np.array([id]), none)) * ODD_INVERSE)[0])

    def judge(self, at: int, id: int, floor: int, begun: int) -> list[str]:
        one = np.array([id])
        bounds = np.array([floor], np.uint32), np.array([begun], np.uint32)
        return self.ramps[length_of(id)].judge(self.words(at, id), one, *bounds)


class Worker(threading.Thread):
    """A peer with blocks of its own. It runs between :meth:`go` and :meth:`halt`.

    :param ids: its blocks; it reads those of others, too.
    """

    def __init__(self, peer: Peer, ledger: Ledger, ids: Ids, seed: int) -> None:
        super().__init__(daemon=True, name=f"worker {seed}")
        self.peer, self.ledger, self.ids = peer, ledger, ids
        self.rng = np.random.default_rng(seed)
        self.places = Places(peer)
        self.wrong: list[str] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.now = ""  # what it does, for those who wonder why it does not halt
        self._running, self._parked, self._ended = threading.Event(), threading.Event(), False
        self.start()

    # --- when it runs ---

    def go(self) -> None:
        self._parked.clear()
        self._running.set()

    def halt(self) -> None:
        """Waits for what is under way."""
        self._running.clear()
        assert self._parked.wait(60), f"{self.name} is stuck in a {self.now}"

    def end(self) -> None:
        self._ended = True
        self._running.set()
        self.join(60)
        assert not self.is_alive(), f"{self.name} is stuck in a {self.now}"

    def crashed(self) -> None:
        """The node is gone, and with it what was in memory only. While halted."""
        for id in self.ids.tolist():
            if self.ledger.held[id] == VOLATILE:
                self.ledger.held[id] = NOTHING

    def run(self) -> None:
        acts = (self.put, self.get, self.delete, self.look, self.pin, self.stage, self.spy)
        chances = (0.4, 0.22, 0.12, 0.04, 0.06, 0.08, 0.08)
        while True:
            if not self._running.is_set():
                self._parked.set()
                self._running.wait()
            if self._ended:
                return
            act = acts[self.rng.choice(len(acts), p=chances)]
            self.now = act.__name__
            try:
                act()
            except MemKVError as exc:
                self._count(self.now, type(exc).__name__)
                time.sleep(0.01)
            except Exception as exc:
                self.wrong.append(f"{self.now}: {exc!r}")
                raise

    # --- what it does ---

    def choose(self, ids: Ids) -> Ids:
        return self.rng.choice(ids, min(len(ids), int(self.rng.integers(1, BATCH + 1))), replace=False)

    def put(self) -> None:
        ledger, ids = self.ledger, self.choose(self.ids)
        durable = bool(self.rng.random() < 0.5)
        expect = ledger.rules.expect
        ledger.begun[ids] += np.uint32(1)
        puts = ledger.begun[ids].copy()
        self.places.fill(ids, puts)
        for id, put in zip(ids.tolist(), puts.tolist(), strict=True):
            ledger.possible[id].add(put)
        timeout = 5.0 if self.rng.random() < 0.9 else float(self.rng.uniform(0.002, 0.05))
        status = self.peer.put_from(
            keys_of(ids),
            self.places.slices(ids),
            timeout=timeout,
            durability="flash" if durable else "memory",
        )
        self._tally("put flash" if durable else "put memory", status)
        for id, put, s in zip(ids.tolist(), puts.tolist(), status.tolist(), strict=True):
            if s == Status.STORED:
                # With nothing unknown about it there was none before; a durable one wins over all others.
                if not ledger.rules.evicts and durable:
                    ledger.possible[id] = {put}
                if expect and not ledger.rules.evicts and ledger.held[id]:
                    self.wrong.append(f"block {id}: put {put} was taken, although {self._state(id)}")
            elif s in (Status.EXISTS, Status.CORRUPT):
                ledger.possible[id].discard(put)
                if not ledger.possible[id]:
                    self.wrong.append(f"block {id}: put {put} {Status(s).name}, but nothing can be there")
            if s in (Status.STORED, Status.EXISTS):
                ledger.held[id] = max(int(ledger.held[id]), DURABLE if durable else VOLATILE)
            elif s not in UNKNOWN and not (s == Status.MISS and ledger.rules.evicts):  # gone again already
                self.wrong.append(f"block {id}: put {put} ended {Status(s).name}")

    def delete(self) -> None:
        ledger, ids = self.ledger, self.choose(self.ids)
        held = ledger.held[ids].copy()
        ledger.held[ids] = NOTHING  # from now on it may go at any time
        timeout = 5.0 if self.rng.random() < 0.9 else float(self.rng.uniform(0.0, 0.02))
        expect = ledger.rules.expect
        status = self.peer.delete(keys_of(ids), timeout=timeout)
        self._tally("delete", status)
        for i, (id, s) in enumerate(zip(ids.tolist(), status.tolist(), strict=True)):
            if s in GONE:
                if s == Status.MISS and held[i] and expect and not ledger.rules.evicts:
                    self.wrong.append(f"block {id}: delete misses it, with puts {ledger.possible[id]} held")
                ledger.possible[id].clear()
                ledger.floor[id] = ledger.begun[id] + 1

    def get(self) -> None:
        self._get(self.choose(self.ids))

    def _get(self, ids: Ids) -> npt.NDArray[np.uint8]:
        ledger, expect = self.ledger, self.ledger.rules.expect
        status = self.peer.get_into(keys_of(ids), self.places.slices(ids), timeout=5.0)
        self._tally("get", status)
        for at, (id, s) in enumerate(zip(ids.tolist(), status.tolist(), strict=True)):
            if s == Status.HIT:
                bad = self.places.judge(at, id, int(ledger.floor[id]), int(ledger.begun[id]))
                if not bad and (put := self.places.shown(at, id)) not in ledger.possible[id]:
                    bad = [f"block {id}: put {put} is shown, although {self._state(id)}"]
                self.wrong += bad
            else:
                self._missed("get", id, s, expect)
        return status

    def spy(self) -> None:
        """Gets blocks of others, whose owners work on them meanwhile."""
        ledger = self.ledger
        ids = self.choose(np.arange(len(ledger.begun)))
        floor = ledger.floor[ids]
        status = self.peer.get_into(keys_of(ids), self.places.slices(ids), timeout=5.0)
        begun = ledger.begun[ids]
        self._tally("spy", status)
        for at in np.flatnonzero(status == Status.HIT).tolist():
            self.wrong += self.places.judge(at, int(ids[at]), int(floor[at]), int(begun[at]))

    def look(self) -> None:
        self._ask("exists", self.peer.exists)

    def pin(self) -> None:
        if self.rng.random() < 0.7:
            ttl = float(self.rng.uniform(0.01, 0.5))
            self._ask("pin", lambda keys: self.peer.pin(keys, ttl))
        else:
            self._ask("unpin", self.peer.unpin)

    def stage(self) -> None:
        self._ask("stage", lambda keys: self.peer.stage(keys, timeout=5.0))

    def _ask(self, what: str, call: Any) -> None:
        ids, expect = self.choose(self.ids), self.ledger.rules.expect
        status = call(keys_of(ids))
        self._tally(what, status)
        for id, s in zip(ids.tolist(), status.tolist(), strict=True):
            if s in (Status.HIT, Status.DONE):
                if not self.ledger.possible[id]:
                    self.wrong.append(f"block {id}: {what} finds what cannot be there")
            elif what != "unpin":
                self._missed(what, id, s, expect)

    def verify(self, patience: float = 15.0) -> None:
        """Every block once, while halted and with nothing to be scanned: what is held is there."""
        until = time.monotonic() + patience
        left = self.ids
        while len(left):
            parts = [left[i : i + BATCH] for i in range(0, len(left), BATCH)]
            left = np.concatenate([part[np.isin(self._get(part), UNKNOWN)] for part in parts])
            if time.monotonic() > until:
                self.wrong.append(f"no answer about blocks {left.tolist()} within {patience:g} s")
                return
            time.sleep(0.05 if len(left) else 0)

    # --- notes ---

    def _missed(self, what: str, id: int, status: int, expect: bool) -> None:
        """A block was not to be had: whether that may be."""
        if status == Status.CORRUPT and not self.ledger.rules.lies:
            self.wrong.append(f"block {id}: {what} ends CORRUPT")
        elif status not in UNKNOWN and expect and not self.ledger.rules.evicts and self.ledger.held[id]:
            self.wrong.append(f"block {id}: {what} ends {Status(status).name}, although {self._state(id)}")

    def _state(self, id: int) -> str:
        ledger = self.ledger
        held = ("nothing is promised", "it is held", "it is durable")[int(ledger.held[id])]
        return f"{held}, with puts {sorted(ledger.possible[id])} possible ({int(ledger.begun[id])} begun)"

    def _tally(self, what: str, status: Any) -> None:
        for s in status.tolist():
            self._count(what, Status(s).name)

    def _count(self, what: str, how: str) -> None:
        self.counts[what, how] = self.counts.get((what, how), 0) + 1

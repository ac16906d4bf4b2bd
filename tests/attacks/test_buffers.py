"""The attack on "nothing is handed back too early".

A get that runs out of time has READs under way into the caller's memory. Its statuses may only be returned
when no device can write there any more. So: deadlines of a fraction of what a batch needs, again and again;
as soon as the call returns the memory is filled with a canary; later not one byte of the canary may have
changed. Likewise with a node that is stopped, or killed, in the middle of a get.

A put that runs out of time has the node's READs under way, on one side into an extent of the node's, on the
other out of the caller's memory. So: sources that are overwritten by poison as soon as the put is given up,
peers that are stopped in the middle of a put, in an arena so small that an extent which is given back is
filled for somebody else at once. Other peers' blocks have to stay what they are, and poison may never be
seen.

Both are also carried out by a caller who does what memkv must not do, as proof that it would be noticed.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.peer import Peer
from memkv.status import Status

from . import churn
from .churn import Board, Sort
from .conftest import Child
from .pattern import Ramp, keys_of

Start = Callable[[str, dict[str, Any]], Child]
Report = Callable[..., None]
KIB, MIB = 1 << 10, 1 << 20
CANARY = 0xA5
BLOCK, BLOCKS = 256 * KIB, 48
OVERTIME = 4.0  # seconds beyond the deadline: two for a device to let go, and what a loaded machine takes


class Victim:
    """A node with some blocks, and a peer whose memory is watched."""

    def __init__(self, start: Start, tmp_path: Path, fabric: str) -> None:
        config = {"fabric": fabric, "memory": 32 * MIB, "slab_bytes": 4 * MIB, "block_bytes": BLOCK}
        self.node = start("node", {"config": config, "board": str(tmp_path / "board")})
        spec = {"address": self.node.line()["address"], "fabric": fabric}
        self.peer: Peer = churn.connect(spec)
        self.ids = np.arange(BLOCKS)
        self.keys = keys_of(self.ids)
        self.ramp = Ramp.of(BLOCK)
        self.puts = np.ones(BLOCKS, np.uint32)
        self.memory = [np.zeros((BLOCKS, BLOCK // 8), np.uint64) for _ in range(2)]
        self.slices = [self.peer.register(m.reshape(-1)).split(BLOCK) for m in self.memory]
        self.ramp.fill(self.memory[0], self.ids, self.puts)
        assert (self.peer.put_from(self.keys, self.slices[0]) == Status.STORED).all()
        for m in self.memory:
            m.view(np.uint8)[:] = CANARY
        self.usual = min(self.time_of_a_get() for _ in range(3))
        self.counts = np.zeros(256, np.int64)
        self.changed = 0
        self.cut = 0  # gets that ended with some blocks there and some not
        self.longest = 0.0
        self._side = 0

    def time_of_a_get(self) -> float:
        started = time.monotonic()
        assert (self.peer.get_into(self.keys, self.slices[0]) == Status.HIT).all()
        self.memory[0].view(np.uint8)[:] = CANARY
        return time.monotonic() - started

    def get(self, timeout: float) -> Any:
        """A get into one of two buffers, which then is a canary. The other one, a canary since the last get,
        has to be one still."""
        memory, self._side = self.memory[self._side], 1 - self._side
        slices = self.slices[1 - self._side]
        started = time.monotonic()
        status = self.peer.get_into(self.keys, slices, timeout=timeout)
        self.longest = max(self.longest, time.monotonic() - started - timeout)
        hits = status == Status.HIT
        assert not self.ramp.judge(memory[hits], self.ids[hits], self.puts[hits], self.puts[hits])
        memory.view(np.uint8)[:] = CANARY
        self.counts += np.bincount(status, minlength=256)
        self.cut += bool(hits.any() and not hits.all())
        self.look(self._side)
        return status

    def look(self, side: int) -> None:
        words = self.memory[side]
        self.changed += int((words != np.uint64(CANARY * 0x0101010101010101)).any(axis=1).sum())

    def look_at_all(self) -> None:
        time.sleep(0.3)
        self.look(0)
        self.look(1)

    def statuses(self) -> dict[str, int]:
        return {Status(int(i)).name: int(self.counts[i]) for i in np.flatnonzero(self.counts)}


@contextlib.contextmanager
def in_a_moment(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Does something from another thread, meanwhile."""
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


def cut_short(victim: Victim, rounds: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and rounds > 0:
        victim.get(victim.usual * random.uniform(0.05, 1.1))
        rounds -= 1
    victim.look_at_all()


def unharmed(victim: Victim, report: Report) -> None:
    report(
        statuses=victim.statuses(),
        cut=victim.cut,
        changed=victim.changed,
        longest_overtime=round(victim.longest, 3),
    )
    assert victim.changed == 0, "somebody wrote after the statuses had been returned"
    assert victim.longest < OVERTIME


def test_nothing_is_written_after_a_get_has_timed_out(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    victim = Victim(start, tmp_path, fabric_name)
    with victim.peer:
        cut_short(victim, 100, 10)
        unharmed(victim, report)
        assert victim.counts[Status.TIMEOUT] > 0
        assert victim.cut > 0, "no get ended in its middle"
        assert (victim.get(10.0) == Status.HIT).all(), "it did not recover"


@pytest.mark.slow
def test_nothing_is_written_after_thousands_of_gets_have_timed_out(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    """Two minutes at most."""
    victim = Victim(start, tmp_path, fabric_name)
    with victim.peer:
        cut_short(victim, 5000, 120)
        unharmed(victim, report)
        assert victim.cut > 50
        assert (victim.get(10.0) == Status.HIT).all(), "it did not recover"


def test_a_stopped_node_costs_the_deadline_and_no_byte(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    """Over verbs its device goes on answering, and the gets may well be hits."""
    victim = Victim(start, tmp_path, fabric_name)
    node = victim.node.process
    with victim.peer:
        for _ in range(5):
            with in_a_moment(lambda: node.send_signal(signal.SIGSTOP), victim.usual * random.uniform(0, 0.8)):
                victim.get(max(0.3, 2 * victim.usual))
            node.send_signal(signal.SIGCONT)
            victim.look_at_all()
            wait_until_up(victim)
        unharmed(victim, report)
        if fabric_name == "tcp":
            assert victim.counts[Status.TIMEOUT] > 0
        assert (victim.get(10.0) == Status.HIT).all(), "it did not recover"


def test_a_node_killed_in_the_middle_of_a_get_costs_no_byte(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    died_in_the_middle = 0
    for i in range(8):
        if i >= 2 and died_in_the_middle:
            break
        (tmp_path / str(i)).mkdir()
        victim = Victim(start, tmp_path / str(i), fabric_name)
        with victim.peer:
            with in_a_moment(victim.node.process.kill, victim.usual * random.uniform(0.1, 0.7)):
                while (victim.get(2.0) == Status.HIT).all():
                    pass
            died_in_the_middle += victim.cut
            victim.get(0.5)
            victim.look_at_all()
            unharmed(victim, report)
    report(died_in_the_middle=died_in_the_middle)
    assert died_in_the_middle > 0, "no get was cut off half-way"


def wait_until_up(victim: Victim) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        (node,) = victim.peer.stats()["nodes"].values()
        if node["up"] and (victim.peer.exists(victim.keys[:1], timeout=2.0) == Status.HIT).all():
            return
        time.sleep(0.05)
    pytest.fail("the peer did not connect again")


def test_a_caller_who_takes_its_memory_back_early_is_found_out(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    """The proof: what the canary would show if a get returned while its READs were under way."""
    victim = Victim(start, tmp_path, fabric_name)
    with victim.peer:
        until = time.monotonic() + 60
        while not victim.changed and time.monotonic() < until:
            ticket = victim.peer.submit_get(victim.keys, victim.slices[0], timeout=30.0)
            time.sleep(victim.usual * random.uniform(0.1, 0.6))
            victim.memory[0].view(np.uint8)[:] = CANARY
            while not ticket.done:
                time.sleep(0.001)
            victim.look(0)
            victim.memory[0].view(np.uint8)[:] = CANARY
        report(changed=victim.changed)
        assert victim.changed > 0, "the attack is blind"


# --- puts ---

SORTS = [(64 * KIB, 0, 96, 12), (512 * KIB, 96, 24, 6)]
PUT_BLOCKS = 120


def put_attack(start: Start, tmp_path: Path, fabric: str, *, seconds: float, wanted: int) -> dict[str, Any]:
    """Two hasty writers, one of which is stopped again and again; a steady one; a reader."""
    board = Board(tmp_path / "board", PUT_BLOCKS)
    config = {
        "fabric": fabric,
        "grace_ms": 20,
        "memory": 16 * MIB,
        "slab_bytes": 2 * MIB,
        "block_bytes": 512 * KIB,
        "max_put_bytes": 2 * MIB,
    }
    node = start("node", {"config": config, "board": str(tmp_path / "board")})
    common = {
        "address": node.line()["address"],
        "fabric": fabric,
        "board": str(tmp_path / "board"),
        "blocks": PUT_BLOCKS,
        "sorts": SORTS,
    }
    writers = [
        start(
            "write",
            {**common, "seed": i, "share": i, "shares": 3, "delete": 0.5, "hasty": i < 2, "place": 1 + i},
        )
        for i in range(3)
    ]
    reader = start("read", {**common, "seed": 9, "place": 0, "strict": False, "test": ""})
    for child in (*writers, reader):
        child.line()
    until = time.monotonic() + seconds
    while time.monotonic() < until and (min(board.progress[1:3]) < wanted or writers[0].stops < 5):
        time.sleep(random.uniform(0.02, 0.15))
        writers[0].pause(random.uniform(0.02, 0.2))
    return {
        "reader": reader.end(),
        "writers": [w.end() for w in writers],
        "stops": writers[0].stops,
        "node": node.ask(do="stats"),
    }


def sources_were_safe(result: dict[str, Any], report: Report) -> None:
    reader, writers, stats = result["reader"], result["writers"], result["node"]
    report(
        reader=reader,
        writers=writers,
        stops=result["stops"],
        evictions=stats["evictions"],
        puts_by_status=stats["puts_by_status"],
    )
    assert not reader["wrong"], f"{reader['wrong_count']} blocks were not what was put"
    for writer in writers:
        assert not writer["wrong"]
        assert writer["statuses"].get("STORED", 0) > 0
    assert sum(w["statuses"].get("TIMEOUT", 0) for w in writers[:2]) > 0, "no put ran out of time"
    assert reader["statuses"].get("HIT", 0) > 0
    assert stats["evictions"] > 0
    assert result["stops"] > 0
    assert stats["check"] == 0, f"the node's own invariants: line {stats['check']}"
    assert stats["extents_filling"] == 0, "an extent of a put that was given up is lost"


def test_a_put_that_was_given_up_leaves_no_trace(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    sources_were_safe(put_attack(start, tmp_path, fabric_name, seconds=8, wanted=200), report)


@pytest.mark.slow
def test_thousands_of_puts_that_were_given_up_leave_no_trace(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    """Two minutes at most."""
    sources_were_safe(put_attack(start, tmp_path, fabric_name, seconds=120, wanted=4_000), report)


def test_a_source_that_changes_before_its_put_has_ended_is_found_out(
    start: Start, tmp_path: Path, fabric_name: str, report: Report
) -> None:
    """The proof: poison, or a mixture with it, is seen if the source is overwritten while it is pulled."""
    config = {"fabric": fabric_name, "memory": 64 * MIB, "slab_bytes": 8 * MIB, "block_bytes": 4 * MIB}
    node = start("node", {"config": config, "board": str(tmp_path / "board")})
    found: list[str] = []
    with churn.connect({"address": node.line()["address"], "fabric": fabric_name}) as peer:
        batches = churn.Batches([Sort(4 * MIB, 0, 6, 6)], peer)
        batches.choose(np.random.default_rng(1))
        keys, everything = keys_of(batches.ids), np.ones(6, bool)
        puts, usual, until = np.zeros(6, np.uint32), 0.0, time.monotonic() + 60
        while not found and time.monotonic() < until:
            puts += np.uint32(1)
            batches.fill(puts)
            started = time.monotonic()
            ticket = peer.submit_put(keys, batches.slices, timeout=30.0)
            if usual:
                time.sleep(usual * random.uniform(0.1, 0.8))
                batches.poison(puts, everything)
            while not ticket.done:
                time.sleep(0.0005)
            usual = usual or time.monotonic() - started
            found = batches.judge(peer.get_into(keys, batches.slices), puts, puts)
            peer.delete(keys)
    report(found=found[:2])
    assert found, "the attack is blind"

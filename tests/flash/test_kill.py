"""``kill -9`` at random moments, again and again: what was promised is kept, what was deleted stays away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.peer import Peer

from ..nodes import Connect, NodeProcess, until
from .churn import Ledger, Rules, Worker

pytest_plugins = "tests.nodes"

WORKERS = 3
ROOMY = {"blocks": 40, "flash": "48M"}  # of each worker; everything fits
TIGHT = {"blocks": 150, "flash": "20M"}  # three times what fits
PATIENCE = 60.0


class Torment:
    """A node, its peers, and who kills it.

    :param sizes: blocks of each worker, and bytes of the file.
    """

    def __init__(self, start: Any, connect: Connect, path: Path, sizes: dict[str, Any], seed: int) -> None:
        self.random = random.Random(seed)
        self.rules = Rules(evicts=sizes is TIGHT)
        self.node: NodeProcess = start(
            flash=f"{path / 'flash'}:{sizes['flash']}",
            memory=4 << 20,
            slab_bytes=1 << 20,
            grace_ms=100,
        )
        blocks = sizes["blocks"] * WORKERS
        self.ledger = Ledger(blocks, self.rules)
        self.peers: list[Peer] = [connect(self.node) for _ in range(WORKERS)]
        self.workers = [
            Worker(peer, self.ledger, np.arange(i, blocks, WORKERS), seed * 100 + i)
            for i, peer in enumerate(self.peers)
        ]
        self.recovered = self.durable = self.during_scan = 0

    def kill(self) -> None:
        """Lets everybody work for a random time, then kills the node in the middle of it."""
        for worker in self.workers:
            worker.go()
        busy = self.random.choice((0.02, 0.1, 0.3, 0.6)) * self.random.uniform(0.5, 1.5)
        until(self.has_seen_it_all, PATIENCE, "something of everything")
        time.sleep(busy)
        self.node.kill()
        self.halt()
        for worker in self.workers:
            worker.crashed()
        self.durable += int((self.ledger.held == 2).sum())

    def has_seen_it_all(self) -> bool:
        """From the second kill on at once: however slow the machine is, there was something to lose."""
        counts = self.counts()
        acts = (("put flash", "STORED"), ("put memory", "STORED"), ("delete", "DONE"), ("get", "HIT"))
        return all(counts.get(what) for what in acts)

    def halt(self) -> None:
        for worker in self.workers:
            worker.halt()
        self.check()

    def restart(self) -> None:
        """Starts it again. Sometimes everybody goes on while it scans, and sometimes it is killed at that."""
        self.rules.expect = False
        if self.random.random() < 0.2:
            self.node.launch()
            time.sleep(self.random.uniform(0.2, 0.9))
            self.node.kill()
        self.node.start()
        if self.random.random() < 0.5:
            for worker in self.workers:
                worker.go()
            self.during_scan += 1
        until(lambda: self.scan_left() == 0, PATIENCE, "the scan")
        self.rules.expect = True
        self.halt()

    def scan_left(self) -> int:
        status = self.node.status()["flash"]
        self.recovered += status["recovered"] if not status["scan_left"] else 0
        left: int = status["scan_left"]
        return left

    def verify(self) -> None:
        for worker in self.workers:
            worker.verify()
        self.check()

    def check(self) -> None:
        wrong = [line for worker in self.workers for line in worker.wrong]
        assert not wrong, "\n".join(wrong[:20])

    def counts(self) -> dict[tuple[str, str], int]:
        out: dict[tuple[str, str], int] = {}
        for worker in self.workers:
            for what, n in list(worker.counts.items()):
                out[what] = out.get(what, 0) + n
        return out

    def end(self) -> None:
        for worker in self.workers:
            worker.end()


@pytest.fixture
def torment(start_process: Any, connect: Connect, tmp_path: Path) -> Any:
    made: list[Torment] = []

    def make(sizes: dict[str, Any], seed: int) -> Torment:
        made.append(Torment(start_process, connect, tmp_path, sizes, seed))
        return made[-1]

    yield make
    for one in made:
        one.end()


def run(torment: Torment, kills: int) -> None:
    for _ in range(kills):
        torment.kill()
        torment.restart()
        torment.verify()
    counts = torment.counts()
    assert torment.recovered
    if not torment.rules.evicts:
        assert torment.durable  # there was something to be lost
    print(f"{kills} kills, {torment.durable} durable blocks at them, {torment.recovered} recovered", end="; ")
    print(f"{torment.during_scan} went on during the scan; {counts}")


@pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)
@pytest.mark.parametrize(("sizes", "kills"), [(ROOMY, 6), (TIGHT, 4)], ids=["roomy", "tight"])
def test_a_node_that_is_killed_keeps_its_promises(
    torment: Callable[..., Torment], sizes: dict[str, Any], kills: int
) -> None:
    run(torment(sizes, 1), kills)


@pytest.mark.parametrize("fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True)
def test_the_same_over_verbs(torment: Callable[..., Torment]) -> None:
    run(torment(ROOMY, 2), 3)


@pytest.mark.slow  # 240 kills, eight to eleven minutes: two to three seconds a kill
@pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)
@pytest.mark.parametrize("sizes", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("seed", [11, 12])
def test_hundreds_of_kills(torment: Callable[..., Torment], sizes: dict[str, Any], seed: int) -> None:
    run(torment(sizes, seed), 60)

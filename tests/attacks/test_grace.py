"""The attack on "one READ, one clock": not one wrong byte may be accepted.

The argument stands at the heads of memkv/native/get.c and store/native/quarantine.c. Here a node with far too
little memory and a grace period of milliseconds is written to at full speed, with evictions and deletions,
and two peers read all the while. One goes by its clock; the other is strict and its clock stands still. Both
are stopped for longer than the grace period again and again. Every block that they accept has to be one whole
put of its key, and none that had been out of sight, and acknowledged so, before the get was called.

On tcp neither a reader's clock nor the epoch is asked: each response carries the responder's own times of its
first and last byte. So there the frozen clock changes nothing, and what can go wrong is a response that
stalls half-way.

The second half proves that the attack would find something: without the time check, with a frozen clock in
plain mode, with the quarantine cut short, wrong bytes are accepted, and seen.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .churn import Board
from .conftest import Child

Start = Callable[[str, dict[str, Any]], Child]
KIB, MIB = 1 << 10, 1 << 20

# bytes, first block, blocks, of them in a batch
SORTS = [(4 * KIB, 0, 1024, 60), (64 * KIB, 1024, 24, 2), (256 * KIB, 1048, 8, 1)]
BLOCKS = 1056


def attack(
    start: Start, tmp_path: Path, fabric: str, grace_ms: int, gets: int, seconds: float
) -> dict[str, Any]:
    """Until each reader has looked at ``gets`` blocks, or for ``seconds``; what everybody reports."""
    board = Board(tmp_path / "board", BLOCKS)
    config = {
        "fabric": fabric,
        "grace_ms": grace_ms,
        "memory": 9 * MIB,
        "slab_bytes": MIB,
        "block_bytes": 256 * KIB,
        "align": 512,
    }
    node = start("node", {"config": config, "board": str(tmp_path / "board")})
    common = {
        "address": node.line()["address"],
        "fabric": fabric,
        "board": str(tmp_path / "board"),
        "blocks": BLOCKS,
        "sorts": SORTS,
    }
    writers = [
        start("write", {**common, "seed": i, "share": i, "shares": 2, "delete": 0.2, "hasty": False})
        for i in range(2)
    ]
    plain = start("read", {**common, "seed": 10, "place": 0, "strict": False, "test": ""})
    strict = start("read", {**common, "seed": 11, "place": 1, "strict": True, "test": "frozen clock"})
    for child in (*writers, plain, strict):
        child.line()
    grace, until = grace_ms / 1000, time.monotonic() + seconds
    while time.monotonic() < until and (min(board.progress[:2]) < gets or min(plain.stops, strict.stops) < 3):
        time.sleep(random.uniform(0.02, 0.2))
        random.choice((plain, strict)).pause(grace * random.uniform(1.2, 4))
    readers = {"plain": plain.end(), "strict": strict.end()}
    stops = {"plain": plain.stops, "strict": strict.stops}
    return {
        "readers": readers,
        "writers": [w.end() for w in writers],
        "stops": stops,
        "node": node.ask(do="stats"),
    }


def verdict(result: dict[str, Any], report: Callable[..., None]) -> None:
    """Not one wrong byte; and there was an attack."""
    stats = result["node"]
    report(
        **result["readers"],
        stops=result["stops"],
        evictions=stats["evictions"],
        deletes=stats["deletes"],
        puts=stats["puts"],
        slabs_retired=stats["slabs_retired"],
    )
    assert stats["check"] == 0, f"the node's own invariants: line {stats['check']}"
    assert stats["evictions"] > 0
    assert stats["deletes"] > 0
    for name, reader in result["readers"].items():
        assert not reader["wrong"], f"{name}: {reader['wrong_count']} accepted wrongly"
        assert reader["statuses"].get("HIT", 0) > 0
        assert reader["outdated"] > 0, "no location was ever out of date"
        assert reader["cached"] > 0
        assert result["stops"][name] > 0
        assert "PENDING" not in reader["statuses"]
        assert reader["gets"] > 0.98 * sum(reader["statuses"].values()), "too few gets came to a READ"


GRACE_MS = {"tcp": 10, "verbs": 40}


def test_no_wrong_byte_under_churn(
    start: Start, tmp_path: Path, fabric_name: str, report: Callable[..., None]
) -> None:
    gets = {"tcp": 100_000, "verbs": 20_000}[fabric_name]
    verdict(attack(start, tmp_path, fabric_name, GRACE_MS[fabric_name], gets, 20), report)


@pytest.mark.slow
def test_no_wrong_byte_in_a_long_churn(
    start: Start, tmp_path: Path, fabric_name: str, report: Callable[..., None]
) -> None:
    """A million blocks by each reader over tcp, a hundred thousand over verbs: minutes, ten at most."""
    gets = {"tcp": 1_000_000, "verbs": 100_000}[fabric_name]
    result = attack(start, tmp_path, fabric_name, GRACE_MS[fabric_name], gets, 600)
    verdict(result, report)
    assert min(r["gets"] for r in result["readers"].values()) >= gets


# --- that it would find something ---

BIG = 24 * MIB


class Duel:
    """One reader against :class:`~tests.attacks.churn.Flip`, over a single large block in an arena that holds
    no other.
    """

    def __init__(
        self,
        start: Start,
        tmp_path: Path,
        fabric: str,
        *,
        grace_ms: int,
        strict: bool = False,
        test: str = "",
        cut: bool = False,
        until_wrong: bool = True,
    ) -> None:
        self.fabric, self.grace = fabric, grace_ms / 1000
        board, whole = str(tmp_path / "board"), BIG + 4 * KIB
        self.board = Board(board, 2)
        config = {
            "fabric": fabric,
            "grace_ms": grace_ms,
            "memory": whole,
            "slab_bytes": whole,
            "block_bytes": BIG,
            "align": 4096,
        }
        self.node = start("node", {"config": config, "board": board})
        spec = {
            "address": self.node.line()["address"],
            "fabric": fabric,
            "board": board,
            "blocks": 2,
            "sorts": [(BIG, 0, 1, 1)],
            "seed": 1,
            "place": 0,
            "strict": strict,
            "test": test,
            "until_wrong": until_wrong,
        }
        self.reader = start("read", spec)
        self.reader.line()
        self.node.ask(do="flip", **{"with": {"nbytes": BIG, "live": (0.0, 0.06), "cut": cut}})

    def run(self, seconds: float) -> dict[str, Any]:
        """Until the reader has accepted wrong bytes, at most ``seconds``. Over tcp it is stopped again and
        again, since a response over a loopback socket is quick unless nobody takes it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.reader.running:
            time.sleep(random.uniform(0.005, 0.03))
            if self.fabric == "tcp":
                self.reader.pause(min(max(0.05, 2 * self.grace), 0.15))
        result = self.reader.end()
        result["rounds"] = self.node.ask(do="stats")["rounds"]
        return result


def found(result: dict[str, Any], report: Callable[..., None]) -> None:
    report(found=result["wrong"][:1], gets=result["gets"], rounds=result["rounds"])
    assert result["wrong"], "the attack is blind"


def test_without_the_time_check_wrong_bytes_are_accepted(
    start: Start, tmp_path: Path, fabric_name: str, report: Callable[..., None]
) -> None:
    found(Duel(start, tmp_path, fabric_name, grace_ms=10, test="no time check").run(60), report)


@pytest.mark.parametrize("fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True)
def test_with_a_frozen_clock_a_plain_reader_accepts_wrong_bytes(
    start: Start, tmp_path: Path, fabric_name: str, report: Callable[..., None]
) -> None:
    """Over verbs alone: on tcp it is the responder's clock that counts."""
    found(Duel(start, tmp_path, fabric_name, grace_ms=10, test="frozen clock").run(60), report)


def test_with_the_quarantine_cut_short_wrong_bytes_are_accepted(
    start: Start, tmp_path: Path, fabric_name: str, report: Callable[..., None]
) -> None:
    """Every check of the reader's is in force, its READs are in time: the node breaks its word."""
    found(Duel(start, tmp_path, fabric_name, grace_ms=4000, cut=True).run(60), report)


@pytest.mark.parametrize(
    ("strict", "test"), [(False, ""), (True, "frozen clock")], ids=["plain", "strict with a frozen clock"]
)
def test_with_all_checks_the_same_duel_is_safe(
    start: Start, tmp_path: Path, fabric_name: str, strict: bool, test: str, report: Callable[..., None]
) -> None:
    """Over tcp with a grace period that a response may keep, so that there is also something to accept."""
    grace_ms = {"tcp": 60, "verbs": 10}[fabric_name]
    duel = Duel(start, tmp_path, fabric_name, grace_ms=grace_ms, strict=strict, test=test, until_wrong=False)
    result = duel.run(4)
    report(**result)
    assert not result["wrong"]
    assert result["outdated"] > 0, "nothing was ever refused"
    assert result["statuses"].get("HIT", 0) > 0 or fabric_name == "verbs"
    assert result["rounds"] > 0

"""A peer's process in a replay: finds, gets and puts the blocks of the prompts that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..keys import KeySpace, keys_from_ids
from ..peer import Statuses
from ..rdma.memory import HostMemory
from . import pattern
from .cluster import Wish
from .lanes import TIMEOUT, clock
from .rig import heading, open_peer
from .sample import GOOD_GET, GOOD_PUT, Keys, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """What a player needs to know; ``longest``: blocks of the longest prompt, ``distinct``: of all."""

    addresses: Sequence[str]
    wish: Wish
    block_bytes: int
    batch: int
    verify: bool
    salt: str
    longest: int
    distinct: int


@dataclass(slots=True)
class Outcome:
    """What one request came to. Times in µs, 0 where there was no such call."""

    held: int
    match_us: float
    get: Sample
    put: Sample


class _Player:
    """A peer with a buffer for the longest prompt."""

    def __init__(self, play: Play) -> None:
        self.size, self.batch, self.verify = play.block_bytes, play.batch, play.verify
        self.peer = open_peer(
            play.addresses,
            play.wish,
            f"replay-{play.salt}",
            self.size,
            channels=2,
            cache=2 * play.distinct,
        )
        places = max(play.longest, play.batch)
        self.memory = HostMemory(places * self.size)
        self.rows = self.memory.array[: places * self.size].reshape(places, self.size)
        self.rows[:] = 0
        self.slices = self.peer.register(self.memory.array).split(self.size)
        self.common = pattern.ramp(self.size)
        self.salt = play.salt

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
        sample, status = self._timed(self.peer.get_into, keys, GOOD_GET)
        if self.verify:
            sample.wrong = int(
                (pattern.wrong(self.rows[:n], keys, self.common) & np.isin(status, GOOD_GET)).sum()
            )
        return sample

    def _put(self, keys: Keys) -> Sample:
        pattern.fill(self.rows[: len(keys)], keys, self.common)
        return self._timed(self.peer.put_from, keys, GOOD_PUT)[0]

    def _timed(self, call: Callable[..., Statuses], keys: Keys, good: Any) -> tuple[Sample, Statuses]:
        """One call, timed and judged."""
        sample = Sample()
        start = clock()
        status = call(keys, self.slices[: len(keys)], timeout=TIMEOUT)
        sample.ns = clock() - start
        sample.times_us.append(sample.ns / 1000)
        sample.judge(status, good)
        sample.nbytes = sample.hits * self.size
        return sample, status

    def again(self, ids: Sequence[int]) -> Sample:
        """Gets many blocks, batch by batch."""
        total = Sample()
        for i in range(0, len(ids), self.batch):
            total.add(self._get(self.keys(ids[i : i + self.batch])))
        return total


def run(pipe: Connection, play: Play) -> None:
    """The process: answers (name of a method, argument) with what it returns, after the heading."""
    player = _Player(play)
    try:
        pipe.send(heading(player.peer, player.memory))
        while True:
            name, argument = pipe.recv()
            pipe.send(getattr(player, name)(argument))
    finally:
        player.peer.close()

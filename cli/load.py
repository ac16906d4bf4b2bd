"""A load: one peer with one or more threads that get and put, for as long as asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..peer import Peer
from ..rdma.errors import LocalError
from .lanes import TIMEOUT, Lane
from .sample import Plan, Sample, together


class Load:
    """A peer under load.

    :param peer: made with ``max_channels`` of at least threads times depth; the caller closes it.
    :param part: which of ``parts`` processes this is: it takes its share of the working set.
    """

    def __init__(self, peer: Peer, plan: Plan, part: int = 0, parts: int = 1) -> None:
        self.peer, self.plan = peer, plan
        shares = np.array_split(np.arange(plan.blocks), plan.threads * parts)
        if any(not len(share) for share in shares):
            raise LocalError(f"{plan.blocks} blocks for {len(shares)} threads", "a larger --working-set")
        first = part * plan.threads
        self.lanes = [
            Lane(peer, plan, first + i, plan.keys(int(share[0]), len(share)))
            for i, share in enumerate(shares[first : first + plan.threads])
        ]
        self._pool = ThreadPoolExecutor(plan.threads, "load") if plan.threads > 1 else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        for lane in self.lanes:
            lane.close()

    def prepare(self) -> Sample:
        """Puts the working set. Not timed."""
        return self._each(Lane.prepare)

    def clean(self) -> None:
        """Deletes the working set."""
        for lane in self.lanes:
            self.peer.delete(lane.keys, timeout=TIMEOUT)

    def get(self, seconds: float, *, cold: bool = False, checksum: bool | None = None) -> Sample:
        """Gets the working set again and again until the clock has run for ``seconds``."""
        sums = self.plan.checksum if checksum is None else checksum
        return self._until(seconds, lambda lane: lane.get(cold, sums))

    def put(self, seconds: float, most_bytes: int) -> Sample:
        """Puts new blocks until the clock has run for ``seconds``, or about ``most_bytes`` have been put."""
        return self._until(seconds, Lane.put, most_bytes)

    def mixed(self, seconds: float, put_share: float, most_bytes: int) -> tuple[Sample, Sample]:
        """Gets of the working set and puts of new blocks, batch by batch, as ``put_share`` says: (gets,
        puts)."""
        parts: list[tuple[Sample, Sample]] = []

        def stretch(lane: Lane) -> Sample:
            gets, puts = lane.mixed(put_share)
            parts.append((gets, puts))
            return Sample(gets.nbytes + puts.nbytes, gets.ns, hits=gets.hits + puts.hits)

        whole = self._until(seconds, stretch, most_bytes)
        total = Sample(), Sample()
        for part in parts:
            for into, sample in zip(total, part, strict=True):
                into.add(sample)
        total[0].ns = total[1].ns = whole.ns
        return total

    def _each(self, work: Callable[[Lane], Sample]) -> Sample:
        """Runs ``work`` for every lane at once."""
        if self._pool is None:
            return work(self.lanes[0])
        return together(list(self._pool.map(work, self.lanes)))

    def _until(
        self, seconds: float, stretch: Callable[[Lane], Sample], most_bytes: int | None = None
    ) -> Sample:
        total = Sample()
        while True:
            total.add(self._each(stretch))
            enough = most_bytes is not None and total.nbytes * 2 > most_bytes
            if total.ns >= seconds * 1e9 or enough or not total.hits:
                return total

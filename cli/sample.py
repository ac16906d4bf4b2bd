"""What a load was asked for and what came of it: plain data, which also travels between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..keys import KeySpace, keys_from_ids
from ..status import Status, describe

Keys = npt.NDArray[np.uint8]
Statuses = npt.NDArray[np.uint8]

GOOD_GET = (Status.HIT,)
GOOD_PUT = (Status.STORED, Status.EXISTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a load consists of."""

    size: int
    batch: int
    blocks: int  # of the working set
    threads: int = 1
    depth: int = 1  # batches under way in each thread's hands
    verify: bool = True
    checksum: bool = False
    gpu: str = ""  # like cuda:0: where the blocks go to and come from; else host memory
    salt: str = ""  # keeps keys of different loads apart

    def keys(self, first: int, count: int) -> Keys:
        """Keys of blocks by number."""
        space = KeySpace(
            model="memkv-bench", dtype="bytes", layout=str(self.size), block_tokens=512, salt=self.salt
        )
        return keys_from_ids(np.arange(first, first + count), space=space)


@dataclass(slots=True)
class Sample:
    """What was done while the clock ran. ``times_us``: of each batch; ``wrong``: hits with other bytes than
    due."""

    nbytes: int = 0
    ns: int = 0
    times_us: list[float] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    errors: int = 0
    wrong: int = 0
    first_error: str = ""

    @property
    def gbps(self) -> float:
        return self.nbytes / self.ns if self.ns else 0.0

    def add(self, other: Sample) -> None:
        """Adds what was done after this."""
        self.nbytes += other.nbytes
        self.ns += other.ns
        self.times_us += other.times_us
        self.count(other)

    def count(self, other: Sample, hits: bool = True) -> None:
        """Adds only the outcomes."""
        self.hits += other.hits if hits else 0
        self.misses += other.misses
        self.errors += other.errors
        self.wrong += other.wrong
        self.first_error = self.first_error or other.first_error

    def judge(self, status: Statuses, good: Sequence[Status]) -> None:
        """Counts a batch's statuses; MISS and STALE are misses, TIMEOUT and CORRUPT are errors like any
        other."""
        hit = np.isin(status, good)
        bad = status[~hit & (status != Status.MISS) & (status != Status.STALE)]
        self.hits += int(hit.sum())
        self.errors += len(bad)
        self.misses += len(status) - int(hit.sum()) - len(bad)
        if len(bad) and not self.first_error:
            self.first_error = describe(int(bad[0]))


def together(samples: Sequence[Sample]) -> Sample:
    """What threads or processes did side by side: all bytes, over the longest of the times."""
    total = Sample(ns=max(s.ns for s in samples))
    for s in samples:
        total.nbytes += s.nbytes
        total.times_us += s.times_us
        total.count(s)
    return total

"""What a get costs the thread that makes it, for batches of several sizes: the part of the command latency
that counts processor time instead of the clock.

The kernel tells a thread its time in user mode and in system mode (``getrusage(RUSAGE_THREAD)``). The sum is
exact; on most kernels the division is sampled by a tick of 1 to 10 ms, so it takes hundreds of ticks to mean
something: 1 s at 250 Hz and a share of one tenth is right to within a fifth, 4 s to within a tenth.

Our own code runs in user mode, C and Python; posting, copying and sleeping are the kernel's. Spinning for
completions is waiting, as long as the device takes; so while this counts, threads sleep at once.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from ..peer import Peer
from ..rdma.native._rdma import lib
from .lanes import TIMEOUT, Lane
from .report import Row

BATCHES = (1, 16, 64, 256, 1024)
SURE_SECONDS = 0.2  # of system time; a kernel that counts no user time beside so much does not count it
AT_ONCE = 64  # calls between two looks at the clock, fewer of large batches


@contextlib.contextmanager
def asleep() -> Iterator[None]:
    """Threads of this process do not spin while they wait."""
    before = int(lib.mkv_spin_ns())
    lib.mkv_set_spin_ns(0)
    try:
        yield
    finally:
        lib.mkv_set_spin_ns(before)


def _used() -> tuple[float, float]:
    """This thread's seconds in user mode and in system mode."""
    now = resource.getrusage(resource.RUSAGE_THREAD)
    return now.ru_utime, now.ru_stime


def _hits(peer: Peer) -> int:
    return sum(int(node.get("hits", 0)) for node in peer.stats()["nodes"].values())


@dataclass(slots=True)
class Cost:
    """Of gets of ``batch`` blocks, in all rounds."""

    batch: int
    user_s: float = 0.0
    system_s: float = 0.0
    blocks: int = 0
    calls: int = 0
    hits: int = 0
    user_us: list[float] = field(default_factory=list)  # of a block, round by round

    def add(self, peer: Peer, lane: Lane, seconds: float) -> None:
        """Gets until this thread has used ``seconds`` of processor time."""
        n = len(lane.keys) // self.batch  # prepared beforehand: slicing is the caller's
        parts = [slice(i * self.batch, (i + 1) * self.batch) for i in range(n)]
        pairs = [(lane.keys[part], lane.slices[part]) for part in parts]
        each = max(1, AT_ONCE // self.batch)
        hits, calls = _hits(peer), 0
        user, system = now = _used()
        while not calls or sum(now) < user + system + seconds:
            for _ in range(each):
                keys, slices = pairs[calls % n]
                peer.get_into(keys, slices, timeout=TIMEOUT)
                calls += 1
            now = _used()
        self.user_s += now[0] - user
        self.system_s += now[1] - system
        self.calls += calls
        self.blocks += calls * self.batch
        self.user_us.append((now[0] - user) * 1e6 / (calls * self.batch))
        self.hits += _hits(peer) - hits

    @property
    def call_us(self) -> float:
        """User time of a call."""
        return self.user_s * 1e6 / max(1, self.calls)


def rows(size: int, costs: list[Cost]) -> list[Row]:
    """One for each batch size; the last says what is a call's and what is a block's."""
    out = []
    for cost in costs:
        row = Row(what=f"cpu of a get of {cost.batch}", size=size, batch=cost.batch)
        row.hits, row.misses = cost.hits, 0
        row.errors = max(0, cost.blocks - cost.hits)  # they are all there
        if cost.user_s == 0.0 and cost.system_s > SURE_SECONDS:
            row.note = "this kernel counts all processor time as its own"
            out.append(row)
            continue
        row.extra["user_us_a_block"] = median(cost.user_us) if cost.user_us else None
        row.extra["kernel_us_a_block"] = cost.system_s * 1e6 / max(1, cost.blocks)
        row.extra["user_us_a_call"] = cost.call_us
        out.append(row)
    first, last = costs[0], costs[-1]
    if "user_us_a_call" in out[0].extra and "user_us_a_call" in out[-1].extra:
        slope = (last.call_us - first.call_us) / (last.batch - first.batch)
        out[-1].extra["user_us_each_block_more"] = slope
    return out

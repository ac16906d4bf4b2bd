"""One megabyte READ from this process by itself over a fabric, compared byte by byte, and timed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np

from ..rdma import jobs
from ..rdma.errors import MemKVError
from ..rdma.fabric import Domain, Fabric
from ..rdma.loopback import to_self

NBYTES = 1 << 20
ROUNDS = 8
SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a self-test found."""

    fabric: str
    ok: bool
    why: str
    first_s: float = 0.0  # the first READ
    best_s: float = 0.0  # the best of them


def run(fabric: Fabric, host: str = "127.0.0.1", nbytes: int = NBYTES) -> Outcome:
    """:param host: where the fabric's data connections are taken (tcp)."""
    with contextlib.ExitStack() as stack:
        try:
            domain = fabric.domain()
            stack.callback(domain.close)
            return _read(domain, host, nbytes, stack)
        except (MemKVError, OSError) as exc:
            return Outcome(fabric.name, False, str(exc))


def _read(domain: Domain, host: str, nbytes: int, stack: contextlib.ExitStack) -> Outcome:
    name = domain.fabric.name
    source = np.random.default_rng().integers(0, 256, nbytes, np.uint8)
    sink = np.zeros(nbytes, np.uint8)
    offered = domain.register(source.ctypes.data, nbytes, remote_read=True, owner=source)
    landing = domain.register(sink.ctypes.data, nbytes, owner=sink)
    channel = to_self(domain, domain, offered, host, SECONDS, stack)
    read = np.zeros(1, jobs.READ)
    read[0]["region"], read[0]["nseg"] = offered.desc.id, 1
    read[0]["seg"][0] = (0, landing.id, nbytes)
    took = []
    for _ in range(ROUNDS):
        sink.fill(0)
        start = time.perf_counter()
        outcome = jobs.read_batch(channel, read, SECONDS)[0]
        took.append(time.perf_counter() - start)
        if outcome["status"]:
            code, vendor = -int(outcome["status"]), int(outcome["vendor"])
            return Outcome(name, False, f"the READ failed: error {code}, vendor error {vendor:#x}")
        if not np.array_equal(source, sink):
            wrong = int(np.flatnonzero(source != sink)[0])
            return Outcome(name, False, f"the bytes that arrived differ from byte {wrong} on")
    return Outcome(name, True, f"{nbytes} bytes, all as they should be", took[0], min(took))

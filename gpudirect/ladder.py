"""Which way blocks go into and out of GPU memory, and why: dma-buf, else nvidia-peermem, else staged.

That a registration succeeds says little. On some machines a READ out of a GPU's BAR crawls or never ends
while a READ into it flies, so get and put have a rung each, and what decides is a READ of our own that was
verified and timed each way (:mod:`.probe`).

:class:`Answers` is everything that a machine was asked, plain enough to be recorded as JSON and replayed in a
test; :func:`decide` is a pure function of it. Nothing is decided for good: :class:`Ladder` asks again, later
and later, while there is a higher rung to be had, and at once steps down from one that failed.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from . import order

Direction = Literal["get", "put"]
RUNGS = ("dma-buf", "peermem", "staged")
DIRECT = RUNGS[:2]
WORTH = 0.5  # a direct way slower than this part of host memory's speed loses to staging
FIRST_RETRY, LAST_RETRY = 2.0, 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Nic:
    """A device of the verbs fabric: whether its driver takes dma-bufs, and what it said."""

    name: str
    driver: str
    dma_buf: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried. ``errno`` is 0 where it worked, or where it was not tried (``text`` says)."""

    ok: bool = False
    errno: int = 0
    text: str = "not tried"


@dataclass(frozen=True, slots=True)
class Read:
    """A READ from ourselves, verified byte by byte. ``gbps``: GB/s (10⁹ bytes)."""

    ok: bool = False
    gbps: float = 0.0
    text: str = "not tried"


@dataclass(frozen=True, slots=True)
class Tried:
    """How far one rung came: handing the memory out, registering it, READing into it and out of it."""

    export: Step = Step()  # dma-buf only
    register: Step = Step()
    get: Read = Read()
    put: Read = Read()


@dataclass(frozen=True, slots=True)
class Answers:
    """What this machine said about one GPU. Defaults are the answers of a machine that has nothing."""

    fabric: str = ""  # "verbs", "tcp"
    kernel: str = ""
    cuda: str = ""  # the driver's version, like "12.4"
    cuda_missing: str = ""  # why there is no CUDA
    gpu: str = ""  # name and index
    gpu_dma_buf: bool = False
    gpu_direct: bool = False
    ordering: int = 0  # CUDA's number, see order.py
    flush_options: int = 0
    memory: str = ""  # why this memory cannot be given to a NIC
    nics: tuple[Nic, ...] = ()
    peermem: str = "absent"  # the module: "loaded", "loadable", "absent"
    dma_buf: Tried = Tried()
    by_peermem: Tried = Tried()
    host: Read = Read()  # the same READ between two places in host memory


@dataclass(frozen=True, slots=True)
class Rung:
    """The way blocks go, and why this one: each higher rung with what spoke against it."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    get: Rung
    put: Rung

    def of(self, direction: Direction) -> Rung:
        return self.get if direction == "get" else self.put


def decide(a: Answers, lost: dict[tuple[str, Direction], str] | None = None) -> Decision:
    """The rung for each direction.

    :param lost: (rung, direction) that have failed in use, with the reason: they are not taken again before
        they have been probed anew.
    """
    return Decision(_decide(a, "get", lost or {}), _decide(a, "put", lost or {}))


def _decide(a: Answers, direction: Direction, lost: dict[tuple[str, Direction], str]) -> Rung:
    why = _nothing_direct(a)
    if why:
        return Rung("staged", why)
    against: list[str] = []
    for name in DIRECT:
        obstacle = lost.get((name, direction)) or _obstacle(a, name, direction)
        if not obstacle:
            tried = _tried(a, name)
            read: Read = getattr(tried, direction)
            way = "into" if direction == "get" else "out of"
            against.append(f"READs {way} {a.gpu} arrive whole, {_speeds(read, a.host)}")
            return Rung(name, "; ".join(against))
        against.append(f"{name}: {obstacle}")
    return Rung("staged", "; ".join(against))


def rungs(a: Answers, direction: Direction) -> list[tuple[str, bool, str]]:
    """Every rung: its name, whether it can be used, and why, or why not."""
    if why := _nothing_direct(a):
        found = [(name, False, why) for name in DIRECT]
    else:
        found = []
        for name in DIRECT:
            obstacle = _obstacle(a, name, direction)
            found.append(
                (name, not obstacle, obstacle or _speeds(getattr(_tried(a, name), direction), a.host))
            )
    staged = f"no CUDA: {a.cuda_missing}" if a.cuda_missing else "through pinned host memory, over any fabric"
    return [*found, ("staged", not a.cuda_missing, staged)]


def _nothing_direct(a: Answers) -> str:
    """Why no direct rung needs to be looked at."""
    if a.cuda_missing:
        return f"no CUDA: {a.cuda_missing}"
    if a.fabric != "verbs":
        return f"the {a.fabric or 'missing'} fabric reaches host memory only"
    return a.memory


def _obstacle(a: Answers, name: str, direction: Direction) -> str:
    tried = _tried(a, name)
    if name == "dma-buf":
        if not a.gpu_dma_buf:
            return f"CUDA {a.cuda} exports none here (open kernel modules and driver 515 or later do)"
        if without := [n for n in a.nics if not n.dma_buf]:
            return "; ".join(
                f"{n.name} ({n.driver}) takes none{f': {n.note}' if n.note else ''}" for n in without
            )
        if not tried.export.ok:
            return f"exporting failed: {_step(tried.export)}"
    else:
        if a.peermem != "loaded":
            do = ": modprobe nvidia_peermem" if a.peermem == "loadable" else ""
            return f"the module is {a.peermem}{do}"
        if not a.gpu_direct:
            return "this GPU has no GPUDirect RDMA"
    if not tried.register.ok:
        return f"registering failed: {_step(tried.register)}"
    if direction == "get" and order.flush(a.ordering, a.flush_options) == "impossible":
        return "what a NIC writes cannot be made visible to kernels on this GPU"
    read: Read = getattr(tried, direction)
    if not read.ok:
        return f"a READ {'into' if direction == 'get' else 'out of'} it failed: {read.text}"
    if a.host.ok and read.gbps < WORTH * a.host.gbps:
        return f"slow, {_speeds(read, a.host)}"
    return ""


def _names(a: Answers) -> tuple[str, str]:
    taken = decide(a)
    return taken.get.name, taken.put.name


def _tried(a: Answers, name: str) -> Tried:
    return a.dma_buf if name == "dma-buf" else a.by_peermem


def _step(step: Step) -> str:
    names = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}  # Linux gives that number two names
    return f"{step.text} ({names.get(step.errno, step.errno)})" if step.errno else step.text


def _speeds(read: Read, host: Read) -> str:
    beside = f" (host memory: {host.gbps:.2f})" if host.ok else ""
    return f"{read.gbps:.2f} GB/s{beside}"


@dataclass(slots=True)
class Ladder:
    """The decision for one GPU, kept up to date.

    :param probe: asks the machine; takes seconds and must not raise for what is merely absent.
    :param clock: seconds.
    """

    probe: Callable[[], Answers]
    clock: Callable[[], float] = time.monotonic
    answers: Answers | None = None
    probes: int = 0
    _lost: dict[tuple[str, Direction], str] = field(default_factory=dict)
    _wait: float = FIRST_RETRY
    _next: float = 0.0
    _failed_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decision(self, memory: str = "") -> Decision:
        """The rungs to take now. Probes if that was never done, or if it is time to look for a higher one.

        :param memory: what speaks against some memory in particular (``Memory.reason``).
        """
        with self._lock:
            if self.answers is None or self._due():
                self._ask()
            assert self.answers is not None
            answers = replace(self.answers, memory=memory) if memory else self.answers
            return decide(answers, self._lost)

    def failed(self, rung: str, direction: Direction, why: str) -> Decision:
        """A rung has failed in use: the next one, at once. It is tried again when it has been probed anew."""
        with self._lock:
            if self.answers is None:
                self._ask()
            assert self.answers is not None
            now = self.clock()
            if now - self._failed_at > 2 * LAST_RETRY:
                self._wait = FIRST_RETRY  # it has worked for long
            self._lost[rung, direction] = f"failed in use: {why}"
            self._failed_at = now
            self._next = now + self._wait
            self._wait = min(LAST_RETRY, self._wait * 2)
            return decide(self.answers, self._lost)

    def _due(self) -> bool:
        assert self.answers is not None
        taken = decide(self.answers, self._lost)
        best = all(taken.of(d).name == DIRECT[0] for d in ("get", "put"))
        return not best and self.clock() >= self._next

    def _ask(self) -> None:
        """The longer nothing better is found, or what is found fails in use, the later it is tried again."""
        before = self.answers and _names(self.answers)
        failed, self._lost = bool(self._lost), {}
        self.answers = self.probe()
        self.probes += 1
        if _names(self.answers) != before:
            self._wait = FIRST_RETRY
        elif not failed:
            self._wait = min(LAST_RETRY, self._wait * 2)
        self._next = self.clock() + self._wait

"""The command flash: staged gets and write-behind beside fio, which reads the same file and writes its like.

The working set is several times the arena and is walked in an order shuffled once, so a block that comes by
again has left memory long ago; what was found there all the same is not counted as speed. Each block size has
a store of its own::

    PATH (memkv's store)                        PATH.fio, or the device behind the store
    │ tables │ working set │ puts of a turn │   │ as large as the puts of a turn │
             ▲ fio randread, staged gets                ▲ fio write
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..peer import Peer
from ..rdma.errors import LocalError, MemKVError
from ..rdma.memory import HostMemory
from . import fio, pattern
from .cluster import Nodes, Wish, extent_bytes
from .compare import LIMIT, Contestant, contest
from .flash_rig import FlashRig, FlashStats, room
from .lanes import TIMEOUT, clock
from .report import Row, Steps, size_text
from .rig import heading, open_peer
from .sample import GOOD_GET, GOOD_PUT, Keys, Plan, Sample, together

DURABLE_SECONDS = 120.0  # for what is dirty to be written
NOTES = (
    "GB/s: median over rounds; ratio: to fio in the same round, median over rounds.",
    "stage, staged get: payload of blocks that came from flash; put: until acknowledged, or until written.",
    "get from memory: the fabric's share, the same batch again and again; nothing staged can be faster.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command's options; sizes in bytes, 0 where something is worked out."""

    wish: Wish
    flash: str
    force: bool
    memory: int
    sizes: tuple[int, ...]
    working_set: int
    put_bytes: int
    batch: int
    depth: int
    grace_ms: int
    seconds: float
    rounds: int
    verify: bool

    @property
    def slot_seconds(self) -> float:
        return self.seconds / self.rounds


def run(settings: Settings) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes."""
    if settings.wish.nodes:
        raise LocalError("the flash of nodes that exist cannot be given to fio", "leave --nodes out")
    rows: list[Row] = []
    head: dict[str, Any] = {}
    notes = list(NOTES)
    with Steps() as steps:
        for size in settings.sizes:
            blocks = _blocks(settings, size)
            puts = max(settings.batch * settings.depth, settings.put_bytes // size)
            least = room(blocks + 2 * puts, size)
            with FlashRig(settings.flash, least, force=settings.force or bool(head), steps=steps) as store:
                found, more = _one(settings, size, blocks, puts, store, steps)
                head = head or found
                rows += more
                if not store.direct:
                    notes.append(f"No O_DIRECT on {store.path}: the page cache serves both sides.")
    if fio.available():
        notes.append(f"{fio.available()}: there is no limit to divide by.")
    if settings.verify:
        notes.append(
            "The last batch of each lane and turn was compared with its keys, outside of the timed part."
        )
    return head, rows, notes


def _blocks(settings: Settings, size: int) -> int:
    blocks = (settings.working_set or 4 * settings.memory) // size
    if blocks * extent_bytes(size) < 2 * settings.memory:
        raise LocalError(
            "the working set is not even twice the arena: much of it would be got from memory",
            "a larger --working-set, or less --memory",
        )
    if settings.batch * settings.depth * extent_bytes(size) * 2 > settings.memory:
        raise LocalError("more blocks are under way than the arena holds", "--memory, --batch, --depth")
    return blocks


def _one(
    settings: Settings, size: int, blocks: int, puts: int, store: FlashRig, steps: Steps
) -> tuple[dict[str, Any], list[Row]]:
    """Heading and rows for one block size."""
    flags = [*store.flags, "--grace-ms", str(settings.grace_ms)]
    steps.now(f"{size_text(size)}: starting")
    with Nodes(settings.wish, memory=settings.memory, block_bytes=size, more=lambda _: flags) as nodes:
        peer = open_peer(
            nodes.addresses,
            settings.wish,
            f"bench-{secrets.token_hex(4)}",
            size,
            channels=settings.depth,
            cache=2 * blocks,
        )
        try:
            plan = Plan(
                size=size,
                batch=settings.batch,
                blocks=blocks,
                threads=settings.depth,
                verify=settings.verify,
                salt=secrets.token_hex(4),
            )
            load = FlashLoad(peer, plan, puts)
            head = heading(peer, load.lanes[0].memory) | store.heading() | load.stats.heading()
            head["grace"] = f"{settings.grace_ms} ms"
            limit = _Fio(settings, size, blocks, puts, store, load.stats)
            head["fio"] = limit.what
            try:
                steps.now(f"{size_text(size)}: putting {blocks} blocks")
                load.fill()
                limit.prepare()
                rows = contest(limit.reads(load), size=size, rounds=settings.rounds, steps=steps)
                rows += contest(limit.writes(load), size=size, rounds=settings.rounds, steps=steps)
            finally:
                limit.close()
            return head, rows
        finally:
            peer.close()


class _Fio:
    """fio's jobs beside a store, and the fields of contestants."""

    def __init__(
        self, settings: Settings, size: int, blocks: int, puts: int, store: FlashRig, stats: FlashStats
    ) -> None:
        said = stats.heading()
        uring = str(said["flash engine"]).startswith("io_uring")
        huge = "2 MiB" in str(said["arena pages"]).split("(")[0]
        depth = settings.batch * settings.depth
        self.settings = settings
        self.batch = settings.batch
        first = -(-store.data_at // size) * size
        self.read_job = fio.Job(
            path=store.path,
            offset=first,
            span=blocks * size,
            size=size,
            depth=depth,
            direct=store.direct,
            uring=uring,
            huge=huge,
        )
        self._scratch: Path | None = None
        if store.block_device:
            at = -(-store.size // size) * size
            if at + puts * size > store.device_bytes:
                raise LocalError(
                    f"{store.path} has no room behind the store for fio's writes",
                    f"--flash {store.path}:SIZE of at most {(store.device_bytes - puts * size) >> 20}m",
                )
            self.write_job = replace(self.read_job, offset=at, span=puts * size)
        else:
            self._scratch = store.path.with_name(store.path.name + ".fio")
            self.write_job = replace(self.read_job, path=self._scratch, offset=0, span=puts * size)
        engine, pages = "io_uring" if uring else "threads", "2 MiB" if huge else "4 KiB"
        self.what = f"{engine}, depth {depth}, {pages} pages"

    def prepare(self) -> None:
        """Writes fio's own span once, so that no later write changes a file's metadata."""
        if not fio.available():
            outcome = fio.run(self.write_job, "write", None)
            if outcome.note:
                raise MemKVError(outcome.note, "--flash")

    def reads(self, load: FlashLoad) -> list[Contestant]:
        seconds = self.settings.slot_seconds
        return [
            Contestant(("fio randread",), self._turn(self.read_job, "randread"), role=LIMIT, counts=False),
            Contestant(("stage",), lambda: [load.get(seconds, "stage")], self.batch),
            Contestant(("staged get",), lambda: [load.get(seconds, "get")], self.batch),
            Contestant(("get from memory",), lambda: [load.get(seconds, "hot")], self.batch),
        ]

    def writes(self, load: FlashLoad) -> list[Contestant]:
        return [
            Contestant(("fio write",), self._turn(self.write_job, "write"), role=LIMIT, counts=False),
            Contestant(("put to flash",), lambda: [load.put("flash")], self.batch),
            Contestant(("put, written behind",), lambda: [load.put("memory")], self.batch),
        ]

    def _turn(self, job: fio.Job, kind: str) -> Callable[[], Sequence[Sample] | str]:
        def turn() -> Sequence[Sample] | str:
            outcome = fio.run(job, kind, self.settings.slot_seconds)
            return outcome.note or [Sample(nbytes=outcome.nbytes, ns=outcome.ns)]

        return turn

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.unlink(missing_ok=True)


class FlashLane:
    """One thread's share of the keys, and room for its batch and for what it puts in a turn."""

    def __init__(self, peer: Peer, plan: Plan, keys: Keys, puts: int, number: int) -> None:
        self.peer, self.plan, self.keys = peer, plan, keys
        self.puts = max(plan.batch, puts // plan.batch * plan.batch)
        self.memory = HostMemory(self.puts * plan.size)
        self.rows = self.memory.array[: self.puts * plan.size].reshape(self.puts, plan.size)
        self.rows[:] = 0
        self.slices = peer.register(self.memory.array).split(plan.size)[: self.puts]
        self._common = pattern.ramp(plan.size)
        self._next = 0
        self._next_new = 1 << 40 | number << 32

    def fill(self) -> Sample:
        """Puts its keys, durably."""
        sample = Sample()
        for i in range(0, len(self.keys), self.plan.batch):
            keys = self.keys[i : i + self.plan.batch]
            pattern.fill(self.rows[: len(keys)], keys, self._common)
            sample.judge(self._put(keys, self.slices[: len(keys)], "flash"), GOOD_PUT)
        return sample

    def get(self, seconds: float, how: str) -> Sample:
        """Batches of keys in turn, until the time is over; "get": the last is verified. "stage": brought to
        the node's memory, not here. "hot": one batch only, again and again."""
        sample = Sample()
        n = self.plan.batch
        self.rows[:n, ::8] = 0
        keys = self._next_keys()
        for _ in range(3 if how == "hot" else 0):  # what is used twice stays in memory
            self.peer.get_into(keys, self.slices[:n], timeout=TIMEOUT)
        start = clock()
        while sample.ns < seconds * 1e9:
            if how != "hot":
                keys = self._next_keys()
            before = clock()
            if how == "stage":
                status = self.peer.stage(keys, timeout=TIMEOUT)
            else:
                status = self.peer.get_into(keys, self.slices[:n], timeout=TIMEOUT)
            now = clock()
            sample.times_us.append((now - before) / 1000)
            sample.ns = now - start
            sample.judge(status, GOOD_GET)
        if self.plan.verify and how != "stage":
            bad = pattern.wrong(self.rows[:n], keys, self._common)
            sample.wrong = int((bad & np.isin(status, GOOD_GET)).sum())
        return sample

    def _next_keys(self) -> Keys:
        n = self.plan.batch
        keys = np.take(self.keys, range(self._next, self._next + n), axis=0, mode="wrap")
        self._next = (self._next + n) % len(self.keys)
        return keys

    def new(self) -> Keys:
        """Fills its room with blocks that nobody has put; their keys."""
        keys = self.plan.keys(self._next_new, self.puts)
        self._next_new += self.puts
        pattern.fill(self.rows, keys, self._common)
        return keys

    def put(self, keys: Keys, durability: str) -> Sample:
        """Puts what :meth:`new` has filled in."""
        sample = Sample()
        for i in range(0, self.puts, self.plan.batch):
            part = slice(i, i + self.plan.batch)
            before = clock()
            status = self._put(keys[part], self.slices[part], durability)
            sample.times_us.append((clock() - before) / 1000)
            sample.judge(status, GOOD_PUT)
        return sample

    def _put(self, keys: Keys, slices: Any, durability: str) -> Any:
        return self.peer.put_from(keys, slices, timeout=TIMEOUT, durability=durability)

    def read_back(self, keys: Keys) -> Sample:
        """Gets the last batch that was put, compares it, and deletes all."""
        n = self.plan.batch
        sample = Sample()
        if self.plan.verify:
            self.rows[:n, ::8] = 0
            status = self.peer.get_into(keys[-n:], self.slices[:n], timeout=TIMEOUT)
            sample.judge(status, GOOD_GET)
            sample.wrong = int(pattern.wrong(self.rows[:n], keys[-n:], self._common).sum())
        self.peer.delete(keys, timeout=TIMEOUT)
        return sample


class FlashLoad:
    """``plan.threads`` lanes of one peer. :param puts: blocks that all of them put in a turn."""

    def __init__(self, peer: Peer, plan: Plan, puts: int) -> None:
        self.plan, self.stats = plan, FlashStats(peer)
        order = np.random.default_rng(1).permutation(plan.blocks)
        shares = np.array_split(plan.keys(0, plan.blocks)[order], plan.threads)
        each = puts // plan.threads
        self.lanes = [FlashLane(peer, plan, share, each, i) for i, share in enumerate(shares)]

    def _each(self, work: Callable[[int], Sample]) -> Sample:
        """Runs ``work`` for each lane, in a thread each."""
        out: list[Sample | BaseException] = [Sample()] * len(self.lanes)

        def run(i: int) -> None:
            try:
                out[i] = work(i)
            except BaseException as error:
                out[i] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(self.lanes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in out:
            if isinstance(result, BaseException):
                raise result
        return together([result for result in out if isinstance(result, Sample)])

    def fill(self) -> None:
        """Puts the working set. :raises MemKVError: not all of it was taken."""
        total = self._each(lambda i: self.lanes[i].fill())
        if total.errors or total.misses:
            failed = total.errors + total.misses
            raise MemKVError(f"{failed} of {self.plan.blocks} blocks could not be put: {total.first_error}")
        self._written()

    def _written(self) -> None:
        """Waits until nothing is dirty."""
        until = time.monotonic() + DURABLE_SECONDS
        while self.stats.read().get("dirty_blocks", 0):
            if time.monotonic() > until:
                raise MemKVError("what is dirty is not written: is a device out of use?")
            time.sleep(0.001)

    def get(self, seconds: float, how: str) -> Sample:
        """As :meth:`FlashLane.get`; the bytes are those of blocks that came from flash ("hot": all)."""
        before = self.stats.read()["staged_blocks"]
        sample = self._each(lambda i: self.lanes[i].get(seconds, how))
        staged = self.stats.read()["staged_blocks"] - before
        sample.nbytes = (sample.hits if how == "hot" else min(sample.hits, staged)) * self.plan.size
        return sample

    def put(self, durability: str) -> Sample:
        """Puts new blocks until all are acknowledged, or (durability memory) until all are written."""
        keys = [lane.new() for lane in self.lanes]
        start = clock()
        sample = self._each(lambda i: self.lanes[i].put(keys[i], durability))
        if durability == "memory":
            self._written()
        sample.ns = clock() - start
        sample.nbytes = sample.hits * self.plan.size
        back = self._each(lambda i: self.lanes[i].read_back(keys[i]))
        sample.count(back, hits=False)
        return sample

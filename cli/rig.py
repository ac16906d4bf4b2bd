"""What a load runs on: nodes, a peer in this process, more of them in others, and the bare loop beside
them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ..peer import Peer
from ..rdma.devices import Selection
from ..rdma.errors import LocalError, MemKVError
from ..rdma.memory import HostMemory
from ..rdma.verbs import VerbsFabric
from . import report
from .cluster import Child, Nodes, Wish, arena_bytes, extent_bytes
from .limits import Limit, open_limit
from .load import Load
from .report import size_text
from .sample import Plan, Sample, together

SETS = (
    3  # working sets in the arena, before its reserve: one that stays, and puts, some of them in quarantine
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all loads have in common."""

    wish: Wish
    sizes: tuple[int, ...]
    working_set: int
    batch: int
    depth: int = 1
    threads: int = 1
    processes: int = 1
    seconds: float
    rounds: int
    verify: bool = True
    checksum: bool = False
    memory: int = 0  # of the benchmark's own node; 0: enough
    gpu: str = ""  # like cuda:0: where the peers' blocks are; else in host memory

    def plan(self, size: int, salt: str, gpu: str | None = None) -> Plan:
        """The plan for blocks of one size. :param gpu: another place than the options'."""
        blocks = max(self.working_set // size, self.threads * self.processes)
        batch = min(self.batch, blocks)
        return Plan(
            size=size,
            batch=batch,
            blocks=blocks,
            threads=self.threads,
            depth=self.depth,
            verify=self.verify,
            checksum=self.checksum,
            gpu=self.gpu if gpu is None else gpu,
            salt=salt,
        )

    def arena(self, size: int) -> int:
        """Bytes of the own node's arena, for blocks of one size."""
        least = 2 * max(self.working_set // size, 1) * extent_bytes(size)
        if 0 < self.memory < least:
            raise LocalError(
                f"a working set of {size_text(self.working_set)} would be evicted while it is put",
                f"--memory of at least {-(-least >> 20)}m, or a smaller --working-set",
            )
        return self.memory or arena_bytes(max(self.working_set // size, 1) * SETS, size)

    @property
    def slot_seconds(self) -> float:
        """Of one contestant in one round."""
        return self.seconds / self.rounds


def open_nodes(options: Options, size: int) -> Nodes:
    """The nodes of a load with blocks of ``size`` bytes: those named, or a new one."""
    return Nodes(options.wish, memory=options.arena(size), block_bytes=size)


def open_peer(
    addresses: Sequence[str], wish: Wish, namespace: str, size: int, *, channels: int, cache: int = 1 << 16
) -> Peer:
    """A peer as the options wish it."""
    return Peer(
        list(addresses),
        namespace,
        secret_file=wish.secret_file,
        block_bytes=size,
        strict={"strict": True, "plain": False}.get(wish.clock),
        fabric=wish.fabric,
        devices=wish.devices,
        ib_port=wish.ib_port,
        gid_index=wish.gid_index,
        timeout=30.0,
        cache_entries=max(1 << 16, cache),
        max_channels=max(2, channels),
    )


def rail(peer: Peer) -> Selection | None:
    """The first device of a peer over verbs."""
    return peer.fabric.rails[0] if isinstance(peer.fabric, VerbsFabric) else None


def heading(peer: Peer, memory: HostMemory | None = None) -> dict[str, Any]:
    """The machine and how bytes move."""
    out: dict[str, Any] = dict(report.machine())
    out |= peer.stats()["fabric"]
    if memory is not None:
        out["pages"] = f"{memory.pages} ({memory.reason})"
    strict = {entry["strict"] for entry in peer.stats()["nodes"].values() if "strict" in entry}
    out["clock"] = " and ".join("strict" if s else "plain" for s in sorted(strict))
    return out


def _work(
    pipe: Connection, addresses: Sequence[str], wish: Wish, namespace: str, plan: Plan, part: int, parts: int
) -> None:
    """A worker process: carries out methods of a Load that come over the pipe."""
    peer = open_peer(
        addresses, wish, namespace, plan.size, channels=plan.threads * plan.depth, cache=2 * plan.blocks
    )
    try:
        load = Load(peer, plan, part, parts)
        pipe.send("ready")
        while True:
            name, args, kwargs = pipe.recv()
            pipe.send(getattr(load, name)(*args, **kwargs))
    finally:
        peer.close()


class Rig:
    """A namespace with the working set of one block size in it, and loads on it. A context manager."""

    def __init__(self, nodes: Nodes, options: Options, size: int) -> None:
        self.options = options
        salt = secrets.token_hex(4)
        self.plan = options.plan(size, salt)
        namespace = f"bench-{salt}"
        parts = options.processes
        common = (nodes.addresses, options.wish, namespace)
        channels = self.plan.threads * self.plan.depth
        self.peer = open_peer(*common, size, channels=channels, cache=2 * self.plan.blocks)
        self._children: list[Child] = []
        try:
            self.load = Load(self.peer, self.plan, 0, parts)
            self._children.extend(Child(_work, *common, self.plan, i, parts) for i in range(1, parts))
            for child in self._children:
                child.ask()
        except BaseException:
            self.close()
            raise

    def _all(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls a method of every process's load at once."""
        for child in self._children:
            child.pipe.send((name, args, kwargs))
        return [
            getattr(self.load, name)(*args, **kwargs),
            *(child.ask(timeout=600.0) for child in self._children),
        ]

    def prepare(self) -> None:
        """Puts the working set. MemKVError if the node does not take it whole."""
        total = together(self._all("prepare"))
        if total.errors or total.misses:
            failed = total.errors + total.misses
            raise MemKVError(
                f"{failed} of {self.plan.blocks} blocks could not be put: {total.first_error}",
                "--memory, or a smaller --working-set",
            )

    def clean(self) -> None:
        """Deletes what prepare put."""
        self._all("clean")

    def get(self, **kwargs: Any) -> list[Sample]:
        return [together(self._all("get", self.options.slot_seconds, **kwargs))]

    def put(self) -> list[Sample]:
        each = self.options.working_set // self.options.processes
        return [together(self._all("put", self.options.slot_seconds, each))]

    def mixed(self, share: float) -> list[Sample]:
        each = self.options.working_set * 4 // self.options.processes
        pairs = self._all("mixed", self.options.slot_seconds, share, each)
        return [together([gets for gets, _ in pairs]), together([puts for _, puts in pairs])]

    def close(self) -> None:
        for child in self._children:
            child.close()
        if hasattr(self, "load"):
            self.load.close()
        self.peer.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class LimitHolder:
    """The bare loop, opened when the first peer says over which fabric, and kept over all sizes."""

    def __init__(self, options: Options) -> None:
        self._nbytes = max(options.working_set, max(options.sizes))
        self._memory: HostMemory | None = None
        self.limit: Limit | None = None

    def open(self, peer: Peer) -> Limit:
        if self.limit is None:
            assert peer.fabric is not None
            self._memory = HostMemory(self._nbytes)
            self._memory.array[:] = 1
            self.limit = open_limit(peer.fabric.name, self._nbytes, self._memory, rail(peer))
        return self.limit

    def __enter__(self) -> LimitHolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.limit is not None:
            self.limit.close()

"""A process of ``memkv-bench ttft``: a model and a peer; it computes prompts, keeps and restores them.

Pages of the model are registered with the peer, and a page is a block: blocks go out of the KV cache and into
it, in the host's memory or a GPU's, without a copy in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..buffers import SLICE, Slices
from ..connectors.identity import Identity
from ..keys import Keys, block_keys
from ..peer import Peer
from ..rdma.errors import LocalError
from ..status import Status, describe, kept
from .cluster import Wish
from .flash_rig import FlashStats
from .lanes import TIMEOUT
from .rig import heading, open_peer
from .shapes import Shape
from .transformer import Tokens, restorable

BACKENDS = ("numpy", "torch", "cuda")
LAYOUT = "layer,kv,head,token,dim"  # of the values in a block
Floats = npt.NDArray[np.float32]


class Model(Protocol):
    """What a backend is: cli/transformer.py says what each of these does."""

    backend: str
    dtype: str
    dtype_bytes: int
    shape: Shape
    block: int
    weights: Any

    @property
    def block_bytes(self) -> int: ...
    @property
    def memory(self) -> Any: ...
    def describe(self) -> str: ...
    def forget(self) -> None: ...
    def prefill(self, tokens: Tokens, start: int = 0) -> Floats: ...
    def sync(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process needs to know before the first prompt."""

    shape: Shape
    backend: str
    seed: int
    longest: int  # tokens
    block: int  # tokens of a block
    chunk: int  # tokens that are computed at once
    wish: Wish
    salt: str  # keeps this run's blocks apart from all others'
    durability: str = "memory"


@dataclass(slots=True)
class Computed:
    """A prompt that was computed, and kept: seconds until its logits were there, those of them in which this
    process ran (on all cores together), and of the put.
    """

    seconds: float
    logits: Floats
    cpu_seconds: float = 0.0
    blocks: int = 0
    kept: int = 0
    put_seconds: float = 0.0
    problem: str = ""


@dataclass(slots=True)
class Restored:
    """A prompt whose full blocks were fetched and whose rest was computed. ``seconds`` is everything: keys,
    match, get, computing; the others are parts of it.
    """

    seconds: float
    match_seconds: float
    get_seconds: float
    compute_seconds: float
    logits: Floats
    tokens: int  # that needed no computing
    blocks: int
    hits: int
    problem: str = ""


def make_model(job: Job) -> Model:
    """The backend of a job, with weights. :raises LocalError: it cannot be had here."""
    options = {"longest": job.longest, "block": job.block, "chunk": job.chunk}
    if job.backend == "numpy":
        from .transformer import NumpyModel

        return NumpyModel(job.shape, job.seed, **options)
    from .ttft_torch import TorchModel

    device = "cuda" if job.backend == "cuda" else "cpu"
    return TorchModel(job.shape, job.seed, device=device, **options)


class Worker:
    """A model with, after ``open``, a peer."""

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, make_model(job)
        shape = job.shape
        self.identity = Identity(
            engine="memkv-bench-ttft",
            model=f"{shape.name}, weights {self.model.weights.fingerprint}",
            dtype=self.model.dtype,
            layout=LAYOUT,
            block_tokens=job.block,
            salt=job.salt,
            labels={
                "backend": self.model.backend,
                "layers": f"{shape.layers}",
                "kv_heads": f"{shape.kv_heads}",
                "head_dim": f"{shape.head_dim}",
                "chunk": f"{job.chunk}",
            },
        )
        self.peer: Peer | None = None
        self._slices: Slices = np.empty(0, SLICE)

    def open(self, addresses: Sequence[str]) -> dict[str, Any]:
        """Connects, registers the pages and does everything once with a short prompt of this process's own;
        the heading.
        """
        self.close()
        size = self.model.block_bytes
        self.peer = peer = open_peer(
            addresses, self.job.wish, self.identity.namespace(size), size, channels=2
        )
        buffer = peer.register(self.model.memory)
        self._slices = buffer.split(size)
        rng = np.random.default_rng()  # not the seed's: nobody else's prompt
        short = rng.integers(0, self.job.shape.vocab, min(2 * self.job.block + 1, self.job.longest))
        self.compute(short)
        self.restore(short)
        out = heading(peer) | {"backend": self.model.describe()}
        if buffer.device != "cpu":
            rung = buffer.get_rung
            out["gpu memory"] = f"{rung.name} ({rung.reason})"
        return out

    def compute(self, tokens: Tokens) -> Computed:
        """Computes the prompt, and then keeps its full blocks."""
        self.model.forget()
        self.model.sync()
        began, ran = time.perf_counter(), time.process_time()
        logits = self.model.prefill(tokens)
        out = Computed(time.perf_counter() - began, logits, time.process_time() - ran)
        keys = self._keys(tokens)
        self.model.sync()
        began = time.perf_counter()
        status = self._peer.put_from(
            keys, self._slices[: len(keys)], timeout=TIMEOUT, durability=self.job.durability
        )
        out.put_seconds = time.perf_counter() - began
        good = kept(status)
        out.blocks, out.kept = len(keys), int(good.sum())
        if not good.all():
            out.problem = f"put: {describe(int(status[~good][0]))}"
        return out

    def restore(self, tokens: Tokens) -> Restored:
        """The prompt's first token with what the nodes have: fetches the blocks and computes the rest."""
        self.model.forget()
        self.model.sync()
        problem, hits, matched, got = "", 0, 0.0, 0.0
        began = time.perf_counter()
        keys = self._keys(tokens)
        held = self._peer.match(keys, timeout=TIMEOUT)
        matched = time.perf_counter()
        if held:
            status = self._peer.get_into(keys[:held], self._slices[:held], timeout=TIMEOUT)
            bad = np.flatnonzero(status != Status.HIT)
            hits = int(bad[0]) if len(bad) else held
            problem = f"get: {describe(int(status[bad[0]]))}" if len(bad) else ""
        got = time.perf_counter()
        start = hits * self.job.block
        logits = self.model.prefill(tokens, start)
        done = time.perf_counter()
        if not problem and held < len(keys):
            problem = f"only {held} of {len(keys)} blocks were held"
        return Restored(
            seconds=done - began,
            match_seconds=matched - began,
            get_seconds=got - matched,
            compute_seconds=done - got,
            logits=logits,
            tokens=start,
            blocks=len(keys),
            hits=hits,
            problem=problem,
        )

    def flash(self, _: None) -> tuple[dict[str, Any], int]:
        """What the nodes say of their flash: for the heading, and blocks that they have read from it."""
        stats = FlashStats(self._peer)
        return stats.heading(), stats.read().get("staged_blocks", 0)

    def _keys(self, tokens: Tokens) -> Keys:
        return block_keys(tokens[: restorable(len(tokens), self.job.block)], space=self.identity.space)

    @property
    def _peer(self) -> Peer:
        if self.peer is None:
            raise LocalError("this process has no peer yet")
        return self.peer

    def leave(self, _: None) -> bool:
        """Disconnects."""
        self.close()
        return True

    def close(self) -> None:
        if self.peer is not None:
            self.peer.close()
            self.peer = None


def work(pipe: Connection, job: Job) -> None:
    """The process: carries out methods of a :class:`Worker` that come over the pipe."""
    worker = Worker(job)
    try:
        pipe.send("ready")
        while True:
            name, argument = pipe.recv()
            pipe.send(getattr(worker, name)(argument))
    finally:
        worker.close()

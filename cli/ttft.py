"""The command ttft: time to the first token of a prompt, computed and out of memkv, and whether it is the
same token.

One process computes each prompt and keeps its blocks: that is the recompute. Another, which has the same
weights but has computed none of the prompts, fetches the blocks, computes what is left behind the last full
one, and has to come to the same logits, bit for bit. With ``--flash`` the node is then stopped and started
again, so that it has the blocks on flash only, and a third process asks. Every repetition has new prompts: no
location and no block of one is known from an earlier one.

docs/ttft.md says what the figures include and what they do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..gpudirect import driver
from ..rdma.errors import LocalError
from .cluster import Child, Nodes, Wish, arena_bytes
from .flash_rig import FlashRig, room
from .report import Steps, print_result
from .shapes import Shape, find
from .transformer import Tokens, restorable
from .ttft_report import NOTES, Result, Way, busy, compare, lines, report, table_rows
from .ttft_worker import Computed, Job, Restored, work

SECONDS = 3600.0  # for one answer of a process
TOKENS = {"tiny": (64, 256)}  # what is measured unless --tokens says so
OTHER_TOKENS = (512, 1024, 2048)
CHUNKS = {"numpy": 256, "torch": 256, "cuda": 2048}
THREADS = {"tiny": 1}  # of its small products, several threads mostly wait for one another
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command's options. Empty ``tokens``, no ``memory``, None: what is usual."""

    wish: Wish
    model: str = "tiny"
    layers: int | None = None
    backend: str = "auto"
    tokens: tuple[int, ...] = ()
    block_tokens: int = 16
    chunk: int | None = None
    repeat: int = 3
    seed: int = 1
    tolerance: float = 0.0
    threads: int | None = None
    flash: str = ""
    force: bool = False
    memory: int = 0


def pick_backend(name: str) -> str:
    """auto: cuda where there is a GPU and torch, else numpy."""
    if name != "auto":
        return name
    if driver.available():  # says why not
        return "numpy"
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return "cuda"
    return "numpy"


def run(settings: Settings, *, as_json: bool) -> int:
    """Measures and prints; the exit status."""
    head, shape, dtype_bytes, results = measure(settings)
    errors = sum(result.errors(settings.tolerance) for result in results)
    if as_json:
        print(json.dumps(report(head, shape, dtype_bytes, results, settings.tolerance)))
    else:
        rows = [
            row for result in results for row in table_rows(result, shape, dtype_bytes, settings.tolerance)
        ]
        notes = [*NOTES, *busy(results), "", *lines(results, settings.tolerance)]
        print_result(head, rows, as_json=False, notes=notes)
    return 1 if errors else 0


def measure(settings: Settings) -> tuple[dict[str, Any], Shape, int, list[Result]]:
    """Heading, shape, bytes of a value of KV, and a result for each length."""
    shape = find(settings.model)
    shape = shape.cut(settings.layers) if settings.layers else shape
    backend = pick_backend(settings.backend)
    lengths = settings.tokens or TOKENS.get(shape.name, OTHER_TOKENS)
    block = settings.block_tokens
    if min(lengths) <= block:
        raise LocalError(
            f"a prompt of {min(lengths)} tokens has no full block of {block} and a token behind it",
            "--tokens, --block-tokens",
        )
    chunk = settings.chunk or -(-CHUNKS[backend] // block) * block
    if chunk % block:
        raise LocalError(f"chunks of {chunk} tokens cut blocks of {block}", "--chunk: a multiple")
    if settings.flash and settings.wish.nodes:
        raise LocalError("nodes that exist are not restarted for a benchmark", "leave --nodes or --flash out")
    job = Job(
        shape=shape,
        backend=backend,
        seed=settings.seed,
        longest=max(lengths),
        block=block,
        chunk=chunk,
        wish=settings.wish,
        salt=secrets.token_hex(8),
        durability="flash" if settings.flash else "memory",
    )
    steps_due = (2 + bool(settings.flash)) * len(lengths) * settings.repeat
    threads = settings.threads or THREADS.get(shape.name, 0)
    with Steps(steps_due) as steps, _threads(threads):
        bench = _Ttft(settings, job, lengths, steps)
        try:
            bench.run()
        finally:
            bench.close()
    head = bench.head | {
        "model": shape.describe(),
        "weights": f"random, seed {settings.seed}",
        "prompts": f"{settings.repeat} of each length, in blocks of {block} tokens, computed {chunk} at once",
    }
    return head, shape, bench.dtype_bytes, bench.results


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that are started meanwhile compute with so many threads; 0: with as many as they like."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    if count:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Ttft:
    def __init__(self, settings: Settings, job: Job, lengths: Sequence[int], steps: Steps) -> None:
        self.settings, self.job, self.steps = settings, job, steps
        self.results = [Result(tokens) for tokens in lengths]
        self.dtype_bytes = 2 if job.backend == "cuda" else 4
        self.head: dict[str, Any] = {}
        self._block_bytes = job.shape.kv_bytes(job.block, self.dtype_bytes)
        self._all = settings.repeat * sum(-(-n // job.block) for n in lengths) + 16
        self._stack = contextlib.ExitStack()
        self._store: FlashRig | None = None
        self._nodes: Nodes | None = None
        self._processes: dict[str, Child] = {}
        self._started: set[str] = set()
        self._connected: set[str] = set()

    def run(self) -> None:
        self._launch("writer")  # starts while the node does
        if self.settings.flash:
            least = room(self._all, self._block_bytes)
            store = FlashRig(self.settings.flash, least, force=self.settings.force, steps=self.steps)
            self._store = self._stack.enter_context(store)
        self._start_node()
        for number in range(self.settings.repeat):
            prompts = [self._prompt(result.tokens, number) for result in self.results]
            computed = self._compute(prompts)
            self._restore("memory", prompts, computed)
            if self._store:
                self._restart_node()
                self._restore("flash", prompts, computed)

    def _prompt(self, tokens: int, number: int) -> Tokens:
        rng = np.random.default_rng([self.settings.seed, number, tokens])
        return rng.integers(0, self.job.shape.vocab, tokens)

    def _launch(self, name: str) -> Child:
        """A process of this name, which may still be about to start."""
        if name not in self._processes:
            self._processes[name] = Child(work, self.job)
        return self._processes[name]

    def _process(self, name: str) -> Child:
        """The same, started and connected."""
        assert self._nodes is not None
        child = self._launch(name)
        if name not in self._started:
            self.steps.now(f"drawing weights for {name}")
            child.ask(timeout=SECONDS)
            self._started.add(name)
        if name not in self._connected:
            self.head |= child.ask(("open", self._nodes.addresses), SECONDS)
            self._connected.add(name)
        return child

    def _compute(self, prompts: Sequence[Tokens]) -> list[Computed]:
        writer, out = self._process("writer"), []
        for result, tokens in zip(self.results, prompts, strict=True):
            self.steps.now(f"computing {len(tokens)} tokens")
            done: Computed = writer.ask(("compute", tokens), SECONDS)
            result.recompute.seconds.append(done.seconds)
            if self.job.backend != "cuda":  # whose processor waits
                result.cpu_seconds.append(done.cpu_seconds)
            result.put_seconds.append(done.put_seconds)
            result.kept_less += done.blocks - done.kept
            result.problem = result.problem or done.problem
            out.append(done)
            self.steps.done()
        return out

    def _restore(self, way: str, prompts: Sequence[Tokens], computed: Sequence[Computed]) -> None:
        reader = self._process(way)
        before = self._staged(way)
        for result, tokens, due in zip(self.results, prompts, computed, strict=True):
            self.steps.now(f"restoring {len(tokens)} tokens from {way}")
            done: Restored = reader.ask(("restore", tokens), SECONDS)
            compare(result.ways.setdefault(way, Way()), due, done)
            self.steps.done()
        due_blocks = sum(restorable(len(p), self.job.block) // self.job.block for p in prompts)
        self._check_tier(way, self._staged(way) - before, due_blocks)

    def _check_tier(self, way: str, staged: int, due: int) -> None:
        """Blocks said to come from flash must have been read there; of memory it is only noted."""
        if staged if way == "memory" else staged < due:
            for result in self.results:
                result.ways[way].problem = f"the node read {staged} blocks from flash, of {due}"
                result.ways[way].missed += way == "flash"

    def _staged(self, way: str) -> int:
        """Blocks that the node has read from flash since it started."""
        if self._store is None:
            return 0
        heading, staged = self._processes[way].ask(("flash", None), SECONDS)
        self.head |= self._store.heading() | heading
        return int(staged)

    def _start_node(self) -> None:
        memory = self.settings.memory or arena_bytes(self._all, self._block_bytes)
        store = self._store
        self._nodes = Nodes(
            self.settings.wish,
            memory=memory,
            block_bytes=self._block_bytes,
            more=lambda number: store.flags if store else (),
        )

    def _restart_node(self) -> None:
        """In order; it has everything on flash then, and nothing in memory."""
        assert self._nodes is not None
        self.steps.now("restarting the node")
        for name in self._connected:
            self._processes[name].ask(("leave", None))
        self._connected.clear()
        self._nodes.own[0].stop()
        self._nodes.close()
        self._start_node()

    def close(self) -> None:
        for child in self._processes.values():
            child.close()
        if self._nodes is not None:
            self._nodes.close()
        self._stack.close()

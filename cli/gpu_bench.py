"""The command gpu: the staging pipeline beside pinned copies, the kernels beside a copy within the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rdma.errors import LocalError, MemKVError
from ..rdma.memory import HostMemory
from . import report
from .compare import LIMIT, Contestant, contest
from .gpu_kernels import KernelRig
from .gpu_rig import GpuRig
from .gpu_staging import Pipeline
from .report import Row, Steps, size_text
from .sample import Sample

NOTES = (
    "GB/s: of the bytes of blocks, counted once, median over rounds; ratio: to the limit in the same round.",
    "limit: of staging, asynchronous copies from or to pinned memory; of kernels, a copy within the GPU.",
    "staging: into the GPU and out of it through slots, with a fabric that takes no time; µs: of one pass.",
    "In the first round every byte of one more pass is compared, outside of the timed part.",
)
PINNED = 64 << 20  # bytes of pinned memory that the plain copies walk through: as many as the slots have


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured."""

    gpu: str = "cuda:0"
    sizes: tuple[int, ...]
    working_set: int
    seconds: float
    rounds: int
    verify: bool = True

    @property
    def slot_seconds(self) -> float:
        """Of one contestant in one round."""
        return self.seconds / self.rounds


def run(settings: Settings) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Heading, rows and notes. :raises MemKVError: there is no such GPU, and why."""
    if max(settings.sizes) > min(settings.working_set, PINNED):
        raise LocalError(
            f"a block of {size_text(max(settings.sizes))} does not fit",
            f"blocks of {size_text(PINNED)} at most, and a --working-set that holds one",
        )
    with GpuRig(settings.gpu) as rig:
        return measure(
            rig, settings, lambda: KernelRig(rig.index, settings.working_set, settings.slot_seconds)
        )


def measure(
    rig: Any, settings: Settings, open_kernels: Callable[[], Any]
) -> tuple[dict[str, Any], list[Row], list[str]]:
    """The same on a rig that is there. ``open_kernels`` may raise: then the kernels' row says why."""
    rows: list[Row] = []
    with Steps() as steps:
        steps.now("staging")
        rows += _staging(rig, settings, steps)
        steps.now("compiling the kernels")
        try:
            kernels = open_kernels()
        except MemKVError as exc:
            rows.append(Row(what="kernels", note=str(exc)))
        else:
            for size, field in kernels.field(settings.sizes, settings.verify):
                rows += contest(field, size=size, rounds=settings.rounds, steps=steps)
    for row in rows:
        if row.what == "checksum" and row.ratio is not None:
            row.extra["of_traffic"] = row.ratio / 2  # a copy moves each byte twice, a checksum once
    head = dict(report.machine()) | rig.heading() | {"cupy": _cupy()}
    return head, rows, list(NOTES)


def _staging(rig: Any, settings: Settings, steps: Steps) -> list[Row]:
    rows: list[Row] = []
    memory = rig.alloc(settings.working_set)
    pinned = HostMemory(PINNED)
    pinned.array[:] = 1
    rig.device.pin(pinned.address, pinned.nbytes)
    try:
        for size in settings.sizes:
            for into in (True, False):
                rows += _one_way(rig, settings, steps, memory, pinned, size, into)
    finally:
        rig.device.unpin(pinned.address)
    return rows


def _one_way(
    rig: Any, settings: Settings, steps: Steps, memory: int, pinned: HostMemory, size: int, into: bool
) -> list[Row]:
    count, seconds = settings.working_set // size, settings.slot_seconds
    way = "into the GPU" if into else "out of the GPU"
    pipeline = Pipeline(rig, memory, size, count, into)

    def copies() -> list[Sample]:
        total = Sample()
        while total.ns < seconds * 1e9:
            ns = rig.copies(memory, pinned, size, count, into)
            total.add(Sample(nbytes=size * count, ns=ns, times_us=[ns / 1000]))
        return [total]

    def staged() -> list[Sample]:
        sample = pipeline.turn(seconds)
        if settings.verify and not field[1].samples:  # one more pass, in the first round
            sample.wrong = pipeline.wrong()
        return [sample]

    field = [
        Contestant((f"pinned copies {way}",), copies, count, role=LIMIT, counts=False),
        Contestant((f"staging {way}",), staged, count),
    ]
    try:
        return contest(field, size=size, rounds=settings.rounds, steps=steps)
    finally:
        pipeline.close()


def _cupy() -> str:
    try:
        import cupy
    except ImportError as exc:
        return f"none: {exc}"
    try:
        version = int(cupy.cuda.runtime.runtimeGetVersion())
    except Exception as exc:  # its libraries do not fit this machine
        return f"{cupy.__version__}, which cannot be used: {exc}"
    return f"{cupy.__version__}, CUDA runtime {version // 1000}.{version % 1000 // 10}"

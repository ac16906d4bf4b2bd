"""The kernels, for ``memkv-bench gpu``: gather, scatter and checksums beside a copy within the GPU's memory.

All of them are timed by events in one stream, over a working set that is larger than any cache. GB count the
bytes of blocks once: a copy, a gather and a scatter read and write each, a checksum only reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..gpudirect import checksum, kernels, pages
from ..gpudirect.pages import Layout
from ..rdma.errors import MemKVError
from ..store.native._store import ffi, lib
from . import pattern
from .compare import LIMIT, Contestant
from .sample import Sample

BLOCK = 8 << 20  # bytes of a block of pages
PARTS = 16  # of a cache: eight layers with keys and values


@dataclass(frozen=True, slots=True)
class Shape:
    """A cache's: ``run`` contiguous bytes of a page in a part."""

    name: str
    run: int


SHAPES = (
    Shape("vllm, 16 tokens of 8 heads", 16 * 8 * 128 * 2),
    Shape("sglang, 1 token of 8 heads", 8 * 128 * 2),
    Shape("sglang mla, 1 token", 576 * 2),
    Shape("sglang, 1 token of 1 head", 128 * 2),
)


class KernelRig:
    """Memory on a GPU for the kernels: a cache, and as much again for blocks.

    :raises LocalError: no CuPy. :raises MemKVError: it cannot use this GPU, or the kernels do not compile.
    """

    def __init__(self, index: int, working_set: int, seconds: float) -> None:
        self.cupy = kernels.cupy()
        self.seconds = seconds
        self.nbytes = max(1, working_set // BLOCK) * BLOCK
        try:
            self.device = self.cupy.cuda.Device(index)
            self._ready()
        except MemKVError:
            raise
        except Exception as exc:  # a CuPy that does not fit this driver, or too little memory
            raise MemKVError(
                f"CuPy cannot use cuda:{index}: {exc}", "nvidia-smi shows driver and memory"
            ) from None

    def _ready(self) -> None:
        """Fills the cache, and compiles the kernels."""
        with self.device:
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
            with self.stream:
                ramp = self.cupy.arange(self.nbytes // 8, dtype=self.cupy.uint64)
                self.cache = (ramp * self.cupy.uint64(pattern.STEP)).view(self.cupy.uint8)
                del ramp
                self.packed = self.cupy.zeros(self.nbytes, self.cupy.uint8)
            self.stream.synchronize()
            kernels.function("checksum", "mkv_chunks")
            kernels.function("pages", "mkv_gather_16")

    def timed(self, what: Callable[[], Any], nbytes: int) -> Sample:
        """``what`` again and again until the events are ``seconds`` apart."""
        cuda, total = self.cupy.cuda, Sample()
        with self.device, self.stream:
            what()
            self.stream.synchronize()
            many = 1
            while total.ns < self.seconds * 1e9:
                start, end = cuda.Event(), cuda.Event()
                start.record(self.stream)
                for _ in range(many):
                    what()
                end.record(self.stream)
                end.synchronize()
                ns = max(1, int(cuda.get_elapsed_time(start, end) * 1e6))
                total.add(Sample(nbytes=nbytes * many, ns=ns, times_us=[ns / 1000 / many]))
                many = min(1000, max(1, int(many * 20e6 / ns)))  # about 20 ms between events
        return total

    def field(self, sizes: tuple[int, ...], verify: bool) -> list[tuple[int, list[Contestant]]]:
        """(block bytes, contestants), the copy first in each."""

        def contestant(
            name: str, run: Callable[[], Any], nbytes: int, wrong: Callable[[], int]
        ) -> Contestant:
            def turn() -> list[Sample]:
                sample = self.timed(run, nbytes)
                if verify and not made.samples:  # one more call, in the first round
                    sample.wrong = wrong()
                return [sample]

            made = Contestant((name,), turn, counts=False)
            return made

        def copy() -> None:
            self.packed.data.copy_from_device_async(self.cache.data, self.nbytes, self.stream)

        def limit() -> Contestant:
            return Contestant(
                ("copy within the GPU",), lambda: [self.timed(copy, self.nbytes)], role=LIMIT, counts=False
            )

        out = []
        moves = [limit()]
        for shape in SHAPES:
            cache = Paged(self, shape)
            moves.append(contestant(f"gather {shape.name}", cache.gather, cache.nbytes, cache.gather_wrong))
            moves.append(
                contestant(f"scatter {shape.name}", cache.scatter, cache.nbytes, cache.scatter_wrong)
            )
        out.append((BLOCK, moves))
        for size in sizes:
            sums = Sums(self, size)
            out.append((size, [limit(), contestant("checksum", sums.run, sums.nbytes, sums.wrong)]))
        return out


class Paged:
    """The rig's cache as pages of one shape, all of them in random order in the blocks."""

    def __init__(self, rig: KernelRig, shape: Shape) -> None:
        self.rig = rig
        each = max(1, BLOCK // (PARTS * shape.run))  # pages of a block
        blocks = rig.nbytes // (PARTS * shape.run * each)
        count = blocks * each
        self.nbytes = count * PARTS * shape.run
        self.shape = (PARTS, count, shape.run)
        base = int(rig.cache.data.ptr)
        bases = tuple(base + part * count * shape.run for part in range(PARTS))
        self.layout = Layout("NHD", bases, shape.run, shape.run, count)
        self.block_bytes = self.layout.block_bytes(each)
        self.table = np.random.default_rng(5).permutation(count).astype(np.int32).reshape(blocks, each)
        start = int(rig.packed.data.ptr)
        self.blocks = start + np.arange(blocks, dtype=np.uint64) * np.uint64(self.block_bytes)
        with rig.device:
            self.on_gpu = rig.cupy.asarray(self.table)  # where engines have it

    def gather(self) -> None:
        self.refused = pages.gather(self.layout, self.on_gpu, self.blocks, stream=self.rig.stream)

    def scatter(self) -> None:
        self.refused = pages.scatter(self.layout, self.on_gpu, self.blocks, stream=self.rig.stream)

    def gather_wrong(self) -> int:
        return self._wrong(self.rig.packed, self.gather)

    def scatter_wrong(self) -> int:
        return self._wrong(self.rig.cache, self.scatter)

    def _wrong(self, target: Any, run: Callable[[], None]) -> int:
        """Blocks that cache and blocks do not agree on after one call into cleared memory. Not timed."""
        rig = self.rig
        with rig.device, rig.stream:
            target[: self.nbytes] = 0
            run()
            cache = rig.cache[: self.nbytes].reshape(self.shape)
            packed = rig.packed[: self.nbytes].reshape(len(self.blocks), PARTS, -1, self.shape[2])
            bad = rig.cupy.zeros(len(self.blocks), bool)
            for part in range(PARTS):
                for i, row in enumerate(self.table):
                    bad[i] |= (cache[part, row] != packed[i, part]).any()
            return int(bad.sum()) + int(self.refused[0] != 0)


class Sums:
    """The rig's cache as blocks of one size."""

    def __init__(self, rig: KernelRig, size: int) -> None:
        self.rig, self.size = rig, size
        count = max(1, rig.nbytes // size)
        self.nbytes = count * size
        self.pointers = int(rig.cache.data.ptr) + np.arange(count, dtype=np.uint64) * np.uint64(size)

    def run(self) -> None:
        self.out = checksum.checksums(self.pointers, self.size, stream=self.rig.stream)

    def wrong(self) -> int:
        """Blocks whose checksum the CPU computes otherwise. Not timed."""
        with self.rig.device, self.rig.stream:
            self.run()
            got, data = self.out.get(), self.rig.cache[: self.nbytes].get()
        address = ffi.cast("uint8_t *", data.ctypes.data)
        due = [lib.mkv_checksum(address + i * self.size, self.size) for i in range(len(got))]
        return int((got != np.array(due, np.uint64)).sum())

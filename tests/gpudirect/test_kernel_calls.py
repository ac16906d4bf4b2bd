"""checksum.py and pages.py from end to end: over a stand-in for CuPy, with the kernels run on the host."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.cli import gpu_kernels
from memkv.cli.compare import contest
from memkv.cli.gpu_kernels import Shape
from memkv.cli.report import Steps
from memkv.gpudirect import checksum, kernels, layouts, pages
from memkv.gpudirect.pages import Layout
from memkv.rdma.errors import LocalError, MemKVError
from memkv.store.layout import CHUNK_BYTES as CHUNK
from memkv.store.native._store import ffi, lib

from . import hostcupy
from .hostcupy import Array, made
from .hosted import needs_compiler

pytestmark = needs_compiler
DICE = np.random.default_rng(8)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The stand-in is in force; which kernels were launched, with how many blocks of threads."""
    return hostcupy.install(monkeypatch)


def by_cpu(data: npt.NDArray[np.uint8]) -> int:
    return int(lib.mkv_checksum(ffi.cast("void *", data.ctypes.data), data.nbytes))


def noise(*shape: int) -> Array:
    return made(DICE.integers(0, 256, shape, np.uint8))


def test_checksums_of_a_batch(launched: list[tuple[str, int]]) -> None:
    data = noise(5, 2 * CHUNK + 112)

    out = checksum.checksums(data.data.ptr + np.arange(5) * data.shape[1], data.shape[1])

    assert out.tolist() == [by_cpu(row) for row in data]
    assert [name for name, _ in launched] == ["mkv_chunks", "mkv_verdicts"]


def test_verdicts_of_a_batch(launched: list[tuple[str, int]]) -> None:
    data, lengths = noise(4, 1000), [1000, 1, 999, 240]
    due = [by_cpu(data[i, :n]) for i, n in enumerate(lengths)]
    due[2] ^= 1 << 63

    verdicts = checksum.verify(data.data.ptr + np.arange(4) * 1000, lengths, due, stream=7)

    assert verdicts.tolist() == [1, 1, 0, 1]


def test_empty_blocks_need_no_chunks(launched: list[tuple[str, int]]) -> None:
    assert checksum.checksums([512, 512], 0).tolist() == [by_cpu(np.zeros(0, np.uint8))] * 2
    assert [name for name, _ in launched] == ["mkv_verdicts"]


PAGES, PARTS, RUN = 12, 3, 80
TABLE = np.array([[7, 2], [1, 3], [11, 0]])


def cache() -> tuple[Array, Layout]:
    data = noise(PARTS, PAGES, RUN)
    bases = tuple(int(data.data.ptr) + i * PAGES * RUN for i in range(PARTS))
    return data, Layout("NHD", bases, RUN, RUN, PAGES)


def packed(data: Array, table: npt.NDArray[Any]) -> list[bytes]:
    return [b"".join(data[part, row].tobytes() for part in range(PARTS)) for row in table]


@pytest.mark.parametrize("where", ["host", "gpu"])
def test_gather_and_scatter_of_a_batch(launched: list[tuple[str, int]], where: str) -> None:
    data, layout = cache()
    before = data.copy()
    table = made(TABLE, np.int32) if where == "gpu" else TABLE
    blocks = made(np.zeros((3, layout.block_bytes(2)), np.uint8))
    places = blocks.data.ptr + np.arange(3) * blocks.shape[1]

    refused = pages.gather(layout, table, places)
    assert [row.tobytes() for row in blocks] == packed(before, TABLE)
    assert refused.tolist() == [0]

    data[:, TABLE.ravel()] = 0
    refused = pages.scatter(layout, table, places, stream=SimpleNamespace(ptr=5))
    assert (data == before).all()
    assert refused.tolist() == [0]
    assert [name for name, _ in launched] == ["mkv_gather_16", "mkv_scatter_16"]


def test_one_part_at_a_time(launched: list[tuple[str, int]]) -> None:
    data, layout = cache()
    blocks = made(np.zeros((3, layout.block_bytes(2)), np.uint8))
    places = blocks.data.ptr + np.arange(3) * blocks.shape[1]

    for part in range(PARTS):
        pages.gather(layout, TABLE, places, parts=range(part, part + 1))

    assert [row.tobytes() for row in blocks] == packed(data, TABLE)


def test_a_call_of_several_launches(launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    data, layout = cache()
    each = layout.block_bytes(2) // 16
    monkeypatch.setattr(pages, "MOST_VECTORS", 2 * each + 1)
    blocks = made(np.zeros((3, layout.block_bytes(2)), np.uint8))

    pages.gather(layout, TABLE, blocks.data.ptr + np.arange(3) * blocks.shape[1])

    assert [row.tobytes() for row in blocks] == packed(data, TABLE)
    assert len(launched) == 2


def test_pages_that_do_not_exist_are_counted(launched: list[tuple[str, int]]) -> None:
    _, layout = cache()
    blocks = made(np.zeros((1, layout.block_bytes(2)), np.uint8))

    refused = pages.gather(layout, made([[3, PAGES]], np.int32), [blocks.data.ptr])

    assert refused.tolist() == [PARTS * RUN // 16]
    with pytest.raises(LocalError, match=f"page {PAGES}"):
        pages.gather(layout, [[3, PAGES]], [blocks.data.ptr])


@pytest.mark.parametrize("newer", [False, True])
def test_streams_are_taken_by_handle(
    launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, newer: bool
) -> None:
    if newer:  # CuPy 14 and later
        external = lambda stream: nullcontext(stream.__cuda_stream__()[1])  # noqa: E731
        monkeypatch.setattr(kernels.cupy().cuda.Stream, "from_external", external, raising=False)
    for stream in (7, SimpleNamespace(ptr=7), SimpleNamespace(cuda_stream=7)):
        with kernels.on(stream) as handle:
            assert handle == 7
    with kernels.on(None):
        pass
    with pytest.raises(LocalError, match="no CUDA stream"):
        kernels.on("stream")


def test_the_chapter_names_every_layout() -> None:
    text = (Path(__file__).parents[2] / "docs/gpu.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `((?:vllm|sglang)_\w+)`", text, re.MULTILINE))

    made_of = {n for n in vars(layouts) if n.startswith(("vllm_", "sglang_")) and n != "sglang_pages"}
    assert named == made_of
    assert all(f"``{name}``" in (layouts.__doc__ or "") for name in made_of)


# --- the benchmark of the kernels ---


@pytest.fixture
def rig(launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> gpu_kernels.KernelRig:
    monkeypatch.setattr(gpu_kernels, "BLOCK", 64 << 10)
    monkeypatch.setattr(gpu_kernels, "SHAPES", (Shape("vllm, small", 1024), Shape("mla, small", 144)))
    return gpu_kernels.KernelRig(0, 128 << 10, 1e-6)


def test_kernels_are_measured_beside_a_copy(rig: gpu_kernels.KernelRig) -> None:
    fields = rig.field((32 << 10,), True)

    rows = [row for size, field in fields for row in contest(field, size=size, rounds=2, steps=Steps())]

    assert [row.what for row in rows] == [
        "copy within the GPU",
        "gather vllm, small",
        "scatter vllm, small",
        "gather mla, small",
        "scatter mla, small",
        "copy within the GPU",
        "checksum",
    ]
    assert all(row.gbps and row.ratio and row.errors == 0 for row in rows)


def test_blocks_that_come_out_wrong_are_errors(
    rig: gpu_kernels.KernelRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged, sums = gpu_kernels.Paged(rig, gpu_kernels.SHAPES[0]), gpu_kernels.Sums(rig, 32 << 10)
    assert paged.gather_wrong() == paged.scatter_wrong() == sums.wrong() == 0

    right = pages.gather

    def one_off(layout: Layout, table: Any, blocks: Any, **more: Any) -> Any:
        return right(layout, table[:, ::-1], blocks, **more)

    monkeypatch.setattr(pages, "gather", one_off)
    assert paged.gather_wrong() == len(paged.blocks)


def test_a_cupy_that_does_not_fit_is_told(
    launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(index: int) -> Any:
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(kernels.cupy().cuda, "Device", broken)

    with pytest.raises(MemKVError, match="CuPy cannot use cuda:3: cudaErrorInsufficientDriver"):
        gpu_kernels.KernelRig(3, 1 << 20, 0.1)

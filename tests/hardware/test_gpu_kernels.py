"""The kernels on a GPU: the same answers as the CPU and numpy. script/gpu-check also runs this file under
compute-sanitizer, so allocations are as long as what is read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import checksum, layouts, pages
from memkv.gpudirect.pages import Layout
from memkv.store.layout import CHUNK_BYTES as CHUNK
from memkv.store.native._store import ffi, lib

DICE = np.random.default_rng(17)
CLASSES = [1, 3, 4, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 128, 129, 239, 240, 241, 255, 256]
STEPS = [n + d for n in (320, 1024, 2048, CHUNK, 2 * CHUNK, 30 * CHUNK) for d in (-64, -1, 0, 1, 64)]


def noise(n: int) -> npt.NDArray[np.uint8]:
    return DICE.integers(0, 256, n, np.uint8)


def by_cpu(data: npt.NDArray[np.uint8]) -> int:
    return int(lib.mkv_checksum(ffi.cast("void *", data.ctypes.data), data.nbytes))


def allocated(cupy: Any, data: npt.NDArray[np.uint8]) -> Any:
    """A copy of ``data`` in an allocation of its own, which ends where it ends."""
    memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(data.nbytes), 0)
    out = cupy.ndarray(data.shape, cupy.uint8, memptr=memory)
    out.set(data)
    return out


# --- checksums ---


def test_every_length_class_agrees_with_the_cpu(cupy: Any) -> None:
    data = [noise(n) for n in CLASSES + STEPS]
    on_gpu = [allocated(cupy, d) for d in data]

    out = checksum.checksums([a.data.ptr for a in on_gpu], [d.nbytes for d in data])

    assert out.get().tolist() == [by_cpu(d) for d in data]


@pytest.mark.parametrize("offset", [16, 8, 4, 1])
def test_any_alignment_agrees_with_the_cpu(cupy: Any, offset: int) -> None:
    data = noise(4 * CHUNK + 64)
    on_gpu = allocated(cupy, data)
    lengths = [n for n in CLASSES + STEPS if n <= 3 * CHUNK]

    out = checksum.checksums([on_gpu.data.ptr + offset] * len(lengths), lengths)

    assert out.get().tolist() == [by_cpu(data[offset : offset + n]) for n in lengths]


@pytest.mark.parametrize(
    ("size", "count"), [(1 << 20, 64), (16 << 20, 3), ((4 << 20) + 16, 5), (64 << 10, 500)]
)
def test_batches_agree_with_the_cpu(cupy: Any, size: int, count: int) -> None:
    data = noise(size * count).reshape(count, size)
    on_gpu = cupy.asarray(data)

    out = checksum.checksums(on_gpu.data.ptr + np.arange(count) * size, size)

    assert out.get().tolist() == [by_cpu(row) for row in data]


def test_verdicts_on_a_stream_of_the_callers(cupy: Any) -> None:
    data = noise(256 * 4096).reshape(256, 4096)
    stream = cupy.cuda.Stream(non_blocking=True)
    due = [by_cpu(row) for row in data]
    wrong = sorted(random.Random(3).sample(range(256), 20))
    for i in wrong:
        data[i, i * 16] ^= 1
    with stream:
        on_gpu = cupy.asarray(data)

    verdicts = checksum.verify(on_gpu.data.ptr + np.arange(256) * 4096, 4096, due, stream=stream)
    stream.synchronize()

    assert np.flatnonzero(verdicts.get() == 0).tolist() == wrong


# --- pages ---

PAGES = 24
TABLE = np.random.default_rng(1).permutation(PAGES)[:18].astype(np.int32).reshape(3, 6)


def blocks_on_gpu(cupy: Any, layout: Layout, each: int, count: int) -> tuple[Any, npt.NDArray[np.uint64]]:
    rows = cupy.zeros((count, layout.block_bytes(each)), cupy.uint8)
    return rows, rows.data.ptr + np.arange(count, dtype=np.uint64) * np.uint64(rows.shape[1])


def packed(parts: list[npt.NDArray[Any]], table: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    rows = [b"".join(np.ascontiguousarray(part[row]).tobytes() for part in parts) for row in table]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(table), -1)


def engine(cupy: Any, name: str) -> tuple[Layout, list[npt.NDArray[Any]], list[Any]]:
    """(layout, its parts as numpy has them, the arrays on the GPU)."""

    def make(*shape: int) -> npt.NDArray[np.uint16]:
        return DICE.integers(0, 1 << 16, shape, np.uint16)

    if name == "vllm kv first":
        host = [make(2, PAGES, 16, 2, 64) for _ in range(3)]
        gpu = [cupy.asarray(h) for h in host]
        return layouts.vllm_kv_first(gpu), [h[kv] for h in host for kv in (0, 1)], gpu
    if name == "vllm kv first, HND":
        host = [make(2, PAGES, 2, 16, 64) for _ in range(3)]
        gpu = [cupy.asarray(h) for h in host]
        views = [g.transpose(0, 1, 3, 2, 4) for g in gpu]
        return layouts.vllm_kv_first(views), [h[kv] for h in host for kv in (0, 1)], gpu
    if name == "vllm block first":
        host = [make(PAGES, 2, 16, 2, 64) for _ in range(3)]
        gpu = [cupy.asarray(h) for h in host]
        return layouts.vllm_block_first(gpu), [h[:, kv] for h in host for kv in (0, 1)], gpu
    if name == "vllm BLHNC":
        whole = make(PAGES, 3, 2, 16, 128)
        on_gpu = cupy.asarray(whole)
        views = [on_gpu[:, layer] for layer in range(3)]
        return layouts.vllm_standard(views), [whole[:, layer] for layer in range(3)], [on_gpu]
    page = int(name.split()[-1])
    shape = (1, 576) if "mla" in name else (2, 64)
    host = [make(PAGES * page, *shape) for _ in range(4)]
    gpu = [cupy.asarray(h) for h in host]
    layout = layouts.sglang_mla(gpu, page) if "mla" in name else layouts.sglang_mha(gpu[::2], gpu[1::2], page)
    return layout, [h.reshape(PAGES, page, *shape) for h in host], gpu


ENGINES = [
    "vllm kv first",
    "vllm kv first, HND",
    "vllm block first",
    "vllm BLHNC",
    "sglang mha 1",
    "sglang mha 16",
    "sglang mha 64",
    "sglang mla 1",
]


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("name", ENGINES)
def test_pages_are_packed_and_unpacked(cupy: Any, name: str, where: str) -> None:
    layout, parts, arrays = engine(cupy, name)
    table = cupy.asarray(TABLE) if where == "gpu" else TABLE
    rows, places = blocks_on_gpu(cupy, layout, TABLE.shape[1], len(TABLE))

    refused = pages.gather(layout, table, places)
    assert int(refused[0]) == 0
    assert (rows.get() == packed(parts, TABLE)).all()

    before = [a.get() for a in arrays]
    for array in arrays:
        array[...] = 0
    assert int(pages.scatter(layout, table, places)[0]) == 0
    pages.gather(layout, table, places)
    assert (rows.get() == packed(parts, TABLE)).all()
    kept = sum(int((b != 0).sum()) for b in before)
    assert 0 < sum(int((a != 0).sum()) for a in arrays) < kept  # pages that are in no block stayed empty


def test_pages_that_do_not_exist_are_left_out(cupy: Any) -> None:
    layout, parts, _arrays = engine(cupy, "vllm kv first")
    rows, places = blocks_on_gpu(cupy, layout, 3, 1)
    rows[...] = 0xEE

    refused = pages.gather(layout, cupy.asarray([[5, -1, PAGES]], cupy.int32), places)

    assert int(refused[0]) == 2 * 6 * layout.run // 16
    first = rows.get()[0].reshape(6, 3, -1)
    assert (first[:, 0] == np.stack([p[5].reshape(-1).view(np.uint8) for p in parts])).all()
    assert (first[:, 1:] == 0xEE).all()


@pytest.mark.parametrize("run", [1, 6, 20, 24, 48, 4096, 4104])
def test_runs_of_any_length(cupy: Any, run: int) -> None:
    cache = noise(PAGES * run).reshape(PAGES, run)
    on_gpu = allocated(cupy, cache)
    layout = Layout("NHD", (int(on_gpu.data.ptr),), run, run, PAGES)
    out = allocated(cupy, np.zeros(TABLE.size * run, np.uint8))
    places = int(out.data.ptr) + np.arange(3, dtype=np.uint64) * np.uint64(6 * run)

    pages.gather(layout, TABLE, places)

    assert (out.get().reshape(3, -1) == packed([cache], TABLE)).all()


def test_torch_tensors_of_bfloat16(cupy: Any, torch: Any) -> None:
    layers = [torch.randn(2, PAGES, 16, 2, 64, device="cuda").to(torch.bfloat16) for _ in range(2)]
    host = [t.cpu().view(torch.int16).numpy() for t in layers]
    layout = layouts.vllm_kv_first(layers)
    rows, places = blocks_on_gpu(cupy, layout, 6, 3)

    pages.gather(layout, TABLE, places, stream=torch.cuda.current_stream())
    torch.cuda.current_stream().synchronize()

    assert (rows.get() == packed([h[kv] for h in host for kv in (0, 1)], TABLE)).all()

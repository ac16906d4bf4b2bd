"""Gather and scatter move the bytes that numpy says: the kernels' index arithmetic, run on the host."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import layouts, pages
from memkv.gpudirect.layouts import Span
from memkv.gpudirect.pages import Layout
from memkv.rdma.errors import LocalError

from .hosted import Fenced, library, needs_compiler, run

Array = npt.NDArray[Any]
DICE = np.random.default_rng(3)


def noise(shape: tuple[int, ...], dtype: type = np.uint16) -> Array:
    return DICE.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def span(array: Array) -> Span:
    """A numpy array as if it lay on the GPU."""
    return Span(array.ctypes.data, array.shape, array.strides, array.itemsize)


def move(
    name: str,
    layout: Layout,
    table: npt.ArrayLike,
    blocks: npt.ArrayLike,
    parts: range | None = None,
    grid: int = 2,
) -> int:
    """What pages.gather and scatter launch, on the host; the counter of vectors left out."""
    listed, places, which = pages.prepare(layout, table, blocks, parts)
    return launch(name, layout, listed, places, which, grid)


def launch(
    name: str, layout: Layout, listed: Array, places: Array, which: range, grid: int = 2, width: int = 0
) -> int:
    refused = np.zeros(1, np.uint32)
    bases = np.array(layout.bases[which.start : which.stop], np.uint64)
    each = listed.shape[1]
    for part in pages.launches(layout, places, each, which):
        assert width in (0, part.width)
        tables = (bases, places[part.first :].copy(), listed[part.first :].copy())
        run("pages", f"{name}_{part.width}", grid, 64, *tables, *part.numbers, refused)
    return int(refused[0])


def block_memory(layout: Layout, count: int, each: int, fill: int = 0) -> tuple[Array, Array]:
    """(n, bytes) and the addresses of its rows, at multiples of 16."""
    nbytes = layout.block_bytes(each)
    pitch = -(-nbytes // 16) * 16
    raw = np.full(count * pitch + 16, fill, np.uint8)
    skip = -raw.ctypes.data % 16
    rows = raw[skip : skip + count * pitch].reshape(count, pitch)
    return rows[:, :nbytes], rows.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(pitch)


def packed(parts: list[Array], table: Array) -> Array:
    """The definition: for each row of ``table`` part after part, pages in order. Parts are [pages, …]."""
    rows = [b"".join(part[row].tobytes() for part in parts) for row in table]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(table), -1)


# --- the engines' layouts ---

LAYERS, PAGES, TOKENS, HEADS, DIM = 3, 10, 4, 2, 8
TABLE = np.array([[7, 2, 9, 0], [1, 3, 8, 5]], np.int32)


def permuted(order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """An array of that logical shape, whose axes lie in memory in that order."""
    memory = noise(tuple(shape[a] for a in order))
    return memory.transpose(np.argsort(order))


def case(name: str) -> tuple[Layout, list[Array], Any]:
    """(layout, parts as numpy sees them, what keeps the memory)."""
    if name in ("kv first", "kv first, HND"):
        order = (0, 1, 2, 3, 4) if name == "kv first" else (0, 1, 3, 2, 4)
        layers = [permuted(order, (2, PAGES, TOKENS, HEADS, DIM)) for _ in range(LAYERS)]
        inner = (0, 1, 2, 3) if name == "kv first" else (0, 2, 1, 3)
        return (
            layouts.vllm_kv_first([span(t) for t in layers]),
            [t[kv].transpose(inner) for t in layers for kv in (0, 1)],
            layers,
        )
    if name == "block first":
        layers = [noise((PAGES, 2, TOKENS, HEADS, DIM)) for _ in range(LAYERS)]
        return (
            layouts.vllm_block_first([span(t) for t in layers]),
            [t[:, kv] for t in layers for kv in (0, 1)],
            layers,
        )
    if name == "mla":
        layers = [noise((PAGES, TOKENS, 36)) for _ in range(LAYERS)]
        return layouts.vllm_mla([span(t) for t in layers]), layers, layers
    if name == "fp8 mla":
        layers = [noise((PAGES, TOKENS, 41), np.uint8) for _ in range(LAYERS)]
        return layouts.vllm_mla([span(t) for t in layers]), layers, layers
    if name.startswith("sglang"):
        page = int(name.split()[-1])
        if "mla" in name:
            pool = [noise((PAGES * page + page - 1, 1, 36)) for _ in range(LAYERS)]
            layout = layouts.sglang_mla([span(t) for t in pool], page)
        else:
            pool = [noise((PAGES * page, HEADS, DIM)) for _ in range(2 * LAYERS)]
            layout = layouts.sglang_mha([span(t) for t in pool[0::2]], [span(t) for t in pool[1::2]], page)
        return layout, [t[: PAGES * page].reshape(PAGES, page, *t.shape[1:]) for t in pool], pool
    order = tuple("LBHNC".index(letter) for letter in name)  # one of vLLM's standard ones
    whole = permuted(order, (LAYERS, PAGES, HEADS, TOKENS, 2 * DIM))
    layout = layouts.vllm_standard([span(whole[i]) for i in range(LAYERS)])
    heads_apart = name.index("H") < name.index("B") or name == "BHLNC"
    if heads_apart:
        return layout, [whole[i][:, h] for i in range(LAYERS) for h in range(HEADS)], whole
    inner = (0, 2, 1, 3) if name.endswith("NHC") else (0, 1, 2, 3)
    return layout, [whole[i].transpose(inner) for i in range(LAYERS)], whole


NAMES = {
    "kv first": "NHD",
    "kv first, HND": "HND",
    "block first": "NHD",
    "mla": "NHD",
    "fp8 mla": "NHD",
    "sglang mha 1": "NHD",
    "sglang mha 4": "NHD",
    "sglang mha 64": "NHD",
    "sglang mla 1": "NHD",
    "sglang mla 16": "NHD",
    "LBHNC": "HND",
    "LBNHC": "NHD",
    "LHBNC": "H/ND",
    "BLHNC": "HND",
    "BLNHC": "NHD",
    "BHLNC": "H/ND",
}


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_gather_packs_part_by_part(name: str) -> None:
    layout, parts, _kept = case(name)
    rows, places = block_memory(layout, len(TABLE), TABLE.shape[1])

    assert move("gather", layout, TABLE, places) == 0

    assert (rows == packed(parts, TABLE)).all()
    assert layout.name == NAMES[name]


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_scatter_undoes_it_and_touches_nothing_else(name: str) -> None:
    layout, parts, _kept = case(name)
    rows, places = block_memory(layout, len(TABLE), TABLE.shape[1])
    rows[:] = noise(rows.shape, np.uint8)
    before = [part.copy() for part in parts]

    assert move("scatter", layout, TABLE, places) == 0

    assert (packed(parts, TABLE) == rows).all()
    others = np.setdiff1d(np.arange(PAGES), TABLE)
    assert all((now[others] == then[others]).all() for now, then in zip(parts, before, strict=True))


@needs_compiler
def test_blocks_are_the_same_bytes_whatever_the_size_of_a_page() -> None:
    keys, values = noise((64, HEADS, DIM)), noise((64, HEADS, DIM))
    got = []
    for page in (1, 2, 16):
        layout = layouts.sglang_mha([span(keys)], [span(values)], page)
        table = np.arange(32 // page, dtype=np.int32).reshape(1, -1)
        rows, places = block_memory(layout, 1, table.shape[1])
        move("gather", layout, table, places)
        got.append(rows.copy())
    paged = np.stack([keys.reshape(4, 16, HEADS, DIM), values.reshape(4, 16, HEADS, DIM)])
    layout = layouts.vllm_kv_first([span(paged)])
    rows, places = block_memory(layout, 1, 2)
    move("gather", layout, [[0, 1]], places)

    assert all((rows == other).all() for other in got)


@needs_compiler
def test_one_layer_goes_to_its_place_in_the_block() -> None:
    layout, parts, _kept = case("kv first")
    rows, places = block_memory(layout, 2, 4, fill=0xEE)
    each = 4 * layout.run

    move("gather", layout, TABLE, places, range(2, 4))

    assert (rows[:, 2 * each : 4 * each] == packed(parts, TABLE)[:, 2 * each : 4 * each]).all()
    assert (rows[:, : 2 * each] == 0xEE).all()
    assert (rows[:, 4 * each :] == 0xEE).all()


@needs_compiler
@pytest.mark.parametrize("width", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("what", ["base", "run", "block"])
def test_vectors_are_as_wide_as_everything_is_aligned(width: int, what: str) -> None:
    run_bytes = 48 + (width if what == "run" and width < 16 else 0)
    cache = Fenced(PAGES * run_bytes, at_end=False, offset=width if what == "base" else 0)
    cache.array[:] = noise(cache.array.shape, np.uint8)
    layout = Layout("NHD", (cache.address,), run_bytes, run_bytes, PAGES)
    block = Fenced(3 * run_bytes, at_end=False, offset=width if what == "block" else 0)
    table = np.array([[9, 0, 4]], np.int32)

    left = launch("gather", layout, table, np.array([block.address], np.uint64), range(1), width=width)

    assert left == 0
    assert (block.array == packed([cache.array.reshape(PAGES, -1)], table)[0]).all()
    block.close()
    cache.close()


@needs_compiler
@pytest.mark.parametrize("grid", [1, 3, 8])
def test_nothing_outside_of_pages_and_blocks_is_touched(grid: int) -> None:
    cache = Fenced(PAGES * 112)
    cache.array[:] = noise(cache.array.shape, np.uint8)
    layout = Layout("NHD", (cache.address,), 112, 112, PAGES)
    block = Fenced(5 * 112)
    table = np.array([[9, 0, 4, 9, 1]], np.int32)

    move("gather", layout, table, [block.address], grid=grid)
    assert (block.array == packed([cache.array.reshape(PAGES, -1)], table)[0]).all()

    block.array[:] = noise(block.array.shape, np.uint8)
    table = np.array([[9, 0, 4, 8, 1]], np.int32)
    move("scatter", layout, table, [block.address], grid=grid)
    assert (block.array == packed([cache.array.reshape(PAGES, -1)], table)[0]).all()
    block.close()
    cache.close()


@needs_compiler
@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_pages_that_a_device_table_makes_up_are_left_out_and_counted(name: str) -> None:
    layout, parts, _kept = case("kv first")
    before = [part.copy() for part in parts]
    rows, places = block_memory(layout, 1, 4, fill=0xEE)
    table = np.array([[3, -1, PAGES, 2**31 - 1]], np.int32)

    left = launch(name, layout, table, places, range(len(layout.bases)))

    assert left == 3 * len(layout.bases) * layout.run // 16
    if name == "gather":
        for i, part in enumerate(parts):
            own = rows[0, i * 4 * layout.run : (i + 1) * 4 * layout.run].reshape(4, -1)
            assert (own[0] == np.frombuffer(part[3].tobytes(), np.uint8)).all()
            assert (own[1:] == 0xEE).all()
    else:
        others = np.arange(PAGES) != 3
        assert all((now[others] == then[others]).all() for now, then in zip(parts, before, strict=True))


@needs_compiler
def test_random_shapes_agree() -> None:
    dice = random.Random(9)
    for _ in range(40):
        run_bytes, count = dice.choice([1, 6, 16, 48, 100, 256]), dice.randrange(1, 9)
        parts = [noise((count, run_bytes), np.uint8) for _ in range(dice.randrange(1, 6))]
        layout = Layout("NHD", tuple(p.ctypes.data for p in parts), run_bytes, run_bytes, count)
        table = np.array(
            [[dice.randrange(count) for _ in range(dice.randrange(1, 6))]] * dice.randrange(1, 4), np.int32
        )
        rows, places = block_memory(layout, *table.shape)
        move("gather", layout, table, places, grid=dice.randrange(1, 4))
        assert (rows == packed(parts, table)).all()


# --- divisions ---


def test_reciprocals_divide_exactly() -> None:
    dice = random.Random(2)
    divisors = [
        *range(1, 70),
        *(dice.randrange(1, 1 << 31) for _ in range(300)),
        *(1 << s for s in range(31)),
        2**31 - 1,
    ]
    for divisor in divisors:
        multiplier, shift = pages.reciprocal(divisor)
        assert multiplier < 1 << 32
        multiples = [divisor * k for k in (1, 2, 3, (2**31 - 1) // divisor)]
        for n in {0, 1, 2**31 - 1, *(m + d for m in multiples for d in (-1, 0, 1))}:
            if 0 <= n < 1 << 31:
                assert (n if divisor == 1 else n * multiplier >> 32 + shift) == n // divisor


@needs_compiler
def test_the_kernel_divides_by_them() -> None:
    divided = library("pages").run_divided
    for divisor in (1, 2, 3, 7, 10, 641, 2**16 + 1, 2**31 - 1):
        for n in (0, 1, divisor - 1, divisor, 12345678, 2**31 - 1):
            assert divided(n, divisor, *pages.reciprocal(divisor)) == n // divisor


# --- what is prepared on the host ---


def test_a_call_of_more_vectors_than_a_launch_can_number_is_divided() -> None:
    run_bytes = 1 << 20
    layout = Layout("NHD", tuple(1 << 40 | i << 35 for i in range(8)), run_bytes, run_bytes, 1000)
    blocks = np.arange(1, 701, dtype=np.uint64) << np.uint64(36)

    found = list(pages.launches(layout, blocks, 16, range(8)))

    assert sum(part.blocks for part in found) == 700
    assert [part.first for part in found] == [0, 255, 510]
    assert all(part.vectors < 1 << 31 and part.vectors == part.blocks * 8 * 16 << 16 for part in found)


def test_the_grid_grows_until_the_gpu_is_full() -> None:
    layout = Layout("NHD", (4096,), 4096, 4096, 10)
    (small,) = pages.launches(layout, np.array([1 << 20], np.uint64), 1, range(1))
    (large,) = pages.launches(layout, np.arange(1, 1000, dtype=np.uint64) << np.uint64(20), 100, range(1))

    assert small.grid(100) == 1
    assert large.grid(100) == 1600


@pytest.mark.parametrize(
    ("table", "blocks", "parts", "words"),
    [
        ([[0, 10]], [4096], None, "page 10"),
        ([[-1, 0]], [4096], None, "page -1"),
        ([0, 1], [4096], None, "page table"),
        ([[]], [4096], None, "page table"),
        ([[0.5]], [4096], None, "page table"),
        ([[0]], [4096, 8192], None, "addresses"),
        ([[0]], [0], None, "addresses"),
        ([[0]], [4096], range(2, 3), "parts"),
        ([[0]], [4096], range(0), "parts"),
    ],
)
def test_what_does_not_fit_is_refused(table: Any, blocks: Any, parts: range | None, words: str) -> None:
    with pytest.raises(LocalError, match=words):
        pages.prepare(Layout("NHD", (4096, 8192), 16, 16, 10), table, blocks, parts)


def test_tensors_that_do_not_fit_are_refused() -> None:
    good, other = span(noise((2, 4, 4, 2, 8))), span(noise((2, 5, 4, 2, 8)))
    with pytest.raises(LocalError, match="different shapes"):
        layouts.vllm_kv_first([good, other])
    with pytest.raises(LocalError, match="no layers"):
        layouts.vllm_kv_first([])
    with pytest.raises(LocalError, match=r"\[B, H, N, C\]"):
        layouts.vllm_standard([good])
    with pytest.raises(LocalError, match="no tensor in GPU memory"):
        layouts.vllm_kv_first([noise((2, 4, 4, 2, 8))])
    with pytest.raises(LocalError, match="pages of 64 tokens"):
        layouts.sglang_mla([span(noise((4, 1, 8)))], 64)
    with pytest.raises(LocalError, match="broadcast"):
        layouts.vllm_mla([span(np.broadcast_to(noise((1, 4, 8)), (6, 4, 8)))])


class Interface:
    """What CuPy shows of an array."""

    def __init__(self, array: Array, strides: tuple[int, ...] | None) -> None:
        self.__cuda_array_interface__ = {
            "data": (array.ctypes.data, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "strides": strides,
            "version": 3,
        }


class Torch:
    """What torch shows of a tensor; bfloat16 has no array interface."""

    is_cuda = True

    def __init__(self, array: Array) -> None:
        self.shape, self._array = array.shape, array

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def element_size(self) -> int:
        return int(self._array.itemsize)

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self._array.itemsize for s in self._array.strides)


def test_tensors_of_every_kind_are_the_same_span() -> None:
    array = noise((2, 3, 4)).transpose(1, 0, 2)
    plain = noise((2, 3, 4))

    assert layouts.span(Interface(array, array.strides)) == layouts.span(Torch(array)) == span(array)
    assert layouts.span(Interface(plain, None)) == span(plain)


def test_token_indices_become_pages() -> None:
    indices = np.array([[8, 9, 10, 11, 4, 5, 6, 7], [0, 1, 2, 3, 12, 13, 14, 15]])

    assert layouts.sglang_pages(indices, 4).tolist() == [[2, 1], [0, 3]]
    assert layouts.sglang_pages(indices, 1).tolist() == indices.tolist()
    for bad in (indices + 1, indices[:, ::-1], indices[:, :6]):
        with pytest.raises(LocalError, match="whole pages"):
            layouts.sglang_pages(bad, 4)


@pytest.mark.parametrize(("stride", "run_bytes", "count"), [(8, 16, 2), (16, 0, 2), (16, 16, 0)])
def test_a_layout_that_cannot_be_is_refused(stride: int, run_bytes: int, count: int) -> None:
    with pytest.raises(LocalError):
        Layout("NHD", (4096,), stride, run_bytes, count)

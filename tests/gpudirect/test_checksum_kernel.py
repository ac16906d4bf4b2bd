"""The GPU's checksum agrees with the definition in docs/layout.md: its kernels, run on the host."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from memkv.gpudirect import checksum, kernels
from memkv.rdma.errors import LocalError
from memkv.store.layout import CHUNK_BYTES as CHUNK
from memkv.store.native._store import ffi, lib

from .hosted import Fenced, needs_compiler, run
from .model import xxh3_long

NOISE = random.Random(11).randbytes(40 * CHUNK)
CLASSES = [0, 1, 3, 4, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 128, 129, 144, 239, 240, 241, 255, 256]
STEPS = [
    n + d for n in (320, 1024, 2048, 4096, 15 * 1024, CHUNK) for d in (-65, -64, -63, -1, 0, 1, 63, 64, 65)
]
SEVERAL = [
    n * CHUNK + d for n in (2, 3, 28, 29, 30) for d in (-1, 0, 1, 16)
]  # the outer hash has classes too


def by_cpu(payload: bytes) -> int:
    return int(lib.mkv_checksum(ffi.from_buffer(payload) if payload else ffi.NULL, len(payload)))


def kernel_checksums(
    pointers: Sequence[int], lengths: Sequence[int], expected: Sequence[int] | None = None, grid: int = 2
) -> tuple[list[int], list[int]]:
    """What the two launches of a batch give, with as many blocks of threads as ``grid``."""
    table, how = checksum.batch(pointers, lengths, expected)
    rows = [np.ascontiguousarray(row) for row in table]
    hashes = np.zeros((how.blocks, how.pitch + 2), np.uint64)
    at = hashes.ctypes.data % 16 // 8  # the GPU's allocations are aligned, numpy's need not be
    hashes = hashes.reshape(-1)[at : at + how.blocks * how.pitch]
    out, verdicts = np.zeros(how.blocks, np.uint64), np.full(how.blocks, 7, np.uint8)
    if how.most:
        run("checksum", "chunks", grid, rows[0], rows[1], how.blocks, how.most, how.pitch, hashes)
    due = rows[2] if expected is not None else None
    run("checksum", "verdicts", grid, rows[1], how.blocks, how.pitch, hashes, out, due, verdicts)
    return out.tolist(), verdicts.tolist()


@pytest.mark.parametrize("length", [241, 300, 1023, 1024, 1025, 1088, 1089, 4096, 16383, CHUNK])
def test_the_model_is_xxh3(length: int) -> None:
    xxhash = pytest.importorskip("xxhash")
    assert xxh3_long(NOISE[:length]) == xxhash.xxh3_64_intdigest(NOISE[:length])


def test_the_secret_is_the_one_of_the_specification() -> None:
    text = kernels.source("checksum")

    assert len(kernels.SECRET) == 192
    assert f"#define CHUNK_BYTES {CHUNK}u" in text
    assert text.index("SECRET[25]") < text.index("mkv_chunks")


@needs_compiler
@pytest.mark.parametrize("offset", [0, 8, 4, 1])
def test_every_length_class_agrees_at_any_alignment(offset: int) -> None:
    lengths = [n for n in CLASSES + STEPS if n > 0]
    memory = [Fenced(n, at_end=False, offset=offset) for n in lengths]
    for fenced, n in zip(memory, lengths, strict=True):
        fenced.array[:] = np.frombuffer(NOISE[7 : 7 + n], np.uint8)

    out, _ = kernel_checksums([m.address for m in memory], lengths)

    assert out == [by_cpu(NOISE[7 : 7 + n]) for n in lengths]
    for fenced in memory:
        fenced.close()


@needs_compiler
def test_nothing_beyond_the_last_byte_is_read() -> None:
    lengths = [n for n in CLASSES + STEPS if n > 0] + [2 * CHUNK + 5, 3 * CHUNK]
    memory = [Fenced(n) for n in lengths]
    for fenced, n in zip(memory, lengths, strict=True):
        fenced.array[:] = np.frombuffer(NOISE[:n], np.uint8)

    out, _ = kernel_checksums([m.address for m in memory], lengths, grid=1)

    assert out == [by_cpu(NOISE[:n]) for n in lengths]
    for fenced in memory:
        fenced.close()


@needs_compiler
def test_blocks_of_many_chunks_agree() -> None:
    memory = Fenced(len(NOISE), at_end=False)
    memory.array[:] = np.frombuffer(NOISE, np.uint8)
    starts = [0 if i % 2 else 16 * i for i in range(len(SEVERAL))]

    out, _ = kernel_checksums([memory.address + s for s in starts], SEVERAL, grid=3)

    assert out == [by_cpu(NOISE[s : s + n]) for s, n in zip(starts, SEVERAL, strict=True)]
    memory.close()


@needs_compiler
@pytest.mark.parametrize("grid", [1, 2, 7])
def test_the_result_does_not_depend_on_the_grid(grid: int) -> None:
    memory = Fenced(5 * CHUNK, at_end=False)
    memory.array[:] = np.frombuffer(NOISE[: 5 * CHUNK], np.uint8)
    lengths = [0, 1, 5 * CHUNK, 100, CHUNK + 1, 0, 240 + CHUNK]

    out, _ = kernel_checksums([memory.address] * len(lengths), lengths, grid=grid)

    assert out == [by_cpu(NOISE[:n]) for n in lengths]
    memory.close()


@needs_compiler
def test_an_empty_batch_of_payload_is_that_of_its_length() -> None:
    assert kernel_checksums([4096, 4096], [0, 0])[0] == [by_cpu(b"")] * 2


@needs_compiler
def test_a_verdict_falls_for_each_block() -> None:
    memory = Fenced(6 * 1024, at_end=False)
    memory.array[:] = np.frombuffer(NOISE[: 6 * 1024], np.uint8)
    starts, lengths = [0, 1024, 2048, 3072], [1024, 1000, 17, 3072]
    due = [by_cpu(NOISE[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
    memory.array[1024 + 999] ^= 1
    memory.array[2048 + 17] ^= 1  # just behind the block

    _, verdicts = kernel_checksums([memory.address + s for s in starts], lengths, due)

    assert verdicts == [1, 0, 1, 1]
    memory.close()


@needs_compiler
def test_random_batches_agree() -> None:
    dice = random.Random(5)
    memory = Fenced(len(NOISE), at_end=False)
    memory.array[:] = np.frombuffer(NOISE, np.uint8)
    lengths = [
        dice.choice([dice.randrange(300), dice.randrange(3000), dice.randrange(3 * CHUNK)]) for _ in range(60)
    ]
    starts = [dice.randrange(len(NOISE) - n) & dice.choice([~15, ~7, ~0]) for n in lengths]

    out, _ = kernel_checksums([memory.address + s for s in starts], lengths)

    assert out == [by_cpu(NOISE[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
    memory.close()


# --- what is prepared on the host ---


def test_lists_of_hashes_begin_at_multiples_of_16_bytes() -> None:
    for most in range(40):
        how = checksum.plan(np.array([0, most * CHUNK], np.uint64))
        assert how.most == most
        assert how.pitch % 2 == 0
        assert how.pitch in (most + 1, most + 2)  # the length goes behind the hashes


def test_the_grid_has_a_warp_for_every_chunk_until_the_gpu_is_full() -> None:
    assert checksum.plan(np.array([CHUNK * 9], np.uint64)).grids(100) == (2, 1)
    assert checksum.plan(np.full(1000, 1 << 24, np.uint64)).grids(132) == (132 * 16, 125)


def test_one_length_may_stand_for_all() -> None:
    table, how = checksum.batch([4096, 8192], 100, [1, 2])
    assert table.tolist() == [[4096, 8192], [100, 100], [1, 2]]
    assert (how.blocks, how.most) == (2, 1)


@pytest.mark.parametrize(
    ("pointers", "lengths", "expected"),
    [
        ([], [], None),
        ([4096, 0], 100, None),
        ([4096], 1 << 32, None),
        ([4096], -1, None),
        ([4096, 8192], [1, 2], [1]),
        ([4096, 8192], [1, 2, 3], None),
    ],
)
def test_what_does_not_fit_is_refused(pointers: object, lengths: object, expected: object) -> None:
    with pytest.raises(LocalError):
        checksum.batch(pointers, lengths, expected)  # type: ignore[arg-type]

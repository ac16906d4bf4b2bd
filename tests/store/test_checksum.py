"""The checksum agrees with its definition in docs/layout.md, by every code path, at every length."""

import random

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from memkv.store import layout
from memkv.store.native._store import ffi, lib

pytestmark = pytest.mark.asan

CHUNK = layout.CHUNK_BYTES
STREAMED = 32 * CHUNK  # from here on the outer hash is fed in parts
EDGES = [n + d for n in (0, CHUNK, 2 * CHUNK, STREAMED, 2 * STREAMED) for d in (-1, 0, 1) if n + d >= 0]
PATHS = [path for path in (lib.MKV_CHECKSUM_PORTABLE, lib.MKV_CHECKSUM_AVX2) if lib.mkv_checksum_can(path)]
NOISE = random.Random(7).randbytes(2 * STREAMED + CHUNK)


def defined(payload: bytes) -> int:
    """The definition, word by word, over an independent xxhash."""
    chunks = [payload[i : i + CHUNK] for i in range(0, len(payload), CHUNK)]
    hashes = b"".join(xxhash.xxh3_64_intdigest(chunk).to_bytes(8, "little") for chunk in chunks)
    return xxhash.xxh3_64_intdigest(hashes + len(payload).to_bytes(8, "little"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", EDGES)
def test_agrees_with_its_definition_around_every_edge(path: int, length: int) -> None:
    assert lib.mkv_checksum_by(path, NOISE[:length], length) == defined(NOISE[:length])


@given(st.integers(0, len(NOISE)), st.integers(0, 63))
@example(240, 1)
@example(241, 1)
def test_all_paths_agree_at_any_length_and_alignment(length: int, start: int) -> None:
    length = min(length, len(NOISE) - start)
    payload = ffi.from_buffer(NOISE) + start
    expected = defined(NOISE[start : start + length])
    assert {lib.mkv_checksum_by(path, payload, length) for path in PATHS} == {expected}
    assert lib.mkv_checksum(payload, length) == expected


@given(st.binary(min_size=1, max_size=3 * CHUNK), st.data())
def test_one_flipped_bit_changes_it(payload: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(payload) * 8 - 1))
    flipped = bytearray(payload)
    flipped[place // 8] ^= 1 << place % 8
    assert lib.mkv_checksum(bytes(flipped), len(flipped)) != lib.mkv_checksum(payload, len(payload))


def test_cut_at_a_chunk_is_not_the_same_block() -> None:
    zeros = bytes(2 * CHUNK)
    assert lib.mkv_checksum(zeros, CHUNK) != lib.mkv_checksum(zeros, 2 * CHUNK)

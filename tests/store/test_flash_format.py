"""The tables of a flash device: they come back as they were written, and nothing else passes for them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.store.flash import format as f
from memkv.store.native._store import ffi

MIB = 1 << 20
SECRET = 0x1234567890ABCDEF
DOCUMENT = Path(__file__).parents[2] / "docs" / "layout.md"
DTYPES = {
    "SUPER": f.SUPER,
    "NAMES_HEAD": f.NAMES_HEAD,
    "NAME": f.NAME,
    "SEGMENT": f.SEGMENT,
    "SNAPSHOT": f.SNAPSHOT,
    "RECORD": f.RECORD,
}

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
supers = st.builds(
    f.Superblock,
    store=st.binary(min_size=16, max_size=16),
    clean=st.booleans(),
    starting=st.booleans(),
    index=u32,
    count=u32,
    segments=u32,
    **{
        n: u64
        for n in f.Superblock.__dataclass_fields__
        if n not in ("store", "clean", "starting", "index", "count", "segments")
    },
)
names = st.builds(
    f.Name,
    id=u32,
    name=st.text(min_size=1, max_size=60),
    block_bytes=u32,
    align=st.sampled_from([512, 4096]),
    grace_ns=u64,
    incarnation=u64,
    salt=u64,
)
segments = st.builds(
    f.Segment, number=st.just(0), namespace=u32, payload=u64, epoch=st.integers(1, 2**64 - 1)
)


def device(nbytes: int = 64 * MIB, **changes: Any) -> f.Superblock:
    made = f.plan(nbytes, store=b"s" * 16, identity=7, index=0, count=1, secret=SECRET)
    return replace(made, **changes)


def flipped(raw: bytes, bit: int) -> bytes:
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


# --- superblock -------------------------------------------------------------------------------------------


@given(supers)
def test_a_superblock_comes_back(block: f.Superblock) -> None:
    page = block.pack()
    assert len(page) == f.PAGE
    assert f.Superblock.parse(page) == block


@settings(max_examples=60)
@given(st.integers(0, 8 * f.SUPER.itemsize - 1))
def test_a_superblock_with_one_bit_changed_is_none(bit: int) -> None:
    assert f.Superblock.parse(flipped(device().pack(), bit)) is None


def test_a_superblock_torn_between_two_versions_is_none() -> None:
    old, new = device().pack(), device(boot=9, generation=3, snapshot=4).pack()
    for cut in range(8, f.SUPER.itemsize, 8):
        torn = new[:cut] + old[cut:]
        assert f.Superblock.parse(torn) is None or torn in (old, new)


def test_pages_of_something_else_are_none() -> None:
    assert f.Superblock.parse(bytes(f.PAGE)) is None
    assert f.Superblock.parse(b"\xff" * f.PAGE) is None
    assert f.Superblock.parse(b"LABELONE".ljust(f.PAGE, b"x")) is None


def test_a_superblock_of_a_version_to_come_is_told_from_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f, "VERSION", 2)
    page = device().pack()
    monkeypatch.undo()
    with pytest.raises(f.FormatError, match="version 2, this program knows 1"):
        f.Superblock.parse(page)


def test_superblocks_take_turns() -> None:
    block = device()
    after = block.next(boot=1)
    assert {block.place(), after.place()} == {0, f.PAGE}
    assert after.next().place() == block.place()


@pytest.mark.parametrize("nbytes", [16 * MIB, 64 * MIB, 1 << 30, 3 << 40])
def test_a_plan_has_everything_in_its_place(nbytes: int) -> None:
    block = device(nbytes)
    at = [0, block.names_at, block.segments_at, block.snapshot_at, block.data_at, nbytes]
    assert at == sorted(at)
    assert block.segments_at - block.names_at == 2 * f.NAMES_BYTES
    assert block.segments * f.SEGMENT.itemsize <= block.snapshot_at - block.segments_at
    assert block.snapshot_at + block.snapshot_bytes <= block.data_at
    assert block.segment_offset(block.segments) == block.size <= nbytes
    assert nbytes - block.size < block.segment_bytes
    assert f.SEGMENT_MIN <= block.segment_bytes <= f.SEGMENT_MAX
    assert all(place % f.PAGE == 0 for place in at[:-1])


@pytest.mark.parametrize("nbytes", [0, f.PAGE, 8 * MIB])
def test_a_device_that_is_too_small_is_refused(nbytes: int) -> None:
    with pytest.raises(f.FormatError, match="no two segments"):
        device(nbytes)


@pytest.mark.parametrize("segment_bytes", [1000, 8192, (1 << 30) + 4096])
def test_segments_that_cannot_be_are_refused(segment_bytes: int) -> None:
    with pytest.raises(f.FormatError, match="segments of"):
        f.plan(1 << 40, store=b"", identity=1, index=0, count=1, secret=1, segment_bytes=segment_bytes)


# --- namespaces -------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(names, max_size=4), u64)
def test_the_namespace_table_comes_back(table: list[f.Name], generation: int) -> None:
    raw = f.pack_names(table, generation, SECRET)
    assert len(raw) == f.NAMES_BYTES
    assert f.parse_names(raw, SECRET) == (generation, table)
    assert f.parse_names(raw, SECRET ^ 1) is None


@settings(max_examples=60)
@given(st.integers(0, 8 * (f.NAMES_HEAD.itemsize) - 1) | st.integers(8 * 512, 8 * 1024 - 1))
def test_a_namespace_table_with_one_bit_changed_is_none(bit: int) -> None:
    raw = f.pack_names([f.Name(1, "a", 2, 512, 3, 4, 5)], 6, SECRET)
    assert f.parse_names(flipped(raw, bit), SECRET) is None


def test_more_names_than_fit_and_longer_ones_are_refused() -> None:
    name = f.Name(1, "a", 2, 512, 3, 4, 5)
    assert f.parse_names(f.pack_names([name] * f.MAX_NAMESPACES, 1, SECRET), SECRET) is not None
    with pytest.raises(f.FormatError, match="fit on flash"):
        f.pack_names([name] * (f.MAX_NAMESPACES + 1), 1, SECRET)
    assert f.parse_names(f.pack_names([replace(name, name="é" * 128)], 1, SECRET), SECRET) is not None
    with pytest.raises(f.FormatError, match="a name of 258 bytes"):
        f.pack_names([replace(name, name="é" * 129)], 1, SECRET)


# --- segments ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.none() | segments, max_size=8))
def test_the_segment_table_comes_back(table: list[f.Segment | None]) -> None:
    raw = b"".join(f.pack_segment(s, SECRET) for s in table)
    expected = [replace(s, number=n) for n, s in enumerate(table) if s]
    assert f.parse_segments(raw, SECRET) == expected
    assert f.parse_segments(raw, SECRET ^ 1) == []


@settings(max_examples=60)
@given(st.integers(0, 8 * f.SEGMENT.itemsize - 1))
def test_a_record_with_one_bit_changed_is_free_and_takes_none_with_it(bit: int) -> None:
    segment = f.Segment(0, 1, 65536, 1 << 32 | 1)
    raw = flipped(f.pack_segment(segment, SECRET), bit) + f.pack_segment(segment, SECRET)
    assert f.parse_segments(raw, SECRET) == [replace(segment, number=1)]


def test_records_do_not_cross_sectors() -> None:
    assert 512 % f.SEGMENT.itemsize == 0


# --- snapshot ---------------------------------------------------------------------------------------------


def records(n: int) -> Any:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, n * f.RECORD.itemsize, np.uint8).view(f.RECORD)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
def test_a_snapshot_comes_back(n: int) -> None:
    raw = f.pack_snapshot(records(n), 5, SECRET)
    assert len(raw) % f.PAGE == 0
    page, body = raw[: f.PAGE], raw[f.PAGE :]
    assert f.snapshot_count(page, 5, SECRET) == n
    back = f.parse_snapshot(page, body, SECRET)
    assert back is not None
    assert back.tobytes() == records(n).tobytes()


def test_a_snapshot_of_another_generation_or_store_is_none() -> None:
    raw = f.pack_snapshot(records(3), 5, SECRET)
    assert f.snapshot_count(raw[: f.PAGE], 4, SECRET) is None
    assert f.snapshot_count(raw[: f.PAGE], 5, SECRET ^ 1) is None
    assert f.snapshot_count(bytes(f.PAGE), 0, SECRET) is None


@settings(max_examples=60)
@given(st.integers(0, 8 * f.SNAPSHOT.itemsize - 1), st.integers(0, 8 * 3 * f.RECORD.itemsize - 1))
def test_a_snapshot_with_one_bit_changed_is_none(in_head: int, in_body: int) -> None:
    raw = f.pack_snapshot(records(3), 5, SECRET)
    assert f.snapshot_count(flipped(raw, in_head)[: f.PAGE], 5, SECRET) is None
    body = flipped(raw[f.PAGE :], in_body)
    assert f.parse_snapshot(raw[: f.PAGE], body, SECRET) is None


def test_a_record_is_the_struct_of_the_c_core() -> None:
    ctype = ffi.typeof("struct mkv_flash_record")
    assert f.RECORD.fields is not None
    in_c = [(field.offset, ffi.sizeof(field.type)) for _, field in ctype.fields]
    assert [(field[1], field[0].itemsize) for field in f.RECORD.fields.values()] == in_c
    assert f.RECORD.itemsize == ffi.sizeof(ctype) == 64


# --- the document -----------------------------------------------------------------------------------------


def documented(name: str) -> list[tuple[str, int, int]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    rest = text[text.index(f"`{name}`, ") :]
    table = rest[: rest.index("\n\n", rest.index("\n|---"))]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    return [(field, int(offset), int(size)) for field, offset, size in rows]


@pytest.mark.parametrize("name", DTYPES)
def test_the_document_and_the_dtype_have_the_same_fields(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.fields is not None
    assert documented(name) == [(n, field[1], field[0].itemsize) for n, field in dtype.fields.items()]
    assert f"`{name}`, {dtype.itemsize} bytes" in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_has_the_same_numbers() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split("## A flash device", 1)[1]
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (\w+) \|", text, re.MULTILINE))
    assert len(rows) == 11
    assert {name: int(value, 0) for name, value in rows.items()} == {name: getattr(f, name) for name in rows}

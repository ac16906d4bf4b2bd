"""docs/layout.md, store/layout.py and layout.h say the same, byte for byte."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv.store import layout
from memkv.store.native._store import ffi, lib

DOCUMENT = Path(__file__).parents[2] / "docs" / "layout.md"
STRUCTS = {
    "mkv_epoch": layout.EPOCH,
    "mkv_bucket": layout.BUCKET,
    "mkv_slot": layout.SLOT,
    "mkv_line": layout.LINE,
    "mkv_cold": layout.COLD,
}
ROW = re.compile(r"^\| `(\w+)` \| (\S+) \| (\S+) \|", re.MULTILINE)


def section(opening: str) -> str:
    """The text from `opening` to the end of the first table after it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    rest = text[text.index(opening) :]
    table = rest.index("\n|---")
    return rest[: rest.index("\n\n", table)]


def documented_fields(struct: str) -> list[tuple[str, int, int]]:
    return [
        (name, int(offset), int(size)) for name, offset, size in ROW.findall(section(f"`struct {struct}`"))
    ]


def documented_constants() -> dict[str, int]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section("## Constants"), re.MULTILINE)
    return {name: int(value, 0) for name, value in rows}


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_document_the_dtype_and_the_struct_have_the_same_fields(struct: str) -> None:
    dtype = STRUCTS[struct]
    assert dtype.fields is not None
    in_numpy = [(name, field[1], field[0].itemsize) for name, field in dtype.fields.items()]
    ctype = ffi.typeof(f"struct {struct}")
    in_c = [(name, field.offset, ffi.sizeof(field.type)) for name, field in ctype.fields]
    in_document = documented_fields(struct)
    assert in_document == in_numpy == in_c
    assert dtype.itemsize == ffi.sizeof(ctype) == in_document[-1][1] + in_document[-1][2]


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_document_states_each_size(struct: str) -> None:
    assert f"`struct {struct}`, {STRUCTS[struct].itemsize} bytes" in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_the_module_and_the_header_have_the_same_constants() -> None:
    documented = documented_constants()
    module = {n: v for n, v in vars(layout).items() if n.isupper() and isinstance(v, int)}
    assert documented == module == {name: getattr(lib, f"MKV_{name}") for name in documented}


def test_a_location_word_is_laid_out_as_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+)", section("The location word"), re.MULTILINE)
    bits = {name: (int(low), int(width)) for low, width, name in rows}
    assert list(bits) == ["state", "moved", "slab", "payload", "zero"]
    assert sum(width for _, width in bits.values()) == 64
    ones = {name: ((1 << width) - 1) << low for name, (low, width) in bits.items()}
    full = int(layout.pack_location(7, 0xFFFFF, layout.SLAB_MAX_BYTES - 512, 1))
    assert full == sum(ones[name] for name in ("state", "moved", "slab", "payload"))
    assert ones["moved"] == layout.LOCATION_MOVED


slabs = st.integers(0, 0xFFFFF)
offsets = st.integers(0, layout.SLAB_MAX_BYTES // 512 - 1).map(lambda units: units * 512)


@pytest.mark.asan
@given(st.sampled_from([layout.SLOT_LIVE, layout.SLOT_FLASH]), slabs, offsets)
def test_locations_pack_and_unpack_in_c_and_numpy_alike(state: int, slab: int, offset: int) -> None:
    word = lib.mkv_location(state, slab, offset)
    assert int(layout.pack_location(state, slab, offset)) == word
    assert int(layout.location_state(word)) == lib.mkv_location_state(word) == state
    assert int(layout.location_slab(word)) == lib.mkv_location_slab(word) == slab
    assert int(layout.location_offset(word)) == lib.mkv_location_offset(word) == offset
    assert int(layout.location_moved(word)) == lib.mkv_location_moved(word) == 0
    assert int(layout.location_moved(word | layout.LOCATION_MOVED)) == 1


@pytest.mark.asan
@given(st.binary(min_size=16, max_size=16 * 40), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_candidate_buckets_are_the_same_in_c_and_numpy(data: bytes, salt: int, log: int) -> None:
    keys = np.frombuffer(data[: len(data) // 16 * 16], np.uint8).reshape(-1, 16)
    out = ffi.new("uint64_t[2]")
    in_c = []
    for key in keys:
        lib.mkv_candidates(key.tobytes(), salt, 1 << log, out)
        in_c.append([out[0], out[1]])
    found = layout.candidates(keys, salt, 1 << log)
    assert found.tolist() == in_c
    assert (found[:, 0] != found[:, 1]).all()
    assert (found < 1 << log).all()


def test_candidate_buckets_of_any_16_byte_items() -> None:
    keys = np.arange(64, dtype=np.uint8).reshape(4, 16)
    as_items = keys.view("V16").reshape(-1)
    assert (layout.candidates(keys, 1, 64) == layout.candidates(as_items, 1, 64)).all()


def test_layout_imports_nothing_of_the_node() -> None:
    source = Path(layout.__file__).read_text(encoding="utf-8")
    imports = re.findall(r"^(?:import|from) (\S+)", source, re.MULTILINE)
    assert set(imports) == {"typing", "numpy", "numpy.typing"}

"""Keys: the vectors of tests/vectors/keys.json, an independent implementation, and what must never collide.

``python tests/test_keys.py`` writes the vectors anew, from the implementation in this file, not memkv's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.keys import Chain, KeySpace, block_keys, keys_from_digests, keys_from_ids
from memkv.rdma.errors import LocalError

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "tests" / "vectors" / "keys.json"

PLAIN: dict[str, Any] = {"model": "demo", "dtype": "bfloat16", "layout": "NHD", "block_tokens": 2}
FULL: dict[str, Any] = {
    "model": "Llama-3.1-70B", "dtype": "float8_e4m3", "layout": "HND", "block_tokens": 16, "layers": "0-39",
    "tp_rank": 3, "tp_size": 8, "pp_rank": 1, "pp_size": 2, "salt": "tenant-ä", "group_blocks": 4,
    "labels": {"lora": "adapter-7", "a": "e\u0301"},
}  # fmt: skip


# --- docs/keys.md once more, as plainly as can be -----------------------------------------------------------


def hashed(data: bytes, size: int, person: str) -> bytes:
    return blake2b(data, digest_size=size, person=person.encode()).digest()


def plain_canonical(space: dict[str, Any]) -> bytes:
    space = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "group_blocks": 64, **space}
    space = {"layers": "all", "salt": "", **space}
    items = {}
    for name in ("block_tokens", "tp_rank", "tp_size", "pp_rank", "pp_size", "group_blocks"):
        items[name.encode()] = b"\2" + (8).to_bytes(4, "little") + space[name].to_bytes(8, "little")
    texts = {name: space[name] for name in ("model", "dtype", "layout", "layers", "salt")}
    texts |= {"x." + label: value for label, value in space.get("labels", {}).items()}
    for name, text in texts.items():
        data = unicodedata.normalize("NFC", text).encode()
        items[unicodedata.normalize("NFC", name).encode()] = b"\1" + len(data).to_bytes(4, "little") + data
    out = b"memkv-keyspace\x00\x01"
    for label in sorted(items):
        out += len(label).to_bytes(2, "little") + label + items[label]
    return out


def plain_root(space: dict[str, Any]) -> bytes:
    return hashed(plain_canonical(space), 32, "memkv-space-v1")


def plain_keys(space: dict[str, Any], tokens: list[int], extras: dict[int, bytes]) -> list[str]:
    size, group = space["block_tokens"], space.get("group_blocks", 64)
    chain, tag, keys = plain_root(space), b"", []
    for i in range(len(tokens) // size):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[i * size : (i + 1) * size])
        chain = hashed(chain + block + extras.get(i, b""), 32, "memkv-block-v1")
        if i % group == 0:
            tag = hashed(chain, 4, "memkv-tag-v1")
        keys.append((tag + hashed(chain, 12, "memkv-key-v1")).hex())
    return keys


def plain_digest_key(space: dict[str, Any], digest: bytes) -> str:
    return hashed(plain_root(space) + digest, 16, "memkv-digest-v1").hex()


def plain_id_key(space: dict[str, Any], number: int) -> str:
    place = number // space.get("group_blocks", 64)
    tag = hashed(plain_root(space) + place.to_bytes(8, "little"), 4, "memkv-id-tag-v1")
    return (tag + hashed(plain_root(space) + number.to_bytes(8, "little"), 12, "memkv-id-v1")).hex()


def make_vectors() -> dict[str, Any]:
    chains = [
        (PLAIN, [1, 2, 3, 4, 5], {}),
        (PLAIN, [1, 2, 3, 4, 5], {1: b"image"}),
        (PLAIN, [7] * 132, {}),
        (FULL, [2**32 - 1, *range(95)], {}),
    ]
    digests = [b"\0", b"d" * 32, bytes(range(64))]
    ids = [0, 1, 63, 64, 2**64 - 1]
    return {
        "spaces": [
            {"space": space, "canonical": plain_canonical(space).hex(), "root": plain_root(space).hex()}
            for space in (PLAIN, FULL)
        ],
        "chains": [
            {
                "space": space,
                "tokens": tokens,
                "extras": {str(block): extra.hex() for block, extra in extras.items()},
                "keys": plain_keys(space, tokens, extras),
            }
            for space, tokens, extras in chains
        ],
        "digests": [{"space": PLAIN, "digest": d.hex(), "key": plain_digest_key(PLAIN, d)} for d in digests],
        "ids": [{"space": PLAIN, "id": i, "key": plain_id_key(PLAIN, i)} for i in ids],
    }


def stored() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(VECTORS.read_text(encoding="utf-8"))
    return loaded


# --- vectors ------------------------------------------------------------------------------------------------


def test_the_vectors_are_what_the_plain_implementation_gives() -> None:
    assert stored() == json.loads(json.dumps(make_vectors()))


def test_memkv_gives_the_vectors() -> None:
    vectors = stored()
    for case in vectors["spaces"]:
        space = KeySpace(**case["space"])
        assert (space.canonical().hex(), space.root.hex()) == (case["canonical"], case["root"])
    for case in vectors["chains"]:
        extras = {int(block): bytes.fromhex(extra) for block, extra in case["extras"].items()}
        keys = block_keys(case["tokens"], space=KeySpace(**case["space"]), extras=extras)
        assert [key.tobytes().hex() for key in keys] == case["keys"]
    for case in vectors["digests"]:
        keys = keys_from_digests([bytes.fromhex(case["digest"])], space=KeySpace(**case["space"]))
        assert keys.tobytes().hex() == case["key"]
    for case in vectors["ids"]:
        assert keys_from_ids([case["id"]], space=KeySpace(**case["space"])).tobytes().hex() == case["key"]


def test_the_document_shows_vectors_as_they_are() -> None:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    vectors = stored()
    assert "".join(re.findall(r"^    ([0-9a-f]+)$", text, re.M)) == vectors["spaces"][0]["canonical"]
    shown = set(re.findall(r"`([0-9a-f]{32,})`", text))
    known = {vectors["spaces"][0]["root"], *vectors["chains"][0]["keys"], *vectors["chains"][1]["keys"]}
    known |= {case["key"] for case in vectors["digests"] + vectors["ids"]}
    assert len(shown) == 7
    assert shown <= known


def test_keys_are_the_same_in_another_process() -> None:
    code = (
        "from memkv.keys import *; import sys;"
        "s = KeySpace(model='m', dtype='d', layout='l', block_tokens=2, labels={'b': '1', 'a': '2'});"
        "sys.stdout.write(block_keys(range(9), space=s).tobytes().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    space = KeySpace(model="m", dtype="d", layout="l", block_tokens=2, labels={"a": "2", "b": "1"})
    assert outputs == {block_keys(range(9), space=space).tobytes().hex()}


# --- chains -------------------------------------------------------------------------------------------------

SPACE = KeySpace(model="m", dtype="d", layout="l", block_tokens=4, group_blocks=3)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=4), st.booleans())
def test_a_growing_chain_gives_the_keys_of_the_whole(parts: list[list[int]], saved: bool) -> None:
    chain = Chain(SPACE)
    grown = []
    for part in parts:
        grown.append(chain.append(part))
        if saved:
            chain = Chain.restore(SPACE, chain.save())
    whole = [token for part in parts for token in part]
    keys = block_keys(whole, space=SPACE)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 16), np.uint8), *grown]), keys)
    assert (chain.blocks, chain.pending) == divmod(len(whole), 4)


@settings(max_examples=60, deadline=None)
@given(TOKENS, TOKENS)
def test_keys_agree_exactly_as_far_as_the_tokens_do(one: list[int], two: list[int]) -> None:
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1
    a, b = block_keys(one, space=SPACE), block_keys(two, space=SPACE)
    n = min(len(a), len(b))
    np.testing.assert_array_equal((a[:n] == b[:n]).all(axis=1), np.arange(n) < common // 4)


def test_parent_is_left_as_it_is() -> None:
    chain = Chain(SPACE)
    first = chain.append(range(10))
    more = block_keys(range(10, 20), space=SPACE, parent=chain)
    assert (chain.blocks, chain.pending) == (2, 2)
    np.testing.assert_array_equal(np.concatenate([first, more]), block_keys(range(20), space=SPACE))


def test_blocks_of_a_group_share_a_tag_and_groups_differ() -> None:
    tags = block_keys(np.arange(4 * 9), space=SPACE)[:, :4].copy().view("<u4").ravel().tolist()
    assert [len(set(tags[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(tags)) == 3


def test_prompts_that_differ_in_the_first_block_get_tags_of_their_own() -> None:
    tags = {block_keys([prompt, 1, 2, 3], space=SPACE)[0, :4].tobytes() for prompt in range(200)}
    assert len(tags) == 200


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"}, {"dtype": "e"}, {"layout": "k"}, {"layers": "0"}, {"salt": "s"}, {"block_tokens": 2},
        {"tp_size": 2}, {"tp_size": 2, "tp_rank": 1}, {"pp_size": 2}, {"pp_size": 2, "pp_rank": 1},
        {"group_blocks": 4}, {"labels": {"a": ""}}, {"labels": {"model": "m"}}, {"labels": {"a": "b"}},
        {"labels": {"ab": ""}},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_space_makes_other_keys(change: dict[str, Any]) -> None:
    space = {"model": "m", "dtype": "d", "layout": "l", "block_tokens": 4, "group_blocks": 3}
    a, b = KeySpace(**space), KeySpace(**{**space, **change})  # type: ignore[arg-type]
    assert a.root != b.root
    assert (block_keys(range(4), space=a)[0] != block_keys(range(4), space=b)[0]).any()


def test_composed_and_decomposed_text_and_the_order_of_labels_do_not_matter() -> None:
    one = KeySpace(model="é", dtype="d", layout="l", block_tokens=4, labels={"a": "1", "ö": "é"})
    two = KeySpace(
        model="e\u0301", dtype="d", layout="l", block_tokens=4, labels={"o\u0308": "e\u0301", "a": "1"}
    )
    assert one.root == two.root


def test_an_extra_changes_its_block_and_all_after_it() -> None:
    plain = block_keys(range(16), space=SPACE)
    marked = block_keys(range(16), space=SPACE, extras={1: b"image"})
    assert (plain == marked).all(axis=1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("tokens", [[-1], [2**32], [0.5], [[1, 2]], ["a"], [None], [2**70], np.array([True])])
def test_tokens_of_another_kind_are_refused_and_change_nothing(tokens: Any) -> None:
    chain = Chain(SPACE)
    chain.append(range(6))
    before = chain.save()
    with pytest.raises(LocalError):
        chain.append(tokens)
    with pytest.raises(LocalError, match="an extra for block 0"):
        chain.append([1, 2], {0: b"late"})
    assert chain.save() == before


def test_any_integer_dtype_of_tokens_will_do() -> None:
    expected = block_keys(list(range(8)), space=SPACE)
    for dtype in ("<i8", ">i4", "u1", "<u4"):
        np.testing.assert_array_equal(block_keys(np.arange(8).astype(dtype), space=SPACE), expected)
    np.testing.assert_array_equal(block_keys(np.arange(16)[::2] // 2, space=SPACE), expected)
    assert expected.flags.c_contiguous
    assert expected.dtype == np.uint8


@pytest.mark.parametrize(
    "wrong",
    [{"model": ""}, {"tp_rank": 1}, {"pp_rank": -1}, {"block_tokens": 0}, {"group_blocks": 0},
     {"model": "\ud800"}, {"labels": {"é": "1", "e\u0301": "2"}}],
    ids=repr,
)  # fmt: skip
def test_a_space_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        KeySpace(**{**PLAIN, **wrong})


def test_a_state_of_another_space_or_none_at_all_is_refused() -> None:
    state = Chain(SPACE).save()
    assert len(state) == 88
    with pytest.raises(LocalError, match="another key space"):
        Chain.restore(KeySpace(model="n", dtype="d", layout="l", block_tokens=4), state)
    for broken in (b"", state[:-1], state + b"1234", b"XXXX" + state[4:]):
        with pytest.raises(LocalError):
            Chain.restore(SPACE, broken)
    with pytest.raises(LocalError, match="parent"):
        block_keys([], space=KeySpace(**PLAIN), parent=Chain(SPACE))


# --- engines and traces that give no tokens -----------------------------------------------------------------


def test_digests_are_bound_to_the_space() -> None:
    other = KeySpace(model="n", dtype="d", layout="l", block_tokens=4)
    a, b = keys_from_digests([b"d"], space=SPACE), keys_from_digests([b"d"], space=other)
    assert a.shape == (1, 16)
    assert (a != b).any()
    assert keys_from_digests([], space=SPACE).shape == (0, 16)
    with pytest.raises(LocalError, match="empty digest"):
        keys_from_digests([b""], space=SPACE)


def test_neighbouring_ids_of_a_trace_share_a_tag() -> None:
    keys = keys_from_ids(np.arange(6), space=SPACE)
    tags = keys[:, :4].copy().view("<u4").ravel().tolist()
    assert (tags[0] == tags[1] == tags[2], tags[3] == tags[5], tags[0] == tags[3]) == (True, True, False)
    assert len({key.tobytes() for key in keys}) == 6
    with pytest.raises(LocalError):
        keys_from_ids([-1], space=SPACE)


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(make_vectors(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")

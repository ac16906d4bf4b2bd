"""Different configuration, no hit: every part of an identity changes every key."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv.connectors.identity import Identity
from memkv.rdma.errors import LocalError
from memkv.store.flash.format import NAME

BASE = Identity(
    engine="test-v1",
    model="meta-llama/Llama-3.1-8B",
    dtype="bfloat16",
    layout="page_first",
    block_tokens=64,
    tp_rank=0,
    tp_size=2,
    pp_rank=0,
    pp_size=2,
    labels={"heads": "8"},
)
HASHES = [bytes([i]) * 32 for i in range(3)]
CHANGES: list[dict[str, Any]] = [
    {"engine": "test-v2"},
    {"model": "meta-llama/Llama-3.1-70B"},
    {"dtype": "float16"},
    {"layout": "layer_first"},
    {"block_tokens": 32},
    {"tp_rank": 1},
    {"tp_size": 4},
    {"pp_rank": 1},
    {"pp_size": 4},
    {"salt": "tenant"},
    {"labels": {"heads": "4"}},
    {"labels": {}},
    {"labels": {"heads": "8", "lora": "x"}},
]


@pytest.mark.parametrize("change", CHANGES, ids=[next(iter(c)) + str(i) for i, c in enumerate(CHANGES)])
def test_a_different_configuration_shares_no_key(change: dict[str, Any]) -> None:
    other = replace(BASE, **change)
    assert not {bytes(k) for k in BASE.keys(HASHES)} & {bytes(k) for k in other.keys(HASHES)}


@pytest.mark.parametrize("change", [c for c in CHANGES if next(iter(c)) not in ("tp_rank", "pp_rank")])
def test_a_different_kind_of_block_has_a_namespace_of_its_own(change: dict[str, Any]) -> None:
    assert replace(BASE, **change).namespace(1 << 20) != BASE.namespace(1 << 20)


def test_ranks_share_a_namespace_and_sizes_of_blocks_do_not() -> None:
    assert replace(BASE, tp_rank=1, pp_rank=1).namespace(1 << 20) == BASE.namespace(1 << 20)
    assert BASE.namespace(1 << 21) != BASE.namespace(1 << 20)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(texts, texts, texts, st.integers(1, 4096)), min_size=2, max_size=2, unique=True))
def test_no_two_identities_agree(two: list[tuple[str, str, str, int]]) -> None:
    one, other = (Identity(engine="e", model=m, dtype=d, layout=y, block_tokens=t) for m, d, y, t in two)
    if one.space.canonical() == other.space.canonical():
        return  # the same text in two Unicode forms
    assert bytes(one.keys(HASHES)[0]) != bytes(other.keys(HASHES)[0])
    assert one.namespace(1 << 20) != other.namespace(1 << 20)


@given(texts, texts)
def test_names_fit_on_flash(prefix: str, model: str) -> None:
    who = Identity(engine="e", model=model, dtype="d", layout="l", block_tokens=1)
    assert len(who.namespace(1 << 20, prefix=prefix * 20).encode()) <= NAME["name"].itemsize


def test_another_process_agrees() -> None:
    code = (
        "from memkv.connectors.identity import Identity\n"
        f"who = Identity(engine={BASE.engine!r}, model={BASE.model!r}, dtype='bfloat16', layout='page_first',"
        " block_tokens=64, tp_size=2, pp_size=2, labels={'heads': '8'})\n"
        f"print(who.namespace(1 << 20), who.keys({HASHES!r}).tobytes().hex())"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.split() == [BASE.namespace(1 << 20), BASE.keys(HASHES).tobytes().hex()]


def test_the_engine_is_no_label() -> None:
    with pytest.raises(LocalError, match="engine"):
        replace(BASE, labels={"engine": "x"})

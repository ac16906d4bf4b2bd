"""Placement: agreed without talking, even, and moving only what must move."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.placement import Placement
from memkv.rdma.errors import LocalError

NAMES = st.lists(
    st.text("abcdef-.:0123456789", min_size=1, max_size=12), min_size=2, max_size=12, unique=True
)


def some_keys(n: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 16), np.uint8)


def owners(names: list[str], keys: npt.NDArray[np.uint8]) -> list[str]:
    return [names[i] for i in Placement(names).nodes(keys)]


@settings(max_examples=50, deadline=None)
@given(NAMES, st.data())
def test_a_node_that_leaves_moves_only_its_own_keys(names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    keys = some_keys(300)
    before = owners(names, keys)
    after = owners([name for name in names if name != gone], keys)
    assert all(a == b or b == gone for a, b in zip(after, before, strict=True))
    assert gone not in after


@settings(max_examples=30, deadline=None)
@given(NAMES, st.randoms())
def test_the_order_of_the_list_does_not_matter(names: list[str], random: Any) -> None:
    keys = some_keys(100)
    shuffled = random.sample(names, len(names))
    assert owners(names, keys) == owners(shuffled, keys)


@pytest.mark.parametrize("nodes", [2, 3, 16, 100])
def test_tags_are_spread_as_evenly_as_chance_allows(nodes: int) -> None:
    """Each node's share of T independent tags is binomial: five standard deviations around T / nodes."""
    tags = 100_000
    counts = np.bincount(
        Placement([f"node-{i}" for i in range(nodes)]).nodes(some_keys(tags)), minlength=nodes
    )
    mean = tags / nodes
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean * (1 - 1 / nodes))


def test_consecutive_tags_are_spread_too() -> None:
    keys = np.zeros((10_000, 16), np.uint8)
    keys[:, :4] = np.arange(10_000, dtype="<u4").view(np.uint8).reshape(-1, 4)
    counts = np.bincount(Placement([f"10.0.0.{i}:7070" for i in range(16)]).nodes(keys), minlength=16)
    assert np.abs(counts - 625).max() < 5 * np.sqrt(625 * 15 / 16)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=120), st.integers(1, 5))
def test_only_the_tag_counts_however_keys_are_batched(tags: list[int], split: int) -> None:
    placement = Placement(["a", "b", "c"])
    keys = some_keys(len(tags))
    keys[:, :4] = np.array(tags, "<u4").view(np.uint8).reshape(-1, 4)
    whole = placement.nodes(keys)
    parts = [Placement(["a", "b", "c"]).nodes(part) for part in np.array_split(keys, split)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len({(tag, int(node)) for tag, node in zip(tags, whole, strict=True)}) == len(set(tags))
    assert whole.dtype == np.intp


def test_short_and_long_batches_agree() -> None:
    keys = some_keys(1000)
    placement = Placement([f"n{i}" for i in range(7)])
    one_by_one = [int(placement.nodes(keys[i : i + 1])[0]) for i in range(1000)]
    assert placement.nodes(keys).tolist() == one_by_one


def test_nodes_are_where_they_have_always_been() -> None:
    """A change here moves every key of every cluster."""
    keys = np.zeros((8, 16), np.uint8)
    keys[:, 0] = range(8)
    assert Placement(["a", "b", "c", "d"]).nodes(keys).tolist() == [1, 1, 2, 3, 1, 3, 0, 1]


def test_one_node_holds_everything() -> None:
    assert Placement(["a"]).nodes(some_keys(5)).tolist() == [0] * 5
    assert Placement(["a", "b"]).nodes(some_keys(0)).shape == (0,)


@pytest.mark.parametrize("names", [[], ["a", ""], ["a", "b", "a"], ["é", "e\u0301"]])
def test_a_list_that_makes_no_sense_is_refused(names: list[str]) -> None:
    with pytest.raises(LocalError):
        Placement(names)


@pytest.mark.parametrize(
    "keys", [np.zeros(16, np.uint8), np.zeros((2, 8), np.uint8), np.zeros((2, 16), np.int8)]
)
def test_keys_of_another_shape_are_refused(keys: Any) -> None:
    with pytest.raises(LocalError, match="where \\(n, 16\\) uint8"):
        Placement(["a", "b"]).nodes(keys)

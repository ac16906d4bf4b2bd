"""Pages of host pools as blocks: where their pieces are, what they are called, when a page is whole."""

from __future__ import annotations

import numpy as np
import pytest

from memkv.connectors.identity import Identity
from memkv.connectors.sglang_pages import Meta, Pieces, ending_windows, pages_of, piece_keys, whole
from memkv.keys import TAG_BYTES
from memkv.rdma.errors import LocalError

PAGE = 4


def keys(n: int) -> np.ndarray:
    identity = Identity(engine="test", model="m", dtype="bf16", layout="l", block_tokens=PAGE)
    return identity.keys(f"{i:064x}".encode() for i in range(n))


# --- keys of pieces ---


def test_pieces_have_keys_of_their_own_on_their_pages_node() -> None:
    pages = keys(64)
    pieces = piece_keys(pages, 160)
    assert pieces.shape == (64 * 160, 16)
    assert len(np.unique(pieces, axis=0)) == len(pieces)
    assert (pieces.reshape(64, 160, 16)[:, :, :TAG_BYTES] == pages[:, None, :TAG_BYTES]).all()
    assert (pieces.reshape(64, 160, 16)[:, 0] == pages).all()
    assert piece_keys(pages, 1) is pages


def test_the_keys_of_pieces_never_change() -> None:
    """Blocks on flash are found again by the next version, too."""
    found = piece_keys(np.zeros((1, 16), np.uint8), 3).tobytes().hex()
    assert found == (
        "0000000000000000000000000000000000000000cecaa85593952d4e9824e750000000008b55ebeb230e93fcf9b2d90e"
    )


def test_how_many_pieces_there_are_does_not_change_their_keys() -> None:
    few, many = piece_keys(keys(3), 2).reshape(3, 2, 16), piece_keys(keys(3), 7).reshape(3, 7, 16)
    assert (few == many[:, :2]).all()


# --- which pages count ---


def test_a_page_is_whole_with_all_of_its_pieces() -> None:
    assert whole(np.array([1, 1, 1, 0, 0, 1, 0, 0], bool), 2).tolist() == [True, False, False, False]
    assert whole(np.array([], bool), 2).tolist() == []


def test_windows_that_end_at_each_page() -> None:
    held = np.array([1, 1, 0, 1, 1, 1, 0], bool)

    def good(window: int) -> list[int]:
        return np.flatnonzero(ending_windows(held, window)).tolist()

    assert good(0) == good(1) == [0, 1, 3, 4, 5]
    assert good(2) == [0, 1, 4, 5]
    assert good(3) == [0, 1, 5]
    assert good(4) == good(7) == good(100) == [0, 1]
    assert ending_windows(held[:0], 3).tolist() == []


# --- where pieces are ---


def pool(pages: int, *, base: int = 1 << 40, stride: int = 256, half: int = 1 << 20) -> Meta:
    """What a pool of K and V pages says of itself."""

    def meta(indices: np.ndarray) -> tuple[list[int], list[int]]:
        first = indices[::PAGE] // PAGE
        assert (first < pages).all()
        return [base + int(p) * stride + v * half for p in first for v in (0, 1)], [stride, 100] * len(first)

    return meta


@pytest.mark.parametrize("pages", [1, 2, 3, 1000])
def test_a_pools_pages_are_learnt_from_three_of_them(pages: int) -> None:
    learnt = Pieces.learn(pool(pages), pages * PAGE, PAGE)
    assert (learnt.pages, len(learnt), learnt.longest, learnt.page_bytes) == (pages, 2, 256, 356)
    every = np.arange(pages)
    want = pool(pages)((every[:, None] * PAGE + np.arange(PAGE)).reshape(-1))
    assert learnt.at(every).reshape(-1).tolist() == want[0]


def test_pages_at_odd_places_are_refused() -> None:
    def last_is_elsewhere(indices: np.ndarray) -> tuple[list[int], list[int]]:
        pointers, sizes = pool(8)(indices)
        return [*pointers[:-1], pointers[-1] + 8], sizes

    def last_is_shorter(indices: np.ndarray) -> tuple[list[int], list[int]]:
        pointers, sizes = pool(8)(indices)
        return pointers, [*sizes[:-1], 99]

    for meta in (last_is_elsewhere, last_is_shorter):
        with pytest.raises(LocalError, match="--hicache-mem-layout"):
            Pieces.learn(meta, 8 * PAGE, PAGE)
    for nothing in (([], []), ([1, 2, 3, 4], [1, 2, 3, 4]), ([1, 2, 3], [1, 2])):
        with pytest.raises(LocalError, match="pieces"):
            Pieces.learn(lambda i, told=nothing: told, 8 * PAGE, PAGE)
    with pytest.raises(LocalError, match="--hicache-size"):
        Pieces.learn(pool(1), PAGE - 1, PAGE)


def test_slots_are_those_of_whole_pages_inside_the_pool() -> None:
    slots = np.concatenate([np.arange(8, 12), np.arange(0, 4)])
    assert pages_of(slots, 2, PAGE, 3).tolist() == [2, 0]
    assert pages_of(slots[:0], 0, PAGE, 3).tolist() == []
    for wrong, n in (
        (slots, 1),
        (slots, 3),
        (slots + 4, 2),
        (slots - 4, 2),
        (slots + 1, 2),
        (slots[None], 2),
    ):
        with pytest.raises(LocalError, match="host indices"):
            pages_of(wrong, n, PAGE, 3)

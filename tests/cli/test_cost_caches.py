"""LRU and SIEVE beside the plainest implementations there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv.cli.cost_caches import Lru, Sieve, cache

IDS = st.lists(st.integers(0, 15), max_size=200)


class PlainSieve:
    """The queue as a list, its head at the end; the hand as the id that it points to."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.queue, self.used, self.hand = capacity, [], set(), 0

    queue: list[int]
    used: set[int]

    def add(self, id: int) -> None:
        if id in self.queue:
            self.used.add(id)
            return
        if len(self.queue) == self.capacity:
            while True:
                self.hand %= len(self.queue)
                victim = self.queue[self.hand]
                if victim not in self.used:
                    break
                self.used.remove(victim)
                self.hand += 1
            del self.queue[self.hand]
            if self.hand == len(self.queue):
                self.hand = 0
        self.queue.append(id)


@given(IDS, st.integers(1, 8))
def test_sieve_holds_what_the_paper_says(ids: list[int], capacity: int) -> None:
    sieve, plain = Sieve(capacity), PlainSieve(capacity)
    for id in ids:
        sieve.add(id)
        plain.add(id)
        assert {i for i in range(16) if i in sieve} == set(plain.queue)


@given(IDS, st.integers(1, 8))
def test_lru_holds_the_last_distinct_ones(ids: list[int], capacity: int) -> None:
    lru = Lru(capacity)
    for n, id in enumerate(ids, 1):
        lru.add(id)
        recent = list(dict.fromkeys(reversed(ids[:n])))[:capacity]
        assert {i for i in range(16) if i in lru} == set(recent)


@given(IDS, st.integers(1, 8), st.sampled_from(["lru", "sieve"]))
def test_no_cache_holds_more_than_fits(ids: list[int], capacity: int, policy: str) -> None:
    one = cache(policy, capacity)
    for id in ids:
        one.add(id)
        assert len(one) <= capacity
        assert id in one


@given(IDS, st.data())
def test_what_is_dropped_is_gone_and_the_queue_goes_on(ids: list[int], data: st.DataObject) -> None:
    sieve = Sieve(5)
    for id in ids:
        sieve.add(id)
        if len(sieve) and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from([i for i in range(16) if i in sieve]))
            sieve.drop(victim)
            assert victim not in sieve
    assert len(sieve) == sum(i in sieve for i in range(16)) <= 5


@pytest.mark.parametrize("policy", ["lru", "sieve"])
def test_a_cache_of_nothing_holds_nothing(policy: str) -> None:
    one = cache(policy, 0)
    one.add(1)
    assert 1 not in one


def test_the_end_of_a_prompt_goes_first() -> None:
    lru = Lru(3)
    lru.use(reversed((1, 2, 3, 4)))
    assert lru.leading((1, 2, 3, 4)) == 3
    lru.add(9)
    assert lru.leading((1, 2, 3, 4)) == 2

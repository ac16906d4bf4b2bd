"""The simulation: hits as a replay counts them, times by hand, and what must hold for any trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.cli import cost_work, trace
from memkv.cli.cost_setup import CASES
from memkv.cli.cost_sim import simulate
from memkv.cli.cost_store import Link, Store
from memkv.cli.trace import Request

from .costs import BLOCK, FOREVER, TRACE, needs_trace, setup, traces, work

CASE = st.sampled_from(CASES)
LOAD = st.sampled_from([0.1, 1.0, 50.0])


# --- hits ---


@needs_trace
def test_a_store_that_forgets_nothing_finds_what_the_replay_of_the_real_trace_found() -> None:
    requests = trace.read(TRACE, 1000)
    due = trace.summarise(requests)
    assert (due.references, due.distinct, due.hits) == (27_305, 21_514, 5_791)
    result = simulate(cost_work.of(requests), setup(**FOREVER), "memkv", instant=True)
    assert result.hits == {"hbm": 0, "host": 0, "memory": 5_791, "flash": 0}
    assert result.cached_tokens == pytest.approx(due.saved_tokens, rel=1e-5)  # less last tokens
    assert result.put_bytes == 21_514 * BLOCK


@given(traces())
def test_unlimited_capacity_is_exact_reuse(requests: list[Request]) -> None:
    due = trace.summarise(requests)
    result = simulate(cost_work.of(requests), setup(**FOREVER), "memkv", instant=True)
    assert result.hits["memory"] == due.hits
    assert result.recompute == 0
    hbm = simulate(cost_work.of(requests), setup(hbm_kv=1 << 60), "hbm")
    assert hbm.hits["hbm"] == due.hits


@given(traces(), st.integers(1, 40), st.integers(0, 40))
def test_a_larger_engine_cache_never_hits_less(requests: list[Request], blocks: int, more: int) -> None:
    played = cost_work.of(requests)
    small, large = (
        simulate(played, setup(hbm_kv=n * BLOCK), "hbm").hits["hbm"] for n in (blocks, blocks + more)
    )
    assert small <= large <= trace.summarise(requests).hits


@given(traces(), st.integers(1, 40))
def test_an_engine_cache_is_an_lru_over_whole_prompts(requests: list[Request], blocks: int) -> None:
    held: list[int] = []  # the most recently used first
    hits = 0
    for r in requests:
        hits += len(list(itertools.takewhile(held.__contains__, r.ids)))
        held = [*r.ids, *(id for id in held if id not in r.ids)][:blocks]
    assert simulate(cost_work.of(requests), setup(hbm_kv=blocks * BLOCK), "hbm").hits["hbm"] == hits


def test_memkv_finds_on_flash_what_memory_has_no_room_for() -> None:
    a, b = tuple(range(40)), tuple(range(40, 80))
    played = work((0, a), (10_000, b), (20_000, a))
    result = simulate(played, setup(hbm_kv=0, node_memory=40 * BLOCK), "memkv")
    assert result.hits["flash"] == 40
    without = simulate(played, setup(hbm_kv=0, node_memory=40 * BLOCK, node_flash=0), "memkv")
    assert sum(without.hits.values()) < 40


def test_replicas_share_memkv_and_nothing_else() -> None:
    prompt = tuple(range(10))
    played = work((0, prompt), (30_000, prompt))
    turns = setup(replicas=2, routing="round-robin")
    assert sum(simulate(played, turns, "host").hits.values()) == 0
    assert simulate(played, turns, "memkv").hits["memory"] == 10


def test_a_block_is_not_found_before_it_was_computed() -> None:
    prompt = tuple(range(60))
    played = work((0, prompt), (1, prompt))
    turns = setup(replicas=2, routing="round-robin", hbm_kv=0)
    assert sum(simulate(played, turns, "memkv").hits.values()) == 0
    assert sum(simulate(played, turns, "memkv", instant=True).hits.values()) == 60


@given(traces())
def test_hits_that_a_replay_counted_take_the_place_of_the_models(requests: list[Request]) -> None:
    played = cost_work.of(requests)
    nothing = setup(hbm_kv=0, node_memory=BLOCK, node_flash=0, deadline=1e9)
    result = simulate(played, nothing, "memkv", held=played.due)
    assert sum(result.hits.values()) == sum(played.due)
    assert result.recompute == 0
    none = simulate(played, setup(hbm_kv=0), "memkv", held=[0] * len(played))
    assert sum(none.hits.values()) == 0


# --- time ---


def test_a_queue_by_hand() -> None:
    fleet = setup()
    played = work((0, (1, 2, 3, 4)), (10, (5, 6, 7, 8)), (10_000, (9,)), outputs=1)
    service = fleet.prefill_seconds(2048)
    result = simulate(played, fleet, "none")
    waits = [0, service - 0.01, 0]
    assert result.ttft == pytest.approx(np.add(waits, [service, service, fleet.prefill_seconds(512)]))
    assert result.prefill == pytest.approx(2 * service + fleet.prefill_seconds(512))
    assert result.decode == 0  # one token: it comes from the prefill


def test_a_hit_in_memkv_takes_a_look_up_and_the_wire_and_the_rest_is_computed() -> None:
    fleet = setup(hbm_kv=0)
    prompt = tuple(range(8))
    result = simulate(work((0, prompt), (60_000, (*prompt, 8, 9))), fleet, "memkv")
    expected = 0.001 + 8 * BLOCK / 45e9 + fleet.prefill_seconds(1024, 4096)
    assert result.ttft[1] == pytest.approx(expected)


def test_a_hit_on_flash_takes_flashs_time() -> None:
    fleet = setup(hbm_kv=0, node_memory=10 * BLOCK, flash_read=1e9, flash_latency=0.002)
    a, b = tuple(range(8)), tuple(range(10, 20))
    result = simulate(work((0, a), (60_000, b), (120_000, a)), fleet, "memkv")
    assert result.hits["flash"] == 8
    expected = 0.001 + 0.002 + 8 * BLOCK / 1e9 + fleet.prefill_seconds(1, 4095)
    assert result.ttft[2] == pytest.approx(expected)


def test_what_would_come_after_the_deadline_is_recomputed() -> None:
    prompt = tuple(range(8))
    seconds = 8 * BLOCK / 1e9
    slow = setup(hbm_kv=0, wire=1e9, deadline=seconds / 2)
    result = simulate(work((0, prompt), (60_000, prompt)), slow, "memkv")
    assert result.dropped == 16  # of either request: the put would have come too late
    half = simulate(work((0, prompt), (60_000, prompt)), slow, "memkv", held=[0, 8])
    assert sum(half.hits.values()) == 4


def test_puts_are_dropped_where_flash_is_behind_by_as_much_as_may_be_dirty() -> None:
    prompts = [(i * 1000, tuple(range(40 * i, 40 * i + 40))) for i in range(4)]
    slow = setup(hbm_kv=0, flash_write=1e6, node_memory=50 * BLOCK)
    assert simulate(work(*prompts), slow, "memkv").dropped == 3 * 40


def test_decode_takes_gaps_and_what_does_not_fit_is_left() -> None:
    fleet = setup(decode_batch=1)
    played = work((0, (1,)), (3_000, (2,)), outputs=10_000)
    result = simulate(played, fleet, "none")
    assert result.busy == pytest.approx(1)
    assert result.left == pytest.approx(result.prefill + result.decode - played.seconds)


def test_requests_go_to_the_replica_that_answers_first() -> None:
    prompt, other = tuple(range(15)), tuple(range(20, 30))
    played = work((0, prompt), (1, other), (60_000, (*prompt, 15)), (120_000, (*other, 31)))
    result = simulate(played, setup(replicas=2), "hbm")
    assert result.hits["hbm"] == 25


def test_times_within_a_tick_of_the_trace_are_spread() -> None:
    arrivals, seconds = cost_work.spread([0, 0, 0, 3000, 3000, 9000])
    assert arrivals == pytest.approx((0, 1, 2, 3, 5.25, 9))  # the usual gap: 4.5, half way between 3 and 6
    assert seconds == pytest.approx(9 + 4.5)


# --- whatever the trace ---


@given(traces(), CASE, LOAD, st.integers(1, 3))
def test_nobody_is_busy_for_longer_than_there_is_time(
    requests: list[Request], case: str, load: float, replicas: int
) -> None:
    result = simulate(cost_work.of(requests), setup(replicas=replicas), case, load=load)
    assert 0 <= result.busy_prefill <= result.busy <= 1 + 1e-9
    assert result.left >= -1e-9
    done = result.busy * replicas * result.seconds
    assert done + result.left == pytest.approx(result.prefill + result.decode)


@given(traces(), LOAD)
def test_no_reuse_computes_every_token_once(requests: list[Request], load: float) -> None:
    fleet = setup()
    result = simulate(cost_work.of(requests), fleet, "none", load=load)
    assert result.cached_tokens == 0
    assert result.prefill == pytest.approx(sum(fleet.prefill_seconds(r.input_length) for r in requests))


@given(traces(), CASE, LOAD)
def test_no_first_token_before_its_prefill(requests: list[Request], case: str, load: float) -> None:
    fleet = setup()
    played = cost_work.of(requests)
    result = simulate(played, fleet, case, load=load)
    least = [fleet.prefill_seconds(1, r.input_length - 1) for r in requests]
    assert np.all(result.ttft >= np.array(least) - 1e-9)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(0, 3000), st.integers(1, 3), LOAD)
def test_without_a_hit_memkv_costs_its_look_ups(
    lengths: list[int], gap: int, replicas: int, load: float
) -> None:
    ends = list(itertools.accumulate(lengths))
    prompts = [tuple(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    played = work(*((i * gap, prompt) for i, prompt in enumerate(prompts)))
    none = simulate(played, setup(replicas=replicas), "none", load=load)
    free = simulate(played, setup(replicas=replicas, lookup=0.0), "memkv", load=load)
    assert free.ttft == pytest.approx(none.ttft)
    one = simulate(played, setup(), "none", load=load)
    asked = simulate(played, setup(), "memkv", load=load)
    assert np.all(asked.ttft >= one.ttft - 1e-9)
    assert np.all(asked.ttft <= one.ttft + 0.001 + 1e-9)
    assert asked.prefill == pytest.approx(one.prefill)


@given(traces(), CASE, LOAD)
def test_prefill_is_what_is_due_and_what_is_recomputed(
    requests: list[Request], case: str, load: float
) -> None:
    played, fleet = cost_work.of(requests), setup()
    result = simulate(played, fleet, case, load=load)
    perfect = simulate(played, setup(**FOREVER), "memkv", instant=True)
    assert result.recompute >= -1e-9
    assert result.prefill == pytest.approx(perfect.prefill + result.recompute)


@settings(max_examples=25)
@given(traces(), LOAD)
def test_the_same_input_gives_the_same_result(requests: list[Request], load: float) -> None:
    played = cost_work.of(requests)
    first, again = (simulate(played, setup(replicas=2), "memkv", load=load) for _ in range(2))
    assert np.array_equal(first.ttft, again.ttft)
    assert first.hits == again.hits


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**10)), max_size=30))
def test_a_link_is_busy_for_as_long_as_its_bytes_take(uses: list[tuple[float, int]]) -> None:
    link = Link(1e9)
    end = 0.0
    for at, nbytes in sorted(uses):
        end = max(end, link.send(at, nbytes))
    assert link.busy(1.0) == pytest.approx(sum(n for _, n in uses) / 1e9)
    assert end >= link.busy(1.0) - 1e-6 or not any(n for _, n in uses)


@given(traces(), st.sampled_from(["lru", "sieve"]))
def test_a_store_holds_no_more_than_fits(requests: list[Request], policy: str) -> None:
    store = Store(setup(policy=policy, node_memory=5 * BLOCK, node_flash=9 * BLOCK), instant=True)
    for n, r in enumerate(requests):
        plan = store.plan(r.ids, float(n))
        store.get(plan, float(n))
        store.put(r.ids[len(plan) :], float(n))
        assert len(store.memory) <= 5
        assert len(store.flash) <= 9

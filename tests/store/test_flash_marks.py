"""Who was away is known, whatever is killed when: the marks of devices against a history that knows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.store.flash import format as f
from memkv.store.flash.marks import begun, gone_on, mark_of, standing

DEVICES = 4


@dataclass
class Known:
    """A device, and what an onlooker knows of it."""

    block: f.Superblock
    has: bool = False  # the store went on with it, so there may be blocks on it
    missed: bool = False  # and it went on without it since
    doubt: bool = False  # or was killed when it was about to: then giving up its blocks is right, too


def fresh(index: int) -> Known:
    return Known(f.plan(1 << 30, store=b"s" * 16, identity=index + 1, index=index, count=1, secret=1))


def put_mark(devices: list[Known], here: list[int], prior: tuple[int, int], start: int, writes: int) -> bool:
    """Writes a new mark on the devices that are here, and is killed after so many writes. Whether it got
    through, so that the store went on.
    """
    mark = max(devices[i].block.boot for i in here) + 1, start
    steps = [(i, first) for first in (True, False) for i in here]
    for i, first in steps[:writes]:
        block = devices[i].block
        devices[i].block = begun(block, mark, prior, len(here)) if first else gone_on(block)
    return writes >= len(steps)


turns = st.tuples(
    st.sets(st.integers(0, DEVICES - 1), min_size=1),  # who is there at the start
    st.integers(0, 2 * DEVICES),  # writes before a kill
    st.sets(st.integers(0, DEVICES - 1)),  # who is lost under way, if it goes on
    st.integers(0, 2 * DEVICES),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(turns, min_size=1, max_size=12))
def test_who_missed_something_is_emptied_and_nobody_else(
    history: list[tuple[set[int], int, set[int], int]],
) -> None:
    devices = [fresh(i) for i in range(DEVICES)]
    number = 1
    halfway: set[int] = set()  # who took part in a start that was killed between its last writes
    for here, writes, lost, more in history:
        there = sorted(here)
        know = {i for i, device in enumerate(devices) if device.has and not device.missed}
        if know and not know & here:
            continue  # nobody is there who could know better
        prior, good = standing([devices[i].block for i in there])
        believed = {i for i, was in zip(there, good, strict=True) if was}
        holding = {i for i in believed if devices[i].has}
        if halfway and halfway != here:
            return  # a kill in that millisecond, and other devices the next time: nobody can know
        assert holding <= know, "what was deleted could return"
        whole = {i for i in know & here if not devices[i].doubt}
        assert whole <= holding, "what was promised is lost"
        for i in here - believed:
            devices[i].has = devices[i].missed = devices[i].doubt = False  # emptied, before it is marked
        number += 1
        if not put_mark(devices, there, prior, number, writes):
            if writes > len(there):
                halfway = here
                for i in set(range(DEVICES)) - here:
                    devices[i].doubt = True
            continue
        halfway = set()
        for i, device in enumerate(devices):
            device.missed = i not in here
            device.doubt = False
            device.has |= i in here
        left = sorted(here - lost)
        if left and len(left) < len(there):
            number += 1
            through = put_mark(devices, left, mark_of(devices[left[0]].block), number, more)
            for i in here & lost:
                devices[i].missed, devices[i].doubt = through, more > len(left)
            if more > len(left) and not through:
                halfway = set(left)


def test_a_kill_between_the_two_halves_of_a_start_loses_nothing() -> None:
    a, b = fresh(0).block, fresh(1).block
    for i, block in enumerate([a, b]):
        block = gone_on(begun(block, (1, 11), (0, 0), 2))
        a, b = (block, b) if i == 0 else (a, block)
    half = begun(a, (2, 22), (1, 11), 2)
    assert standing([half, b]) == ((1, 11), [True, True])
    both = begun(b, (2, 22), (1, 11), 2)
    assert standing([half, both]) == ((1, 11), [True, True])
    assert standing([gone_on(half), both]) == ((2, 22), [True, True])
    assert standing([gone_on(half), b]) == ((2, 22), [True, False])


def test_two_halves_that_went_on_without_each_other_are_told_apart() -> None:
    a = replace(fresh(0).block, boot=6, start=1)
    b = replace(fresh(1).block, boot=6, start=2)
    assert sum(standing([a, b])[1]) == 1

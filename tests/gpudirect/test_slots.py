"""Slots are given out in the order in which they were asked for, and never twice."""

from __future__ import annotations

import asyncio

import numpy as np

from memkv.gpudirect.slots import Slots


def test_slots_are_adjacent_and_never_given_twice() -> None:
    async def main() -> None:
        slots = Slots(8)
        rng = np.random.default_rng(1)
        owned = np.zeros(8, int)

        async def worker() -> None:
            for _ in range(50):
                n = int(rng.integers(1, 9))
                first = await slots.take(n, 30)
                assert 0 <= first <= 8 - n
                owned[first : first + n] += 1
                assert owned.max() == 1
                await asyncio.sleep(float(rng.random()) * 1e-3)
                owned[first : first + n] -= 1
                slots.give(first, n)

        await asyncio.gather(*(worker() for _ in range(10)))
        assert slots.free == 8

    asyncio.run(main())


def test_who_asked_first_is_served_first() -> None:
    async def main() -> None:
        slots = Slots(4)
        taken = [await slots.take(1, 1) for _ in range(4)]
        got: list[int] = []

        async def want(n: int) -> None:
            assert await slots.take(n, 10) >= 0
            got.append(n)

        tasks = []
        for n in (3, 1, 2):
            tasks.append(asyncio.ensure_future(want(n)))
            await asyncio.sleep(0)
        slots.give(taken[0], 1)
        await asyncio.sleep(0.01)
        assert got == []  # the big one is first, and is not overtaken for ever
        slots.give(taken[1], 1)
        slots.give(taken[2], 1)
        await asyncio.sleep(0.01)
        assert got == [3]
        slots.give(taken[3], 1)
        await asyncio.sleep(0.01)
        assert got == [3, 1]
        slots.give(0, 3)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_none_in_time_and_more_than_there_are() -> None:
    async def main() -> None:
        slots = Slots(2)
        assert await slots.take(3, 10) == -1
        assert await slots.take(2, 0) == 0
        assert await slots.take(1, 0) == -1
        assert await slots.take(1, 0.02) == -1
        waiting = asyncio.ensure_future(slots.take(1, 10))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(slots.take(1, 0.02))
        assert await late == -1
        slots.give(0, 1)
        assert await waiting == 0

    asyncio.run(main())


def test_one_that_is_cancelled_keeps_nothing() -> None:
    async def main() -> None:
        slots = Slots(1)
        assert await slots.take(1, 1) == 0
        first = asyncio.ensure_future(slots.take(1, 10))
        second = asyncio.ensure_future(slots.take(1, 10))
        await asyncio.sleep(0)
        slots.give(0, 1)  # granted to the first …
        first.cancel()  # … which does not want it any more
        assert await second == 0
        slots.give(0, 1)
        assert slots.free == 1

    asyncio.run(main())

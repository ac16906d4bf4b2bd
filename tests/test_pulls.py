"""The channels over which a peer's puts are pulled: how many there are, and when one more is made."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from memkv import pulls
from memkv.pulls import Pulls
from memkv.rdma.errors import MemKVError
from memkv.status import Status
from memkv.store.node import NodeThread

from .nodes import Blocks, Connect, count, keys_of, until

pytest_plugins = "tests.nodes"

STORED = Status.STORED


class End:
    """Stands in for an endpoint: only whether it was closed matters here."""

    closed = False

    def close(self) -> None:
        self.closed = True


class Opener:
    """Opens ends, or fails as often as it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0

    async def __call__(self) -> Any:
        self.calls += 1
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise MemKVError("no")
        return End()


async def settle(some: Pulls) -> None:
    while some._opening is not None:
        await asyncio.sleep(0)


def test_puts_at_once_get_a_second_channel_on_a_node(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    (link,) = peer._links
    first = Blocks(peer, 8)
    assert count(first.put(keys_of(8))) == {STORED: 8}
    assert link.session is not None
    assert len(link.session.pulls.endpoints) == 1

    async def many(seed: int) -> None:
        blocks, keys = Blocks(peer, 8), keys_of(800, seed=seed)
        for i in range(0, 800, 8):
            assert count(await peer.aio.put_from(keys[i : i + 8], blocks.slices)) == {STORED: 8}

    async def main() -> None:
        await asyncio.gather(*(many(seed) for seed in range(1, 5)))

    asyncio.run(main())
    session = link.session
    until(lambda: len(session.pulls.endpoints) == pulls.LIMIT)


def test_one_put_at_a_time_needs_one_channel() -> None:
    async def main() -> None:
        opener = Opener()
        some = Pulls(opener)
        for _ in range(3):
            with some.put():
                await some.ready(1.0)
        assert opener.calls == len(some.endpoints) == 1

    asyncio.run(main())


def test_a_second_one_that_fails_costs_no_put_and_is_tried_again_later() -> None:
    async def main() -> None:
        opener = Opener()
        some = Pulls(opener)
        with some.put(), some.put():
            await some.ready(1.0)
            opener.failures = 1
            await some.ready(1.0)
            await settle(some)
            await some.ready(1.0)
            assert (opener.calls, len(some.endpoints)) == (2, 1)
            some._not_before = 0.0  # later
            await some.ready(1.0)
            await settle(some)
            assert (opener.calls, len(some.endpoints)) == (3, 2)
            await some.ready(1.0)
            assert opener.calls == 3

    asyncio.run(main())


def test_the_first_one_that_fails_is_an_error() -> None:
    async def main() -> None:
        opener = Opener()
        opener.failures = 1
        with pytest.raises(MemKVError, match="no"):
            await Pulls(opener).ready(1.0)

    asyncio.run(main())


def test_what_is_gone_is_dropped_and_nothing_else() -> None:
    async def main() -> None:
        some = Pulls(Opener())
        with some.put(), some.put():
            await some.ready(1.0)
            await some.ready(1.0)
            await settle(some)
        gone, kept = some.endpoints
        some.drop([gone])
        assert some.endpoints == [kept]
        assert (gone.closed, kept.closed) == (True, False)  # type: ignore[attr-defined]
        some.close()
        assert kept.closed  # type: ignore[attr-defined]

    asyncio.run(main())


def test_one_that_is_ready_too_late_is_closed() -> None:
    async def main() -> None:
        opened: list[Any] = []

        async def late() -> Any:
            await asyncio.sleep(0.01)
            opened.append(End())
            return opened[-1]

        some = Pulls(late)
        waiting = asyncio.ensure_future(some.ready(1.0))
        await asyncio.sleep(0)
        some.close()
        await waiting
        assert some.endpoints == []
        assert [end.closed for end in opened] == [True]

    asyncio.run(main())

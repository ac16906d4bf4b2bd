"""Lanes of copies, over the stand-in for a GPU: order, overlap, deadlines, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect.copier import COPY, IN_STREAM, LATE, Lane, Mark, Outcome, open_device, stream_handle
from memkv.gpudirect.copier_host import HostDevice, HostStream
from memkv.rdma.errors import DeviceError, LocalError, MemKVError

from ..gpus import produce

pytestmark = pytest.mark.asan

Bytes = npt.NDArray[np.uint8]


def copies_of(dst: Bytes, src: Bytes, step: int, order: list[int] | None = None) -> npt.NDArray[np.void]:
    """Copies of src to dst, ``step`` bytes each."""
    starts = np.arange(len(src) // step, dtype=np.uint64) * np.uint64(step)
    if order is not None:
        starts = starts[order]
    out = np.empty(len(starts), COPY)
    out["dst"], out["src"], out["nbytes"] = dst.ctypes.data + starts, src.ctypes.data + starts, step
    return out


def random_bytes(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def with_lane(device: HostDevice, body: Callable[[Lane], Coroutine[Any, Any, None]]) -> Lane:
    """Runs a coroutine with a lane into the device, and closes that."""
    lane = device.lane(True)

    async def main() -> None:
        lane.attach(asyncio.get_running_loop())
        try:
            await body(lane)
        finally:
            lane.detach()

    asyncio.run(main())
    lane.close()
    return lane


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.mark.parametrize("step", [1, 7, 64, 4096, 100_000])
def test_what_was_copied_is_there(device: HostDevice, step: int) -> None:
    src = random_bytes(100_000)
    dst = np.zeros_like(src)

    async def body(lane: Lane) -> None:
        outcome = await lane.copy(copies_of(dst, src, step), 5)
        assert outcome.ok.all()
        assert outcome.rc == 0

    stats = with_lane(device, body).stats()
    assert np.array_equal(dst[: len(src) // step * step], src[: len(src) // step * step])
    assert stats["bytes"] == len(src) // step * step
    assert stats["blocks"] == len(src) // step
    assert stats["calls"] == 1  # they were adjacent


def test_only_neighbours_on_both_sides_become_one_copy(device: HostDevice) -> None:
    src = random_bytes(8 * 64)
    dst = np.zeros_like(src)

    async def body(lane: Lane) -> None:
        assert (await lane.copy(copies_of(dst, src, 64, [0, 1, 4, 5, 7, 6, 3, 2]), 5)).ok.all()

    assert with_lane(device, body).stats()["calls"] == 6  # 0 1, 4 5, 7, 6, 3, 2
    assert np.array_equal(dst, src)


def test_empty_transfers_and_empty_copies(device: HostDevice) -> None:
    here = np.zeros(1, np.uint8)

    async def body(lane: Lane) -> None:
        assert len((await lane.copy(np.zeros(0, COPY), 5)).ok) == 0
        nothing = np.zeros(3, COPY)
        nothing["dst"] = nothing["src"] = here.ctypes.data
        assert (await lane.copy(nothing, 5)).ok.all()

    with_lane(device, body)
    assert device.into.counts == (0, 0)


def test_transfers_are_issued_while_earlier_ones_are_under_way(device: HostDevice) -> None:
    src = random_bytes(64 * 100)
    dst = np.zeros_like(src)
    device.into.hold()

    async def body(lane: Lane) -> None:
        each = [copies_of(dst, src, 64)[i : i + 1] for i in range(100)]
        tasks = [asyncio.ensure_future(lane.copy(c, 20)) for c in each]
        while device.into.counts[0] < IN_STREAM:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert device.into.counts == (IN_STREAM, 0)
        assert not any(t.done() for t in tasks)
        device.into.hold(False)
        assert all(o.ok.all() for o in await asyncio.gather(*tasks))

    with_lane(device, body)
    assert np.array_equal(dst, src)


def test_what_is_in_the_stream_is_waited_for_beyond_the_deadline(device: HostDevice) -> None:
    src = random_bytes(64)
    dst = np.zeros_like(src)
    device.into.hold()

    async def body(lane: Lane) -> None:
        task = asyncio.ensure_future(lane.copy(copies_of(dst, src, 64), 0.05))
        await asyncio.sleep(0.3)
        assert not task.done()
        device.into.hold(False)
        assert (await task).ok.all()

    with_lane(device, body)
    assert np.array_equal(dst, src)


def test_what_is_not_in_the_stream_at_the_deadline_never_gets_there(device: HostDevice) -> None:
    src = random_bytes(64 * (IN_STREAM + 1))
    dst = np.zeros_like(src)
    device.into.hold()

    async def body(lane: Lane) -> None:
        each = copies_of(dst, src, 64)
        first = [asyncio.ensure_future(lane.copy(each[i : i + 1], 20)) for i in range(IN_STREAM)]
        while device.into.counts[0] < IN_STREAM:
            await asyncio.sleep(0.001)
        late = await lane.copy(each[IN_STREAM:], 0.05)
        assert not late.ok.any()
        assert late.rc == LATE
        device.into.hold(False)
        await asyncio.gather(*first)

    with_lane(device, body)
    assert not dst[-64:].any()


def test_marks(device: HostDevice) -> None:
    theirs = HostStream()
    src, dst = random_bytes(64), np.zeros(64, np.uint8)
    theirs.hold()
    produce(theirs, dst, src)
    first, dropped = device.mark(theirs), device.mark(theirs)
    assert not first.reached()
    dropped.close()  # while the stream still has it
    dropped.close()
    theirs.hold(False)
    while not first.reached():
        time.sleep(0.001)
    assert np.array_equal(dst, src)
    theirs.lose(0, 700)
    produce(theirs, dst, src)
    second = device.mark(theirs)
    while not lost(second):
        time.sleep(0.001)


def lost(mark: Mark) -> bool:
    try:
        assert not mark.reached()
    except DeviceError:
        return True
    return False


@pytest.mark.parametrize("adjacent", [True, False])
def test_a_copy_that_is_refused_fails_alone(device: HostDevice, adjacent: bool) -> None:
    src = random_bytes(64 * 10)
    dst = np.zeros_like(src)
    order = None if adjacent else [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    device.into.refuse(0, 1)  # adjacent: the one call for all; then each is tried by itself

    async def body(lane: Lane) -> None:
        outcome = await lane.copy(copies_of(dst, src, 64, order), 5)
        assert outcome.rc == 1
        if adjacent:
            assert outcome.ok.all()
        else:
            assert outcome.ok.tolist() == [False] + [True] * 9

    stats = with_lane(device, body).stats()
    assert stats["last_error"] == 1
    assert stats["errors"] == (0 if adjacent else 1)
    assert np.array_equal(dst[64:], src[64:])


def test_a_stream_that_is_lost_fails_all_of_a_transfer(device: HostDevice) -> None:
    src = random_bytes(64 * 10)
    dst = np.zeros_like(src)
    device.into.lose(5, 719)

    async def body(lane: Lane) -> None:
        shuffled = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
        outcome = await lane.copy(copies_of(dst, src, 64, shuffled), 5)
        assert outcome.rc == 719
        assert not outcome.ok.any()
        assert (await lane.copy(copies_of(dst, src, 64), 5)).rc == 719
        device.into.lose(0, 0)
        assert (await lane.copy(copies_of(dst, src, 64), 5)).ok.all()

    with_lane(device, body)


def test_cancelling_waits_for_the_copy(device: HostDevice) -> None:
    src = random_bytes(64)
    dst = np.zeros_like(src)
    device.into.hold()

    async def body(lane: Lane) -> None:
        task = asyncio.ensure_future(lane.copy(copies_of(dst, src, 64), 5))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        device.into.hold(False)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert np.array_equal(dst, src)

    with_lane(device, body)


def test_closing_waits_for_what_is_in_the_stream(device: HostDevice) -> None:
    src = random_bytes(64 * 4)
    dst = np.zeros_like(src)
    device.into.delay(0.05)
    lane = device.lane(True)

    async def main() -> None:
        lane.attach(asyncio.get_running_loop())
        under_way = asyncio.ensure_future(lane.copy(copies_of(dst, src, 64, [3, 1, 0, 2]), 5))
        await asyncio.sleep(0.02)
        lane.detach()
        with pytest.raises(LocalError, match="not attached"):
            await lane.copy(copies_of(dst, src, 64), 5)
        lane.close()
        assert np.array_equal(dst, src)
        lane.close()
        under_way.cancel()

    asyncio.run(main())
    assert lane.stats()["blocks"] == 4


def test_many_at_once(device: HostDevice) -> None:
    src = random_bytes(1 << 16)
    dst = np.zeros_like(src)
    device.into.delay(1e-5)

    async def body(lane: Lane) -> None:
        async def worker(i: int) -> list[Outcome]:
            mine = slice(i * 4096, (i + 1) * 4096)
            rng = np.random.default_rng(i)
            return [
                await lane.copy(copies_of(dst[mine], src[mine], 64, list(rng.permutation(64))), 20)
                for _ in range(5)
            ]

        for outcomes in await asyncio.gather(*(worker(i) for i in range(16))):
            assert all(o.ok.all() for o in outcomes)

    with_lane(device, body)
    assert np.array_equal(dst, src)


def test_an_idle_lane_does_nothing(device: HostDevice) -> None:
    async def body(lane: Lane) -> None:
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.05

    with_lane(device, body)


# --- streams and devices ---


def test_streams_of_other_libraries() -> None:
    class Cupy:
        ptr = 5

    class Torch:
        cuda_stream = 6

    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 7

    assert [stream_handle(s) for s in (Cupy(), Torch(), Protocol(), 8, 0)] == [5, 6, 7, 8, 0]
    for wrong in (True, -1, "stream", None, object()):
        with pytest.raises(LocalError, match="no CUDA stream"):
            stream_handle(wrong)


def test_devices_that_there_are_not() -> None:
    for name in ("gpu", "cuda", "cuda:x", "rocm:0"):
        with pytest.raises(LocalError, match="there is no device"):
            open_device(name)
    with pytest.raises(MemKVError, match="cuda:99"):
        open_device("cuda:99")

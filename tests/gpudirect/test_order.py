"""Ordering: which waits are asked of CUDA, and which are not."""

from __future__ import annotations

import threading
import time

import pytest

from memkv.gpudirect import driver, order
from memkv.gpudirect.driver import DriverError
from memkv.gpudirect.order import After, Before, after_copy, flush
from memkv.rdma.errors import DeadlineError

from .standin import Standin


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x77


class Torch:
    cuda_stream = 0x77


class CuPy:
    ptr = 0x77


@pytest.mark.parametrize(
    ("ordering", "options", "needed"),
    [
        (driver.ORDERING_NONE, driver.FLUSH_HOST, "call"),
        (driver.ORDERING_NONE, driver.FLUSH_HOST | driver.FLUSH_MEMOPS, "call"),
        (driver.ORDERING_NONE, driver.FLUSH_MEMOPS, "impossible"),
        (driver.ORDERING_NONE, 0, "impossible"),
        (driver.ORDERING_OWNER, 0, "none"),
        (driver.ORDERING_ALL, driver.FLUSH_HOST, "none"),
    ],
)
def test_when_a_flush_is_needed(ordering: int, options: int, needed: str) -> None:
    assert flush(ordering, options) == needed


@pytest.mark.parametrize("stream", [Protocol(), Torch(), CuPy(), 0x77])
def test_every_kind_of_stream_is_recorded_on(standin: Standin, stream: object) -> None:
    with Before(standin.driver, 1, stream) as before:
        before.wait(0)
    assert [s for s in standin.log() if not s.startswith("retain")] == [
        "event 2",
        "record on 0x77",
        "destroy",
    ]
    assert standin.depth == 0


def test_no_stream_asks_nothing(standin: Standin) -> None:
    with Before(standin.driver, 0, None) as before:
        assert before.reached()
    assert standin.log() == []


def test_the_array_s_own_stream_counts_too_and_one_stream_once(standin: Standin) -> None:
    with Before(standin.driver, 0, CuPy(), 9, Torch()):
        assert [s for s in standin.log() if s.startswith("record")] == ["record on 0x9", "record on 0x77"]


def test_a_stream_that_hangs_costs_the_deadline_and_no_more(standin: Standin) -> None:
    standin.hold(True)
    with Before(standin.driver, 0, 5) as before, pytest.raises(DeadlineError, match="did not come as far"):
        before.wait(0.05)
    assert not any("synchronize" in s for s in standin.log()), "that would have had no deadline"


def test_waiting_ends_when_the_stream_is_there(standin: Standin) -> None:
    standin.hold(True)
    with Before(standin.driver, 0, 5) as before:
        timer = threading.Timer(0.05, standin.hold, [False])
        timer.start()
        start = time.monotonic()
        before.wait(10)
        timer.join()
        assert time.monotonic() - start < 5


def test_a_lost_context_and_a_stream_that_is_none_leave_no_event(standin: Standin) -> None:
    with Before(standin.driver, 0, 5) as before:
        standin.fail("cuEventQuery", 719)
        with pytest.raises(DriverError):
            before.wait(1)
    standin.fail("cuEventRecord", 400)
    standin.log()
    with pytest.raises(DriverError):
        Before(standin.driver, 0, 5)
    assert standin.log() == ["event 2", "destroy"]


def test_after_a_get_the_device_is_flushed_in_its_own_context_only_where_needed(standin: Standin) -> None:
    standin.attribute(driver.GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, 1)
    standin.attribute(driver.GPU_DIRECT_RDMA_WRITES_ORDERING, driver.ORDERING_NONE)
    After(standin.driver, 1).visible()
    assert standin.log()[-1] == "flush 0 100 in 0xc1"
    standin.attribute(driver.GPU_DIRECT_RDMA_WRITES_ORDERING, driver.ORDERING_OWNER)
    After(standin.driver, 1).visible()
    assert standin.log() == []


def test_after_a_copy_the_consumer_s_stream_waits_and_the_host_does_not(standin: Standin) -> None:
    standin.hold(True)
    after_copy(standin.driver, 0, Torch(), 0x1234)
    assert standin.log()[-1] == "wait 0x77 for 0x1234"


def test_the_module_says_what_a_stream_is() -> None:
    assert order.__doc__ is not None
    for word in ("cuda_stream", "ptr", "__cuda_stream__", "legacy default stream", "None says"):
        assert word in order.__doc__

"""Channels of either fabric: batches of READs, their bounds, their ends."""

from __future__ import annotations

import errno
import threading
import time

import numpy as np
import pytest

from memkv.rdma import fabric as fabric_module
from memkv.rdma.jobs import OUTCOME, Loop, read_batch, run
from memkv.rdma.memory import HostMemory
from memkv.rdma.native._rdma import ffi, lib

from ..conftest import make_fabric
from .conftest import NBYTES, Pair

pytestmark = pytest.mark.asan


@pytest.mark.parametrize("size", [1, 64, 4096, 65536, 1 << 20])
def test_every_byte_arrives_whatever_the_size(pair: Pair, size: int) -> None:
    channel = pair.connect()
    count = min(NBYTES // size, 200)
    outcome = read_batch(channel, pair.reads(np.arange(count) * size, size))
    assert not outcome["status"].any()
    assert np.array_equal(pair.target.array[: count * size], pair.source.array[: count * size])
    assert not pair.target.array[count * size :].any()


def test_outcomes_carry_cookies_and_times(pair: Pair) -> None:
    before = lib.mkv_clock_ns()
    outcome = read_batch(pair.connect(), pair.reads([0, 4096], 4096))
    assert outcome["cookie"].tolist() == [7, 8]
    assert (outcome["posted_ns"] >= before).all()
    assert (outcome["done_ns"] > outcome["posted_ns"]).all()


def test_one_read_scatters_into_four_places(pair: Pair) -> None:
    reads = pair.reads([1000], 10)
    reads["nseg"] = 4
    parts = [(0, 64), (4096, 1000), (8192, 1), (100_000, 50_001)]
    for i, (offset, length) in enumerate(parts):
        reads["seg"][0, i] = (offset, pair.into.id, length)
    assert read_batch(pair.connect(), reads)["status"][0] == 0
    at = 1000
    for offset, length in parts:
        assert np.array_equal(
            pair.target.array[offset : offset + length], pair.source.array[at : at + length]
        )
        at += length


def test_a_list_longer_than_the_channel_is_deep(pair: Pair) -> None:
    channel = pair.connect(depth=3)
    outcome = read_batch(channel, pair.reads(np.arange(1000) * 512, 512))
    assert not outcome["status"].any()
    assert np.array_equal(pair.target.array[:512000], pair.source.array[:512000])


@pytest.mark.parametrize("fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True)
def test_a_message_longer_than_the_port_allows_is_cut(fabric_name: str) -> None:
    serve, read = make_fabric("verbs", listen=True), make_fabric("verbs", listen=False, max_msg=8192)
    a, b = serve.domain(), read.domain()
    source, target = HostMemory(1 << 20), HostMemory(1 << 20)
    source.array[:] = np.random.default_rng(2).integers(0, 256, source.nbytes, dtype=np.uint8)
    remote = fabric_module.RemoteTable()
    offered = a.register(source.address, source.nbytes, remote_read=True)
    remote.add(offered.desc)
    into = b.register(target.address, target.nbytes)
    made = Pair(a, b, source, target, offered, into, remote, [])
    channel = made.connect(depth=8)
    outcome = read_batch(channel, made.reads([0, 300_000, 700_001], [300_000, 400_001, 100_003]))
    assert not outcome["status"].any()
    assert np.array_equal(target.array[:800_004], source.array[:800_004])
    assert ffi.cast("struct mkv_channel *", channel).reads == 3
    for end in made.ends:
        end.close()
    for thing in (b, a, read, serve):
        thing.close()


def test_a_read_out_of_bounds_costs_only_itself(pair: Pair) -> None:
    channel = pair.connect()
    reads = pair.reads([0, NBYTES - 10, 0, 4096, 0], 4096)
    reads["region"][2] = 999
    reads["seg"]["offset"][3, 0] = NBYTES
    status = read_batch(channel, reads)["status"].tolist()
    assert status == [0, -errno.ERANGE, -errno.ENOENT, -errno.ERANGE, 0]
    assert ffi.cast("struct mkv_channel *", channel).broken == 0


def test_reads_land_only_where_reads_may_land(pair: Pair) -> None:
    closed = pair.read.register(pair.target.address, 4096, remote_read=True)
    reads = pair.reads([0], 64)
    reads["seg"]["region"][0, 0] = closed.id
    assert read_batch(pair.connect(), reads)["status"][0] == -errno.EACCES


def test_a_region_that_was_never_offered_cannot_be_read(pair: Pair) -> None:
    """The keys of a region that is only open to local writes do not open it to anybody else."""
    secret = pair.serve.register(pair.source.address, 4096)
    pair.remote.add(fabric_module.RegionDesc(secret.id, 4096, 2, secret.desc.secret, secret.desc.rails))
    reads = pair.reads([0, 0], 64)
    reads["region"][0] = secret.id
    channel = pair.connect()
    outcome = read_batch(channel, reads)
    assert outcome["status"][0] == -errno.EACCES
    assert ffi.cast("struct mkv_channel *", channel).broken
    assert not pair.target.array[:64].any()


def test_a_withdrawn_region_cannot_be_read(pair: Pair) -> None:
    channel = pair.connect()
    assert read_batch(channel, pair.reads([0], 64))["status"][0] == 0
    pair.offered.close()
    assert read_batch(channel, pair.reads([0], 64))["status"][0] == -errno.EACCES


def test_a_domain_serves_its_own_regions_only(pair: Pair) -> None:
    other = pair.serve.fabric.domain()
    stranger = other.register(pair.source.address, 4096, remote_read=True, region_id=500)
    pair.remote.add(stranger.desc)
    reads = pair.reads([0], 64)
    reads["region"] = 500
    assert read_batch(pair.connect(), reads)["status"][0] == -errno.EACCES
    other.close()


def test_the_deadline_ends_a_batch_and_nothing_is_written_afterwards(pair: Pair) -> None:
    """A READ may be under way when the deadline passes: its memory is ours once the status is there."""
    channel = pair.connect()
    count = 4000
    reads = pair.reads(np.arange(count) % 8 << 20, 1 << 20)
    started = time.monotonic()
    outcome = read_batch(channel, reads, timeout=0.05)
    took = time.monotonic() - started
    late = outcome["status"] != 0
    assert late.any()
    assert took < 4
    pair.target.array[:] = 0xEE
    time.sleep(0.1)
    assert (pair.target.array == 0xEE).all()
    assert ffi.cast("struct mkv_channel *", channel).busy == 0


def test_the_other_side_vanishing_ends_a_batch(pair: Pair) -> None:
    channel = pair.connect()
    timer = threading.Timer(0.05, pair.ends[1].close)
    timer.start()
    outcome = read_batch(channel, pair.reads(np.arange(4000) % 8 << 20, 1 << 20), timeout=20)
    timer.join()
    assert (outcome["status"] != 0).any()
    assert ffi.cast("struct mkv_channel *", channel).busy == 0


def test_jobs_of_several_channels_run_together(pair: Pair) -> None:
    channels = [pair.connect() for _ in range(3)]
    jobs, keep = [], []
    for i, channel in enumerate(channels):
        reads = pair.reads(np.arange(50) * 4096 + i * 50 * 4096, 4096)
        outcome = np.zeros(50, OUTCOME)
        job = ffi.new("struct mkv_readjob *")
        lib.mkv_readjob_init(
            job,
            channel,
            ffi.cast("struct mkv_read *", ffi.from_buffer(reads)),
            ffi.cast("struct mkv_done *", ffi.from_buffer(outcome)),
            50,
            10**10,
        )
        jobs.append(job)
        keep.append((reads, outcome))
    run(jobs)
    assert not any(outcome["status"].any() for _, outcome in keep)
    assert np.array_equal(pair.target.array[: 150 * 4096], pair.source.array[: 150 * 4096])


def test_the_loop_drives_jobs_and_tells_by_its_descriptor(pair: Pair) -> None:
    import select

    loop = Loop()
    channels = [pair.connect() for _ in range(3)]
    keep = []
    for i, channel in enumerate(channels):
        reads = pair.reads(np.arange(20) * 4096 + i * 20 * 4096, 4096)
        outcome = np.zeros(20, OUTCOME)
        job = ffi.new("struct mkv_readjob *")
        lib.mkv_readjob_init(
            job,
            channel,
            ffi.cast("struct mkv_read *", ffi.from_buffer(reads)),
            ffi.cast("struct mkv_done *", ffi.from_buffer(outcome)),
            20,
            10**10,
        )
        keep.append((reads, outcome, job))
        loop.submit(job, i)
    seen: list[int] = []
    while len(seen) < 3:
        assert select.select([loop.fd], [], [], 10)[0]
        seen += loop.reap()
    assert sorted(seen) == [0, 1, 2]
    assert not select.select([loop.fd], [], [], 0)[0]
    assert not any(outcome["status"].any() for _, outcome, _ in keep)
    loop.close()


def test_an_idle_channel_costs_no_wakeups(pair: Pair) -> None:
    channel = ffi.cast("struct mkv_channel *", pair.connect())
    read_batch(channel, pair.reads([0], 4096))
    before = channel.sleeps, channel.doorbells
    time.sleep(0.2)
    assert (channel.sleeps, channel.doorbells) == before

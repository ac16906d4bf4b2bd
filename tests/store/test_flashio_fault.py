"""The flash engine's fault injector: what it breaks, and the model of a power cut against a plain one."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.store.native._store import lib

from .flash import DISCARD, FLUSH, MIB, READ, SECTOR, WRITE, Engine, make_file

pytestmark = pytest.mark.asan
ERROR, TORN, LOST = lib.MKV_FAULT_ERROR, lib.MKV_FAULT_TORN, lib.MKV_FAULT_LOST
HELD, FLIP = lib.MKV_FAULT_HELD, lib.MKV_FAULT_FLIP
ANY = 0xFFFFFFFF


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_file(tmp_path, MIB)


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    """On whatever rung there is."""
    engine = Engine()
    engine.open(path)
    yield engine
    engine.close()


@pytest.fixture
def cached(path: Path) -> Iterator[Engine]:
    """With a volatile cache."""
    engine = Engine()
    engine.open(path)
    assert lib.mkv_flashio_volatile(engine.f, 1) == 0
    yield engine
    engine.close()


# --- faults ---


def test_an_error_in_a_span(engine: Engine) -> None:
    assert engine.fault(ERROR, op=READ, error=-errno.EIO, **{"from": 4096, "to": 8192}) == 0
    ios = engine.run_many((READ, 0, at, 0, 4096) for at in (0, 4096, 8192, 4096 - SECTOR, 8192 - SECTOR))
    assert [io.result for io in ios] == [0, -errno.EIO, 0, -errno.EIO, -errno.EIO]
    assert engine.run(WRITE, 0, 4096) == 0


def test_the_first_fault_that_hits_acts_and_ends_after_its_times(engine: Engine) -> None:
    engine.fault(ERROR, device=3, error=-errno.EPERM)
    engine.fault(ERROR, device=ANY, error=-errno.ENOSPC, times=2)
    engine.fault(ERROR, error=-errno.EIO, times=1)
    results = [engine.run(WRITE) for _ in range(4)]
    assert results == [-errno.ENOSPC, -errno.ENOSPC, -errno.EIO, 0]


def test_a_fault_by_chance(engine: Engine) -> None:
    engine.fault(ERROR, error=-errno.EIO, per_million=300_000)
    failed = sum(io.result != 0 for io in engine.run_many((READ, 0, 0, 0, 512) for _ in range(1000)))
    assert 200 < failed < 400


def test_clearing_ends_faults(engine: Engine) -> None:
    engine.fault(ERROR, error=-errno.EIO)
    assert engine.run(READ) == -errno.EIO
    lib.mkv_flashio_fault_clear(engine.f)
    assert engine.run(READ) == 0


@pytest.mark.parametrize("fields", [{"kind": 0}, {"kind": 6}, {"kind": ERROR}, {"kind": ERROR, "error": 5}])
def test_an_impossible_fault_is_refused(engine: Engine, fields: dict[str, int]) -> None:
    assert engine.fault(**fields) == -errno.EINVAL


@pytest.mark.parametrize("error", [0, -errno.EIO])
@pytest.mark.parametrize("volatile", [False, True])
def test_a_torn_write_brings_some_sectors_never_all(path: Path, error: int, volatile: bool) -> None:
    engine = Engine()
    engine.open(path)
    if volatile:
        lib.mkv_flashio_volatile(engine.f, 5)
    seen = set()
    for i in range(60):
        assert engine.write(bytes(8 * SECTOR), 0) == 0
        engine.fault(TORN, error=error, times=1)
        assert engine.write(b"x" * 8 * SECTOR, 0) == error
        arrived = engine.read(8 * SECTOR, 0).count(b"x")
        assert arrived % SECTOR == 0, i
        seen.add(arrived // SECTOR)
    assert seen == set(range(8))
    engine.close()


def test_a_lost_write_is_reported_as_done(engine: Engine, path: Path) -> None:
    engine.fault(LOST, times=1)
    assert engine.write(b"x" * 4096, 0) == 0
    assert engine.read(4096, 0) == bytes(4096)
    assert engine.write(b"y" * 4096, 0) == 0
    assert path.read_bytes()[:4096] == b"y" * 4096


def test_a_flipped_bit(engine: Engine) -> None:
    engine.write(bytes(4096), 0)
    engine.fault(FLIP, times=1)
    assert sum(byte.bit_count() for byte in engine.read(4096, 0)) == 1
    assert engine.read(4096, 0) == bytes(4096)


def test_free_lets_go_what_is_held(path: Path) -> None:
    engine = Engine()
    engine.open(path)
    engine.fault(HELD)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(engine.run(READ)))
    thread.start()
    while not engine.stats().under_way:
        time.sleep(0.001)
    engine.close()
    thread.join()
    assert results == [0]


# --- the volatile cache ---


def test_a_write_reaches_the_file_at_a_flush(cached: Engine, path: Path) -> None:
    assert cached.write(b"x" * 4096, 0) == 0
    assert path.read_bytes() == bytes(MIB)
    assert cached.read(8192, 0) == b"x" * 4096 + bytes(4096)
    assert cached.run(FLUSH) == 0
    assert path.read_bytes()[:4096] == b"x" * 4096
    assert cached.read(8192, 0) == b"x" * 4096 + bytes(4096)


def test_a_flush_covers_its_own_device(cached: Engine, path: Path, tmp_path: Path) -> None:
    cached.open(make_file(tmp_path, MIB, "other"))
    cached.write(b"x" * 4096, 0, device=1)
    assert cached.run(FLUSH, 0) == 0
    assert (tmp_path / "other").read_bytes() == bytes(MIB)
    assert cached.read(4096, 0, device=0) == bytes(4096)


def test_a_flush_covers_only_what_was_over_when_it_was_queued(cached: Engine, path: Path) -> None:
    """Both are queued at once, so the flush owes the write nothing."""
    cached.memory[:4096] = 1
    assert not any(io.result for io in cached.run_many([(WRITE, 0, 0, 0, 4096), (FLUSH, 0, 0, 0, 0)]))
    assert path.read_bytes() == bytes(MIB)
    assert cached.run(FLUSH) == 0
    assert path.read_bytes()[:4096] == b"\1" * 4096


def test_a_lost_flush_leaves_writes_in_the_cache(cached: Engine, path: Path) -> None:
    cached.write(b"x" * 4096, 0)
    cached.fault(LOST, op=FLUSH, times=1)
    assert cached.run(FLUSH) == 0
    assert path.read_bytes() == bytes(MIB)


def test_a_device_has_an_end(cached: Engine) -> None:
    assert cached.write(bytes(4096), MIB - SECTOR) == -errno.ENOSPC
    assert cached.run(READ, 0, MIB) == -errno.EIO
    assert cached.run(DISCARD) == 0


def test_the_cache_comes_before_the_first_request(engine: Engine) -> None:
    engine.run(READ)
    assert lib.mkv_flashio_volatile(engine.f, 0) == -errno.EBUSY
    assert lib.mkv_flashio_power_cut(engine.f, 0) == -errno.EINVAL


# --- power cuts ---


def test_after_the_cut_everything_fails(cached: Engine) -> None:
    cached.write(b"x" * 4096, 0)
    assert lib.mkv_flashio_power_cut(cached.f, 0) == 0
    assert [cached.run(op) for op in (READ, WRITE, FLUSH)] == [-errno.EIO] * 3
    assert lib.mkv_flashio_power_cut(cached.f, 0) == 0


def cut(path: Path, seed: int, direct: bool = False) -> list[int]:
    """The sectors' bytes after: 1 flushed everywhere, 2 written over 0..16, 3 over 8..24, cut."""
    engine = Engine()
    engine.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
    lib.mkv_flashio_volatile(engine.f, 0)
    engine.write(b"\1" * 32 * SECTOR, 0)
    engine.run(FLUSH)
    engine.write(b"\2" * 16 * SECTOR, 0)
    engine.write(b"\3" * 16 * SECTOR, 8 * SECTOR)
    lib.mkv_flashio_power_cut(engine.f, seed)
    engine.close()
    sectors = np.frombuffer(path.read_bytes()[: 32 * SECTOR], np.uint8).reshape(32, SECTOR)
    assert (sectors == sectors[:, :1]).all()  # a sector is never torn
    return [int(value) for value in sectors[:, 0]]


def test_a_cut_leaves_all_that_a_device_could(path: Path) -> None:
    outcomes = [cut(path, seed) for seed in range(200)]
    for i in range(32):
        allowed = {1} | ({2} if i < 16 else set()) | ({3} if 8 <= i < 24 else set())
        assert {outcome[i] for outcome in outcomes} == allowed
    first, second = [o[:8] for o in outcomes], [o[16:24] for o in outcomes]
    assert {1, 2} == {o[0] for o in first if len(set(o)) == 1}  # not at all, and wholly
    assert any(len(set(o)) == 2 for o in first)  # torn
    assert any(a == [1] * 8 and b == [3] * 8 for a, b in zip(first, second, strict=True))  # out of order


def test_the_same_seed_leaves_the_same_file(path: Path) -> None:
    assert cut(path, 7) == cut(path, 7)
    assert any(cut(path, 7) != cut(path, seed) for seed in range(5))


def test_a_write_on_its_way_may_arrive_too(path: Path) -> None:
    """Held, or waiting behind what is held: neither is over, both end with -EIO."""
    arrived = set()
    for seed in range(30):
        engine = Engine(depth=4)
        engine.open(path)
        lib.mkv_flashio_volatile(engine.f, 0)
        engine.memory[:SECTOR] = seed + 1
        engine.fault(HELD, op=WRITE)
        ios = engine.ios((WRITE, 0, i * SECTOR, 0, SECTOR) for i in range(8))
        thread = threading.Thread(target=lib.mkv_flashio_run_many, args=(engine.f, ios, 8))
        thread.start()
        while engine.stats().under_way + engine.stats().waiting < 8:
            time.sleep(0.0005)
        lib.mkv_flashio_power_cut(engine.f, seed)
        thread.join()
        engine.close()
        assert [io.result for io in ios] == [-errno.EIO] * 8
        content = path.read_bytes()
        arrived |= {(i, content[i * SECTOR] == seed + 1) for i in range(8)}
    assert arrived == {(i, happened) for i in range(8) for happened in (False, True)}


def test_a_cut_amid_traffic_keeps_what_was_flushed(path: Path) -> None:
    """Threads write counters and flush them; what one saw flushed is the least that is there after."""
    for seed in range(10):
        engine = Engine(depth=4)
        engine.open(path)
        lib.mkv_flashio_volatile(engine.f, seed)
        sure, tried = [0] * 4, [0] * 4

        def work(i: int, engine: Engine = engine, sure: list[int] = sure, tried: list[int] = tried) -> None:
            sector = engine.memory[i * SECTOR : (i + 1) * SECTOR].view(np.uint64)
            for value in range(1, 100000):
                tried[i] = value
                sector[:] = value
                if engine.run(WRITE, 0, i * SECTOR, i * SECTOR) or engine.run(FLUSH):
                    return
                sure[i] = value

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        engine.memory[: 4 * SECTOR] = 0
        assert engine.run(WRITE, 0, 0, 0, 4 * SECTOR) == engine.run(FLUSH) == 0
        for thread in threads:
            thread.start()
        while min(sure) < 5:
            time.sleep(0.0005)
        lib.mkv_flashio_power_cut(engine.f, seed)
        for thread in threads:
            thread.join()
        engine.close()
        found = np.frombuffer(path.read_bytes()[: 4 * SECTOR], np.uint64).reshape(4, -1)
        assert (found == found[:, :1]).all()
        for i in range(4):
            assert sure[i] <= found[i, 0] <= tried[i]


SECTORS = 12
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SECTORS - 1), st.integers(1, SECTORS)),
        st.tuples(st.just("read"), st.integers(0, SECTORS - 1), st.integers(1, SECTORS)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@given(steps=steps, seed=st.integers(0, 2**64 - 1))
@settings(max_examples=150, deadline=None)
def test_the_model(steps: list[tuple[str, int, int]], seed: int) -> None:
    """Reads see the last write; after a cut each sector has its flushed value or one written since."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_file(Path(folder), SECTORS * SECTOR)
        engine = Engine(memory=SECTORS * SECTOR)
        engine.open(path)
        lib.mkv_flashio_volatile(engine.f, seed)
        stable, now = [0] * SECTORS, [0] * SECTORS
        since: list[set[int]] = [set() for _ in range(SECTORS)]
        for value, (op, at, n) in enumerate(steps, 1):
            n = min(n, SECTORS - at)
            if op == "write":
                assert engine.write(bytes([value]) * n * SECTOR, at * SECTOR) == 0
                for i in range(at, at + n):
                    now[i] = value
                    since[i].add(value)
            elif op == "read":
                assert engine.read(n * SECTOR, at * SECTOR) == b"".join(
                    bytes([v]) * SECTOR for v in now[at : at + n]
                )
            else:
                assert engine.run(FLUSH) == 0
                stable, since = list(now), [set() for _ in range(SECTORS)]
                assert path.read_bytes() == b"".join(bytes([v]) * SECTOR for v in stable)
        assert lib.mkv_flashio_power_cut(engine.f, seed) == 0
        engine.close()
        left = np.frombuffer(path.read_bytes(), np.uint8).reshape(SECTORS, SECTOR)
        assert (left == left[:, :1]).all()
        for i in range(SECTORS):
            assert int(left[i, 0]) in {stable[i]} | since[i]

"""The flash engine: both rungs, with and without O_DIRECT, held to one contract."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.store.native._store import ffi, lib

from .flash import DISCARD, FLUSH, MIB, READ, SECTOR, WRITE, Engine, allows_direct, engine_or_skip, make_file

pytestmark = pytest.mark.asan
HELD = lib.MKV_FAULT_HELD
ANY = 0xFFFFFFFF
FILE = 4 * MIB


@pytest.fixture(params=["io_uring", "threads"])
def rung(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make_engine(rung: str) -> Iterator[Callable[..., Engine]]:
    """Engines on the rung of the test; closes them in the end."""
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        engines.append(engine_or_skip(rung, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["direct", "buffered"])
def flags(request: pytest.FixtureRequest, tmp_path: Path) -> int:
    """How to open the file of the test."""
    if request.param == "buffered":
        return os.O_RDWR
    if not allows_direct(tmp_path):
        pytest.skip(f"no O_DIRECT in {tmp_path}: point --basetemp to a disk")
    return os.O_RDWR | os.O_DIRECT


@pytest.fixture
def engine(make_engine: Callable[..., Engine], tmp_path: Path, flags: int) -> Engine:
    """An engine with one device of FILE bytes."""
    engine = make_engine()
    engine.open(make_file(tmp_path, FILE), flags)
    return engine


def pattern(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n)


# --- what comes back is what was written ---


def test_what_was_written_is_read(engine: Engine) -> None:
    data = pattern(MIB)
    assert engine.write(data, 3 * SECTOR) == 0
    engine.memory[:] = 0
    assert engine.read(MIB, 3 * SECTOR) == data
    stats = engine.stats()
    assert (stats.writes, stats.write_bytes, stats.reads, stats.read_bytes) == (1, MIB, 1, MIB)
    assert (stats.errors, stats.under_way, stats.waiting, stats.oldest_ns) == (0, 0, 0, 0)


def test_memory_need_not_be_registered(
    make_engine: Callable[..., Engine], tmp_path: Path, flags: int
) -> None:
    engine = make_engine(register=False)
    engine.open(make_file(tmp_path, FILE), flags)
    data = pattern(MIB)
    assert engine.write(data, 0) == 0
    assert engine.read(MIB, 0) == data


def test_memory_may_be_registered_in_parts(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine(register=False)
    engine.open(make_file(tmp_path, FILE))
    for part in (2, 0, 1):  # the fourth quarter is left out
        assert lib.mkv_flashio_memory(engine.f, engine.address + part * MIB, MIB) == 0
    data = pattern(4 * MIB)
    engine.memory[:] = np.frombuffer(data, np.uint8)
    spans = [(at, min(640 << 10, 4 * MIB - at)) for at in range(0, 4 * MIB, 640 << 10)]  # some lie across two
    assert [io.result for io in engine.run_many((WRITE, 0, at, at, n) for at, n in spans)] == [0] * len(spans)
    engine.memory[:] = 0
    assert [io.result for io in engine.run_many((READ, 0, at, at, n) for at, n in spans)] == [0] * len(spans)
    assert engine.memory.tobytes() == data


def test_thousands_of_requests_at_random_offsets(engine: Engine) -> None:
    """More than any ring holds, all told at once."""
    n, unit = 4096, 1024
    order = np.random.default_rng(1).permutation(n)
    engine.memory[:] = np.frombuffer(pattern(n * unit), np.uint8)
    before = engine.memory.copy()
    ios = engine.run_many((WRITE, 0, int(to) * unit, i * unit, unit) for i, to in enumerate(order))
    assert not any(io.result for io in ios)
    engine.memory[:] = 0
    ios = engine.run_many((READ, 0, int(to) * unit, i * unit, unit) for i, to in enumerate(order))
    assert not any(io.result for io in ios)
    assert (engine.memory == before).all()
    stats = engine.stats()
    assert stats.deepest == (32 if engine.rung == "io_uring" else 8)


def test_many_threads_submit(engine: Engine) -> None:
    wrong: list[int] = []

    def work(part: int) -> None:
        rng, base = np.random.default_rng(part), part * (MIB // 2)
        mine = engine.memory[base : base + MIB // 2].reshape(128, 4096)
        for _ in range(8):
            mine[:] = rng.integers(0, 256, mine.shape, np.uint8)
            copy = mine.copy()
            spans = [(base + i * 4096, base + i * 4096, 4096) for i in range(128)]
            bad = any(io.result for io in engine.run_many((WRITE, 0, *s) for s in spans))
            mine[:] = 0
            bad |= any(io.result for io in engine.run_many((READ, 0, *s) for s in spans))
            if bad or (mine != copy).any():
                wrong.append(part)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.stats().reads == 8 * 8 * 128


def test_devices_are_told_apart(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine()
    for i in range(5):
        assert engine.open(make_file(tmp_path, MIB, f"device{i}")) == i
        assert engine.write(bytes([i]) * 4096, 0, device=i) == 0
    assert [engine.read(4096, 0, device=i)[0] for i in range(5)] == list(range(5))


def test_a_callback_may_submit_more(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine()
    engine.open(make_file(tmp_path, MIB))
    ios = engine.ios((WRITE, 0, i * 4096, 0, 4096) for i in range(50))
    over = threading.Event()
    left = list(range(1, 50))

    @ffi.callback("void(struct mkv_io *)")
    def done(io: Any) -> None:
        if left:
            lib.mkv_flashio_submit(engine.f, [ios + left.pop(0)], 1)
        else:
            over.set()

    for io in ios:
        io.done = done
    lib.mkv_flashio_submit(engine.f, [ios + 0], 1)
    assert over.wait(10)
    assert engine.stats().writes == 50
    assert engine.stats().enters < 60  # the thread does not wake itself


def test_free_waits_for_what_was_submitted(rung: str, tmp_path: Path) -> None:
    engine = engine_or_skip(rung)
    engine.open(make_file(tmp_path, MIB))
    ios = engine.ios((WRITE, 0, i * 4096, 0, 4096) for i in range(200))
    results: list[int] = []
    done = ffi.callback("void(struct mkv_io *)", lambda io: results.append(io.result))
    for io in ios:
        io.done = done
    lib.mkv_flashio_submit(engine.f, [ios + i for i in range(200)], 200)
    engine.close()
    assert results == [0] * 200


# --- errors ---


@pytest.mark.parametrize(
    ("op", "offset", "at", "length"),
    [
        (READ, 1, 0, SECTOR),
        (READ, 256, 0, SECTOR),
        (READ, 0, 8, SECTOR),
        (WRITE, 0, 0, SECTOR + 1),
        (WRITE, 0, 0, 0),
        (READ, 1 << 63, 0, SECTOR),
        (READ, (1 << 63) - SECTOR, 0, SECTOR),
        (READ, 0, 0, 1 << 63),
        (0, 0, 0, SECTOR),
        (5, 0, 0, SECTOR),
    ],
)
def test_a_bad_span_is_refused(engine: Engine, op: int, offset: int, at: int, length: int) -> None:
    assert engine.run(op, 0, offset, at, length) == -errno.EINVAL
    assert engine.stats().errors == 1


def test_an_unknown_device_is_refused(engine: Engine) -> None:
    assert engine.run(READ, device=1) == -errno.ENODEV
    assert engine.run(FLUSH, device=ANY) == -errno.ENODEV


def test_beyond_the_end_is_an_error(engine: Engine, tmp_path: Path) -> None:
    assert engine.run(READ, 0, FILE, 0, SECTOR) == -errno.EIO
    assert engine.run(READ, 0, FILE - 2 * SECTOR, 0, 4 * SECTOR) == -errno.EIO
    os.truncate(tmp_path / "device", FILE // 2 + 100)
    assert engine.run(READ, 0, FILE // 2, 0, SECTOR) == -errno.EIO
    assert engine.run(READ, 0, FILE // 2 - SECTOR, 0, SECTOR) == 0


def test_errors_are_told_one_by_one(engine: Engine) -> None:
    ios = engine.run_many((READ, 0, FILE + (i % 2 - 1) * SECTOR, i * SECTOR, SECTOR) for i in range(100))
    assert [io.result for io in ios] == [0, -errno.EIO] * 50


def test_the_kernels_errors_come_through(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine()
    full = engine.open("/dev/full")
    readonly = engine.open(make_file(tmp_path, MIB), os.O_RDONLY)
    assert engine.run(WRITE, full) == -errno.ENOSPC
    assert engine.run(FLUSH, full) == -errno.EINVAL
    assert engine.run(WRITE, readonly) == -errno.EBADF
    io = engine.ios([(READ, readonly, 0, 0, SECTOR)])
    io[0].address = 4096  # unmapped
    assert lib.mkv_flashio_run(engine.f, io) == -errno.EFAULT


def test_what_cannot_be_a_device_stays_the_callers(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    read, write = os.pipe()
    assert lib.mkv_flashio_device(engine.f, read) == -errno.ESPIPE
    assert lib.mkv_flashio_device(engine.f, -1) == -errno.EBADF
    os.close(read)
    os.close(write)


def test_there_are_so_many_devices_and_no_more(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine(depth=1)
    path = make_file(tmp_path, MIB)
    for i in range(lib.MKV_MAX_DEVICES):
        assert engine.open(path) == i
    fd = os.open(path, os.O_RDWR)
    assert lib.mkv_flashio_device(engine.f, fd) == -errno.ENFILE
    os.close(fd)
    assert not any(io.result for io in engine.run_many((READ, d, 0, 0, 4096) for d in range(64)))


def test_a_depth_must_be_possible() -> None:
    for depth in (0, lib.MKV_MAX_DEPTH + 1):
        with pytest.raises(OSError, match="mkv_flashio_new") as caught:
            Engine(depth=depth)
        assert caught.value.errno == errno.EINVAL


def test_memory_comes_before_the_first_request(engine: Engine) -> None:
    assert engine.run(READ) == 0
    assert lib.mkv_flashio_memory(engine.f, engine.address, MIB) == -errno.EBUSY


# --- flush and discard ---


def test_flushes_are_answered_each(engine: Engine) -> None:
    requests = [(op, 0, i * 4096, 0, 4096) for i in range(64) for op in (WRITE, FLUSH)]
    assert not any(io.result for io in engine.run_many(requests))
    assert (engine.stats().flushes, engine.stats().writes) == (64, 64)


def test_a_flush_does_not_wait_for_others(engine: Engine) -> None:
    engine.fault(HELD, op=WRITE)
    thread = threading.Thread(target=engine.run, args=(WRITE,))
    thread.start()
    while not engine.stats().under_way:
        time.sleep(0.001)
    assert engine.run(FLUSH) == 0
    lib.mkv_flashio_fault_clear(engine.f)
    thread.join()


def test_discarding_leaves_a_file_as_it_is(engine: Engine, tmp_path: Path) -> None:
    data = pattern(MIB)
    engine.write(data, 0)
    before = os.stat(tmp_path / "device")
    assert engine.run(DISCARD, 0, 0, 0, MIB) == 0
    assert engine.run(DISCARD, 0, 1, 0, MIB) == -errno.EINVAL
    after = os.stat(tmp_path / "device")
    assert (before.st_blocks, before.st_mtime_ns) == (after.st_blocks, after.st_mtime_ns)
    assert engine.read(MIB, 0) == data


def test_discarding_on_a_block_device(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    path = make_file(tmp_path, FILE)
    losetup = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "losetup"
    try:
        out = subprocess.run([losetup, "--show", "-f", path], capture_output=True, text=True)
    except OSError as exc:
        pytest.skip(f"no loop device: {exc}")
    if out.returncode:
        pytest.skip(f"no loop device: {out.stderr.strip()}")
    loop = out.stdout.strip()
    try:
        engine = make_engine()
        engine.open(loop, os.O_RDWR | os.O_DIRECT)
        data = pattern(MIB)
        assert engine.write(data, 0) == 0
        assert engine.run(DISCARD, 0, 4096, 0, 4096) == 0
        assert engine.read(4096, 0) == data[:4096]
        assert engine.read(MIB - 8192, 8192) == data[8192:]
        assert engine.run(FLUSH) == 0
        engine.close()
    finally:
        subprocess.run([losetup, "-d", loop], check=True)


# --- whose turn it is ---


def test_three_reads_to_a_write_while_both_wait(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    """With the volatile cache a request is over as soon as it has a place, so the ends show the order."""
    engine = make_engine()
    engine.open(make_file(tmp_path, MIB))
    lib.mkv_flashio_volatile(engine.f, 0)
    ops = [WRITE] * 20 + [READ] * 30 + [FLUSH] * 2
    ios = engine.run_many((op, 0, i * SECTOR, 0, SECTOR) for i, op in enumerate(ops))
    order = [io.op for io in sorted(ios, key=lambda io: int(io.done_ns))]
    assert order == [FLUSH] * 2 + [READ, READ, READ, WRITE] * 10 + [WRITE] * 10


def test_a_read_overtakes_a_burst_of_writes(engine: Engine) -> None:
    n = 2000
    ios = engine.run_many([*((WRITE, 0, i % 1000 * 4096, 0, 4096) for i in range(n)), (READ, 0, 0, 0, 4096)])
    assert sum(io.done_ns < ios[n].done_ns for io in ios) < n // 10


@pytest.fixture
def in_background() -> Iterator[Callable[..., Any]]:
    """Runs a batch on a thread of its own; joins it in the end."""
    threads: list[threading.Thread] = []

    def run(engine: Engine, requests: list[tuple[int, int, int, int, int]]) -> Any:
        ios = engine.ios(requests)
        run_many = lib.mkv_flashio_run_many
        threads.append(threading.Thread(target=run_many, args=(engine.f, ios, len(ios))))
        threads[-1].start()
        return ios

    yield run
    for thread in threads:
        thread.join()


def test_hanging_writes_leave_places_for_reads(engine: Engine, in_background: Callable[..., Any]) -> None:
    engine.fault(HELD, op=WRITE)
    written = in_background(engine, [(WRITE, 0, i * 4096, 0, 4096) for i in range(100)])
    places = 24 if engine.rung == "io_uring" else 6
    while engine.stats().under_way < places:
        time.sleep(0.001)
    assert engine.run(READ) == 0
    stats = engine.stats()
    assert (stats.under_way, stats.waiting) == (places, 100 - places)
    lib.mkv_flashio_fault_clear(engine.f)
    while engine.stats().writes < 100:
        time.sleep(0.001)
    assert not any(io.result for io in written)


@pytest.mark.parametrize(("length", "at_once"), [(2 * MIB, 4), (3 * MIB, 3), (12 * MIB, 1)])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_device_is_given_so_many_bytes_at_once(
    make_engine: Callable[..., Engine],
    in_background: Callable[..., Any],
    tmp_path: Path,
    op: int,
    length: int,
    at_once: int,
) -> None:
    engine = make_engine(memory=12 * MIB)
    engine.open(make_file(tmp_path, 12 * MIB))
    engine.fault(HELD, op=op)
    in_background(engine, [(op, 0, 0, 0, length) for _ in range(20)])
    while engine.stats().waiting != 20 - at_once:
        time.sleep(0.001)
    assert engine.stats().under_way == at_once
    other = WRITE if op == READ else READ  # has a share of its own
    assert engine.run(other, 0, 0, 0, MIB) == 0
    lib.mkv_flashio_fault_clear(engine.f)


def test_a_device_that_hangs_stalls_no_other_and_is_seen(
    engine: Engine, in_background: Callable[..., Any], tmp_path: Path
) -> None:
    other = engine.open(make_file(tmp_path, MIB, "other"))
    engine.fault(HELD)
    in_background(engine, [(READ, 0, 0, i * 4096, 4096) for i in range(100)])
    while not engine.stats().waiting:
        time.sleep(0.001)
    assert not any(io.result for io in engine.run_many((READ, other, 0, 0, 4096) for _ in range(100)))
    time.sleep(0.02)
    assert lib.mkv_flashio_stuck(engine.f, 0) > 20_000_000
    assert engine.stats().oldest_ns > 20_000_000
    assert lib.mkv_flashio_stuck(engine.f, other) == 0
    lib.mkv_flashio_fault_clear(engine.f)


# --- the thread ---


def switches() -> dict[str, int]:
    """Voluntary context switches by thread of the engine."""
    out = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith("memkv-flash"):
            status = (task / "status").read_text()
            out[task.name] = int(status.split("voluntary_ctxt_switches:")[1].split()[0])
    return out


def test_an_idle_engine_never_wakes(engine: Engine) -> None:
    for busy_before in (False, True):
        if busy_before:
            engine.run_many((READ, 0, i * 4096, 0, 4096) for i in range(100))
        time.sleep(0.05)
        before = switches()
        enters = engine.stats().enters
        time.sleep(0.3)
        assert before == switches()
        assert len(before) == (1 if engine.rung == "io_uring" else 9)
        assert engine.stats().enters == enters


def test_requests_share_system_calls(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine()
    if engine.rung != "io_uring":
        pytest.skip("threads take one each")
    engine.open(make_file(tmp_path, FILE), os.O_RDWR)
    engine.run_many((READ, 0, i * 4096, i * 4096, 4096) for i in range(1000))
    assert engine.stats().enters < 1000


# --- the ladder ---


def in_subprocess(code: str, path: Path) -> str:
    """What the code prints, in a process of its own: it takes rights away that do not come back."""
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_lower_rung_can_be_demanded() -> None:
    engine = Engine("threads")
    assert (engine.rung, engine.reason) == ("threads", "threads were demanded")
    engine.close()


def test_without_memlock_the_engine_works_with_unregistered_memory(tmp_path: Path) -> None:
    engine_or_skip("io_uring").close()
    code = """
        import os, resource, sys
        from tests.store.flash import *
        fd = os.open(sys.argv[1], os.O_RDWR)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        if os.geteuid() == 0:
            os.setresuid(54321, 54321, 54321)  # root may lock what it wants
        engine = Engine(memory=4 * MIB)
        print(engine.registered, engine.rung, engine.reason, sep="|")
        assert lib.mkv_flashio_device(engine.f, fd) == 0
        assert engine.write(b"x" * 4096, 0) == 0
        assert engine.read(4096, 0) == b"x" * 4096
        engine.close()
    """
    registered, rung, reason = in_subprocess(code, make_file(tmp_path, MIB)).split("|")
    assert (int(registered), rung) == (-errno.ENOMEM, "io_uring")
    assert "RLIMIT_MEMLOCK" in reason


@pytest.mark.parametrize(("error", "hint"), [(errno.EPERM, "seccomp"), (errno.ENOSYS, "seccomp")])
def test_where_io_uring_is_refused_threads_do_it_and_say_why(tmp_path: Path, error: int, hint: str) -> None:
    engine_or_skip("io_uring").close()
    code = """
        import ctypes, struct, sys
        from tests.store.flash import *
        libc = ctypes.CDLL(None, use_errno=True)
        # load the system call's number; io_uring_setup fails with %d; everything else is allowed
        program = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50000 | %d), (0x06, 0, 0, 0x7FFF0000)]
        filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *f) for f in program))
        fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters))
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, fprog) == 0
        engine = Engine()
        print(engine.rung, engine.reason, sep="|")
        engine.open(sys.argv[1])
        assert engine.write(b"x" * 4096, 0) == 0
        assert engine.read(4096, 0) == b"x" * 4096
        engine.close()
    """
    rung, reason = in_subprocess(code % (error, error), make_file(tmp_path, MIB)).split("|")
    assert rung == "threads"
    assert os.strerror(error) in reason
    assert hint in reason

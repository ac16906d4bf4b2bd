"""The tcp fabric's C core: what a READ over sockets delivers, what is refused, and who closes when."""

import errno
import re
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memkv.rdma.native._rdma import ffi, lib

pytestmark = pytest.mark.asan

MiB = 1 << 20
LOCAL_WRITE, REMOTE_READ = 1, 2
SOURCE, UNREADABLE, OTHER_SECRET, UNKNOWN, SHORTER = 1, 2, 3, 4, 5  # remote regions, as the reader knows them
DEST, SCRATCH, READ_ONLY = 1, 2, 3  # local regions
SECRET = 0x1122334455667788
COPY_MAX = lib.MKV_TCP_COPY_MAX
UNKNOWN_TIME = 2**64 - 1
MAX_SEG = lib.MKV_MAX_SEG
REQUEST = struct.Struct("<IIQQIIQ")
HEADER = struct.Struct("<IIII")
TRAILER = struct.Struct("<QQ")


def region(table, id, array=None, length=None, secret=SECRET, access=0):
    base = 0 if array is None else array.ctypes.data
    length = array.nbytes if length is None else length
    r = ffi.new(
        "struct mkv_region *", {"base": base, "length": length, "secret": secret, "id": id, "access": access}
    )
    assert lib.mkv_table_set(table, r) == 0


def connected(n):
    """n pairs of connected loopback sockets, as descriptors: (reader's, responder's)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = []
        for _ in range(n):
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
            pairs.append((near.detach(), far.detach()))
        return pairs


class Fabric:
    """A source with its responder, a destination, and whatever channels a test opens between them."""

    def __init__(self):
        rng = np.random.default_rng(7)
        self.source = rng.integers(0, 256, 24 * MiB, dtype=np.uint8)
        self.dest = np.zeros(24 * MiB, dtype=np.uint8)
        self.scratch = np.zeros(64 * 256, dtype=np.uint8)
        self.served, self.remote, self.local = (lib.mkv_table_new(64) for _ in range(3))
        region(self.served, SOURCE, self.source, access=REMOTE_READ)
        region(self.served, UNREADABLE, self.source, access=LOCAL_WRITE)
        region(self.served, OTHER_SECRET, self.source, access=REMOTE_READ, secret=SECRET + 1)
        region(self.served, SHORTER, self.source, access=REMOTE_READ, length=MiB)
        for id in (SOURCE, UNREADABLE, OTHER_SECRET, UNKNOWN, SHORTER):
            region(self.remote, id, length=self.source.nbytes)
        region(self.local, DEST, self.dest, access=LOCAL_WRITE)
        region(self.local, SCRATCH, self.scratch, access=LOCAL_WRITE)
        region(self.local, READ_ONLY, self.dest, access=REMOTE_READ)
        self.responder = lib.mkv_tcp_responder_new()
        self.channels = []
        self.ids = []

    def channel(self, sockets=1, depth=256):
        pairs = connected(sockets)
        self.ids += [lib.mkv_tcp_responder_add(self.responder, far, self.served) for _, far in pairs]
        ch = lib.mkv_tcp_channel_new([near for near, _ in pairs], sockets, depth, self.local, self.remote)
        assert ch
        self.channels.append(ch)
        return ch

    def raw(self):
        """A socket to the responder, to be spoken to by hand."""
        [(near, far)] = connected(1)
        self.ids.append(lib.mkv_tcp_responder_add(self.responder, far, self.served))
        sock = socket.socket(fileno=near)
        sock.settimeout(5)
        return sock

    def stats(self):
        out = ffi.new("struct mkv_tcp_stats *")
        lib.mkv_tcp_responder_stats(self.responder, out)
        return out

    def withdraw(self, id, timeout_s):
        at = lib.mkv_table_at(self.served, id)
        return lib.mkv_tcp_region_withdraw(self.responder, at, int(timeout_s * 1e9))

    def kill(self):
        lib.mkv_tcp_responder_free(self.responder)
        self.responder = ffi.NULL

    def close(self):
        for ch in self.channels:
            lib.mkv_tcp_channel_free(ch)
        lib.mkv_tcp_responder_free(self.responder)
        for t in (self.served, self.remote, self.local):
            lib.mkv_table_free(t)


@pytest.fixture
def fabric():
    f = Fabric()
    yield f
    f.close()


def read(offset, *segs, id=SOURCE, cookie=0):
    """A READ; segs are (region, offset, length)."""
    r = ffi.new("struct mkv_read *", {"cookie": cookie, "offset": offset, "region": id, "nseg": len(segs)})
    for i, (local, at, length) in enumerate(segs[:MAX_SEG]):
        r.seg[i] = {"region": local, "offset": at, "length": length}
    return r


def post(ch, *reads):
    return [ch.ops.post(ch, r) for r in reads]


def finish(ch, max=64, timeout=10):
    """Polls until nothing is under way; completions by cookie, each of them once."""
    out = ffi.new("struct mkv_done[]", max)
    done = {}
    deadline = time.monotonic() + timeout
    while ch.busy:
        assert time.monotonic() < deadline, f"{ch.busy} READs still under way"
        for i in range(ch.ops.poll(ch, out, max)):
            assert out[i].cookie not in done
            done[out[i].cookie] = ffi.new("struct mkv_done *", out[i])[0]
    return done


def run(ch, *reads):
    assert not any(post(ch, *reads))
    ch.ops.flush(ch)
    return finish(ch)


def eventually(condition, timeout=5):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# What a READ delivers


@pytest.mark.parametrize("sockets", [1, 3])
@pytest.mark.parametrize(
    "length", [1, 63, 64, 4096, COPY_MAX - 1, COPY_MAX, COPY_MAX + 1, 96 * 1024, 96 * 1024 + 1, MiB + 3]
)
def test_every_length_arrives_whole_and_nothing_beside_it(fabric, length, sockets):
    done = run(fabric.channel(sockets), read(12345, (DEST, 77, length), cookie=9))
    assert done[9].status == 0
    np.testing.assert_array_equal(fabric.dest[77 : 77 + length], fabric.source[12345 : 12345 + length])
    assert not fabric.dest[:77].any()
    assert not fabric.dest[77 + length : 77 + length + 4096].any()


def test_completion_says_when(fabric):
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    done = run(fabric.channel(), read(0, (DEST, 0, MiB)))[0]
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert before <= done.posted_ns < done.done_ns <= after
    assert 0 < done.sample_ns <= done.done_ns - done.posted_ns


def test_one_read_scatters_into_four_segments(fabric):
    segs = [(SCRATCH, 64, 64), (DEST, 5 * MiB, 100_001), (DEST, 3, 1), (DEST, MiB, 70_000)]
    assert run(fabric.channel(), read(4096 - 64, *segs))[0].status == 0
    at = 4096 - 64
    for local, offset, length in segs:
        buf = fabric.scratch if local == SCRATCH else fabric.dest
        np.testing.assert_array_equal(buf[offset : offset + length], fabric.source[at : at + length])
        at += length


@pytest.mark.parametrize("sockets", [1, 4, 64])
def test_many_reads_of_mixed_sizes(fabric, sockets):
    rng = np.random.default_rng(sockets)
    ch = fabric.channel(sockets)
    ch.window = 4 * MiB
    wanted, reads, at = [], [], 0
    for i in range(256):
        length = int(
            rng.choice(
                [1, 100, 4096, COPY_MAX, COPY_MAX + 1, 65536, 300_000], p=[0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]
            )
        )
        offset = int(rng.integers(0, fabric.source.nbytes - length))
        wanted.append((at, offset, length))
        head = min(64, length - 1)
        segs = [(DEST, at, length)] if head == 0 else [(DEST, at, head), (DEST, at + head, length - head)]
        reads.append(read(offset, *segs, cookie=i))
        at += length
    done = run(ch, *reads)
    assert sorted(done) == list(range(256))
    assert all(d.status == 0 for d in done.values())
    for to, offset, length in wanted:
        np.testing.assert_array_equal(fabric.dest[to : to + length], fabric.source[offset : offset + length])
    assert (ch.reads, ch.read_bytes, ch.wire_bytes, ch.busy) == (256, at, 0, 0)


def test_one_read_is_let_through_however_narrow_the_window(fabric):
    ch = fabric.channel()
    ch.window = 1
    done = run(ch, *(read(i * MiB, (DEST, i * MiB, MiB), cookie=i) for i in range(4)))
    assert [done[i].status for i in range(4)] == [0] * 4
    np.testing.assert_array_equal(fabric.dest[: 4 * MiB], fabric.source[: 4 * MiB])


def test_poll_takes_completions_one_by_one(fabric):
    ch = fabric.channel(2)
    assert not any(post(ch, *(read(i, (DEST, i, 1), cookie=i) for i in range(200))))
    ch.ops.flush(ch)
    assert len(finish(ch, max=1)) == 200
    np.testing.assert_array_equal(fabric.dest[:200], fabric.source[:200])


def test_small_reads_share_send_calls(fabric):
    ch = fabric.channel()
    run(ch, *(read(i * 4096, (DEST, i * 4096, 4096), cookie=i) for i in range(64)))
    assert ch.doorbells <= 4
    assert fabric.stats().sends <= 32


read_lists = st.lists(
    st.tuples(
        st.integers(0, 2 * MiB),
        st.lists(st.one_of(st.integers(1, 200), st.integers(1, 3 * COPY_MAX)), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lists=st.lists(read_lists, min_size=1, max_size=3), sockets=st.integers(1, 5), window=st.integers(1, MiB)
)
def test_any_list_of_reads_delivers_the_source_bytes(fabric, lists, sockets, window):
    ch = fabric.channel(sockets, depth=64)
    ch.window = window
    for reads in lists:
        fabric.dest[:] = 0
        at, expect, descriptors = 0, [], []
        for i, (offset, lengths) in enumerate(reads):
            segs = []
            for length in lengths:
                segs.append((DEST, at, length))
                at += length
            descriptors.append(read(offset, *segs, cookie=i))
            expect.append(fabric.source[offset : offset + sum(lengths)])
        done = run(ch, *descriptors)
        assert len(done) == len(reads)
        assert not any(d.status for d in done.values())
        np.testing.assert_array_equal(fabric.dest[:at], np.concatenate(expect))
        assert not fabric.dest[at : at + 4096].any()
    lib.mkv_tcp_channel_free(fabric.channels.pop())


# What is refused at post, and leaves the channel good


@pytest.mark.parametrize(
    ("bad", "rc"),
    [
        (read(0, (DEST, 0, 0)), errno.ERANGE),
        (read(0), errno.ERANGE),
        (read(0, *[(DEST, 0, 1)] * (MAX_SEG + 1)), errno.ERANGE),
        (read(24 * MiB, (DEST, 0, 1)), errno.ERANGE),
        (read(24 * MiB - 1, (DEST, 0, 2)), errno.ERANGE),
        (read(2**64 - 1, (DEST, 0, 2)), errno.ERANGE),
        (read(0, (DEST, 24 * MiB - 1, 2)), errno.ERANGE),
        (read(0, (DEST, 2**64 - 1, 2)), errno.ERANGE),
        (read(0, (DEST, 0, 24 * MiB), (DEST, 0, 1)), errno.ERANGE),
        (read(0, (READ_ONLY, 0, 1)), errno.EACCES),
        (read(0, (9, 0, 1)), errno.ENOENT),
        (read(0, (2**32 - 1, 0, 1)), errno.ENOENT),
        (read(0, (DEST, 0, 1), id=9), errno.ENOENT),
    ],
)
def test_out_of_bounds_is_refused_at_post(fabric, bad, rc):
    ch = fabric.channel()
    assert post(ch, bad) == [-rc]
    assert ch.busy == 0
    assert run(ch, read(0, (DEST, 0, 100)))[0].status == 0


def test_depth_limits_what_is_under_way(fabric):
    ch = fabric.channel(depth=2)
    assert post(ch, *(read(0, (DEST, 0, 1), cookie=i) for i in range(3))) == [0, 0, -errno.EAGAIN]
    ch.ops.flush(ch)
    assert len(finish(ch)) == 2


# What the responder refuses, and breaks the channel


@pytest.mark.parametrize(
    ("id", "offset", "rc"),
    [
        (UNKNOWN, 0, errno.EACCES),
        (OTHER_SECRET, 0, errno.EACCES),
        (UNREADABLE, 0, errno.EACCES),
        (SHORTER, MiB, errno.ERANGE),
        (SHORTER, MiB - 99, errno.ERANGE),
    ],
)
def test_refusal_breaks_the_channel_like_a_queue_pair(fabric, id, offset, rc):
    ch = fabric.channel(2)
    good = [read(i * MiB, (DEST, i * MiB, MiB), cookie=i) for i in range(2)]
    bad = read(offset, (DEST, 8 * MiB, 100), id=id, cookie=2)
    later = [read(0, (DEST, 9 * MiB, MiB), cookie=i) for i in range(3, 9)]
    done = run(ch, *good, bad, *later)
    assert done[2].status == -rc
    assert done[2].sample_ns == UNKNOWN_TIME
    assert {done[i].status for i in done if i != 2} <= {0, -errno.ECANCELED}
    assert ch.broken == -rc
    assert post(ch, read(0, (DEST, 0, 1))) == [-errno.EPIPE]
    assert not fabric.dest[8 * MiB : 8 * MiB + 100].any()
    assert fabric.stats().refusals == 1
    eventually(lambda: fabric.stats().sockets == 0)


def test_the_bound_of_a_region_is_its_last_byte(fabric):
    assert run(fabric.channel(), read(MiB - 100, (DEST, 0, 100), id=SHORTER))[0].status == 0
    np.testing.assert_array_equal(fabric.dest[:100], fabric.source[MiB - 100 : MiB])


def test_a_withdrawn_region_is_refused(fabric):
    assert run(fabric.channel(), read(0, (DEST, 0, 1)))[0].status == 0
    assert fabric.withdraw(SOURCE, 1) == 0
    assert run(fabric.channel(), read(0, (DEST, 0, 1)))[0].status == -errno.EACCES
    assert run(fabric.channel(), read(0, (DEST, 0, 1), id=SHORTER))[0].status == 0


# Stalls, deaths and aborts


def stalled(fabric, length=24 * MiB):
    """A channel whose reader does not read, with a READ that its socket cannot hold."""
    ch = fabric.channel()
    assert post(ch, read(0, (DEST, 0, length))) == [0]
    ch.ops.flush(ch)
    before = -1
    while fabric.stats().bytes != before:
        before = fabric.stats().bytes
        time.sleep(0.05)
    assert 0 < before < length
    return ch


def test_a_stall_shows_in_the_sampling_time_and_holds_up_nobody_else(fabric):
    slow = stalled(fabric)
    quick = run(fabric.channel(), read(0, (DEST, 0, 2 * MiB)))[0]
    assert quick.status == 0
    assert quick.sample_ns < quick.done_ns - quick.posted_ns
    time.sleep(0.2)
    done = finish(slow)[0]
    assert done.status == 0
    assert done.sample_ns > 200_000_000
    np.testing.assert_array_equal(fabric.dest, fabric.source)


def test_withdrawal_waits_for_a_response_under_way(fabric):
    ch = stalled(fabric)
    closed = []
    waiter = threading.Thread(target=lambda: closed.append(fabric.withdraw(SOURCE, 20)))
    waiter.start()
    time.sleep(0.1)
    assert waiter.is_alive()
    done = finish(ch)[0]
    waiter.join()
    assert (done.status, closed) == (0, [0])
    np.testing.assert_array_equal(fabric.dest, fabric.source)
    assert run(ch, read(0, (DEST, 0, 1)))[0].status == -errno.EACCES


def test_withdrawal_closes_a_socket_that_sits_on_the_region(fabric):
    ch = stalled(fabric)
    start = time.monotonic()
    assert fabric.withdraw(SOURCE, 0.1) == 1
    assert 0.09 < time.monotonic() - start < 3
    assert lib.mkv_table_at(fabric.served, SOURCE).sends == 0
    assert (fabric.stats().evictions, fabric.stats().sockets) == (1, 0)
    assert finish(ch)[0].status == -errno.EHOSTUNREACH


def test_removing_a_socket_ends_its_response(fabric):
    ch = stalled(fabric)
    assert lib.mkv_tcp_responder_remove(fabric.responder, fabric.ids[-1]) == 0
    assert lib.mkv_tcp_responder_remove(fabric.responder, fabric.ids[-1]) == -errno.ENOENT
    assert lib.mkv_table_at(fabric.served, SOURCE).sends == 0
    assert finish(ch)[0].status == -errno.EHOSTUNREACH


def test_dropping_a_table_closes_its_sockets_only(fabric):
    mine = fabric.channel(3)
    other_table = lib.mkv_table_new(8)
    [(near, far)] = connected(1)
    lib.mkv_tcp_responder_add(fabric.responder, far, other_table)
    assert lib.mkv_tcp_responder_drop(fabric.responder, other_table) == 1
    lib.mkv_table_free(other_table)
    socket.socket(fileno=near).close()
    assert run(mine, read(0, (DEST, 0, 100)))[0].status == 0


def test_the_responder_dies_in_the_middle(fabric):
    ch = stalled(fabric)
    assert not any(post(ch, *(read(0, (DEST, 0, 1), cookie=i) for i in range(1, 10))))
    fabric.kill()
    done = finish(ch)
    assert len(done) == 10
    assert done[0].status == -errno.EHOSTUNREACH
    assert {done[i].status for i in range(1, 10)} == {-errno.ECANCELED}
    assert ch.broken == -errno.EHOSTUNREACH


def test_a_dead_idle_socket_breaks_the_channel(fabric):
    ch = fabric.channel(2)
    lib.mkv_tcp_responder_remove(fabric.responder, fabric.ids[0])
    out = ffi.new("struct mkv_done *")
    eventually(lambda: ch.ops.poll(ch, out, 1) == 0 and ch.broken)
    assert ch.broken == -errno.EHOSTUNREACH


def test_after_an_abort_nothing_is_written(fabric):
    ch = fabric.channel(2)
    assert not any(post(ch, *(read(i * MiB, (DEST, i * MiB, MiB), cookie=i) for i in range(24))))
    ch.ops.flush(ch)
    out = ffi.new("struct mkv_done[64]")
    completed = ch.ops.poll(ch, out, 64)
    ch.ops.abort(ch)
    assert ch.ops.arm(ch) == 1
    done = finish(ch)
    assert len(done) == 24 - completed
    assert {d.status for d in done.values()} == {-errno.ECANCELED}
    assert (ch.broken, ch.wire_bytes, ch.busy) == (-errno.ECANCELED, 0, 0)
    after = fabric.dest.copy()
    eventually(lambda: fabric.stats().sockets == 0)
    np.testing.assert_array_equal(fabric.dest, after)


def test_freeing_a_channel_with_reads_under_way_closes_its_sockets(fabric):
    stalled(fabric)
    lib.mkv_tcp_channel_free(fabric.channels.pop())
    eventually(lambda: fabric.stats().sockets == 0)
    assert lib.mkv_table_at(fabric.served, SOURCE).sends == 0


def test_an_idle_responder_sleeps(fabric):
    ch = fabric.channel(4)
    run(ch, read(0, (DEST, 0, MiB)))
    time.sleep(0.05)
    before = fabric.stats().wakeups
    time.sleep(0.3)
    assert fabric.stats().wakeups == before


# By hand: what the bytes are, and what the responder makes of others


def request(
    offset=0, length=100, sequence=0, id=SOURCE, secret=SECRET, magic=lib.MKV_TCP_REQUEST_MAGIC, reserved=0
):
    return REQUEST.pack(magic, id, secret, offset, length, sequence, reserved)


def receive(sock, n):
    data = b""
    while len(data) < n:
        more = sock.recv(n - len(data))
        assert more, "closed early"
        data += more
    return data


def test_a_response_is_header_payload_trailer(fabric):
    with fabric.raw() as sock:
        for sequence, length in enumerate((100, 50_000)):
            sock.sendall(request(4096, length, sequence))
            data = receive(sock, 32 + length)
            assert HEADER.unpack(data[:16]) == (lib.MKV_TCP_RESPONSE_MAGIC, lib.MKV_TCP_OK, sequence, length)
            assert data[16:-16] == fabric.source[4096 : 4096 + length].tobytes()
            first, last = TRAILER.unpack(data[-16:])
            assert first <= last <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
        bytes(40),
        request(magic=0x02524B4D),
        request(length=0),
        request(reserved=1),
        b"\xff" * 100_000,
    ],
)
def test_garbage_closes_its_socket_and_no_other(fabric, junk):
    good = fabric.channel()
    with fabric.raw() as sock:
        sock.sendall(junk)
        magic, status, _, length = HEADER.unpack(receive(sock, 16))
        assert (magic, status, length) == (lib.MKV_TCP_RESPONSE_MAGIC, lib.MKV_TCP_BAD, 0)
        assert sock.recv(1) == b""
    assert run(good, read(0, (DEST, 0, MiB)))[0].status == 0
    eventually(lambda: fabric.stats().sockets == 1)


def test_answers_before_a_refusal_arrive_before_it(fabric):
    with fabric.raw() as sock:
        sock.sendall(
            request(0, 200_000, 0) + request(0, 10, 1) + request(secret=1, sequence=2) + request(sequence=3)
        )
        assert receive(sock, 32 + 200_000)[16:-16] == fabric.source[:200_000].tobytes()
        assert receive(sock, 32 + 10)[16:-16] == fabric.source[:10].tobytes()
        assert HEADER.unpack(receive(sock, 16)) == (lib.MKV_TCP_RESPONSE_MAGIC, lib.MKV_TCP_ACCESS, 2, 0)
        assert sock.recv(1) == b""


def test_the_responder_does_not_swallow_for_ever_behind_a_refusal(fabric):
    with fabric.raw() as sock:
        sock.sendall(request(secret=1))
        with pytest.raises(ConnectionError):
            sock.sendall(bytes(64 * MiB))
    eventually(lambda: fabric.stats().sockets == 0)


@pytest.mark.parametrize("kept", [0, 1, 39])
def test_a_truncated_request_is_forgotten_when_the_peer_closes(fabric, kept):
    good = fabric.channel()
    with fabric.raw() as sock:
        sock.sendall(request() + request(sequence=1)[:kept])
        receive(sock, 132)
    eventually(lambda: fabric.stats().sockets == 1)
    assert fabric.stats().reads == 1
    assert run(good, read(0, (DEST, 0, MiB)))[0].status == 0


def test_a_request_may_arrive_byte_by_byte(fabric):
    with fabric.raw() as sock:
        for byte in request():
            sock.send(bytes([byte]))
            time.sleep(0.0005)
        assert receive(sock, 132)[16:-16] == fabric.source[:100].tobytes()


def imposter(fabric, answer):
    """A channel to a peer that answers with these bytes whatever it is asked."""
    [(near, far)] = connected(1)
    ch = lib.mkv_tcp_channel_new([near], 1, 8, fabric.local, fabric.remote)
    fabric.channels.append(ch)
    with socket.socket(fileno=far) as sock:
        assert post(ch, read(0, (DEST, 0, 100), cookie=0), read(0, (DEST, 100, 100), cookie=1)) == [0, 0]
        ch.ops.flush(ch)
        receive(sock, 80)
        sock.sendall(answer)
    return finish(ch), ch


GOOD = HEADER.pack(lib.MKV_TCP_RESPONSE_MAGIC, 0, 0, 100) + bytes(range(100))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        HEADER.pack(lib.MKV_TCP_RESPONSE_MAGIC, 0, 1, 100),
        HEADER.pack(lib.MKV_TCP_RESPONSE_MAGIC, 0, 0, 101),
        HEADER.pack(lib.MKV_TCP_RESPONSE_MAGIC, 99, 0, 0),
    ],
)
def test_a_response_that_does_not_fit_breaks_the_channel(fabric, answer):
    done, ch = imposter(fabric, answer + bytes(1000))
    assert (done[0].status, done[1].status) == (-errno.EIO, -errno.ECANCELED)
    assert ch.broken == -errno.EIO
    assert not fabric.dest[200:4096].any()


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 115, 116, 131])
def test_a_response_cut_short_is_no_completion(fabric, cut):
    done, _ = imposter(fabric, (GOOD + TRAILER.pack(1, 2))[:cut])
    assert (done[0].status, done[1].status) == (-errno.EHOSTUNREACH, -errno.ECANCELED)


def test_a_clock_that_runs_backwards_tells_nothing(fabric):
    done, _ = imposter(fabric, GOOD + TRAILER.pack(2, 1))
    assert (done[0].status, done[0].sample_ns) == (0, UNKNOWN_TIME)


def test_more_than_was_asked_for_breaks_the_channel(fabric):
    [(near, far)] = connected(1)
    ch = lib.mkv_tcp_channel_new([near], 1, 8, fabric.local, fabric.remote)
    fabric.channels.append(ch)
    with socket.socket(fileno=far) as sock:
        sock.sendall(b"?")
        out = ffi.new("struct mkv_done *")
        eventually(lambda: ch.ops.poll(ch, out, 1) == 0 and ch.broken)
    assert ch.broken == -errno.EIO


# Handles


def test_a_channel_that_cannot_be_made_leaves_the_sockets_alone(fabric):
    [(near, far)] = connected(1)
    for fds, depth in (([], 1), ([near], 0), ([near] * 65, 1), ([near, 2**31 - 1], 1)):
        assert not lib.mkv_tcp_channel_new(fds, len(fds), depth, fabric.local, fabric.remote)
    with socket.socket(fileno=near) as a, socket.socket(fileno=far) as b:
        a.sendall(b"x")
        assert b.recv(1) == b"x"


def test_a_socket_that_cannot_be_served_stays_the_caller_s(fabric):
    assert lib.mkv_tcp_responder_add(fabric.responder, 2**31 - 1, fabric.served) == -errno.EBADF
    assert fabric.stats().sockets == 0


def test_the_document_has_the_structs_offsets():
    text = (Path(__file__).parents[2] / "docs" / "tcp-wire.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(mkv_tcp_\w+)\.(\w+)` \| (\d+) \| (\d+) \|", text, flags=re.M)
    assert len(rows) == 13
    for name, field, offset, size in rows:
        assert ffi.offsetof(f"struct {name}", field) == int(offset)
        fields = dict(ffi.typeof(f"struct {name}").fields)
        assert ffi.sizeof(fields[field].type) == int(size)

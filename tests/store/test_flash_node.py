"""A node with flash, asked by a raw peer: what is written, staged, kept over a stop, and never comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.rdma.errors import DeviceError
from memkv.rdma.memory import HostMemory
from memkv.store import layout
from memkv.store import messages as m
from memkv.store import node as node_module
from memkv.store.columns import pack_keys
from memkv.store.config import NodeConfig
from memkv.store.flash import tier as tier_module
from memkv.store.flash.store import FlashStore
from memkv.store.flash.tier import FlashTier
from memkv.store.framing import Code
from memkv.store.native._store import ffi, lib
from memkv.store.node import NodeThread

from ..cli.nodes import running
from .raw import RawPeer, Reader, Refused, checksum, keys_of
from .test_puts import BLOCK, eventually

pytestmark = pytest.mark.asan

MIB = 1 << 20
STORED, HIT, MISS, DONE = lib.MKV_STORED, lib.MKV_HIT, lib.MKV_MISS, lib.MKV_DONE
TIMEOUT, EXISTS, ERROR_DEVICE = lib.MKV_TIMEOUT, lib.MKV_EXISTS, lib.MKV_ERROR_DEVICE
PER_BATCH = 16
SETTINGS = ["--memory", "8M", "--slab-bytes", "2M", "--block-bytes", "64K", "--grace-ms", "100"]
Connect = Callable[..., RawPeer]
Start = Callable[..., NodeThread]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flash"


@pytest.fixture
def start(start_node: Start, path: Path) -> Start:
    """Starts a node with 8 MiB of memory over a flash of 32 MiB."""

    def make(**settings: Any) -> NodeThread:
        return start_node(**({"memory": 8 * MIB, "flash": (f"{path}:32M",)} | settings))

    return make


class Filler:
    """A peer that puts blocks whose content follows from their number."""

    def __init__(self, peer: RawPeer, name: str = "test") -> None:
        self.peer = peer
        self.info = peer.open(name)
        peer.open_pull(self.info)
        self.region = peer.source(np.zeros(PER_BATCH * BLOCK, np.uint8))

    @staticmethod
    def content(number: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(number).integers(0, 256, BLOCK, np.uint8)

    def put(self, numbers: range, **named: Any) -> list[int]:
        out: list[int] = []
        assert isinstance(self.region.owner, HostMemory)
        source = self.region.owner.array
        for first in range(numbers.start, numbers.stop, PER_BATCH):
            batch = range(first, min(first + PER_BATCH, numbers.stop))
            for i, number in enumerate(batch):
                source[i * BLOCK : (i + 1) * BLOCK] = self.content(number)
            out += self.peer.statuses(
                self.peer.put(self.info, keys_of(*batch), self.region.id, BLOCK, **named)
            )
        return out

    def lookup(self, numbers: range) -> list[int]:
        return self.peer.on_keys(m.Lookup, self.info, keys_of(*numbers))

    def delete(self, *numbers: int, **named: Any) -> list[int]:
        answer = self.peer.ask(m.Delete, self.info.namespace, pack_keys(keys_of(*numbers)), **named)
        return list(answer.statuses)

    def stats(self) -> dict[str, Any]:
        return self.peer.stats(self.info.name)

    def flash(self) -> dict[str, Any]:
        flash: dict[str, Any] = self.peer.ask(m.Stats).sections["flash"]
        return flash

    def in_flash_only(self, reader: Reader, numbers: range) -> list[int]:
        """Numbers whose slot says FLASH."""
        slots = [(n, reader.find(self.info, keys_of(n))) for n in numbers]
        return [n for n, s in slots if s is not None and layout.location_state(s["location"]) == 2]


def stage(
    peer: RawPeer, info: m.NamespaceInfo, keys: npt.NDArray[np.uint8], **named: Any
) -> list[tuple[int, np.void]]:
    """(status, slot) of each key; checks the shape of the answers."""
    request = peer.post(m.Stage, info.namespace, pack_keys(keys), **named)
    got: dict[int, tuple[int, np.void]] = {}
    while True:
        answer = peer.wait(request)
        assert isinstance(answer, m.Staged)
        slots = np.frombuffer(answer.slots, layout.SLOT)
        for index, status, slot in zip(
            np.frombuffer(answer.indices, "<u4").tolist(), answer.statuses, slots, strict=True
        ):
            assert index not in got
            got[index] = (status, slot)
        if answer.last:
            assert sorted(got) == list(range(len(keys)))
            return [got[i] for i in range(len(keys))]


def learn_all(reader: Reader, peer: RawPeer, info: m.NamespaceInfo) -> None:
    """Slabs come as they are needed; a peer hears of them by notices, this one asks."""
    for region in peer.open(info.name).slabs:
        if region.id not in reader.remote.known:
            reader.learn(region)


def read(reader: Reader, slot: np.void, peer: RawPeer, info: m.NamespaceInfo) -> bytes:
    """READs a staged block and verifies it against its live line."""
    slab, offset = int(layout.location_slab(slot["location"])), int(layout.location_offset(slot["location"]))
    learn_all(reader, peer, info)
    data = reader.read(slab, offset - layout.LINE_BYTES, layout.LINE_BYTES + int(slot["length"]))
    line = np.frombuffer(data[: layout.LINE_BYTES], layout.LINE)[0]
    payload = data[layout.LINE_BYTES :]
    assert bytes(line["key"]) == bytes(slot["key"])
    assert int(line["generation"]) & 0xFFFFFFFF == slot["generation"]
    assert checksum(payload) == line["checksum"]
    return payload


@pytest.fixture
def filled(start: Start, connect: Connect) -> Filler:
    """A node that was given 200 blocks of 64 KiB, more than its memory holds."""
    filler = Filler(connect(start()))
    assert filler.put(range(200)) == [STORED] * 200
    return filler


# --- write-behind and staging -----------------------------------------------------------------------------


def test_what_memory_cannot_hold_is_held_by_flash(filled: Filler) -> None:
    assert filled.lookup(range(200)) == [HIT] * 200
    assert filled.stats()["evictions"] > 50
    answer = filled.peer.ask(m.Match, filled.info.namespace, pack_keys(keys_of(*range(205))))
    assert answer.count == 200
    eventually(lambda: filled.flash()["dirty_blocks"] == 0)
    assert filled.stats()["flash_blocks"] == 200


def test_blocks_in_flash_are_staged_and_read(filled: Filler) -> None:
    peer, info = filled.peer, filled.info
    reader = peer.open_get(info)
    cold = filled.in_flash_only(reader, range(40))
    assert len(cold) > 20
    answers = stage(peer, info, keys_of(*cold, 999))
    assert [status for status, _ in answers] == [HIT] * len(cold) + [MISS]
    assert answers[-1][1].tobytes() == bytes(32)
    for number, (_, slot) in zip(cold, answers, strict=False):
        assert layout.location_state(slot["location"]) == layout.SLOT_LIVE
        assert read(reader, slot, peer, info) == filled.content(number).tobytes()
    assert filled.flash()["staged_blocks"] == len(cold)


def test_a_staged_place_is_private_until_the_second_use(filled: Filler) -> None:
    reader = filled.peer.open_get(filled.info)
    number = filled.in_flash_only(reader, range(40))[0]
    first = stage(filled.peer, filled.info, keys_of(number))[0][1]
    assert filled.in_flash_only(reader, range(number, number + 1)) == [number]
    second = stage(filled.peer, filled.info, keys_of(number))[0][1]
    assert first["location"] == second["location"]
    assert filled.in_flash_only(reader, range(number, number + 1)) == []
    learn_all(reader, filled.peer, filled.info)
    assert reader.get(filled.info, keys_of(number)) == filled.content(number).tobytes()


def test_a_prefetch_publishes_and_names_no_place(filled: Filler) -> None:
    reader = filled.peer.open_get(filled.info)
    cold = filled.in_flash_only(reader, range(40))[:8]
    answers = stage(filled.peer, filled.info, keys_of(*cold), prefetch=True)
    assert [status for status, _ in answers] == [HIT] * 8
    assert all(slot.tobytes() == bytes(32) for _, slot in answers)
    assert filled.in_flash_only(reader, range(40)) != cold
    assert not set(filled.in_flash_only(reader, range(40))) & set(cold)


def test_what_is_in_memory_is_answered_without_a_read(filled: Filler) -> None:
    before = filled.flash()["staged_blocks"]
    answers = stage(filled.peer, filled.info, keys_of(*range(196, 200)))
    assert [status for status, _ in answers] == [HIT] * 4
    assert filled.flash()["staged_blocks"] == before


def test_a_batch_larger_than_memory_is_staged_in_turns(filled: Filler) -> None:
    answers = stage(filled.peer, filled.info, keys_of(*range(200)), deadline_ms=8000)
    assert {status for status, _ in answers} == {HIT}


def test_an_empty_stage_and_one_that_is_too_large(start: Start, connect: Connect) -> None:
    peer = connect(start(max_queued_blocks=8))
    info = peer.open()
    assert peer.ask(m.Stage, info.namespace, b"") == m.Staged(2, b"", b"", b"", True)
    with pytest.raises(Refused) as refused:
        stage(peer, info, keys_of(*range(9)))
    assert refused.value.refusal.code == Code.LIMIT


def test_without_flash_nothing_is_staged_or_promised(node: NodeThread, connect: Connect) -> None:
    filler = Filler(connect(node))
    for ask in (
        lambda: stage(filler.peer, filler.info, keys_of(1)),
        lambda: filler.put(range(1), durability="flash"),
    ):
        with pytest.raises(Refused) as refused:
            ask()
        assert refused.value.refusal.code == Code.UNSUPPORTED


def test_a_session_that_vanishes_takes_its_stages_along(
    filled: Filler, start: Start, connect: Connect, fabric_name: str
) -> None:
    filled.peer.post(m.Stage, filled.info.namespace, pack_keys(keys_of(*range(200))))
    filled.peer.vanish()
    # the fixture stops the node, which waits for every session


def store_of(node: NodeThread) -> FlashStore:
    assert node.node.flash is not None
    return node.node.flash.store


def hold(store: FlashStore, op: int) -> Callable[[], None]:
    """The devices answer no request of this kind any more; returns what lets them go on."""
    fault = ffi.new("struct mkv_fault *")
    fault.kind, fault.op, fault.device = lib.MKV_FAULT_HELD, op, 2**32 - 1
    assert lib.mkv_flashio_fault(store.io, fault) == 0
    return lambda: lib.mkv_flashio_fault_clear(store.io)


def hold_reads(store: FlashStore) -> Callable[[], None]:
    return hold(store, lib.MKV_IO_READ)


def test_a_device_that_hangs_costs_a_timeout(start: Start, connect: Connect) -> None:
    node = start()
    filler = Filler(connect(node))
    filler.put(range(200))
    release = hold_reads(store_of(node))
    try:
        reader = filler.peer.open_get(filler.info)
        cold = filler.in_flash_only(reader, range(20))
        began = time.monotonic()
        answers = stage(filler.peer, filler.info, keys_of(*cold), deadline_ms=300)
        assert {status for status, _ in answers} == {TIMEOUT}
        assert 0.2 < time.monotonic() - began < 3
        eventually(lambda: filler.flash()["stages"] == 0)
    finally:
        release()
    assert {status for status, _ in stage(filler.peer, filler.info, keys_of(*cold))} == {HIT}


def test_two_sessions_that_want_the_same_blocks_share_the_reads(start: Start, connect: Connect) -> None:
    node = start()
    filler = Filler(connect(node))
    filler.put(range(200))
    cold = filler.in_flash_only(filler.peer.open_get(filler.info), range(30))
    other = connect(node)
    info = other.open()
    release = hold_reads(store_of(node))
    first = filler.peer.post(m.Stage, filler.info.namespace, pack_keys(keys_of(*cold)))
    second = other.post(m.Stage, info.namespace, pack_keys(keys_of(*cold)))
    try:
        eventually(lambda: filler.flash()["stage_joined"] == len(cold))
    finally:
        release()
    for peer, request in ((filler.peer, first), (other, second)):
        left = len(cold)
        while left:
            answer = peer.wait(request)
            assert set(answer.statuses) == {HIT}
            left -= answer.blocks
    assert filler.flash()["staged_blocks"] == len(cold)


# --- durability -------------------------------------------------------------------------------------------


def test_a_durable_put_is_on_flash_when_it_is_answered(start: Start, connect: Connect) -> None:
    filler = Filler(connect(start()))
    assert filler.put(range(20), durability="flash") == [STORED] * 20
    assert filler.flash()["dirty_blocks"] == 0
    assert filler.stats()["flash_blocks"] == 20
    assert filler.put(range(20), durability="flash") == [EXISTS] * 20


def test_a_clean_stop_and_a_start_from_the_snapshot(start: Start, connect: Connect) -> None:
    node = start()
    filler = Filler(connect(node))
    filler.put(range(150))
    settings = filler.info
    filler.peer.close()
    node.stop()
    again = start()
    peer = connect(again)
    info = peer.open(mode="open")
    assert (info.namespace, info.salt, info.block_bytes, info.grace_ns) == (
        settings.namespace,
        settings.salt,
        settings.block_bytes,
        settings.grace_ns,
    )
    assert info.incarnation != settings.incarnation
    assert peer.on_keys(m.Lookup, info, keys_of(*range(151))) == [HIT] * 150 + [MISS]
    assert peer.ask(m.Stats).sections["flash"]["scanned"] == 0
    reader = peer.open_get(info)
    for number, (status, slot) in enumerate(stage(peer, info, keys_of(*range(40)))):
        assert status == HIT
        assert read(reader, slot, peer, info) == filler.content(number).tobytes()


def test_a_namespace_made_after_a_restart_has_an_id_of_its_own(start: Start, connect: Connect) -> None:
    node = start()
    one = connect(node).open("one")
    node.stop()
    peer = connect(start())
    two = peer.open("two")
    assert two.namespace > one.namespace
    assert peer.open("one").namespace == one.namespace
    with pytest.raises(Refused) as refused:
        peer.open("one", block_bytes=one.block_bytes * 2)
    assert refused.value.refusal.code == Code.MISMATCH


# --- what is deleted does not return ----------------------------------------------------------------------


def test_deleted_blocks_do_not_return_after_a_clean_stop(start: Start, connect: Connect) -> None:
    node = start()
    filler = Filler(connect(node))
    filler.put(range(150))
    assert filler.delete(0, 60, 149, 777) == [DONE] * 3 + [MISS]
    filler.peer.close()
    node.stop()
    peer = connect(start())
    found = peer.on_keys(m.Lookup, peer.open(), keys_of(*range(150)))
    assert [n for n, status in enumerate(found) if status == MISS] == [0, 60, 149]


def test_a_delete_waits_for_the_scan(
    start: Start, connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crashing(path) as crash:
        filler = Filler(RawPeer(crash.address))
        assert filler.put(range(30), durability="flash") == [STORED] * 30
        crash.kill()
    release: list[Callable[[], None]] = []

    def tier_on_a_device_that_hangs(store: FlashStore, pool: Any) -> FlashTier:
        release.append(hold_reads(store))
        return FlashTier(store, pool)

    monkeypatch.setattr(node_module, "FlashTier", tier_on_a_device_that_hangs)
    node = start()
    monkeypatch.undo()
    peer = connect(node)
    info = peer.open("test")
    try:
        assert peer.on_keys(m.Lookup, info, keys_of(1)) == [MISS]  # it serves meanwhile
        assert peer.ask(m.Stats).sections["flash"]["scan_left"] > 0
        keys = pack_keys(keys_of(1, 2))
        assert list(peer.ask(m.Delete, info.namespace, keys, deadline_ms=200).statuses) == [TIMEOUT] * 2
        patient = peer.post(m.Delete, info.namespace, keys, deadline_ms=20_000)
    finally:
        release[0]()
    assert peer.statuses(patient) == [DONE] * 2
    assert peer.on_keys(m.Lookup, info, keys_of(*range(30))) == [HIT, MISS, MISS] + [HIT] * 27


def test_a_delete_on_a_device_that_was_lost_says_so(start: Start, connect: Connect) -> None:
    node = start()
    filler = Filler(connect(node))
    filler.put(range(20), durability="flash")
    tier = node.node.flash
    assert tier is not None
    node.call(lambda: tier.store.fail(tier.store.devices[0], "pulled out"))
    assert filler.delete(1) == [TIMEOUT]
    assert filler.put(range(1), durability="flash") == [ERROR_DEVICE]
    assert filler.put(range(100, 101)) == [STORED]
    assert filler.lookup(range(100, 101)) == [HIT]


# --- kill -9 ----------------------------------------------------------------------------------------------


class Crash:
    """A node in a process of its own, to be killed."""

    def __init__(self, process: Any, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self._process = process

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def crashing(path: Path) -> Iterator[Crash]:
    with running(*SETTINGS, "--flash", f"{path}:32M") as node:
        yield Crash(node.process, node.address)


def test_what_was_promised_survives_a_kill_and_what_was_deleted_does_not(
    start: Start, connect: Connect, path: Path, fabric_name: str
) -> None:
    if fabric_name != "tcp":
        pytest.skip("once is enough: the process is asked over tcp")
    with crashing(path) as crash:
        filler = Filler(RawPeer(crash.address))
        assert filler.put(range(100), durability="flash") == [STORED] * 100
        filler.put(range(100, 220))
        assert filler.delete(*range(0, 100, 10)) == [DONE] * 10
        for number in range(3):  # again and again, so that there are older images
            filler.put(range(50, 51), durability="flash")
            filler.delete(50)
            assert number >= 0
        crash.kill()
    node = start()
    peer = connect(node)
    info = peer.open("test", mode="open")
    eventually(lambda: peer.ask(m.Stats).sections["flash"]["scan_left"] == 0)
    found = peer.on_keys(m.Lookup, info, keys_of(*range(100)))
    assert [n for n, status in enumerate(found) if status == MISS] == list(range(0, 100, 10))
    reader = peer.open_get(info)
    kept = [n for n in range(100) if n % 10]
    for number, (status, slot) in zip(kept, stage(peer, info, keys_of(*kept[:50])), strict=False):
        assert status == HIT
        assert read(reader, slot, peer, info) == filler.content(number).tobytes()
    flash = peer.ask(m.Stats).sections["flash"]
    assert flash["recovered"] >= 90
    assert flash["dropped_corrupt"] == 0


@pytest.mark.parametrize("rounds", [3])
def test_kills_at_any_moment_leave_a_store_that_starts(
    path: Path, rounds: int, fabric_name: str, start: Start, connect: Connect
) -> None:
    if fabric_name != "tcp":
        pytest.skip("once is enough: the process is asked over tcp")
    promised: set[int] = set()
    deleted: set[int] = set()
    rng = np.random.default_rng(7)
    for turn in range(rounds):
        with crashing(path) as crash:
            filler = Filler(RawPeer(crash.address))
            eventually(lambda f=filler: f.flash()["scan_left"] == 0)  # type: ignore[misc]
            first = 100 * turn
            promised |= {
                first + i
                for i, status in enumerate(filler.put(range(first, first + 20), durability="flash"))
                if status == STORED
            }
            victims = rng.choice(sorted(promised), 5, replace=False).tolist()
            if filler.delete(*victims) == [DONE] * 5:
                promised -= set(victims)
                deleted |= set(victims)
            filler.peer.put(filler.info, keys_of(*range(first + 50, first + 66)), filler.region.id, BLOCK)
            time.sleep(float(rng.uniform(0, 0.05)))
            crash.kill()
    peer = connect(start())
    info = peer.open("test")
    eventually(lambda: peer.ask(m.Stats).sections["flash"]["scan_left"] == 0)
    assert set(peer.on_keys(m.Lookup, info, keys_of(*sorted(promised)))) == {HIT}
    assert set(peer.on_keys(m.Lookup, info, keys_of(*sorted(deleted)))) == {MISS}


def test_a_node_that_was_told_to_stop_needs_no_scan(path: Path, fabric_name: str) -> None:
    if fabric_name != "tcp":
        pytest.skip("once is enough: the process is asked over tcp")
    args = [*SETTINGS, "--flash", f"{path}:32M"]
    with running(*args) as node:
        host, _, port = node.address.rpartition(":")
        Filler(RawPeer((host, int(port)))).put(range(100))
        code, log = node.stop(signal.SIGTERM)
        assert code == 0, log
    with running(*args) as node:
        with urllib.request.urlopen(f"{node.metrics}/status", timeout=10) as answer:
            status = json.load(answer)
        assert status["flash"]["scanned"] == 0
        assert status["namespaces"]["test"]["flash_blocks"] == 100


SLOW = """
import sys
from memkv.store.flash import tier
from memkv.store.native._store import ffi, lib
attach = tier.FlashTier.attach
def slow(self, *args):
    fault = ffi.new("struct mkv_fault *")
    fault.kind, fault.op, fault.device = lib.MKV_FAULT_HELD, lib.MKV_IO_WRITE, 2**32 - 1
    assert lib.mkv_flashio_fault(self.store.io, fault) == 0
    attach(self, *args)
tier.FlashTier.attach = slow
from memkv.cli.node import main
main(sys.argv[1:], prog_name="memkv-node")
"""


def test_a_stop_that_leaves_something_unwritten_is_not_clean_and_a_second_signal_does_not_wait(
    path: Path, fabric_name: str
) -> None:
    if fabric_name != "tcp":
        pytest.skip("once is enough: the process is asked over tcp")
    for timeout, signals in (("1", 1), ("600", 2)):
        args = [*SETTINGS, "--flash", f"{path}:32M", "--stop-timeout", timeout]
        with running(*args, program=SLOW) as node:
            host, _, port = node.address.rpartition(":")
            assert Filler(RawPeer((host, int(port)))).put(range(8)) == [STORED] * 8
            if signals == 2:
                node.process.send_signal(signal.SIGTERM)
                assert node.process.stderr is not None
                while "are to be written" not in node.process.stderr.readline():
                    pass
            began = time.monotonic()
            code, log = node.stop(signal.SIGTERM)
            assert time.monotonic() - began < 10
        assert code == (1 if signals == 1 else -signal.SIGTERM), log
        assert ("8 blocks" in log) == (signals == 1)


# --- when it cannot be done -------------------------------------------------------------------------------


def test_a_stop_that_cannot_write_everything_ends_all_the_same_and_says_what(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tier_module, "TELL_FLUSH_SECONDS", 0.1)
    took: list[float] = []
    finish = FlashTier.finish

    async def timed(tier: FlashTier, seconds: float) -> None:
        began = time.monotonic()
        await finish(tier, seconds)
        took.append(time.monotonic() - began)
        if len(took) == 1:
            release()

    monkeypatch.setattr(FlashTier, "finish", timed)
    node = start(stop_timeout=1)
    filler = Filler(connect(node))
    release = hold(store_of(node), lib.MKV_IO_WRITE)
    assert filler.put(range(8)) == [STORED] * 8
    filler.peer.close()
    with caplog.at_level("INFO", "memkv.flash"):
        node.stop()
    assert 0.2 < took[0] < 5
    assert "0 MiB are to be written, for at most 1 s" in caplog.text or "1 MiB are to be" in caplog.text
    assert "MiB written" in caplog.text
    assert "8 blocks (0 MiB) could not be written within" in caplog.text
    assert "of namespaces test: 8" in caplog.text
    assert "the next start scans" in caplog.text
    assert not node.node.stopped_clean
    peer = connect(start())
    info = peer.open()
    eventually(lambda: peer.ask(m.Stats).sections["flash"]["scan_left"] == 0)
    assert set(peer.on_keys(m.Lookup, info, keys_of(*range(8)))) <= {HIT, MISS}


def test_a_setting_that_does_not_fit_what_is_on_flash_is_an_error(start: Start, connect: Connect) -> None:
    node = start(slab_bytes=2 * MIB)
    connect(node).open("large", block_bytes=MIB)
    node.stop()
    with pytest.raises(Exception, match=r"namespace large is on flash, and .*slab_bytes"):
        start(slab_bytes=512 << 10)
    connect(start(slab_bytes=2 * MIB)).open("large", mode="open")


def test_no_device_at_all_is_an_error_and_one_of_two_is_not(
    start: Start, connect: Connect, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match="no flash device can be used"):
        start(flash=(str(tmp_path / "nowhere"),))
    node = start(flash=(f"{path}:32M", str(tmp_path / "nowhere")))
    good, why = node.node.health()
    assert good
    assert why.startswith("serving, degraded")
    assert "nowhere" in why
    assert Filler(connect(node)).put(range(4), durability="flash") == [STORED] * 4


def test_a_device_that_fails_shows_at_once(start: Start) -> None:
    node = start()
    store = store_of(node)
    assert node.call(node.node.health) == (True, "serving")
    lib.mkv_flash_device_fail(store.flash, store.devices[0].io)
    good, why = node.call(node.node.health)
    assert good
    assert why.startswith("serving, degraded: flash: ")
    assert why.endswith("I/O errors")


def test_a_device_cut_down_to_its_tables_shows_in_health(start: Start, connect: Connect, path: Path) -> None:
    node = start()
    assert Filler(connect(node)).put(range(4), durability="flash") == [STORED] * 4
    tables = store_of(node).devices[0].super.data_at
    node.stop()
    os.truncate(path, tables)
    node = start()
    good, why = node.node.health()
    assert good
    assert why.startswith("serving, degraded: flash: ")
    assert "it ends at" in why
    filler = Filler(connect(node))
    assert filler.put(range(4)) == [STORED] * 4
    assert filler.put(range(4, 5), durability="flash") == [ERROR_DEVICE]


def test_a_segment_of_a_size_class_that_nobody_knows_is_lost_and_counted(
    start: Start, connect: Connect
) -> None:
    node = start()
    filler = Filler(connect(node))
    assert filler.put(range(4), durability="flash") == [STORED] * 4
    store = store_of(node)
    taken = store.take_segment(filler.info.namespace, 12345)
    assert taken is not None
    filler.peer.close()
    node.stop()
    for turn in range(2):
        node = start()
        filler = Filler(connect(node))
        assert filler.lookup(range(4)) == [HIT] * 4
        assert filler.flash()["segments_lost"] == (turn == 0)
        assert node.node.health() == (True, "serving")
        filler.peer.close()
        node.stop()


# --- what it tells ----------------------------------------------------------------------------------------


def test_status_metrics_and_sections(start: Start, connect: Connect, path: Path) -> None:
    node = start(metrics=("127.0.0.1", 0), flash_threads=2)
    filler = Filler(connect(node))
    filler.put(range(100), durability="flash")
    sections = filler.peer.ask(m.Stats).sections
    assert sections["flash"]["engine"] == "threads"
    assert sections["flash"]["devices"] == 1
    assert sections[f"flash:{path}"]["live_bytes"] >= 100 * BLOCK
    assert sections["namespace:test"]["flash_blocks"] == 100
    assert node.metrics_address is not None
    url = f"http://127.0.0.1:{node.metrics_address[1]}"
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert f'memkv_flash_device_up{{path="{path}"}} 1.0' in text
    assert 'memkv_flash_info{engine="threads"' in text
    assert 'memkv_namespace_flash_blocks{namespace="test"} 100.0' in text
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:
        status = json.load(answer)
    assert status["flash_devices"][str(path)]["failed"] == ""


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('memory = "8M"\nflash = ["/a:1G", "/b"]\ndirty_bytes = "2M"\n')
    config = NodeConfig.load(file)
    assert [(str(p.path), p.size) for p in config.flash_paths] == [("/a", 1 << 30), ("/b", 0)]
    assert config.dirty_max == 2 * MIB
    assert NodeConfig(memory=8 * MIB).dirty_max == 4 * MIB
    assert NodeConfig.load(None, flash="/a:1M").flash == ("/a:1M",)

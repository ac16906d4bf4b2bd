"""What lies on a device was damaged while the node was away: it serves what is good, and nothing else.

The files are those of a real node, once killed and once stopped in order; each test damages a copy.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import memkv
from memkv.cli.node import main
from memkv.rdma.errors import MemKVError
from memkv.status import Status
from memkv.store import layout
from memkv.store.flash import format as f
from memkv.store.node import NodeThread

from ..nodes import BLOCK, KIB, Blocks, Connect, NodeProcess, StartNode, address_of, count, keys_of, until

pytest_plugins = "tests.nodes"
pytestmark = [pytest.mark.asan, pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)]

SIZE = "24M"
SMALL = 16 * KIB
SETTINGS: dict[str, Any] = {"memory": 8 << 20, "slab_bytes": 1 << 20, "grace_ms": 100}
LARGE_KEYS, SMALL_KEYS, GONE_KEYS = keys_of(30, seed=1), keys_of(30, seed=2), keys_of(10, seed=3)
FOREIGN_KEYS = keys_of(30, seed=4)

Key = bytes


@dataclass
class Image:
    """A device's file, taken apart."""

    path: Path

    def __post_init__(self) -> None:
        raw = self.path.read_bytes()
        found = [s for s in map(f.Superblock.parse, (raw[: f.PAGE], raw[f.PAGE : 2 * f.PAGE])) if s]
        self.super = max(found, key=lambda s: s.generation)
        self.segments = f.parse_segments(
            raw[self.super.segments_at : self.super.snapshot_at], self.super.secret
        )
        self.extents: dict[Key, tuple[int, int]] = {}  # offset, and length of the image
        for s in self.segments:
            start, stride = self.super.segment_offset(s.number), f.PAGE + s.payload
            for at in range(start, start + self.super.segment_bytes - stride + 1, stride):
                cold = np.frombuffer(raw[at : at + layout.COLD.itemsize], layout.COLD)[0]
                if cold["magic"] == layout.COLD_MAGIC and cold["slab_epoch"] == s.epoch:
                    self.extents[cold["key"].tobytes()] = at, f.PAGE + int(cold["length"])

    def read(self, at: int, n: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(n)

    def write(self, at: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def flip(self, at: int, bit: int = 3) -> None:
        self.write(at, bytes([self.read(at, 1)[0] ^ 1 << bit]))

    def image(self, key: Key) -> bytes:
        return self.read(*self.extents[key])


@dataclass
class Images:
    """``before``: before the deletes; ``killed``, ``stopped``: after them; ``foreign``: of another store."""

    before: Path
    killed: Path
    stopped: Path
    foreign: Path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("images")

    def fill(path: Path, large: Any, small: Any, before: Path | None) -> NodeProcess:
        node = NodeProcess("tcp", flash=f"{path}:{SIZE}", **SETTINGS).start()
        with memkv.connect(address_of(node), "test", fabric="tcp", secret=b"") as peer:
            for keys, length in ((large, BLOCK), (small, SMALL), (GONE_KEYS, BLOCK)):
                status = Blocks(peer, len(keys), length).put(keys, durability="flash")
                assert count(status) == {Status.STORED: len(keys)}
            if before:
                shutil.copy(path, before)
            assert count(peer.delete(GONE_KEYS)) == {Status.DONE: len(GONE_KEYS)}
        return node

    out = Images(*(folder / name for name in ("before", "killed", "stopped", "foreign")))
    fill(out.killed, LARGE_KEYS, SMALL_KEYS, out.before).kill()
    shutil.copy(out.killed, out.stopped)
    node = NodeProcess("tcp", flash=f"{out.stopped}", **SETTINGS).start()
    until(lambda: node.status()["flash"]["scan_left"] == 0)
    assert node.terminate() == 0
    fill(out.foreign, FOREIGN_KEYS, SMALL_KEYS, None).kill()
    return out


@dataclass
class After:
    """What became of the blocks, and what the node says."""

    lost: set[Key]
    flash: dict[str, Any]
    health: tuple[bool, str]


class Scene:
    """A damaged copy, and a node over it."""

    def __init__(self, image: Image, start_node: StartNode, connect: Connect) -> None:
        self.image, self._start, self._connect = image, start_node, connect

    def look(self) -> After:
        """Starts a node: every block is exact or lost, and what was deleted stays so."""
        node: NodeThread = self._start(flash=(str(self.image.path),), **SETTINGS)
        peer = self._connect(node)
        until(lambda: not node.node.flash.scanning if node.node.flash else False, what="the scan")
        lost: set[Key] = set()
        for keys, length in (
            (LARGE_KEYS, BLOCK),
            (SMALL_KEYS, SMALL),
            (FOREIGN_KEYS, BLOCK),
            (GONE_KEYS, BLOCK),
        ):
            status = Blocks(peer, len(keys), length).get(keys)
            assert set(status.tolist()) <= {Status.HIT, Status.MISS, Status.CORRUPT}, count(status)
            lost |= {key.tobytes() for key, s in zip(keys, status, strict=True) if s != Status.HIT}
        strangers = {k.tobytes() for k in (*GONE_KEYS, *FOREIGN_KEYS)}
        assert strangers <= lost, "what is not of this store, or was deleted, is served"
        blocks = Blocks(peer, 10)
        assert count(blocks.put(keys_of(10, seed=9), durability="flash")) == {Status.STORED: 10}
        assert count(blocks.get(keys_of(10, seed=9))) == {Status.HIT: 10}
        health = node.call(node.node.health)
        after = After(lost - strangers, node.call(node.node.status)["flash"], health)
        node.stop()
        return after

    def scrub(self) -> tuple[int, dict[str, Any]]:
        """Exit status and report of ``memkv-node scrub``."""
        result = CliRunner().invoke(main, ["scrub", "--json", str(self.image.path)], standalone_mode=False)
        assert result.exception is None, result.exception
        report: dict[str, Any] = json.loads(result.stdout)
        return int(result.return_value or 0), report


@pytest.fixture(params=["killed", "stopped"])
def scene(request: Any, images: Images, tmp_path: Path, start_node: StartNode, connect: Connect) -> Scene:
    path = tmp_path / "flash"
    shutil.copy(getattr(images, request.param), path)
    scene = Scene(Image(path), start_node, connect)
    scene.image.path = path
    return scene


def was_killed(scene: Scene) -> bool:
    return not scene.image.super.clean


def test_without_damage_everything_is_there(scene: Scene) -> None:
    assert scene.scrub()[0] == 0
    after = scene.look()
    assert not after.lost
    assert after.health == (True, "serving")
    assert not any(n for name, n in after.flash.items() if name.startswith("dropped_"))


# --- extents ----------------------------------------------------------------------------------------------


def place_in(name: str) -> Callable[[int], int]:
    """Where in an image of so many bytes."""
    return {
        "payload": lambda n: f.PAGE + (n - f.PAGE) // 3,
        "its last byte": lambda n: n - 1,
        "its first byte": lambda n: f.PAGE,
    }[name]


@pytest.mark.parametrize("place", ["payload", "its last byte", "its first byte"])
def test_a_bit_of_a_payload(scene: Scene, place: str) -> None:
    victims = {LARGE_KEYS[3].tobytes(), SMALL_KEYS[5].tobytes()}
    for key in victims:
        at, n = scene.image.extents[key]
        scene.image.flip(at + place_in(place)(n), zlib.crc32(key) % 8)
    copy = scene.image.path.with_name("copy")
    shutil.copy(scene.image.path, copy)
    after = scene.look()
    assert after.lost == victims
    shutil.copy(copy, scene.image.path)
    code, report = scene.scrub()
    assert (code, report["bad"], report["ok"]) == (1, 2, False)
    code, report = scene.scrub()
    assert (code, report["bad"]) == (0, 0)  # they are gone
    assert scene.look().lost == victims


@pytest.mark.parametrize("field", ["magic", "key", "sequence", "checksum", "slab_epoch", "offset", "check"])
def test_a_bit_of_a_header(scene: Scene, field: str) -> None:
    victim = LARGE_KEYS[7].tobytes()
    offset = layout.COLD.fields[field][1] if layout.COLD.fields else 0
    scene.image.flip(scene.image.extents[victim][0] + offset)
    after = scene.look()
    if was_killed(scene):
        assert after.lost == {victim}
        assert after.flash["dropped_torn"] == 1
    else:  # the snapshot has it all
        assert not after.lost


@pytest.mark.parametrize("content", ["zeros", "what was there before"])
@pytest.mark.parametrize("part", ["beginning", "middle", "end"])
def test_a_torn_write(scene: Scene, images: Images, content: str, part: str) -> None:
    victim = LARGE_KEYS[11].tobytes()
    at, n = scene.image.extents[victim]
    sectors = {"beginning": (0, 9), "middle": (50, 60), "end": (n // 512 - 3, n // 512)}[part]
    begin, end = (sector * 512 for sector in sectors)
    old = Image(images.foreign).image(FOREIGN_KEYS[2].tobytes())
    scene.image.write(at + begin, bytes(end - begin) if content == "zeros" else old[begin:end])
    after = scene.look()
    assert after.lost == {victim}
    if part != "beginning" or not was_killed(scene):  # else there is no header, or a foreign one
        assert after.flash["dropped_corrupt"] == 1


def test_an_image_at_the_place_of_another(scene: Scene) -> None:
    """A misdirected write."""
    one, other = LARGE_KEYS[1].tobytes(), LARGE_KEYS[2].tobytes()
    scene.image.write(scene.image.extents[other][0], scene.image.image(one))
    after = scene.look()
    assert after.lost == {other}
    assert after.flash["dropped_misplaced" if was_killed(scene) else "dropped_corrupt"] == 1


def test_an_old_copy_of_a_deleted_block_at_a_free_place(scene: Scene, images: Images) -> None:
    before = Image(images.before)
    taken = {at for at, _ in scene.image.extents.values()}
    segment = next(s for s in scene.image.segments if s.payload == BLOCK)
    start, stride = scene.image.super.segment_offset(segment.number), f.PAGE + BLOCK
    mine = {before.extents[key.tobytes()][0] for key in GONE_KEYS}
    free = [at for at in range(start, start + 50 * stride, stride) if at not in taken | mine]
    for key, at in zip(GONE_KEYS, free, strict=False):
        scene.image.write(at, before.image(key.tobytes()))
    after = scene.look()
    assert not after.lost
    if was_killed(scene):  # foreign: from a segment with another epoch
        assert after.flash["dropped_misplaced"] + after.flash["dropped_foreign"] == len(GONE_KEYS)


def test_images_of_another_store(scene: Scene, images: Images) -> None:
    """At the very places where they were over there, and over blocks of this one."""
    foreign = Image(images.foreign)
    mine = {at: key for key, (at, _) in scene.image.extents.items()}
    victims = set()
    for key in FOREIGN_KEYS:
        at = foreign.extents[key.tobytes()][0]
        scene.image.write(at, foreign.image(key.tobytes()))
        victims |= {mine[at]} if at in mine else set()
    after = scene.look()
    assert victims
    assert after.lost == victims
    if was_killed(scene):
        assert after.flash["dropped_foreign"] == len(FOREIGN_KEYS)
        assert after.flash["dropped_torn"] == 0


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("content", ["zeros", "a bit"])
def test_one_superblock(scene: Scene, copy: int, content: str) -> None:
    at = copy * f.PAGE
    if content == "zeros":
        scene.image.write(at, bytes(f.PAGE))
    else:
        scene.image.flip(at + 50)
    assert not scene.look().lost


def test_both_superblocks(scene: Scene, start_node: StartNode, tmp_path: Path) -> None:
    for copy in (0, 1):
        scene.image.flip(copy * f.PAGE + 90)
    damaged = scene.image.path.read_bytes()
    with pytest.raises(MemKVError, match="superblock"):
        start_node(flash=(str(scene.image.path),), **SETTINGS)
    assert scene.image.path.read_bytes() == damaged  # perhaps somebody can still help
    node = start_node(flash=(str(scene.image.path), f"{tmp_path / 'other'}:{SIZE}"), **SETTINGS)
    ok, reason = node.call(node.node.health)
    assert ok
    assert "superblock" in reason


@pytest.mark.parametrize("copies", [(0,), (1,), (0, 1)])
def test_namespace_tables(scene: Scene, copies: tuple[int, ...]) -> None:
    """With both gone nobody knows whose the blocks are: the namespace begins empty."""
    for copy in copies:
        scene.image.flip(scene.image.super.names_at + copy * f.NAMES_BYTES + 600)
    after = scene.look()
    everything = {k.tobytes() for k in (*LARGE_KEYS, *SMALL_KEYS)}
    assert after.lost in (set(), everything)
    assert (after.lost == everything) >= (len(copies) == 2)


def test_a_record_of_the_segment_table(scene: Scene) -> None:
    """Its segment is free, and the blocks in it are gone; the others are not."""
    segment = next(s for s in scene.image.segments if s.payload == SMALL)
    scene.image.flip(scene.image.super.segments_at + segment.number * f.SEGMENT.itemsize + 9)
    assert scene.look().lost == {k.tobytes() for k in SMALL_KEYS}


@pytest.mark.parametrize("payload", [4 * KIB, SMALL])
def test_a_segment_that_belongs_to_another_size_class_now(scene: Scene, payload: int) -> None:
    """Its first image is where the new ones begin, and in the payloads there may be headers that somebody
    has planted: true ones, of another assignment.
    """
    segment = next(s for s in scene.image.segments if s.payload == BLOCK)
    start, image, stride = scene.image.super.segment_offset(segment.number), scene.image, f.PAGE + payload
    planted = image.image(LARGE_KEYS[4].tobytes())[: f.PAGE]
    for at in range(start + stride, start + image.super.segment_bytes, 2 * stride):
        image.write(at, planted)
    other = f.Segment(segment.number, segment.namespace, payload, segment.epoch + 100)
    image.write(
        image.super.segments_at + segment.number * f.SEGMENT.itemsize,
        f.pack_segment(other, image.super.secret),
    )
    after = scene.look()
    assert after.lost == {k.tobytes() for k in LARGE_KEYS}
    if was_killed(scene):
        assert after.flash["dropped_foreign"] > 10


@pytest.mark.parametrize("where", ["head", "records"])
def test_the_snapshot(scene: Scene, where: str) -> None:
    scene.image.flip(scene.image.super.snapshot_at + (20 if where == "head" else f.PAGE + 1000))
    after = scene.look()
    assert not after.lost
    assert after.flash["scanned"] >= 60  # it had to


@pytest.mark.parametrize("kept", ["half", "the tables", "a page"])
def test_a_file_that_was_truncated(scene: Scene, start_node: StartNode, connect: Connect, kept: str) -> None:
    segment = max(scene.image.segments, key=lambda s: s.number)
    end = {
        "half": scene.image.super.segment_offset(segment.number) + (1 << 20),
        "the tables": scene.image.super.snapshot_at + scene.image.super.snapshot_bytes,
        "a page": f.PAGE,
    }[kept]
    with scene.image.path.open("r+b") as file:
        file.truncate(end)
    if kept == "half":
        after = scene.look()
        beyond = {k for k, (at, _) in scene.image.extents.items() if at >= end - (1 << 20)}
        assert beyond
        assert after.lost <= beyond
        return
    if kept == "a page":
        with pytest.raises(MemKVError):
            start_node(flash=(str(scene.image.path),), **SETTINGS)
        return
    node = start_node(flash=(str(scene.image.path),), **SETTINGS)  # as one that has no room on flash
    assert set(Blocks(connect(node), 30).get(LARGE_KEYS).tolist()) == {Status.MISS}


def test_a_device_that_is_an_older_copy_of_itself(
    images: Images, tmp_path: Path, start_node: StartNode, connect: Connect
) -> None:
    """Of two devices one is replaced by a copy from before the deletes."""
    paths = [tmp_path / "a", tmp_path / "b"]
    flash = tuple(f"{path}:{SIZE}" for path in paths)
    keys = keys_of(60, seed=5)
    with_node = start_node(flash=flash, **SETTINGS)
    blocks = Blocks(connect(with_node), 60)
    assert count(blocks.put(keys, durability="flash")) == {Status.STORED: 60}
    with_node.stop()
    shutil.copy(paths[1], tmp_path / "old")
    node = start_node(flash=flash, **SETTINGS)
    assert count(connect(node).delete(keys[:40])) == {Status.DONE: 40}
    node.stop()
    shutil.copy(tmp_path / "old", paths[1])
    node = start_node(flash=flash, **SETTINGS)
    status = Blocks(connect(node), 60).get(keys)
    assert not (status[:40] == Status.HIT).any()
    assert (status[40:] == Status.HIT).any()  # the other device's

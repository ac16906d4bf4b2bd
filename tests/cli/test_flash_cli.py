"""memkv-node format and scrub: what they refuse, what they make, what they find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memkv.cli.node import main
from memkv.store import messages as m
from memkv.store.config import NodeConfig
from memkv.store.flash import device
from memkv.store.flash.device import Device
from memkv.store.native._store import lib
from memkv.store.node import NodeThread

from ..store.raw import RawPeer, keys_of
from ..store.test_flash_node import Filler

MIB = 1 << 20
BLOCKS = 40

pytestmark = pytest.mark.asan


def invoke(*args: str) -> Result:
    return CliRunner(env={"MEMKV_SECRET": ""}).invoke(main, args, prog_name="memkv-node")


def node(path: Path) -> NodeThread:
    return NodeThread(
        NodeConfig(
            listen=("127.0.0.1", 0),
            fabric="tcp",
            memory=8 * MIB,
            slab_bytes=2 * MIB,
            block_bytes=64 << 10,
            grace_ms=100,
            secret=b"",
            huge=False,
            flash=(str(path),),
        )
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flash"


@pytest.fixture
def filled(path: Path) -> Path:
    """A store of 40 blocks whose node is stopped."""
    assert invoke("format", f"{path}:32M").exit_code == 0
    with node(path) as running:
        peer = RawPeer(running.address)
        assert Filler(peer).put(range(BLOCKS), durability="flash") == [lib.MKV_STORED] * BLOCKS
        peer.close()
    return path


def spoil(path: Path, number: int) -> None:
    """Changes one byte of the payload of a block."""
    whole = path.read_bytes()
    at = whole.index(Filler.content(number)[:64].tobytes())
    with path.open("r+b") as file:
        file.seek(at + 1000)
        file.write(bytes([whole[at + 1000] ^ 1]))


# --- format -----------------------------------------------------------------------------------------------


def test_format_makes_files_and_says_what_it_made(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    done = invoke("format", f"{a}:32M", f"{b}:24M", "--segment-bytes", "1M")
    assert done.exit_code == 0, done.output
    assert "flash store" in done.output
    assert a.stat().st_size == 32 * MIB
    for path in (a, b):
        device = Device(path)
        block = device.superblock()
        device.close()
        assert block is not None
        assert (block.count, block.segment_bytes) == (2, MIB)


def test_format_refuses_what_it_does_not_know(path: Path) -> None:
    path.write_bytes(b"a diary".ljust(32 * MIB, b"\0"))
    done = invoke("format", str(path))
    assert done.exit_code == 2
    assert "something that memkv does not know" in done.output
    assert "--force" in done.output
    assert path.read_bytes().startswith(b"a diary")
    assert invoke("format", str(path), "--force").exit_code == 0
    assert invoke("format", str(path)).exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "what"),
    [
        (["{path}"], 1, "PATH:SIZE makes a file"),
        (["{path}:1M"], 1, "no two segments"),
        (["{path}:32M", "{path}:32M"], 2, "named twice"),
        (["{path}:32Q"], 2, "not a size"),
        (["{path}:32M", "--segment-bytes", "1000"], 1, "segments of 1000 bytes"),
        (["/dev/null"], 2, "neither a file nor a block device"),
    ],
)
def test_format_errors_are_one_line_with_a_knob(args: list[str], code: int, what: str, path: Path) -> None:
    done = invoke("format", *(a.format(path=path) for a in args))
    assert done.exit_code == code
    assert what in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not path.exists()


# --- scrub ------------------------------------------------------------------------------------------------


def test_scrub_finds_every_block_good(filled: Path) -> None:
    done = invoke("scrub", str(filled), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["ok"]
    assert report["namespaces"]["test"] == {
        "blocks": BLOCKS,
        "bytes": BLOCKS * 65536,
        "checked": BLOCKS,
        "bad": 0,
    }
    with node(filled) as running:
        peer = RawPeer(running.address)
        found = peer.on_keys(m.Lookup, peer.open(), keys_of(*range(BLOCKS)))
        assert found == [lib.MKV_HIT] * BLOCKS
        assert peer.ask(m.Stats).sections["flash"]["scanned"] == 0, "a scrub leaves a snapshot"
        peer.close()


def test_scrub_drops_bad_blocks_and_says_so(filled: Path, tmp_path: Path) -> None:
    spoil(filled, 7)
    config = tmp_path / "node.toml"
    config.write_text(f'flash = ["{filled}"]\n')
    done = invoke("scrub", "--config", str(config))
    assert done.exit_code == 1
    assert "1 blocks were bad and are gone" in done.output
    again = invoke("scrub", str(filled))
    assert again.exit_code == 0
    assert "every block is good" in again.output
    with node(filled) as running:
        peer = RawPeer(running.address)
        found = peer.on_keys(m.Lookup, peer.open(), keys_of(*range(BLOCKS)))
        assert [n for n, status in enumerate(found) if status != lib.MKV_HIT] == [7]
        peer.close()


def test_scrub_wants_the_whole_store_and_a_stopped_node(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "LOCK_SECONDS", 0.1)
    with node(filled):
        done = invoke("scrub", str(filled))
        assert done.exit_code == 1
        assert "in use by another node" in done.output
    a, b = tmp_path / "a", tmp_path / "b"
    assert invoke("format", f"{a}:32M", f"{b}:32M").exit_code == 0
    before = a.read_bytes()
    done = invoke("scrub", str(a))
    assert done.exit_code == 2
    assert "not all 2" in done.output
    assert a.read_bytes() == before
    assert invoke("scrub", str(a), str(filled)).exit_code == 2
    assert invoke("scrub", str(b), str(a)).exit_code == 0


def test_scrub_of_what_is_no_store(path: Path) -> None:
    path.write_bytes(bytes(32 * MIB))
    done = invoke("scrub", str(path))
    assert done.exit_code == 2
    assert "not a device of a memkv store" in done.output
    assert not any(path.read_bytes())
    assert "no devices" in invoke("scrub").output


def test_serve_takes_flash_from_flags() -> None:
    done = invoke("serve", "--print-config", "--flash", "/a:1G", "--flash", "/b", "--dirty-bytes", "64M")
    assert done.exit_code == 0
    assert 'flash = ["/a:1G", "/b"]' in done.output
    assert 'dirty_bytes = "64M"' in done.output
    assert invoke("serve", "--print-config", "--flash", "/a", "--flash", "/a").exit_code == 2

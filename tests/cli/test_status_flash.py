"""What ``memkv-node status`` and the banner say of flash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memkv.cli.status import device_state, flash_summary, show
from memkv.store.native._store import lib

from ..store.raw import RawPeer
from ..store.test_flash_node import SETTINGS, Filler
from .nodes import Running, memkv_node, running

MIB = 1 << 20


def printed(status: dict[str, Any]) -> str:
    console = Console(record=True, width=500, file=open(os.devnull, "w"))  # noqa: SIM115
    show(status, console)
    return console.export_text()


def status_of(node: Running) -> dict[str, Any]:
    done = memkv_node("status", "--json", "--metrics-url", node.metrics)
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def put(node: Running, numbers: range, durability: str = "flash") -> None:
    host, _, port = node.address.rpartition(":")
    with RawPeer((host, int(port))) as peer:
        assert set(Filler(peer).put(numbers, durability=durability)) == {lib.MKV_STORED}


def banner_of(log: str) -> dict[str, str]:
    lines = [
        line.removeprefix("memkv-node: ") for line in log.splitlines() if line.startswith("memkv-node: ")
    ]
    return {line[:8].strip(): line[9:] for line in lines}


def test_a_node_shows_its_flash_and_after_a_kill_its_scan(tmp_path: Path) -> None:
    path = tmp_path / "flash"
    args = [*SETTINGS, "--flash", f"{path}:32M", "--flash", str(tmp_path / "nowhere"), "--flash-threads", "2"]
    with running(*args) as node:
        put(node, range(200))
        status = status_of(node)
        text = printed(status)
        node.process.kill()
        banner = banner_of(node.process.communicate()[1])
    flash = status["flash"]
    assert (flash["engine"], flash["devices"], flash["devices_out"]) == ("threads", 2, 1)
    assert flash["live_blocks"] == 200
    assert flash["bytes"] == 28 * MIB
    assert 0 < flash["bytes_free"] < flash["bytes"]
    assert flash["dirty_max"] == 4 * MIB
    for words in (
        "2 devices, 28 MiB, 1 out of use, by threads: threads were demanded",
        "200 blocks, 12.5 MiB",
        "0 blocks, 0 B of 4 MiB that may be",
        "degraded",
        "OUT: ",
        str(path),
        "good",
        "snapshot",
        "on flash",
    ):
        assert words in text, text
    assert banner["flash"].startswith("2 devices, 28 MiB, 1 out of use, by threads: threads were demanded")
    assert banner["flash 0"].startswith(f"{path}: 29 MiB, 0 of 7 segments in use, by snapshot, good")
    assert "OUT: " in banner["flash 1"]

    with running(*args) as node:
        text = printed(status_of(node))
        _, err = node.stop()
    assert "200 blocks found again" in text
    assert "by scan" in banner_of(err)["flash 0"]


def test_a_node_without_flash_says_so() -> None:
    with running() as node:
        text = printed(status_of(node))
        _, err = node.stop()
    assert "none: --flash was not given" in text
    assert "flash devices" not in text
    assert banner_of(err)["flash"].startswith("off (--flash PATH[:SIZE])")


@pytest.mark.parametrize(
    ("flash", "rows"),
    [
        (
            {"scan_total": 400, "scanned": 100, "scan_left": 300, "recovered": 90},
            ["25 %: 100 of 400 headers"],
        ),
        ({"dropped_torn": 3, "dropped_foreign": 0}, ["3 torn"]),
        ({"lost_memory_acks": 2, "segments_lost": 1}, ["2 acknowledged as memory, 1 whole segments"]),
        ({"evicted_blocks": 5, "evicted_bytes": 5 * MIB}, ["evicted 5 blocks, 5 MiB"]),
        ({"staged_blocks": 7, "staged_bytes": MIB, "stages": 2}, ["7 blocks, 1 MiB; 2 requests"]),
        ({"degraded": "/dev/x: I/O errors"}, ["/dev/x: I/O errors"]),
    ],
)
def test_rows_of_the_table(flash: dict[str, Any], rows: list[str]) -> None:
    base = {"devices": 1, "engine": "io_uring", "reason": "it can be had"}
    text = printed({"incarnation": "1", "flash": base | flash, "flash_devices": {}})
    for row in rows:
        assert row in text, text


def test_what_another_version_does_not_say_is_left_out() -> None:
    assert "flash" not in printed({"incarnation": "1"})
    assert flash_summary({"devices": 1}).startswith("1 device, 0 B, by ?")
    text = printed({"incarnation": "1", "flash_devices": {"/dev/x": {"failed": "gone"}}})
    assert "OUT: gone" in text


def test_the_state_of_a_device() -> None:
    assert device_state({"failed": ""}) == "good"
    assert device_state({"failed": "", "direct": False, "reason": "no O_DIRECT"}) == "good; no O_DIRECT"
    assert device_state({"failed": "", "shortened": "it ends at 5"}) == "SHORTER: it ends at 5"

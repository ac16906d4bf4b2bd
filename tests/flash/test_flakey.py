"""A block device that drops all writes from a moment on, as a power cut does: device-mapper's flakey target.

Only where there is a kernel of one's own and a device to spoil: ``script/softroce`` with an image of zeros as
``MEMKV_SOFTROCE_NVME``, or a loop device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ..nodes import Connect, NodeProcess, until
from .churn import DURABLE, NOTHING, Ledger, Rules, Worker

pytest_plugins = "tests.nodes"
pytestmark = [pytest.mark.verbs, pytest.mark.slow]  # two minutes in an emulated machine

NAME = "memkv-flakey"
BLOCKS = 60
NVME = Path("/dev/nvme0n1")
WAIT = 120.0


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def backing(folder: Path) -> tuple[Path, list[str]]:
    """A block device that may be spoilt, and the command that ends it."""
    if NVME.exists():
        with NVME.open("rb") as device:
            if not any(device.read(1 << 20)):
                return NVME, []
    file = folder / "backing"
    file.write_bytes(bytes(64 << 20))
    call("modprobe", "loop")
    loop = call("losetup", "--find", "--show", str(file))
    return Path(loop), ["losetup", "--detach", loop]


class Flakey:
    """The device; ``drop`` has it ignore writes, and say that they are done."""

    def __init__(self, below: Path) -> None:
        self.sectors = int(call("blockdev", "--getsz", str(below)))
        self.below = below
        self.path = Path("/dev/mapper", NAME)
        call("dmsetup", "create", NAME, "--table", self._table(drops=False))
        call("dmsetup", "mknodes", NAME)

    def _table(self, drops: bool) -> str:
        times = "0 86400 1 drop_writes" if drops else "86400 0"
        return f"0 {self.sectors} flakey {self.below} 0 {times}"

    def drop(self, drops: bool) -> None:
        call("dmsetup", "suspend", "--nolockfs", NAME)
        call("dmsetup", "reload", NAME, "--table", self._table(drops))
        call("dmsetup", "resume", NAME)

    def remove(self) -> None:
        call("dmsetup", "remove", "--retry", NAME)


@pytest.fixture
def flakey(tmp_path: Path) -> Iterator[Flakey]:
    if os.geteuid() or not all(map(shutil.which, ("dmsetup", "losetup", "modprobe"))):
        pytest.skip("needs root, dmsetup, losetup and modprobe")
    if subprocess.run(["modprobe", "dm_flakey"], capture_output=True).returncode:
        pytest.skip("this kernel has no dm-flakey: run it under script/softroce, on its micro-VM")
    try:
        below, end = backing(tmp_path)
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no block device to spoil: {exc.stderr}")
    device = Flakey(below)
    yield device
    device.remove()
    if end:
        call(*end)


@pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)
def test_what_was_durable_before_the_writes_were_dropped(
    flakey: Flakey, start_process: Callable[..., NodeProcess], connect: Connect
) -> None:
    rules = Rules(evicts=False)
    node = start_process(flash=str(flakey.path), memory=4 << 20, slab_bytes=1 << 20, grace_ms=500)
    ledger = Ledger(BLOCKS, rules)
    worker = Worker(connect(node, timeout=20.0), ledger, np.arange(BLOCKS), 5)
    checked = 0
    for _ in range(3):
        worker.go()
        time.sleep(4)
        worker.halt()
        # What is acknowledged from here on is a lie of the device's.
        promised = ledger.held.copy()
        possible, floor = [set(p) for p in ledger.possible], ledger.floor.copy()
        flakey.drop(True)
        rules.expect, rules.lies = False, True
        worker.go()
        time.sleep(3)
        node.kill()
        worker.halt()
        flakey.drop(False)
        ledger.held[:] = np.where(promised == DURABLE, DURABLE, NOTHING)
        ledger.floor[:] = floor
        for id, before in enumerate(possible):
            ledger.possible[id] |= before
        rules.lies = False
        node.start()
        until(lambda: node.status()["flash"]["scan_left"] == 0, WAIT)
        rules.expect = True
        worker.verify(WAIT)
        assert not worker.wrong, "\n".join(worker.wrong)
        checked += int((ledger.held == DURABLE).sum())
    worker.end()
    assert checked
    print(f"{checked} durable blocks after three losses")

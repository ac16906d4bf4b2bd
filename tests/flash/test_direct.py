"""A block moves between device and memory once, past the page cache: what the kernel counts is its bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from memkv.status import Status

from ..nodes import BLOCK, Connect, NodeProcess, keys_of, until
from ..store.flash import allows_direct
from .conftest import ARENA, IN_ARENA, get_all, put_all

pytest_plugins = "tests.nodes"

KEYS = keys_of(6 * IN_ARENA, seed=55)
PAGE = mmap.PAGESIZE


def io_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        out = (ctypes.c_ubyte * (-(-size // PAGE)))()
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), out):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(byte & 1 for byte in out) * PAGE


@pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)
def test_a_block_moves_once_and_past_the_page_cache(
    start_process: Callable[..., NodeProcess], connect: Connect, tmp_path: Path
) -> None:
    if not allows_direct(tmp_path):
        pytest.skip("this file system knows no O_DIRECT")
    path = tmp_path / "flash"
    node = start_process(flash=f"{path}:64M", **ARENA)
    try:
        io_of(node.pid)
    except OSError as exc:
        pytest.skip(f"/proc/PID/io: {exc.strerror}")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached(path)
    peer, payload = connect(node), len(KEYS) * BLOCK
    start = io_of(node.pid)
    put_all(peer, KEYS)
    until(lambda: node.status()["flash"]["dirty_blocks"] == 0, 30)
    wrote = io_of(node.pid)["write_bytes"] - start["write_bytes"]
    images = payload + len(KEYS) * PAGE
    assert images <= wrote <= 1.05 * images + (1 << 20)  # and tables, of new segments
    start, staged = io_of(node.pid), node.status()["flash"]["staged_bytes"]
    assert (get_all(peer, KEYS) == Status.HIT).all()
    read = io_of(node.pid)["read_bytes"] - start["read_bytes"]
    staged = node.status()["flash"]["staged_bytes"] - staged
    assert staged > payload // 2
    assert staged <= read <= 1.05 * staged + (1 << 20)
    assert cached(path) <= before + (1 << 20)
    # that the measure would notice: a read that goes through the cache
    with path.open("rb") as file:
        file.read(8 << 20)
    assert cached(path) >= before + (4 << 20)

"""What the flash engine's tests share: an engine with memory of its own, and files that allow O_DIRECT."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv.store.native._store import ffi, lib

READ, WRITE, FLUSH, DISCARD = lib.MKV_IO_READ, lib.MKV_IO_WRITE, lib.MKV_IO_FLUSH, lib.MKV_IO_DISCARD
SECTOR = 512
MIB = 1 << 20


class Engine:
    """mkv_flashio with `memory` bytes to read into and write from."""

    def __init__(self, rung: str = "io_uring", depth: int = 32, memory: int = 4 * MIB, register: bool = True):
        self.f = lib.mkv_flashio_new(depth, 8 if rung == "threads" else 0)
        if self.f == ffi.NULL:
            raise OSError(ffi.errno, "mkv_flashio_new")
        self.map = mmap.mmap(-1, memory)
        self.memory = np.frombuffer(self.map, np.uint8)
        self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        self.registered = lib.mkv_flashio_memory(self.f, self.address, memory) if register else None

    @property
    def rung(self) -> str:
        return ffi.string(lib.mkv_flashio_rung(self.f)).decode()

    @property
    def reason(self) -> str:
        return ffi.string(lib.mkv_flashio_reason(self.f)).decode()

    def open(self, path: Path | str, flags: int = os.O_RDWR) -> int:
        """The index of a device; the engine closes it."""
        device: int = lib.mkv_flashio_device(self.f, os.open(path, flags | os.O_CLOEXEC))
        assert device >= 0, os.strerror(-device)
        return device

    def ios(self, requests: Iterable[tuple[int, int, int, int, int]]) -> Any:
        """(op, device, offset, where in memory, length) each."""
        requests = list(requests)
        ios = ffi.new("struct mkv_io[]", len(requests))
        for io, (op, device, offset, at, length) in zip(ios, requests, strict=True):
            io.op, io.device, io.offset, io.address, io.length = op, device, offset, self.address + at, length
        return ios

    def run_many(self, requests: Iterable[tuple[int, int, int, int, int]]) -> Any:
        """The requests, all over."""
        ios = self.ios(requests)
        lib.mkv_flashio_run_many(self.f, ios, len(ios))
        return ios

    def run(self, op: int, device: int = 0, offset: int = 0, at: int = 0, length: int = SECTOR) -> int:
        """One request's result."""
        ios = self.run_many([(op, device, offset, at, length)])  # an element does not keep its array
        result: int = ios[0].result
        return result

    def write(self, data: bytes, offset: int, device: int = 0) -> int:
        self.memory[: len(data)] = np.frombuffer(data, np.uint8)
        return self.run(WRITE, device, offset, 0, len(data))

    def read(self, length: int, offset: int, device: int = 0) -> bytes:
        assert self.run(READ, device, offset, 0, length) == 0
        return self.memory[:length].tobytes()

    def fault(self, kind: int, **fields: int) -> int:
        fault = ffi.new("struct mkv_fault *", {"kind": kind, "device": 0, **fields})
        result: int = lib.mkv_flashio_fault(self.f, fault)
        return result

    def stats(self) -> Any:
        out = ffi.new("struct mkv_flashio_stats *")
        lib.mkv_flashio_stats(self.f, out)
        return out

    def close(self) -> None:
        f, self.f = self.f, ffi.NULL
        lib.mkv_flashio_free(f)


def allows_direct(folder: Path) -> bool:
    """Whether files in there can be opened with O_DIRECT (tmpfs knows none before Linux 6.6)."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def make_file(folder: Path, size: int, name: str = "device") -> Path:
    """A file written through, as devices are at format."""
    path = folder / name
    with path.open("wb") as out:
        out.write(bytes(size))
        out.flush()
        os.fsync(out.fileno())
    return path


def engine_or_skip(rung: str, **settings: Any) -> Engine:
    """An engine on that rung; skips where this machine has only the lower one."""
    engine = Engine(rung, **settings)
    if engine.rung != rung:
        reason = engine.reason
        engine.close()
        pytest.skip(f"no {rung}: {reason}")
    return engine

"""Builds standin.c and puts it in libcuda's place. See there for what it proves, and what not."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from memkv.gpudirect import driver

SOURCE = Path(__file__).with_name("standin.c")


@functools.cache
def build(old: bool = False) -> str:
    """The library's path; built once a session."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc to make a stand-in for libcuda")
    folder = Path(tempfile.mkdtemp(prefix="memkv-standin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    out = folder / ("libold.so" if old else "libstandin.so")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([gcc, *flags, *(["-DOLD"] if old else []), "-o", out, SOURCE], check=True)
    return str(out)


class Standin:
    """What the test sees of it. ``driver`` is memkv's own, over this library."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        self.lib.standin_log.restype = ctypes.c_char_p
        self.lib.standin_set.argtypes = [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_uint64]
        self.lib.standin_reset()
        self.path = path
        self.driver = driver.load(path)

    def alloc(self, nbytes: int, device: int = 0) -> int:
        with self.driver.on(device):
            return self.driver.mem_alloc(nbytes)

    def free(self, pointer: int) -> None:
        with self.driver.on(0):
            self.driver.mem_free(pointer)

    def set(self, pointer: int, what: str, value: int) -> None:
        self.lib.standin_set(pointer, what.encode(), value)

    def fail(self, name: str, rc: int) -> None:
        self.lib.standin_fail(name.encode(), rc)

    def attribute(self, which: int, value: int) -> None:
        self.lib.standin_attribute(which, value)

    def hold(self, on: bool) -> None:
        """Whether events and streams are not reached yet."""
        self.lib.standin_hold(int(on))

    def log(self) -> list[str]:
        """What was called since this was last asked."""
        said: str = self.lib.standin_log().decode()
        self.lib.standin_clear()
        return said.splitlines()

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return int(self.lib.standin_depth())

    def close(self) -> None:
        """Gives all of its memory back, whoever asked for it."""
        self.lib.standin_reset()

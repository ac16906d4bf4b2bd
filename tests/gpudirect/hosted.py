"""The kernels on the host: the source that a GPU gets, compiled as C++ behind simt.h."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import kernels

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-fPIC",
    "-shared",
    "-Wno-unused-function",
    "-Wno-maybe-uninitialized",
)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler to run the kernels on the host (apt install g++)"
)


@cache
def library(name: str) -> ctypes.CDLL:
    """The kernels of ``name``.cu as a shared library with an entry run_… for each."""
    folder = Path(mkdtemp(prefix="memkv-simt-"))
    try:
        text = [
            f'#include "{HERE / "simt.h"}"',
            kernels.source(name),
            f'#include "{HERE / f"entries_{name}.h"}"',
        ]
        source = folder / f"{name}.cpp"
        source.write_text("\n".join(text), encoding="utf-8")
        done = subprocess.run(
            ["g++", *FLAGS, "-o", folder / "k.so", source], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(folder / "k.so"))
    finally:
        shutil.rmtree(folder)


def run(name: str, entry: str, *args: Any) -> None:
    """Runs a kernel to its end. Arrays go as pointers, Python ints as 32 bits, numpy scalars as they are.

    AssertionError: it did what is undefined on a GPU.
    """
    function = getattr(library(name), f"run_{entry}")
    function.restype = ctypes.c_char_p
    wrong = function(*(_argument(a) for a in args))
    assert wrong is None, wrong.decode()


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, np.uint64):
        return ctypes.c_uint64(int(value))
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_uint32(int(value))


class Fenced:
    """Memory between two pages that nobody may touch; ``at_end``: the last byte is the last before the fence.

    What a kernel reads or writes beyond its block ends the process there.
    """

    def __init__(self, nbytes: int, *, at_end: bool = True, offset: int = 0) -> None:
        page = 4096
        body = max(1, -(-(nbytes + offset) // page)) * page
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._unmap, self._length = libc.munmap, body + 2 * page
        self._base = libc.mmap(None, self._length, 0, 0x22, -1, 0)  # PROT_NONE, private and anonymous
        assert self._base not in (None, ctypes.c_void_p(-1).value)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.mprotect(self._base + page, body, 3) == 0
        start = self._base + page + (body - nbytes if at_end else offset)
        kind = ctypes.c_uint8 * max(nbytes, 1)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(kind.from_address(start), np.uint8)[:nbytes]
        self.address = start

    def close(self) -> None:
        self._unmap(self._base, self._length)

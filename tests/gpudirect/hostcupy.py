"""As much of CuPy as memkv's kernels and their benchmark use, over host memory: its kernels run on the host.

It proves what is handed to a kernel and what is made of its results, and nothing about CuPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import kernels

from .hosted import run


class Pointer:
    """A MemoryPointer."""

    def __init__(self, memory: Any, offset: int) -> None:
        self.memory, self.ptr = memory, memory.ptr + offset

    def copy_from_device_async(self, source: Pointer, nbytes: int, stream: object) -> None:
        from ctypes import memmove

        memmove(self.ptr, source.ptr, nbytes)


class Array(np.ndarray):  # type: ignore[type-arg]
    """What CuPy's arrays show of themselves."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return Pointer(SimpleNamespace(ptr=self.ctypes.data), 0)

    def get(self) -> npt.NDArray[Any]:
        return np.array(self)

    def set(self, data: Any) -> None:
        self[...] = data


def empty(shape: Any, dtype: Any = np.float64) -> Array:
    """At a multiple of 512 bytes, as CUDA allocates; what was there before is there."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.full(size + 1024, 0xEE, np.uint8)
    at = -raw.ctypes.data % 512
    return raw[at : at + size].view(dtype).reshape(shape).view(Array)


def made(data: Any, dtype: Any = None) -> Array:
    """A copy of ``data`` there."""
    given = np.asarray(data, dtype)
    out = empty(given.shape, given.dtype)
    out[...] = given
    return out


class Stream:
    ptr = 77

    def __init__(self, non_blocking: bool = False) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass


def namespace() -> SimpleNamespace:
    """The module."""
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0, runtimeGetVersion=lambda: 12040),
        Device=lambda index=0: nullcontext(),
        Stream=Stream,
        ExternalStream=nullcontext,
        Event=Event,
        get_elapsed_time=lambda start, end: (end.at - start.at) * 1e3,
    )
    types = {name: getattr(np, name) for name in ("uint8", "uint32", "uint64", "int32", "ndarray")}
    return SimpleNamespace(
        **types | {"ndarray": Array},
        cuda=cuda,
        asarray=made,
        ascontiguousarray=made,
        empty=empty,
        zeros=lambda shape, dtype: made(np.zeros(shape, dtype)),
        arange=lambda n, dtype: made(np.arange(n, dtype=dtype)),
    )


def install(patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Puts it in CuPy's place; the kernels that are launched from now on, with their blocks of threads."""
    launched: list[tuple[str, int]] = []

    def function(name: str, kernel: str) -> Callable[..., None]:
        def launch(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            launched.append((kernel, grid[0]))
            threads = (np.uint32(block[0]),) if name == "pages" else ()
            run(name, kernel.removeprefix("mkv_"), grid[0], *threads, *args)

        return launch

    module = namespace()
    patch.setattr(kernels, "cupy", lambda: module)
    patch.setattr(kernels, "function", function)
    patch.setattr(kernels, "multiprocessors", lambda device: 2)
    return launched

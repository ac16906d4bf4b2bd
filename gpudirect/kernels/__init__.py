"""Device code: where its source comes from, and compiling it for the GPU at hand.

The ``.cu`` files need no header and no CUDA toolkit: CuPy hands them to NVRTC, which is part of it, and keeps
what comes out. The tests compile the same text as C++ for the host (``tests/gpudirect/``), with a few lines
that stand in for the GPU, and so hold every address and every hash against numpy and xxhash without one.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from ...rdma.errors import LocalError, MemKVError
from ...store.layout import CHUNK_BYTES
from ..copier import stream_handle

NAMES = ("checksum", "pages")
OPTIONS = ("--std=c++14",)  # of the compiler

# What XXH3 mixes in: 192 bytes that its specification gives (xxHash, doc/xxhash_spec.md, "defaultSecret").
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
LAST_AT, MERGE_AT = len(SECRET) - 64 - 7, 11  # where it is read for the last stripe, and for merging


def words(at: int, count: int) -> tuple[int, ...]:
    """``count`` words of the secret from byte ``at`` on; beyond its end it is zero."""
    text = SECRET[at : at + 8 * count].ljust(8 * count, b"\0")
    return tuple(int.from_bytes(text[i : i + 8], "little") for i in range(0, 8 * count, 8))


def source(name: str) -> str:
    """The text of a kernel's file, with the constants that it shares with the CPU's code above it."""
    text = (Path(__file__).parent / f"{name}.cu").read_text(encoding="utf-8")
    return _constants() + text if name == "checksum" else text


def _constants() -> str:
    tables = {"SECRET": words(0, 25), "LAST": words(LAST_AT, 8), "MERGE": words(MERGE_AT, 8)}
    lines = [f"#define CHUNK_BYTES {CHUNK_BYTES}u"]
    for name, values in tables.items():
        listed = ", ".join(f"{v:#018x}ull" for v in values)
        lines.append(f"__constant__ unsigned long long {name}[{len(values)}] = {{{listed}}};")
    return "\n".join(lines) + "\n\n"


def cupy() -> Any:
    """CuPy. :raises LocalError: it cannot be imported."""
    try:
        import cupy
    except ImportError as exc:
        raise LocalError(f"no CuPy here: {exc}", "pip install cupy-cuda12x, or cupy-cuda13x") from None
    return cupy


@cache
def _module(name: str, device: int) -> Any:
    module = cupy().RawModule(code=source(name), options=OPTIONS)
    try:
        module.compile()
    except Exception as exc:  # NVRTC is absent, too old for this GPU, or broken
        raise MemKVError(
            f"the kernels of {name}.cu could not be compiled: {exc}",
            "python -c 'import cupy; cupy.show_config()'",
        ) from None
    return module


def function(name: str, kernel: str) -> Any:
    """A kernel of the file ``name``, for the current device. Compiled once for each device.

    :raises LocalError: no CuPy. :raises MemKVError: the compiler refuses.
    """
    return _module(name, int(cupy().cuda.runtime.getDevice())).get_function(kernel)


@cache
def multiprocessors(device: int) -> int:
    """Of that device."""
    return int(cupy().cuda.Device(device).attributes["MultiProcessorCount"])


def on(stream: Any) -> Any:
    """A context manager that makes ``stream`` the current one.

    :param stream: None (the current one stays), a CuPy or torch stream, or a handle; see
        :func:`memkv.gpudirect.copier.stream_handle`.
    """
    if stream is None:
        return nullcontext()
    cuda, handle = cupy().cuda, stream_handle(stream)
    if hasattr(cuda.Stream, "from_external"):  # from CuPy 14 on, where the other is deprecated
        return cuda.Stream.from_external(_Handle(handle))
    return cuda.ExternalStream(handle)


class _Handle:
    """A stream for libraries: the ``__cuda_stream__`` protocol, version 0."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

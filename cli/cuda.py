"""GPUs as the CUDA driver shows them: a look through ctypes, without CuPy, contexts or GPU memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from . import host

GPU_DIRECT_RDMA = 116  # CU_DEVICE_ATTRIBUTE_…_SUPPORTED
DMA_BUF = 124


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device: what its driver says about registration."""

    index: int
    name: str
    dma_buf: bool
    gpu_direct: bool


@dataclass(frozen=True, slots=True)
class Cuda:
    """The driver: its version and devices, or why there are none."""

    version: str
    gpus: tuple[Gpu, ...]
    why: str


def probe(library: str = "libcuda.so.1") -> Cuda:
    """Loads the driver's library and counts its devices; never raises."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        seen = on_bus()
        why = f"{library} is not installed"
        return Cuda("", (), f"{why}, though {seen} NVIDIA GPUs are on the bus" if seen else why)
    number = ctypes.c_int()
    try:
        cuda.cuDriverGetVersion(ctypes.byref(number))
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        rc = cuda.cuInit(0)
        if rc:
            return Cuda(version, (), f"cuInit: {_error(cuda, rc)}")
        rc = cuda.cuDeviceGetCount(ctypes.byref(number))
        if rc or not number.value:
            return Cuda(version, (), _error(cuda, rc) if rc else "the driver sees no GPU")
        return Cuda(version, tuple(_gpu(cuda, i) for i in range(number.value)), "")
    except AttributeError as exc:  # something else of that name
        return Cuda("", (), f"{library} is no CUDA driver: {exc}")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, value = ctypes.c_int(), ctypes.c_int()
    text = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(text, len(text), device)

    def has(attribute: int) -> bool:
        value.value = 0
        return cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0 and value.value != 0

    return Gpu(index, text.value.decode(errors="replace"), has(DMA_BUF), has(GPU_DIRECT_RDMA))


def _error(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if cuda.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value:
        return f"{text.value.decode()} ({code})"
    return f"error {code}"


def on_bus(root: Path | None = None) -> int:
    """NVIDIA display devices and accelerators on PCI, whether or not a driver is there."""
    base = (root or host.ROOT) / "sys/bus/pci/devices"
    found = 0
    for device in base.iterdir() if base.is_dir() else ():
        kind = host.read("class", device)
        found += host.read("vendor", device) == "0x10de" and kind[:6] in ("0x0300", "0x0302")
    return found

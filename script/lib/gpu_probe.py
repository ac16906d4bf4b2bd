"""What script/gpu-check asks of a GPU machine: one JSON object of facts, for whoever reads the figures later.

Run by gpu_check.py with the memkv that was just built.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from memkv.cli import host
from memkv.cli.gpu_rig import pcie
from memkv.gpudirect import driver
from memkv.rdma import devices

NBYTES = 4 << 20


def tried(what: Callable[[], Any]) -> Any:
    """What it returns, or the error in words."""
    try:
        return what()
    except Exception as exc:  # an answer, too
        return f"{type(exc).__name__}: {exc}"


def version(module: str) -> Any:
    def ask() -> str:
        return str(import_module(module).__version__)

    return tried(ask)


def dma_buf(cuda: driver.Driver, index: int, pcie_mapping: bool) -> str:
    """Whether the driver hands out a dma-buf of a GPU's memory."""
    with cuda.on(index):
        memory = cuda.mem_alloc(NBYTES)
        try:
            fd = cuda.export_dma_buf(memory, NBYTES, pcie=pcie_mapping)
            os.close(fd)
            return "exported"
        finally:
            cuda.mem_free(memory)


def gpu(cuda: driver.Driver, index: int) -> dict[str, Any]:
    facts = cuda.facts(index)
    out = {name: getattr(facts, name) for name in facts.__dataclass_fields__}
    out["pcie"] = pcie(facts.bus)
    out["numa_node"] = host.read(f"sys/bus/pci/devices/{facts.bus}/numa_node")
    out["dma_buf_export"] = tried(lambda: dma_buf(cuda, index, False))
    out["dma_buf_export_pcie"] = tried(lambda: dma_buf(cuda, index, True))
    return out


def nvidia_smi() -> str:
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
    return done.stdout


def answers() -> dict[str, Any]:
    why = driver.available()
    cuda = None if why else driver.load()
    return {
        "kernel": os.uname().release,
        "nvidia_driver": host.read("sys/module/nvidia/version") or "not loaded",
        "nvidia_peermem": host.read("sys/module/nvidia_peermem/version") or "not loaded",
        "open_kernel_modules": "open" in host.read("proc/driver/nvidia/version").lower(),
        "cuda": why if cuda is None else f"{cuda.version // 1000}.{cuda.version % 1000 // 10}",
        "gpus": [] if cuda is None else [tried(lambda i=i: gpu(cuda, i)) for i in range(cuda.count)],
        "rdma_devices": list(devices.names()),
        "pyverbs": host.pyverbs()[0] or host.pyverbs()[1],
        "io_uring": host.io_uring()[1],
        "cupy": version("cupy"),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "huge_pages_free": host.read("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"),
        "nvidia_smi": tried(nvidia_smi),
        "container": Path("/.dockerenv").exists(),
    }


if __name__ == "__main__":
    print(json.dumps(answers()))

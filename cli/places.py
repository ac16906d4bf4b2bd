"""Where a load's blocks lie: in host memory, or on a GPU, with a copy on the host to fill and compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..buffers import Buffer
from ..rdma.memory import HostMemory

Rows = npt.NDArray[np.uint8]


class Place:
    """Room for ``count`` blocks of ``size`` bytes in host memory. ``rows``, (count, size), are the blocks."""

    def __init__(self, count: int, size: int) -> None:
        self.memory = HostMemory(count * size)
        self.rows: Rows = self.memory.array[: count * size].reshape(count, size)

    @property
    def buffer(self) -> Any:
        """What is registered."""
        return self.memory.array

    def push(self, which: npt.NDArray[np.intp] | None = None) -> None:
        """Rows were written: all, or these. They are what a put reads from now on."""

    def pull(self) -> None:
        """Rows are to be read: they become what gets have brought."""

    def heading(self, buffer: Buffer) -> dict[str, Any]:
        """What a benchmark's heading says about it."""
        return {}

    def close(self) -> None:
        """The buffer over it is closed."""


class Slab:
    """Device memory for libraries: one array of bytes."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class GpuPlace(Place):
    """The same on a GPU. :param rig: a :class:`~memkv.cli.gpu_rig.GpuRig`, which is closed with it."""

    def __init__(self, rig: Any, count: int, size: int) -> None:
        super().__init__(count, size)
        self.rig = rig
        self.address: int = rig.alloc(self.memory.nbytes)
        self.push()

    @property
    def buffer(self) -> Any:
        return Slab(self.address, self.memory.nbytes)

    def push(self, which: npt.NDArray[np.intp] | None = None) -> None:
        if which is None:
            self.rig.fill(self.address, self.rows)
            return
        for row in which.tolist():
            self.rig.fill(self.address + row * self.rows.shape[1], self.rows[row])

    def pull(self) -> None:
        self.rows[:] = self.rig.read(self.address, self.rows.nbytes).reshape(self.rows.shape)

    def heading(self, buffer: Buffer) -> dict[str, Any]:
        get, put = buffer.get_rung, buffer.put_rung
        rungs = {"get into": f"{get.name} ({get.reason})", "put from": f"{put.name} ({put.reason})"}
        return dict(self.rig.heading()) | rungs

    def close(self) -> None:
        self.rig.close()


def open_place(gpu: str, count: int, size: int) -> Place:
    """:param gpu: like ``cuda:0``; empty: host memory. :raises MemKVError: it cannot be used."""
    if not gpu:
        return Place(count, size)
    from .gpu_rig import GpuRig

    return GpuPlace(GpuRig(gpu), count, size)

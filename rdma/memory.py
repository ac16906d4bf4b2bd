"""Host memory that is worth registering: page-aligned, from huge pages if there are any, and zeroed.

The ladder is explicit 2 MiB pages (hugetlbfs), else transparent huge pages, else normal ones; ``pages`` and
``reason`` say what was taken and why.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DeviceError, LocalError

HUGE = 2 << 20
_MAP_HUGETLB = 0x40000
_MAP_POPULATE = 0x8000


class HostMemory:
    """An anonymous private mapping.

    :param nbytes: rounded up to whole pages.
    :param huge: True: only explicit huge pages will do; False: normal pages; None: the best there is.
    :raises DeviceError: huge pages were demanded and there are not enough, or there is no memory.
    """

    def __init__(self, nbytes: int, huge: bool | None = None) -> None:
        if nbytes <= 0:
            raise LocalError("memory of no size")
        self.nbytes = -(-nbytes // HUGE) * HUGE if nbytes >= HUGE else -(-nbytes // 4096) * 4096
        self.pages, self.reason = "4 KiB", "normal pages"
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.map: mmap.mmap | None = None
        if huge is not False and self.nbytes >= HUGE:
            self.map = self._huge(flags)
            if self.map is None and huge:
                raise DeviceError(
                    f"{self.nbytes >> 20} MiB of huge pages are not free",
                    12,
                    f"sysctl vm.nr_hugepages={self.nbytes // HUGE + 16}",
                )
        if self.map is None:
            try:
                self.map = mmap.mmap(-1, self.nbytes, flags=flags)
            except OSError as exc:
                raise DeviceError(
                    f"no memory: {exc.strerror}", exc.errno or 0, "a smaller --memory"
                ) from None
            if huge is not False and self.nbytes >= HUGE:
                self._transparent()
        self.address = _address(self.map)

    def _huge(self, flags: int) -> mmap.mmap | None:
        free = _meminfo("HugePages_Free")
        if free * HUGE < self.nbytes:
            self.reason = (
                f"{free} huge pages are free, {self.nbytes // HUGE} would be needed (sysctl vm.nr_hugepages)"
            )
            return None
        try:
            mapping = mmap.mmap(-1, self.nbytes, flags=flags | _MAP_HUGETLB | _MAP_POPULATE)
        except OSError as exc:
            self.reason = f"huge pages refused: {exc.strerror}"
            return None
        self.pages, self.reason = "2 MiB", "explicit huge pages"
        return mapping

    def _transparent(self) -> None:
        assert self.map is not None
        try:
            self.map.madvise(14)  # MADV_HUGEPAGE
        except (OSError, ValueError) as exc:
            self.reason += f"; transparent huge pages refused ({exc})"
        else:
            self.pages = "4 KiB, transparent huge pages advised"

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole mapping as bytes."""
        assert self.map is not None
        return np.frombuffer(self.map, dtype=np.uint8)

    def close(self) -> None:
        """Unmaps it; fails if arrays of it are still alive. Close regions over it first."""
        if self.map is not None:
            self.map.close()
            self.map = None


def _address(buffer: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0

"""Host memory that is worth registering: aligned, from huge pages if there are any, and zeroed.

The ladder is explicit 2 MiB pages (hugetlbfs), else transparent huge pages, else normal ones; ``pages`` and
``reason`` say what was taken and why. It is worth climbing: with normal pages every request of 1 MiB that
goes to a device pins 256 pages one by one, and a NIC or an IOMMU has as many translations to remember.

Transparent huge pages are advice. The kernel follows it page by page as memory is first touched, wherever it
finds 2 MiB in one piece, and only in spans that begin at a multiple of 2 MiB: so the mapping does.
:func:`given_of` says how much was given in the end.
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
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
_MAP_HUGETLB = 0x40000
_MAP_POPULATE = 0x8000
_MADV_HUGEPAGE = 14


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
        self.pages, self.reason = "4 KiB", "normal pages were asked for"
        self.map: mmap.mmap | None = None
        self._skip = 0  # bytes of the mapping before what is used
        if huge is not False and self.nbytes >= HUGE:
            self.map = _explicit(self)
            if self.map is None and huge:
                raise DeviceError(
                    f"{self.nbytes >> 20} MiB of huge pages are not free",
                    12,
                    f"sysctl vm.nr_hugepages={self.nbytes // HUGE + 16}",
                )
            if self.map is None:
                self._transparent()
        elif huge is not False:
            self.reason = "less than a huge page"
        if self.map is None:
            self.map = _normal(self.nbytes)
        self.address = _address(self.map) + self._skip

    def _transparent(self) -> None:
        """The middle rung: a mapping that begins at a multiple of a huge page, and the advice."""
        why = transparent_refused()
        if not why:
            self.map, self._skip, why = _advised(self.nbytes)
        if why:
            self.reason += f"; no transparent ones: {why}"
        else:
            self.pages = "4 KiB, transparent huge pages advised"

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All of it as bytes."""
        assert self.map is not None
        return np.frombuffer(self.map, np.uint8, self.nbytes, self._skip)

    def close(self) -> None:
        """Unmaps it; fails if arrays of it are still alive. Close regions over it first."""
        if self.map is not None:
            self.map.close()
            self.map = None


def _explicit(memory: HostMemory) -> mmap.mmap | None:
    """The highest rung; ``reason`` says why not. Such mappings begin at a multiple of a huge page."""
    free = _meminfo("HugePages_Free")
    need = memory.nbytes // HUGE
    if free < need:
        memory.reason = f"{free} huge pages are free, {need} would be needed (sysctl vm.nr_hugepages)"
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_POPULATE
    try:
        mapping = mmap.mmap(-1, memory.nbytes, flags=flags)
    except OSError as exc:
        memory.reason = f"huge pages refused: {exc.strerror}"
        return None
    memory.pages, memory.reason = "2 MiB", "explicit huge pages"
    return mapping


def _normal(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise DeviceError(f"no memory: {exc.strerror}", exc.errno or 0, "a smaller --memory") from None


# --- transparent huge pages ---


def _advised(nbytes: int) -> tuple[mmap.mmap, int, str]:
    """(a mapping, where in it so many bytes begin, why the advice was refused)."""
    mapping = _normal(nbytes + HUGE)
    try:
        mapping.madvise(_MADV_HUGEPAGE)
    except (OSError, ValueError) as exc:
        return mapping, -_address(mapping) % HUGE, str(exc)
    return mapping, -_address(mapping) % HUGE, ""


def transparent_refused() -> str:
    """Why the kernel gives none to who asks for them; empty if it may. The advice itself never fails."""
    mode = _read(THP)
    if not mode:
        return "this kernel has none"
    if "[never]" in mode:
        return f"{THP} says never (echo madvise > {THP})"
    if "\nTHP_enabled:\t0" in _read("/proc/self/status"):
        return "they are disabled for this process (PR_SET_THP_DISABLE)"
    return ""


def given_of(address: int, nbytes: int) -> int:
    """Bytes of a mapping that lie in huge pages, explicit or transparent, by /proc/self/smaps. Looks at every
    page of the process, so it takes a moment where there is much memory.
    """
    given, mine = 0, False
    for line in _read("/proc/self/smaps").splitlines():
        span = line.split(" ", 1)[0].split("-")
        if len(span) == 2 and not line[0].isupper():
            mine = int(span[0], 16) < address + nbytes and address < int(span[1], 16)
        elif mine and line.startswith(("AnonHugePages:", "Private_Hugetlb:")):
            given += int(line.split()[1]) << 10
    return min(given, nbytes)


def try_transparent() -> tuple[int, int]:
    """Bytes in huge pages, and of how many, of a small mapping that is made for this: what the advice is
    worth at the moment.
    """
    nbytes = 4 * HUGE
    mapping, skip, _ = _advised(nbytes)
    with mapping:
        for at in range(skip, skip + nbytes, 4096):
            mapping[at] = 1
        return given_of(_address(mapping) + skip, nbytes), nbytes


def _address(buffer: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _meminfo(name: str) -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0

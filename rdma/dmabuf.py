"""Registering a dma-buf: the file descriptor by which a GPU's memory is handed to a NIC.

A memory region over a dma-buf has addresses of its own (*iova*), which need not be those of the memory. The
hardware asks only that an iova has the same offset in its page as the place in the dma-buf. pyverbs from 60
on lets us choose (``MREx``), and we take the memory's own address. Before that ``DmaBufMR`` takes the place
in the dma-buf itself, so addresses begin near zero. Either way work requests name iova + offset
(rdma/native/verbs.c).
"""

from __future__ import annotations

import errno
import os
from typing import Any

from ._pv import pv
from .errors import LocalError, NotRegistered

PAGE = os.sysconf("SC_PAGESIZE")


def span(address: int, length: int, page: int = PAGE) -> tuple[int, int]:
    """(start, bytes) of the whole pages that hold a range: what is exported, and ``address - start`` is where
    in the dma-buf it lies.
    """
    start = address - address % page
    return start, -(-(address + length - start) // page) * page


def register(pd: Any, dma_buf: tuple[int, int], length: int, address: int, flags: int) -> tuple[Any, int]:
    """The memory region, and the iova of its first byte.

    :param dma_buf: (file descriptor, where in it the region starts). :param address: the memory's own.
    :raises PyverbsRDMAError: the kernel refuses.
    """
    fd, offset = dma_buf
    if (address - offset) % PAGE:
        raise LocalError(f"a dma-buf cannot begin at {address - offset:#x}", f"whole pages of {PAGE} bytes")
    if pv().MREx is not None:
        made = pv().MREx.__new__(pv().MREx)
        try:
            made.__init__(pd, length, flags, iova=address, fd=fd, fd_offset=offset)
        except (pv().PyverbsError, TypeError):
            made.close()  # up to 63 one that is left to the garbage collector ends the process
        else:
            return made, address
        # A kernel that lacks this call may have the older one, which also tells why not.
    return pv().DmaBufMR(pd, length, flags, dmabuf=fd, offset=offset), offset


def refused(code: int, length: int, device: str, *, by_address: bool) -> NotRegistered:
    """What a refusal by ``device`` means."""
    what = f"{device} did not register {length} bytes of GPU memory"
    why = os.strerror(code)
    if by_address:
        hint = "modprobe nvidia_peermem, which maps GPU addresses" if code == errno.EFAULT else ""
        return NotRegistered(f"{what} by its address: {why}", code, hint)
    if code in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOSYS):
        return NotRegistered(f"{what}: its driver takes no dma-buf ({why})", code)
    hint = "BAR1 may be too small: nvidia-smi -q -d MEMORY" if code in (errno.ENOMEM, errno.ENOSPC) else ""
    return NotRegistered(f"{what} as a dma-buf: {why}", code, hint)

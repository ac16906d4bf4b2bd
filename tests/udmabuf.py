"""A real dma-buf without a GPU: /dev/udmabuf makes one of a memfd's pages, which stand for device memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEVICE = Path("/dev/udmabuf")
CREATE = 0x40187542  # UDMABUF_CREATE of linux/udmabuf.h: _IOW('u', 0x42, struct udmabuf_create)
CLOEXEC = 1  # UDMABUF_FLAGS_CLOEXEC


def missing() -> str:
    """Why there is none here, or an empty string."""
    if not DEVICE.exists():
        return f"no {DEVICE}: a kernel with CONFIG_UDMABUF (script/softroce boots one)"
    return "" if os.access(DEVICE, os.R_OK | os.W_OK) else f"{DEVICE} is not for this user"


@dataclass
class Stand:
    """Memory that stands for a device's, and the dma-buf over all of it."""

    map: mmap.mmap
    fd: int


@contextmanager
def stand(nbytes: int) -> Iterator[Stand]:
    """:param nbytes: whole pages."""
    memory = os.memfd_create("memkv-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(memory, "r+b", buffering=0), DEVICE.open("rb+", buffering=0) as device:
        os.ftruncate(memory, nbytes)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        wish = bytearray(struct.pack("=IIQQ", memory, CLOEXEC, 0, nbytes))
        fd = fcntl.ioctl(device, CREATE, wish)
        try:
            with mmap.mmap(memory, nbytes) as mapping:
                yield Stand(mapping, fd)
        finally:
            os.close(fd)

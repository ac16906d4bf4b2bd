"""One file or block device: opening, preparing, and reading and writing its tables.

Everything goes past the page cache where that is possible (O_DIRECT), as the blocks themselves do. Tables are small and
rare; they are written synchronously and flushed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...rdma.errors import DeviceError, LocalError
from .format import MIB, PAGE, Superblock

# Copy-on-write file systems: every write moves data, so that metadata changes with each and O_DIRECT is no promise.
COPY_ON_WRITE = {0x9123683E: "btrfs", 0x2FC12FC1: "zfs", 0xCA451A4E: "bcachefs"}
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268


@dataclass(frozen=True, slots=True)
class FlashPath:
    """PATH[:SIZE] of a command line; size 0: what is there."""

    path: Path
    size: int


class Device:
    """An open device. ``direct`` says whether O_DIRECT could be had, ``reason`` why not.

    :param create: bytes of a regular file to be made if there is none; 0: it must exist.
    :raises DeviceError: cannot be opened. :raises LocalError: on a copy-on-write file system.
    """

    def __init__(self, path: str | os.PathLike[str], create: int = 0) -> None:
        self.path = Path(path)
        self.created = False
        self.direct, self.reason = True, "O_DIRECT"
        flags = os.O_RDWR | os.O_CLOEXEC
        if create and not self.path.exists():
            flags |= os.O_CREAT | os.O_EXCL
            self.created = True
        try:
            self.fd = os.open(self.path, flags | os.O_DIRECT, 0o600)
        except OSError as exc:
            if exc.errno != 22:
                raise DeviceError(
                    f"{self.path}: {exc.strerror}",
                    exc.errno or 0,
                    "--flash PATH:SIZE makes a file; is it readable?",
                ) from None
            self.fd = os.open(self.path, flags & ~os.O_EXCL, 0o600)
            self.direct, self.reason = (
                False,
                "this file system refuses O_DIRECT: the page cache is in the way",
            )
        try:
            self._look()
            if self.created:
                os.ftruncate(self.fd, create)
                self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        mode = os.fstat(self.fd).st_mode
        self.block_device = stat.S_ISBLK(mode)
        if self.block_device:
            self.nbytes = struct.unpack("Q", fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)))[0]
            self.sector = struct.unpack("i", fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4)))[0]
            return
        if not stat.S_ISREG(mode):
            raise LocalError(f"{self.path} is neither a file nor a block device", "--flash")
        self.nbytes = os.fstat(self.fd).st_size
        self.sector = 512
        kind = COPY_ON_WRITE.get(_file_system(self.path))
        if kind:
            raise LocalError(
                f"{self.path} is on {kind}, which copies on write",
                "a file on ext4 or xfs, or a raw block device",
            )

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, both multiples of 4096. :raises DeviceError: a read error, or its end."""
        with _aligned(length) as buffer:
            try:
                got = os.preadv(self.fd, [buffer], offset)
            except OSError as exc:
                raise DeviceError(
                    f"{self.path}: reading at {offset}: {exc.strerror}", exc.errno or 0
                ) from None
            if got != length:
                raise DeviceError(f"{self.path} ends at {offset + got}", 5, "it was truncated")
            return bytes(buffer)

    def write(self, offset: int, data: bytes) -> None:
        """Writes whole pages and flushes them. :raises DeviceError: a write error."""
        buffer, done = _aligned(len(data)), 0
        buffer[:] = data
        try:
            while done < len(data):
                done += os.pwritev(self.fd, [buffer[done:]], offset + done)
            os.fdatasync(self.fd)
        except OSError as exc:
            raise DeviceError(f"{self.path}: writing at {offset}: {exc.strerror}", exc.errno or 0) from None

    def superblock(self) -> Superblock | None:
        """The newer of the two that are whole; None if there is none."""
        found = []
        if self.nbytes >= 2 * PAGE:
            both = self.read(0, 2 * PAGE)
            found = [
                s for s in (Superblock.parse(both[:PAGE]), Superblock.parse(both[PAGE:])) if s is not None
            ]
        return max(found, key=lambda s: s.generation, default=None)

    def blank(self) -> bool:
        """Whether the first megabyte is all zeros: nothing known or unknown lies here."""
        length = min(self.nbytes, MIB) // PAGE * PAGE
        return not length or not any(self.read(0, length))

    def write_through(self, nbytes: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Writes zeros all over a regular file, so that no later write changes its metadata; ``progress(done, all)``."""
        step = 8 * MIB
        zeros = _aligned(step)
        for at in range(0, nbytes, step):
            part, done = zeros[: min(step, nbytes - at)], 0
            try:
                while done < len(part):
                    done += os.pwritev(self.fd, [part[done:]], at + done)
            except OSError as exc:
                raise DeviceError(
                    f"{self.path}: {exc.strerror} after {at + done} bytes", exc.errno or 0, "a smaller SIZE"
                ) from None
            if progress:
                progress(at + len(part), nbytes)
        os.fsync(self.fd)

    def lock(self) -> None:
        """Keeps a second node from opening it. :raises DeviceError: one has."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DeviceError(f"{self.path} is in use by another node", 16, "one node per device") from None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _aligned(nbytes: int) -> memoryview:
    """Page-aligned memory for O_DIRECT, freed with its last view."""
    return memoryview(mmap.mmap(-1, max(nbytes, PAGE)))[:nbytes]


def _file_system(path: Path) -> int:
    """The file system's magic number, by ``stat -f``."""
    import subprocess

    out = subprocess.run(
        ["stat", "-f", "-c", "%t", str(path)], capture_output=True, text=True, check=False
    ).stdout
    try:
        return int(out.strip(), 16)
    except ValueError:
        return 0


def parse_path(text: str, parse_size: Callable[[str, str], int]) -> FlashPath:
    """PATH or PATH:SIZE."""
    path, colon, size = text.rpartition(":")
    if colon and size and size[0].isdigit():
        return FlashPath(Path(path), parse_size(size, "flash"))
    return FlashPath(Path(text), 0)

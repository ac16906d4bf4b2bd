"""One file or block device: opening, preparing, and reading and writing its tables.

Everything goes past the page cache where that is possible (O_DIRECT), as the blocks themselves do. Tables are
small and rare; they are written synchronously and flushed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from ...rdma.errors import DeviceError, LocalError
from .format import MIB, PAGE, FormatError, Superblock

# These copy on write: every write moves data, so metadata changes with each, and O_DIRECT promises
# nothing.
COPY_ON_WRITE = {0x9123683E: "btrfs", 0x2FC12FC1: "zfs", 0xCA451A4E: "bcachefs"}
LOCK_SECONDS = 5.0
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_libc = ctypes.CDLL(None, use_errno=True)


class Device:
    """An open device. ``direct`` says whether O_DIRECT could be had, ``reason`` why not; ``sector`` is what
    offsets and lengths have to be multiples of.

    :param create: bytes of a regular file to be made if there is none; 0: it must exist.
    :raises DeviceError: cannot be opened. :raises LocalError: on a file system that copies on write.
    """

    def __init__(self, path: str | os.PathLike[str], create: int = 0) -> None:
        self.path = Path(path)
        self.fd = -1
        self.created = False
        self.direct, self.reason = True, "O_DIRECT"
        flags = os.O_RDWR | os.O_CLOEXEC
        if create and not self.path.exists():
            flags |= os.O_CREAT
            self.created = True
        try:
            try:
                self.fd = os.open(self.path, flags | os.O_DIRECT, 0o600)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                self.fd = os.open(self.path, flags, 0o600)
                self.direct = False
                self.reason = "this file system refuses O_DIRECT: the page cache is in the way"
        except OSError as exc:
            hint = "--flash PATH:SIZE makes a file" if exc.errno == errno.ENOENT else "--flash PATH"
            raise DeviceError(f"{self.path}: {exc.strerror}", exc.errno or 0, hint) from None
        try:
            if self.created:
                os.ftruncate(self.fd, create)
            self.look()
        except BaseException:
            self.discard()
            raise

    def look(self) -> None:
        """Learns size and kind (again)."""
        mode = os.fstat(self.fd).st_mode
        self.block_device = stat.S_ISBLK(mode)
        if self.block_device:
            self.nbytes = struct.unpack("Q", fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)))[0]
            self.sector = struct.unpack("i", fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4)))[0]
            return
        if not stat.S_ISREG(mode):
            raise LocalError(f"{self.path} is neither a file nor a block device", "--flash")
        if kind := COPY_ON_WRITE.get(_file_system(self.fd)):
            raise LocalError(
                f"{self.path} is on {kind}, which copies on write",
                "a file on ext4 or xfs, or a raw block device",
            )
        self.nbytes = os.fstat(self.fd).st_size
        self.sector = 512 if self._takes_sectors() else PAGE

    def _takes_sectors(self) -> bool:
        """Whether 512 bytes can be read by themselves: not from a file on a disk with sectors of 4096."""
        try:
            os.preadv(self.fd, [aligned(PAGE)[:512]], 512)
        except OSError:
            return False
        return True

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, both multiples of 4096.

        :raises DeviceError: a read error, or the device ends before.
        """
        buffer, done = aligned(length), 0
        while done < length:
            try:
                got = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as exc:
                raise DeviceError(
                    f"{self.path}: reading at {offset}: {exc.strerror}", exc.errno or 0
                ) from None
            done += got
            if not got or done % self.sector:
                raise DeviceError(f"{self.path} ends at {offset + done}", errno.EIO, "it was truncated")
        return bytes(buffer)

    def write(self, offset: int, data: bytes) -> None:
        """Writes whole pages and flushes them. :raises DeviceError: a write error."""
        buffer = aligned(len(data))
        buffer[:] = data
        try:
            _write_all(self.fd, buffer, offset)
            os.fdatasync(self.fd)
        except OSError as exc:
            raise DeviceError(f"{self.path}: writing at {offset}: {exc.strerror}", exc.errno or 0) from None

    def superblock(self) -> Superblock | None:
        """The newer of the two that are whole; None if there is none.

        :raises FormatError: one is of a version that this program does not know.
        """
        if self.nbytes < 2 * PAGE:
            return None
        both = self.read(0, 2 * PAGE)
        found = [s for s in (Superblock.parse(both[:PAGE]), Superblock.parse(both[PAGE:])) if s is not None]
        return max(found, key=lambda s: s.generation, default=None)

    def blank(self) -> bool:
        """Whether the first and the last megabyte are zeros: nothing known or unknown lies here."""
        length = min(self.nbytes, MIB) // PAGE * PAGE
        last = (self.nbytes - length) // PAGE * PAGE
        return not length or not (any(self.read(0, length)) or any(self.read(last, length)))

    def holds(self) -> str:
        """What lies on it, for people; empty if nothing does."""
        try:
            if self.superblock() is not None:
                return "a memkv store"
        except FormatError:
            return "a memkv store of another version"
        return "" if self.blank() else "something that memkv does not know"

    def write_through(self, nbytes: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Writes zeros all over a regular file, so that no later write changes its metadata.

        :param progress: called with (bytes done, all of them). :raises DeviceError: no room.
        """
        step = 8 * MIB
        zeros = aligned(step)
        try:
            for at in range(0, nbytes, step):
                part = zeros[: min(step, nbytes - at)]
                _write_all(self.fd, part, at)
                if progress:
                    progress(at + len(part), nbytes)
            os.fsync(self.fd)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)  # or a power cut could take the whole file away
            finally:
                os.close(folder)
        except OSError as exc:
            raise DeviceError(
                f"{self.path}: {exc.strerror} after {at} bytes", exc.errno or 0, "a smaller SIZE"
            ) from None
        self.look()

    def lock(self) -> None:
        """Keeps others from opening it. :raises DeviceError: somebody has.

        The lock belongs to the open file, which lives until the last request on it is over. So who gets the
        lock after a node was killed knows that none of its writes can still arrive.
        """
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno != errno.EWOULDBLOCK or time.monotonic() > until:
                    raise DeviceError(
                        f"{self.path} is in use by another node", errno.EBUSY, "one node per device"
                    ) from None
                time.sleep(0.05)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        """Closes it; a file that was made by us goes again."""
        if self.created and self.fd >= 0:
            self.path.unlink(missing_ok=True)
        self.close()


def aligned(nbytes: int) -> memoryview:
    """Page-aligned memory for O_DIRECT, freed with its last view."""
    return memoryview(mmap.mmap(-1, max(nbytes, PAGE)))[:nbytes]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwritev(fd, [data[done:]], offset + done)


def _file_system(fd: int) -> int:
    """The file system's magic number: the first word of struct statfs."""
    out = ctypes.create_string_buffer(512)
    if _libc.fstatfs(fd, out):
        return 0
    return int.from_bytes(out.raw[: ctypes.sizeof(ctypes.c_long)], "little") & 0xFFFFFFFF

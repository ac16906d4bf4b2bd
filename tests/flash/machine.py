"""The real store in one process, without network, on devices whose cache a power cut empties.

:class:`Machine` is what a node is between two starts: arena, FlashStore, one namespace, its flash. Blocks go
through the volatile cache of flashio.h; what Python writes (superblocks, tables, snapshots) is flushed by
itself, and :class:`Power` may cut in the middle of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from memkv.store.config import FlashPath
from memkv.store.flash import device as device_module
from memkv.store.flash import format as f
from memkv.store.flash.prepare import format_devices
from memkv.store.flash.store import FlashStore
from memkv.store.flash.tenant import Tenant
from memkv.store.native._store import ffi, lib

from ..store.flashes import FOREVER, FlashSpace
from ..store.spaces import HOUR, Space

SECTOR = 512


class PowerOff(Exception):
    """In the middle of a write of a table."""


class Power:
    """What all devices hang on. ``after``: so many tables are written yet, then it goes; None: it stays."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(0)
        self.after: int | None = None
        self.on = True
        write = device_module.Device.write

        def perhaps(device: device_module.Device, offset: int, data: bytes) -> None:
            if self.on and (self.after is None or self.after > 0):
                self.after = None if self.after is None else self.after - 1
                return write(device, offset, data)
            if self.on:
                self._tear(device, offset, data)
            self.on, self.after = False, None
            raise PowerOff

        patch.setattr(device_module.Device, "write", perhaps)

    def _tear(self, device: device_module.Device, offset: int, data: bytes) -> None:
        """Some sectors arrive, perhaps none or all."""
        chance = self.random.choice((0.0, 0.3, 0.7, 1.0))
        with device.path.open("r+b") as file:
            for at in range(0, len(data), SECTOR):
                if self.random.random() < chance:
                    file.seek(offset + at)
                    file.write(data[at : at + SECTOR])


def make_devices(folder: Path, devices: int, segments: int, segment_bytes: int) -> list[Path]:
    """Devices of one store."""
    paths = [folder / f"disk{i}" for i in range(devices)]
    format_devices(
        [FlashPath(p, (1 << 20) + segments * segment_bytes) for p in paths], segment_bytes=segment_bytes
    )
    return paths


class Machine(FlashSpace):
    """From a start to the loss of power (:meth:`cut`) or a clean stop (:meth:`shut`).

    :param before: is called when the devices are open, and the scan has not begun.
    :raises PowerOff: lost in the middle of the start.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        seed: int,
        *,
        slabs: int = 3,
        dirty_max: int = 1 << 20,
        before: Callable[[Machine], None] | None = None,
    ) -> None:
        Space.__init__(self, slabs=slabs, slab_bytes=16384, block_bytes=2048, align=512, grace_ns=HOUR)
        self.deny = False
        self.store: FlashStore | None = None
        try:
            self.store = FlashStore(
                [FlashPath(p, 0) for p in paths], (self.base, len(self.memory)), dirty_max=dirty_max
            )
            self.io, self.flash = self.store.io, self.store.flash
            assert lib.mkv_flashio_volatile(self.io, seed) == 0
            if before:
                before(self)
            known = self.store.names.get(3)
            self.tenant = Tenant(self.store, self.ns, known or self._name(seed))
            if known is None:
                self.store.remember(self.tenant.name)
            else:
                self.tenant.restore()
        except BaseException:
            self._end()
            raise

    def _name(self, seed: int) -> f.Name:
        return f.Name(3, "test", 2048, 512, HOUR, seed * 2 + 1, self.salt)

    def _larger(self) -> None:
        self.grow_table()
        self.drop_tables()

    def serve_segments(self) -> bool:
        assert self.store is not None
        self.store.sharing.look()  # a node does so now and then: patience ends
        self.tenant.grow()
        return False

    def scanning(self) -> int:
        if lib.mkv_ns_chores(self.ns) & lib.MKV_CHORE_TABLE:
            self._larger()
        return int(lib.mkv_ns_scanning(self.ns))

    def cut(self, seed: int) -> None:
        """The power goes, whatever is under way."""
        assert lib.mkv_flashio_power_cut(self.io, seed) == 0
        self._end()

    def shut(self) -> None:
        """A clean stop, as FlashTier.finish does it. :raises PowerOff: lost in the middle of it."""
        assert self.store is not None
        self.wait_barrier(sync=True)
        self.store.save(self.tenant.export)
        self._end()

    def _end(self) -> None:
        lib.mkv_ns_free(self.ns)
        self.ns = ffi.NULL
        if self.store is not None:
            self.store.close()
        lib.mkv_arena_free(self.arena)


__all__ = ["FOREVER", "Machine", "Power", "PowerOff", "make_devices"]

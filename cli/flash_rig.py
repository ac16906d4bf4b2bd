"""Flash for a benchmark: files that it makes and removes again, or devices that it may overwrite."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..peer import Peer
from ..rdma.errors import LocalError
from ..store.config import FlashPath, parse_path
from ..store.flash.device import Device
from ..store.flash.prepare import format_devices
from .cluster import extent_bytes
from .report import Steps, size_text

MIB = 1 << 20


def room(blocks: int, block_bytes: int) -> int:
    """Bytes of flash for so many blocks: with their headers, tables, and segments that are not full."""
    return (blocks * extent_bytes(block_bytes) * 5 // 4 // MIB + 128) * MIB


class FlashRig:
    """A store's device or file, formatted. A context manager: a file that was made here goes again.

    :param text: PATH[:SIZE]. :param least: bytes that it has to have, and does have unless SIZE is given.
    :param force: overwrite what is there.
    :raises LocalError: too small, or it holds something.
    """

    def __init__(self, text: str, least: int, *, force: bool, steps: Steps) -> None:
        wanted = parse_path(text)
        self.path = wanted.path
        self.there = wanted.path.exists()
        if self.there and not force:
            raise LocalError(f"{wanted.path} exists, and would be overwritten", "--force, or another PATH")
        size = wanted.size or (0 if wanted.path.is_block_device() else least)
        if 0 < size < least:
            raise LocalError(f"{text} is too small", f"at least {self.path}:{-(-least // MIB)}m")
        steps.now(f"writing {size_text(size) if size else 'tables'} to {self.path}")
        (block,) = format_devices([FlashPath(wanted.path, size)], force=force)
        self.size, self.data_at = block.size, block.data_at
        device = Device(self.path)
        self.block_device = device.block_device
        self.device_bytes = device.nbytes
        self.direct, self.reason = device.direct, device.reason
        device.close()

    @property
    def flags(self) -> Sequence[str]:
        """For memkv-node serve."""
        return ("--flash", str(self.path))

    def heading(self) -> dict[str, Any]:
        what = "block device" if self.block_device else "file"
        return {"flash": f"{self.path}, {what}, {self.size >> 20} MiB, {self.reason}"}

    def close(self) -> None:
        if not self.there:
            Path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> FlashRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class FlashStats:
    """What the nodes of a peer say of their flash, added up."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def read(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for sections in self._peer.node_stats(timeout=30.0).values():
            for name, value in sections.get("flash", {}).items():
                with contextlib.suppress(ValueError, TypeError):
                    total[name] = total.get(name, 0) + int(value)
        return total

    def heading(self) -> dict[str, Any]:
        """How the first node does its I/O, and out of which memory."""
        sections = next(iter(self._peer.node_stats(timeout=30.0).values()))
        flash, memory = sections["flash"], sections["memory"]
        return {
            "flash engine": f"{flash['engine']} ({flash['reason']})",
            "arena": f"{int(memory['bytes']) >> 20} MiB",
            "arena pages": f"{memory['pages']} ({memory['pages_reason']})",
        }

"""Preparing devices: laying out the tables of one that is blank, and making a store of several."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence

from ...rdma.errors import LocalError
from ..config import FlashPath
from . import format as f
from .device import Device

Progress = Callable[[str, int, int], None]  # path, bytes written, bytes in all


def prepare(
    device: Device,
    path: FlashPath,
    *,
    store: bytes,
    secret: int,
    index: int,
    count: int,
    segment_bytes: int = 0,
    progress: Progress | None = None,
) -> f.Superblock:
    """Writes the tables of an empty device; the superblock comes last. A file is written through first.

    :raises FormatError: too small, or segments that cannot be. :raises DeviceError: no room, an error.
    """
    nbytes = path.size or device.nbytes
    if device.block_device:
        nbytes = min(nbytes, device.nbytes)
    block = f.plan(
        nbytes,
        store=store,
        identity=secrets.randbits(64) | 1,
        index=index,
        count=count,
        secret=secret,
        segment_bytes=segment_bytes,
    )
    device.write(0, bytes(2 * f.PAGE))  # whatever it was, from here on it is not that
    name = str(path.path)
    if device.block_device:
        device.write(2 * f.PAGE, bytes(block.data_at - 2 * f.PAGE))
    else:
        device.write_through(nbytes, (lambda done, of: progress(name, done, of)) if progress else None)
    table = f.pack_segment(None, secret) * block.segments
    device.write(block.segments_at, table.ljust(block.snapshot_at - block.segments_at, b"\0"))
    for place in (0, 1):
        device.write(block.names_at + place * f.NAMES_BYTES, f.pack_names([], place, secret))
    device.write(block.place(), block.pack())
    device.created = False  # it is not half-made any more
    return block


def format_devices(
    paths: Sequence[FlashPath],
    *,
    force: bool = False,
    segment_bytes: int = 0,
    progress: Progress | None = None,
) -> list[f.Superblock]:
    """Makes a new store of these devices. What lay on them is lost.

    :raises LocalError: one of them holds something, and ``force`` is not set. Then none has been touched.
    :raises DeviceError: one cannot be opened or written, or a node is using it.
    """
    store, secret = secrets.token_bytes(16), secrets.randbits(64)
    with contextlib.ExitStack() as stack:
        devices: list[Device] = []
        for path in paths:
            device = Device(path.path, create=path.size)
            stack.callback(device.discard)
            devices.append(device)
            device.lock()
            what = device.holds()
            if what and not force:
                raise LocalError(f"{path.path} holds {what}", "memkv-node format --force overwrites it")
        blocks = []
        for index, (device, path) in enumerate(zip(devices, paths, strict=True)):
            blocks.append(
                prepare(
                    device,
                    path,
                    store=store,
                    secret=secret,
                    index=index,
                    count=len(paths),
                    segment_bytes=segment_bytes,
                    progress=progress,
                )
            )
    return blocks

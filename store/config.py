"""What a node can be told, with defaults, from a TOML file and from the command line.

Every value is checked when a :class:`NodeConfig` is made; a bad one is a LocalError that names its knob. In
TOML the keys are the fields' names; sizes may be written "64M" or "4G", addresses "HOST:PORT".
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..rdma.errors import LocalError
from .layout import SLAB_MAX_BYTES

DEFAULT_PORT = 7420
MIB = 1 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}

Address = tuple[str, int]


def parse_size(value: int | str, knob: str) -> int:
    """Bytes, from a number or from "64M", "4G", "512 MiB" (always powers of 1024)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if match is None:
        raise LocalError(f"{value!r} is not a size", f"{knob} takes bytes, or 64M, 4G, 1T")
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True, slots=True)
class FlashPath:
    """PATH[:SIZE] of a command line; size 0: what is there."""

    path: Path
    size: int


def parse_path(text: str) -> FlashPath:
    """PATH or PATH:SIZE."""
    path, colon, size = text.rpartition(":")
    if colon and size[:1].isdigit():
        return FlashPath(Path(path), parse_size(size, "flash"))
    return FlashPath(Path(text), 0)


def parse_address(value: str | Address, knob: str, default_port: int = DEFAULT_PORT) -> Address:
    """(host, port) from "HOST:PORT", "HOST", "[::1]:PORT"."""
    hint = f"{knob} takes HOST:PORT, an IPv6 address in brackets"
    if not isinstance(value, str):
        try:
            host, port = value
        except (TypeError, ValueError):
            raise LocalError(f"{value!r} is not an address", hint) from None
    else:
        match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d+))?", value.strip())
        if match is None:
            raise LocalError(f"{value!r} is not an address", hint)
        host, port = match[1] or match[2], int(match[3] or default_port)
    if not isinstance(host, str) or not host or not isinstance(port, int) or not 0 <= port <= 65535:
        raise LocalError(f"{value!r} is not an address", hint)
    return host, port


def read_secret(path: str | Path) -> bytes:
    """The shared secret in a file, without the white space around it."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as exc:
        raise LocalError(f"the secret cannot be read from {path}: {exc.strerror}", "--secret-file") from None
    if not secret:
        raise LocalError(f"{path} is empty", "--secret-file: head -c 32 /dev/urandom | base64 > FILE")
    return secret


def _secret_of_environment() -> bytes:
    return os.environ.get("MEMKV_SECRET", "").strip().encode()


def is_loopback(host: str) -> bool:
    """Whether listening on this address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(a).split("%")[0]).is_loopback for a in found)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Settings of a node; sizes in bytes, times in milliseconds unless they say so, 0 where a default is
    worked out.
    """

    listen: Address = ("127.0.0.1", DEFAULT_PORT)  # control connections; port 0: any
    data_port: int = 0  # tcp fabric: data connections, on the same host; 0: any
    fabric: str = "auto"  # "auto": verbs if a device can be used, else tcp
    devices: tuple[str, ...] = ()  # verbs: RDMA devices, one rail each; empty: the best one
    ib_port: int = 0  # verbs: port of the device; 0: the first that is active
    gid_index: int = -1  # verbs; -1: chosen by rank
    max_msg: int = 0  # verbs: lowers the longest message, to test segmentation
    memory: int = 1 << 30
    slab_bytes: int = 0  # 0: a sixteenth of the memory, 2 to 256 MiB
    huge: bool | None = None  # explicit huge pages: True demanded, False never, None if there are any
    secret: bytes = field(default_factory=_secret_of_environment, repr=False)
    insecure: bool = False  # listen beyond the loopback address without a secret
    metrics: Address | None = None  # HTTP: /metrics, /health, /status
    name: str = ""  # in logs and metrics; empty: the host's name
    block_bytes: int = MIB  # of namespaces whose peer does not say
    align: int = 4096
    grace_ms: int = 1000
    flash: tuple[str, ...] = ()  # PATH[:SIZE] of files or block devices; empty: memory only
    dirty_bytes: int = 0  # that may wait to be written to flash; 0: half of the memory
    flash_threads: int = 0  # demands threads for flash I/O, so many a device; 0: io_uring if it can be had
    clock: str = "plain"  # what peers are advised: "strict" where their clocks may stand still
    max_sessions: int = 1024
    max_namespaces: int = 64
    max_put_bytes: int = 64 * MIB  # set aside at once for the puts of one channel
    max_queued_blocks: int = 1 << 18  # of puts that one session may have queued
    max_requests: int = 256  # of one session, under way at once
    max_channels: int = 32  # of one session
    max_regions: int = 65536  # offered by one session at once
    put_timeout_ms: int = 30_000  # of puts and deletes whose peer does not say
    stage_timeout_ms: int = 10_000  # of stages whose peer does not say
    ack_timeout_ms: int = 30_000  # for a session to act on a notice, else it is closed
    stop_timeout: int = 30  # seconds for a clean stop, most of them for what is still to be written to flash
    log_level: str = "info"

    def __post_init__(self) -> None:
        def need(good: bool, knob: str, what: str) -> None:
            if not good:
                value = getattr(self, knob)
                raise LocalError(
                    f"{knob} = {value!r}", f"{what}; --{knob.replace('_', '-')} or {knob} in TOML"
                )

        need(0 <= self.data_port <= 65535, "data_port", "a TCP port")
        need(self.fabric in ("auto", "verbs", "tcp"), "fabric", "auto, verbs or tcp")
        need(len(self.devices) <= 4, "devices", "at most four rails")
        need(self.max_msg == 0 or self.max_msg >= 4096, "max_msg", "0, or at least 4096 bytes")
        need(self.memory >= 2 * MIB, "memory", "at least 2M")
        need(
            self.slab_bytes == 0
            or (
                self.slab_bytes % 4096 == 0
                and 64 << 10 <= self.slab_bytes <= min(self.memory, SLAB_MAX_BYTES)
            ),
            "slab_bytes",
            "a multiple of 4096, from 64K to 1G, and no more than the memory",
        )
        need(self.align in (512, 4096), "align", "512 or 4096")
        need(10 <= self.grace_ms <= 60_000, "grace_ms", "10 to 60000 ms")
        need(self.clock in ("plain", "strict"), "clock", "plain or strict")
        need(self.block_bytes > 0, "block_bytes", "at least one byte")
        need(
            self.block_bytes + self.align <= self.slab,
            "block_bytes",
            f"block and header page have to fit a slab of {self.slab} bytes: see slab_bytes, memory",
        )
        for knob in ("max_sessions", "max_namespaces", "max_put_bytes", "max_queued_blocks"):
            need(getattr(self, knob) >= 1, knob, "at least 1")
        for knob in ("max_requests", "max_channels", "max_regions"):
            need(1 <= getattr(self, knob) <= 1 << 20, knob, "1 to 1048576")
        for knob in ("put_timeout_ms", "stage_timeout_ms", "ack_timeout_ms"):
            need(1 <= getattr(self, knob) <= 3_600_000, knob, "1 ms to an hour")
        need(1 <= self.stop_timeout <= 86_400, "stop_timeout", "1 second to a day")
        need(0 <= self.flash_threads <= 256, "flash_threads", "0 to 256")
        need(0 <= self.dirty_bytes <= self.memory, "dirty_bytes", "no more than the memory")
        paths = [path.path for path in self.flash_paths]
        need(all(map(str, paths)) and len(set(paths)) == len(paths), "flash", "PATH or PATH:SIZE, each once")
        need(len(paths) <= 64, "flash", "at most 64 devices")
        need(
            self.log_level in ("debug", "info", "warning", "error"),
            "log_level",
            "debug, info, warning, error",
        )

    @property
    def slab(self) -> int:
        """Bytes of a slab, worked out."""
        if self.slab_bytes:
            return self.slab_bytes
        return min(max(self.memory // 16 // (2 * MIB) * (2 * MIB), 2 * MIB), 256 * MIB)

    @property
    def flash_paths(self) -> list[FlashPath]:
        """``flash``, taken apart."""
        return [parse_path(text) for text in self.flash]

    @property
    def dirty_max(self) -> int:
        """Bytes that may wait to be written to flash, worked out."""
        return self.dirty_bytes or self.memory // 2

    @property
    def node_name(self) -> str:
        return self.name or socket.gethostname() or "node"

    def check_exposure(self) -> None:
        """LocalError if the node would serve strangers: beyond the loopback address, without a secret."""
        if self.secret or self.insecure or is_loopback(self.listen[0]):
            return
        raise LocalError(
            f"{self.listen[0]} can be reached from other machines, and there is no secret",
            "--secret-file FILE or MEMKV_SECRET on node and peers; --insecure if the network is closed",
        )

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> NodeConfig:
        """The defaults, under a TOML file, under ``overrides`` (those that are not None).

        Besides the fields, ``secret_file`` names a file with the secret.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values.update(tomllib.loads(Path(path).read_text(encoding="utf-8")))
            except OSError as exc:
                raise LocalError(f"{path} cannot be read: {exc.strerror}", "--config") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
                raise LocalError(f"{path}: {exc}", "--config takes a TOML file") from None
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls(**_coerced(values))


_SIZES = ("memory", "slab_bytes", "max_msg", "block_bytes", "max_put_bytes", "dirty_bytes")


def _coerced(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the fields want them; a wrong key or type is a LocalError."""
    known = {f.name: f for f in fields(NodeConfig)}
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key == "secret_file":
            out["secret"] = read_secret(value)
        elif key not in known:
            raise LocalError(f"there is no setting {key}", f"known: {', '.join([*known, 'secret_file'])}")
        elif key in _SIZES:
            out[key] = parse_size(value, key)
        elif key == "listen":
            out[key] = parse_address(value, key)
        elif key == "metrics":
            out[key] = parse_address(value, key, DEFAULT_PORT + 1) if value else None
        elif key == "devices":
            out[key] = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        elif key == "flash":
            out[key] = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(path, str) for path in out[key]):
                raise LocalError(f"flash = {value!r}", 'flash takes ["PATH", "PATH:SIZE"]')
        elif key == "secret":
            out[key] = value.encode() if isinstance(value, str) else value
        elif key == "huge":
            words = {"auto": None, "true": True, "false": False, "yes": True, "no": False}
            out[key] = words.get(value.lower(), value) if isinstance(value, str) else value
            if out[key] not in (None, True, False):
                raise LocalError(f"huge = {value!r}", "auto, true or false")
        else:
            default = known[key].default
            want = type(default) if default is not MISSING else type(value)
            if type(value) is not want:
                raise LocalError(f"{key} = {value!r}", f"{key} takes a value of type {want.__name__}")
            out[key] = value
    return out

"""The node's settings as flags: one for every field of :class:`NodeConfig`, under a TOML file.

Values go to ``NodeConfig.load`` as they were typed, so that flags and lines of TOML are checked in one place.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from ..rdma.clock import hypervisor
from ..store.config import _SIZES, NodeConfig

F = TypeVar("F", bound=Callable[..., Any])

# In the order of --help. "secret" itself is no flag: everybody on a machine can read a process's arguments.
HELP = {
    "listen": "Control connections; beyond the loopback address a secret is needed.",
    "metrics": "HTTP with /metrics, /health and /status; off unless given.",
    "name": "In logs and metrics; by default the host's name.",
    "memory": "Of blocks: mapped at the start, registered slab by slab as namespaces grow.",
    "slab_bytes": "What a namespace grows by: a sixteenth of the memory, 2 to 256 MiB, unless given.",
    "huge": "Explicit 2 MiB pages: demanded, never, or if enough are free.",
    "fabric": "verbs if a device can be used, else tcp; or one that has to be.",
    "devices": "verbs: RDMA devices, one rail each (up to four; repeat it, or separate by commas).",
    "ib_port": "verbs: the device's port; 0: the first that is active.",
    "gid_index": "verbs: -1: ranked, see memkv-node doctor.",
    "max_msg": "verbs: lowers the longest message of a device; 0: its own.",
    "data_port": "tcp: port of the data connections, on the same host; 0: any.",
    "secret_file": "The shared secret, of every node and peer of a cluster; or the variable MEMKV_SECRET.",
    "insecure": "Serve other machines without a secret.",
    "block_bytes": "Namespaces: payload of a block, where the peer does not say.",
    "align": "Namespaces: alignment of payloads.",
    "grace_ms": "Namespaces: how long the bytes of an evicted block stay as they are.",
    "flash": "A file or block device that blocks go to; SIZE makes the file (repeat it for more devices).",
    "dirty_bytes": "May wait to be written to flash; 0: half of the memory.",
    "flash_threads": "Demands threads for flash I/O, so many a device; 0: io_uring if it can be had.",
    "clock": "What peers are advised: strict where a clock may stand still; auto: strict under a hypervisor.",
    "max_sessions": "Control connections at once.",
    "max_namespaces": "Namespaces at once.",
    "max_put_bytes": "Set aside at once for the puts of one channel.",
    "max_queued_blocks": "Blocks of puts that one session may have queued.",
    "max_requests": "Requests of one session under way at once.",
    "max_channels": "Channels of one session.",
    "max_regions": "Regions that one session may offer at once.",
    "put_timeout_ms": "For puts and deletes whose peer does not say.",
    "stage_timeout_ms": "For bringing blocks from flash, where the peer does not say.",
    "ack_timeout_ms": "For a session to act on a notice, else it is closed.",
    "stop_timeout": "Seconds for a clean stop, most of them for what is still to be written to flash.",
    "log_level": "What is logged, to standard error.",
}
METAVAR = {
    "listen": "HOST:PORT",
    "metrics": "HOST:PORT",
    "huge": "auto|true|false",
    "fabric": "auto|verbs|tcp",
    "devices": "NAME",
    "align": "512|4096",
    "flash": "PATH[:SIZE]",
    "clock": "auto|plain|strict",
    "stop_timeout": "SECONDS",
    "secret_file": "FILE",
    "log_level": "debug|info|warning|error",
}
ALIASES = {"devices": "--device", "slab_bytes": "--slab-size", "huge": "--huge-pages"}


def settings() -> list[str]:
    """Every setting that has a flag, in the order of --help."""
    names = {f.name for f in fields(NodeConfig) if f.name != "secret"} | {"secret_file"}
    return sorted(names, key=lambda n: (list(HELP).index(n) if n in HELP else len(HELP), n))


def node_options(*names: str) -> Callable[[F], F]:
    """A decorator that adds flags to a command: for the settings named, else for all."""

    def decorate(function: F) -> F:
        for name in reversed(names or settings()):
            function = _option(name)(function)
        return function

    return decorate


def _option(name: str) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    names = [name, flag, *([ALIASES[name]] if name in ALIASES else [])]
    field = next((f for f in fields(NodeConfig) if f.name == name), None)
    default = field.default if field and field.default is not MISSING else None
    default = "auto" if name == "clock" else default
    text = HELP.get(name, "")
    shown = _written(name, default)
    if shown not in ("", None):
        text += f" [{shown}]"
    if isinstance(default, bool):
        return click.option(name, f"{flag}/--no-{flag[2:]}", default=None, help=text)
    metavar = METAVAR.get(name)
    if name in ("devices", "flash"):
        return click.option(*names, metavar=metavar, multiple=True, help=text)
    if isinstance(default, int) and name not in _SIZES:
        return click.option(*names, type=int, metavar=metavar or "N", help=text)
    return click.option(*names, metavar=metavar or ("SIZE" if name in _SIZES else "TEXT"), help=text)


def load(path: str | None, flags: Mapping[str, Any]) -> tuple[NodeConfig, str]:
    """The settings, and why the clock is the one that it is.

    :param flags: by setting; None or () where a flag was not given.
    :raises LocalError: a setting that cannot be.
    """
    given = {k: v for k, v in flags.items() if v not in (None, ())}
    if "devices" in given:
        given["devices"] = ",".join(given["devices"])
    clock = given.pop("clock", None)
    config = NodeConfig.load(path, **given)
    if clock not in (None, "auto"):
        return replace(config, clock=clock), "--clock"
    if (
        clock is None
        and path is not None
        and "clock" in tomllib.loads(Path(path).read_text(encoding="utf-8"))
    ):
        return config, str(path)
    found = hypervisor()
    if found is None:
        return replace(config, clock="plain"), "no hypervisor was found"
    return replace(config, clock="strict"), f"under a hypervisor ({found}) clocks may stand still"


def as_toml(config: NodeConfig) -> str:
    """The settings as a file for ``--config``, but for the secret."""
    lines = [
        f"{name} = {_literal(name, getattr(config, name))}" for name in settings() if name != "secret_file"
    ]
    lines.append(f"# secret_file: {'a secret is set' if config.secret else 'no secret is set'}")
    return "\n".join(lines) + "\n"


def _literal(name: str, value: Any) -> str:
    if isinstance(value, tuple) and name in ("devices", "flash"):
        return f"[{', '.join(map(_quoted, value))}]"
    written = _written(name, value)
    plain = isinstance(value, int) and name not in _SIZES and name != "huge"
    return str(written) if plain else _quoted(str(written))


def _written(name: str, value: Any) -> str | int | None:
    """A value as one types it."""
    if name in ("listen", "metrics"):
        return (
            "" if not value else f"[{value[0]}]:{value[1]}" if ":" in value[0] else f"{value[0]}:{value[1]}"
        )
    if name == "huge":
        return {None: "auto", True: "true", False: "false"}[value]
    if isinstance(value, bool):
        return str(value).lower()
    if name in _SIZES and value is not None:
        return _size(value)
    if isinstance(value, tuple):
        return ",".join(value)
    return value if value is None or isinstance(value, int) else str(value)


def written(address: tuple[str, int]) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _size(value: int) -> str:
    for unit, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if value and value % (1 << shift) == 0:
            return f"{value >> shift}{unit}"
    return str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

"""What an operator tells a connector: in the engine's own configuration, else in the environment.

Every engine hands its plug-in a mapping. The names in it are the fields of :class:`Settings`; an unknown one
is an error, since a misspelt deadline would otherwise be a default that nobody asked for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..rdma.errors import LocalError
from .identity import Identity

if TYPE_CHECKING:
    from ..peer import Peer

DURABILITIES = ("memory", "flash")
FABRICS = ("auto", "verbs", "tcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``nodes`` is due, the rest has defaults. In the environment: MEMKV_NODES (with commas between), and for
    every other field MEMKV_ and its name in capitals.
    """

    nodes: tuple[str, ...]  # "host:port"; the same list, in any order, for all that share blocks
    secret_file: str | None = None  # or MEMKV_SECRET itself
    fabric: str = "auto"  # "verbs", "tcp"; auto: verbs where it can be had
    devices: tuple[str, ...] = ()  # RDMA devices; all usable ones if empty
    gid_index: int | None = None
    namespace: str = ""  # in front of the namespace's name: keeps deployments apart on one node
    salt: str = ""  # keeps tenants apart who must not see each other's hits
    durability: str = "memory"  # of puts: "flash" acknowledges when a block is on stable media
    checksum: bool = False  # verify payloads at gets, too
    get_timeout: float = 2.0  # seconds for a batch; what is late is a miss, and is computed
    put_timeout: float = 10.0  # seconds; what is late is not kept
    connect_timeout: float = 5.0  # seconds, and for control requests
    max_channels: int = 4  # batches READ from one node at the same time

    def __post_init__(self) -> None:
        if not self.nodes:
            raise LocalError(
                "no memkv node is named", '"nodes": "host:7420,…" in its settings, or MEMKV_NODES'
            )
        for name, allowed in (("durability", DURABILITIES), ("fabric", FABRICS)):
            if getattr(self, name) not in allowed:
                raise LocalError(f"{name} is {getattr(self, name)!r}", f"{name}: one of {', '.join(allowed)}")
        for name in ("get_timeout", "put_timeout", "connect_timeout"):
            if not 0 < getattr(self, name) <= 3600:
                raise LocalError(f"{name} is {getattr(self, name):g} s", f"{name}: above 0, at most 3600")
        if not 1 <= self.max_channels <= 64:
            raise LocalError(f"max_channels is {self.max_channels}", "max_channels: 1 to 64")

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, *, ignore: Collection[str] = ()) -> Settings:
        """Settings from an engine's mapping and the environment.

        :param ignore: names in the mapping that are the engine's own.
        :raises LocalError: an unknown name, or a value that cannot be meant; it names the knob.
        """
        given = {k: v for k, v in (given or {}).items() if k not in ignore and v is not None}
        known = {f.name: f for f in fields(cls)}
        for name in given:
            if name not in known:
                raise LocalError(f"memkv has no setting {name!r}", f"there are: {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, field in known.items():
            raw = given.get(name, os.environ.get(f"MEMKV_{name.upper()}") or None)
            if raw is None:
                if field.default is MISSING:
                    raw = ()
                else:
                    continue
            values[name] = _convert(name, str(field.type), raw)
        return cls(**values)

    def connect(self, identity: Identity, block_bytes: int) -> Peer:
        """A peer for the blocks of ``identity``, of at most ``block_bytes`` each.

        :raises MemKVError: no node can be reached, or none can be used.
        """
        from ..peer import Peer

        return Peer(
            self.nodes,
            identity.namespace(block_bytes, prefix=self.namespace),
            secret_file=self.secret_file,
            block_bytes=block_bytes,
            fabric=self.fabric,
            devices=self.devices,
            gid_index=self.gid_index,
            checksum=self.checksum,
            timeout=self.connect_timeout,
            max_channels=self.max_channels,
        )


def _convert(name: str, kind: str, raw: Any) -> Any:
    try:
        if kind.startswith("tuple"):
            parts: Sequence[Any] = raw.split(",") if isinstance(raw, str) else raw
            return tuple(part for p in parts if (part := str(p).strip()))
        if kind == "bool":
            return _truth(raw)
        if kind.startswith("int"):
            if isinstance(raw, bool) or int(raw) != float(raw):
                raise ValueError
            return int(raw)
        if kind == "float":
            if isinstance(raw, bool):
                raise ValueError
            return float(raw)
    except (TypeError, ValueError):
        raise LocalError(f"{name} is {raw!r}", f"{name} takes {kind.partition(' ')[0]}") from None
    if not isinstance(raw, str | os.PathLike):
        raise LocalError(f"{name} is {raw!r}", f"{name} takes text")
    return str(raw)


def _truth(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word not in ("0", "1", "true", "false", "yes", "no", "on", "off"):
        raise ValueError
    return word in ("1", "true", "yes", "on")

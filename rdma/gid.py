"""Choosing the GID by which a port is addressed, and saying why.

A RoCE port has a table of them: RoCE v1 and v2, link-local, IPv4-mapped, one per VLAN. Taking the first or a
fixed index is the classic way to a connection that hangs. The choice here is a ranking whose reasons can be
printed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError, LocalError

SYS = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class Gid:
    """One entry of a port's table."""

    index: int
    value: ipaddress.IPv6Address
    kind: str  # "RoCE v2", "RoCE v1", "IB"
    netdev: str

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The IP address that it stands for."""
        return self.value.ipv4_mapped or self.value


@dataclass(frozen=True, slots=True)
class Choice:
    """A GID and the reason; ``rejected`` holds every other entry with its own."""

    gid: Gid
    reason: str
    rejected: tuple[tuple[Gid, str], ...]


def read_table(device: str, port: int, sys: Path = SYS) -> list[Gid]:
    """The GIDs of a port that are in use, from sysfs."""
    base = sys / device / "ports" / str(port)
    table = []
    for file in sorted((base / "gids").iterdir(), key=lambda p: int(p.name)):
        index = int(file.name)
        try:
            value = ipaddress.IPv6Address(file.read_text().strip())
            if int(value) == 0:
                continue
            kind = (base / "gid_attrs/types" / file.name).read_text().strip()
            netdev = (base / "gid_attrs/ndevs" / file.name).read_text().strip()
        except OSError:  # an empty entry's attributes cannot be read
            continue
        table.append(
            Gid(index, value, "IB" if kind.startswith("IB") and "RoCE" not in kind else kind, netdev)
        )
    return table


def choose(
    table: Sequence[Gid],
    local_addresses: Iterable[str] = (),
    *,
    index: int | None = None,
    toward: str | None = None,
) -> Choice:
    """Ranks a GID table.

    RoCE v2 goes before v1 (v1 is not routable), an address that its netdev really carries before one that it
    does not, the address ``toward`` (that the other side or the user named) before all, IPv4 and global IPv6
    before link-local.

    :param local_addresses: addresses that this machine's interfaces carry.
    :param index: the user's own choice, which is taken as it is if it exists.
    :raises LocalError: ``index`` is not in the table.
    :raises DeviceError: the table is empty.
    """
    if not table:
        raise DeviceError(
            "the port has no GID", 0, "give its network interface an address: ip addr add … dev …"
        )
    if index is not None:
        for gid in table:
            if gid.index == index:
                return Choice(gid, f"GID index {index} was asked for", ())
        known = ", ".join(str(g.index) for g in table)
        raise LocalError(f"there is no GID with index {index}", f"--gid-index: the port has {known}")
    local = {ipaddress.ip_address(a.split("%")[0]) for a in local_addresses}
    want = ipaddress.ip_address(toward) if toward else None

    def marks(gid: Gid) -> list[tuple[bool, str, str]]:
        return [
            (gid.address == want, "has the address asked for", "does not have the address asked for"),
            (gid.kind in ("RoCE v2", "IB"), gid.kind, f"{gid.kind} is not routable"),
            (gid.address in local, "on its netdev's own address", "its netdev does not carry the address"),
            (not gid.value.is_link_local, "routable", "link-local only"),
            (gid.value.ipv4_mapped is not None, "IPv4", "IPv6"),
        ]

    ranked = sorted(table, key=lambda g: ([not good for good, _, _ in marks(g)], g.index))
    best = ranked[0]
    why = [text for good, text, _ in marks(best)[0 if want else 1 :] if good]
    rejected = []
    for gid in ranked[1:]:
        pairs = zip(marks(best), marks(gid), strict=True)
        first = next((mine[2] for theirs, mine in pairs if theirs[0] and not mine[0]), "a higher index")
        rejected.append((gid, first))
    reason = f"GID index {best.index}, {best.address}" + (f" on {best.netdev}" if best.netdev else "")
    return Choice(best, f"{reason}: {', '.join(why)}" if why else reason, tuple(rejected))

"""Which GID of a port's table is taken, and what is said about the others."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from memkv.rdma.errors import DeviceError, LocalError
from memkv.rdma.gid import Gid, choose, read_table

V1, V2 = "RoCE v1", "RoCE v2"


def g(index: int, address: str, kind: str = V2, netdev: str = "eth0") -> Gid:
    ip = ipaddress.ip_address(address)
    value = ip if isinstance(ip, ipaddress.IPv6Address) else ipaddress.IPv6Address(f"::ffff:{address}")
    return Gid(index, value, kind, netdev)


LINK = "fe80::1"
TYPICAL = [g(0, LINK, V1), g(1, LINK), g(2, "10.0.0.7", V1), g(3, "10.0.0.7")]
VLANS = [
    g(0, LINK, V1),
    g(1, LINK),
    g(2, "10.0.0.7", V1),
    g(3, "10.0.0.7"),
    g(4, "10.1.0.7", V1, "eth0.100"),
    g(5, "10.1.0.7", V2, "eth0.100"),
    g(6, "10.2.0.7", V1, "eth0.200"),
    g(7, "10.2.0.7", V2, "eth0.200"),
]
IPV6 = [g(0, LINK, V1), g(1, LINK), g(2, "2001:db8::7", V1), g(3, "2001:db8::7")]
MIXED = [*IPV6, g(4, "10.0.0.7", V1), g(5, "10.0.0.7")]
HERE = ("127.0.0.1", "::1", LINK, "10.0.0.7", "10.1.0.7", "10.2.0.7", "2001:db8::7")

CASES = [
    # the table, addresses of the machine, index asked for, address toward: index taken, words of the reason
    ("link-local only", [g(0, LINK, V1), g(1, LINK)], (LINK,), None, None, 1, "RoCE v2"),
    (
        "v1 and v2 of each",
        TYPICAL,
        HERE,
        None,
        None,
        3,
        "RoCE v2, on its netdev's own address, routable, IPv4",
    ),
    ("v1 only", [g(0, LINK, V1), g(1, "10.0.0.7", V1)], HERE, None, None, 1, "routable"),
    ("several VLANs: the lowest index", VLANS, HERE, None, None, 3, "on eth0"),
    ("several VLANs, toward one", VLANS, HERE, None, "10.2.0.7", 7, "on eth0.200: has the address asked for"),
    ("toward an address that no GID has", VLANS, HERE, None, "192.0.2.1", 3, "RoCE v2"),
    ("toward a v1 address only", [*TYPICAL, g(4, "10.9.9.9", V1)], HERE, None, "10.9.9.9", 4, "asked for"),
    ("toward an IPv6 address", MIXED, HERE, None, "2001:db8::7", 3, "has the address asked for"),
    ("IPv6 only", IPV6, HERE, None, None, 3, "routable"),
    ("IPv4 before IPv6", MIXED, HERE, None, None, 5, "IPv4"),
    (
        "an address that is no longer there",
        TYPICAL,
        (LINK, "127.0.0.1"),
        None,
        None,
        1,
        "its netdev's own address",
    ),
    ("addresses unknown", TYPICAL, (), None, None, 3, "RoCE v2, routable, IPv4"),
    ("addresses with zones", [g(0, LINK), g(1, "10.0.0.7")], (f"{LINK}%eth0",), None, None, 0, "own address"),
    ("index asked for", TYPICAL, HERE, 0, None, 0, "GID index 0 was asked for"),
    ("index before toward", VLANS, HERE, 2, "10.2.0.7", 2, "was asked for"),
    ("InfiniBand", [g(0, "fe80::2:c903:0:1", "IB", "")], HERE, None, None, 0, "IB"),
]


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_taken_and_why(
    case: tuple[str, list[Gid], tuple[str, ...], int | None, str | None, int, str],
) -> None:
    _, table, local, index, toward, taken, words = case

    choice = choose(table, local, index=index, toward=toward)

    assert choice.gid.index == taken
    assert words in choice.reason


def test_order_of_the_table_does_not_matter() -> None:
    assert choose(VLANS[::-1], HERE).gid == choose(VLANS, HERE).gid


def test_every_other_entry_is_rejected_with_its_own_reason() -> None:
    choice = choose([*TYPICAL, g(4, "10.5.0.1"), g(5, "10.0.0.7")], HERE)

    assert choice.gid.index == 3
    assert {gid.index: why for gid, why in choice.rejected} == {
        0: "RoCE v1 is not routable",
        1: "link-local only",
        2: "RoCE v1 is not routable",
        4: "its netdev does not carry the address",
        5: "a higher index",
    }


def test_unknown_index_names_those_that_exist() -> None:
    with pytest.raises(LocalError, match=r"no GID with index 9 \(--gid-index: the port has 0, 1, 2, 3\)"):
        choose(TYPICAL, HERE, index=9)


def test_empty_table_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match=r"no GID.*ip addr add"):
        choose([])


def port(root: Path, entries: dict[int, tuple[str, str | None, str]]) -> Path:
    """A port in sysfs, as the kernel shows it: 256 files, most of them without a GID."""
    base = root / "mlx5_0/ports/1"
    for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (base / folder).mkdir(parents=True)
    for index in range(16):
        value, kind, netdev = entries.get(index, ("0" * 4 + ":0000" * 7, None, ""))
        (base / "gids" / str(index)).write_text(value + "\n")
        if kind is not None:  # attributes of an empty entry cannot be read
            (base / "gid_attrs/types" / str(index)).write_text(kind + "\n")
            (base / "gid_attrs/ndevs" / str(index)).write_text(netdev + "\n")
    return root


def test_table_is_read_in_order_and_without_empty_entries(tmp_path: Path) -> None:
    link, four = "fe80:0000:0000:0000:0000:0000:0000:0001", "0000:0000:0000:0000:0000:ffff:0a00:0007"
    entries: dict[int, tuple[str, str | None, str]] = {
        0: (link, "IB/RoCE v1", "eth0"),
        1: (link, "RoCE v2", "eth0"),
        3: (four, "RoCE v2", "eth0"),
        10: (four, None, ""),  # vanished between two reads
        11: (four, "RoCE v2", "eth0.100"),
    }

    table = read_table("mlx5_0", 1, port(tmp_path, entries))

    assert [(x.index, str(x.address), x.kind, x.netdev) for x in table] == [
        (0, "fe80::1", "IB/RoCE v1", "eth0"),
        (1, "fe80::1", "RoCE v2", "eth0"),
        (3, "10.0.0.7", "RoCE v2", "eth0"),
        (11, "10.0.0.7", "RoCE v2", "eth0.100"),
    ]


def test_v1_as_the_kernel_writes_it_loses_against_v2() -> None:
    choice = choose([g(0, "10.0.0.7", "IB/RoCE v1"), g(1, "10.0.0.7")], HERE)

    assert choice.gid.index == 1
    assert choice.rejected[0][1] == "IB/RoCE v1 is not routable"

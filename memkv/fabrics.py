"""The peer's rung of the fabric ladder: verbs, else tcp, with the reason."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from .rdma import devices as rdma_devices
from .rdma.errors import DeviceError, LocalError, MemKVError
from .rdma.fabric import Fabric
from .rdma.tcp import TcpFabric
from .rdma.verbs import VerbsFabric


def choose_fabric(
    offered: Sequence[str],
    local_address: str,
    *,
    demanded: str = "auto",
    devices: Sequence[str] = (),
    ib_port: int | None = None,
    gid_index: int | None = None,
    max_msg: int = 0,
) -> Fabric:
    """The best fabric that the node offers and this machine has.

    :param offered: the node's, from its Welcome. :param local_address: ours toward it: the GID should carry
        it.
    :param demanded: "auto", or one that must be taken.
    :raises DeviceError: verbs was demanded, or is all that the node offers, and cannot be used here.
    """
    if demanded not in ("auto", "verbs", "tcp"):
        raise LocalError(f"there is no fabric {demanded!r}", "auto, verbs or tcp")
    if demanded != "auto" and demanded not in offered:
        raise MemKVError(f"the node offers {list(offered)}, not {demanded}", "memkv-node serve --fabric")
    reason = "the node offers only tcp"
    if "verbs" in offered and demanded != "tcp":
        loopback = ipaddress.ip_address(local_address.split("%")[0]).is_loopback
        toward = None if loopback else local_address
        try:
            rails = [
                rdma_devices.select(name, ib_port, gid_index, toward)
                for name in (devices or [None])  # type: ignore[list-item]
            ]
            return VerbsFabric(rails, max_msg=max_msg)
        except DeviceError as exc:
            if demanded == "verbs" or "tcp" not in offered:
                raise
            reason = f"verbs cannot be used: {exc}"
    return TcpFabric(reason="tcp was asked for" if demanded == "tcp" else reason)

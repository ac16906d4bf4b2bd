"""The verbs fabric: pyverbs makes and connects everything, C posts and polls.

A domain is one protection domain per device; an endpoint is one RC queue pair per rail with a completion
queue of its own. Only READ is ever enabled: no memory region and no queue pair of ours allows remote writes
or atomics.
"""

from __future__ import annotations

import ipaddress
import secrets
from typing import Any

from . import devices, dmabuf
from ._ptr import qp_pointer
from ._pv import HINT, missing, pv
from .errors import DeviceError, LocalError
from .fabric import (
    REMOTE_READ,
    Domain,
    Endpoint,
    Fabric,
    Offer,
    RailEnd,
    Region,
    Registered,
    RemoteTable,
    Role,
)
from .native._rdma import ffi, lib

MEMLOCK_HINT = "memlock is too low: ulimit -l unlimited, LimitMEMLOCK=infinity in the unit, or CAP_IPC_LOCK"
_SQ_SPARE = 8  # work requests beyond `depth`: the marker that follows an error, and slack


def _ack_timeout(grace_ns: int) -> int:
    """The queue pair's ACK timeout exponent t (4.096 µs · 2^t) such that six retries end before grace/2.

    Not below 12 (17 ms): shorter ones fire on loaded machines, and a late READ fails the grace check anyway.
    """
    t = 12
    while t < 18 and 8 * 4096 * 2 ** (t + 1) <= grace_ns // 2:
        t += 1
    return t


def _flags(access: int) -> int:
    return int(pv().IBV_ACCESS_REMOTE_READ if access & REMOTE_READ else pv().IBV_ACCESS_LOCAL_WRITE)


class VerbsFabric(Fabric):
    """One or more devices, each a rail of every channel.

    :param selections: device, port and GID of each rail.
    :param max_msg: lowers the longest message (to test segmentation); 0: the port's own.
    :param grace_ns: the namespace grace period that the retry timers have to fit in.
    """

    name = "verbs"

    def __init__(
        self, selections: list[devices.Selection], *, max_msg: int = 0, grace_ns: int = 10**9
    ) -> None:
        if missing():
            raise DeviceError(missing(), 0, HINT)
        if not 1 <= len(selections) <= 4:
            raise LocalError(f"{len(selections)} rails", "one to four devices")
        self.rails = selections
        self.max_msg = max_msg
        self.grace_ns = grace_ns
        self.reason = "; ".join(s.reason for s in selections)
        self.contexts = [pv().Context(name=s.device.name) for s in selections]

    def domain(self) -> VerbsDomain:
        return VerbsDomain(self)

    def describe(self) -> dict[str, str | int | float | bool]:
        first = self.rails[0]
        return {
            "fabric": "verbs",
            "devices": ", ".join(f"{s.device.name}:{s.port.number}" for s in self.rails),
            "driver": first.device.driver,
            "gid": f"{first.gid.gid.index} ({first.gid.gid.address}, {first.gid.gid.kind})",
            "mtu": first.port.mtu,
            "max_msg": self.longest(0),
            "max_rd_atomic": min(s.device.max_rd_atomic for s in self.rails),
        }

    def longest(self, rail: int) -> int:
        """The longest message of a rail, bytes."""
        own = self.rails[rail].port.max_msg
        return min(own, self.max_msg) if self.max_msg else own

    def close(self) -> None:
        for ctx in self.contexts:
            ctx.close()


class VerbsDomain(Domain):
    """A protection domain on each device."""

    def __init__(self, fabric: VerbsFabric) -> None:
        super().__init__(fabric)
        self.verbs = fabric
        self.pds = [pv().PD(ctx) for ctx in fabric.contexts]
        self.endpoints: set[VerbsEndpoint] = set()

    def _register(self, address: int, length: int, access: int) -> Registered:
        mrs: list[Any] = []
        try:
            mrs.extend(pv().MR(pd, length, _flags(access), address=address) for pd in self.pds)
        except pv().PyverbsRDMAError as exc:
            for mr in mrs:
                mr.close()
            code = exc.error_code
            hint = MEMLOCK_HINT if code in (12, 11) else "is the whole range mapped and readable?"
            raise DeviceError(f"registering {length} bytes failed: {exc}", code, hint) from None
        return mrs, [(address, mr.lkey, mr.rkey) for mr in mrs], 0

    def _register_device(
        self, address: int, length: int, access: int, dma_buf: tuple[int, int] | None
    ) -> Registered:
        mrs: list[Any] = []
        keys: list[tuple[int, int, int]] = []
        try:
            for pd in self.pds:
                if dma_buf is None:
                    mr, iova = pv().MR(pd, length, _flags(access), address=address), address
                else:
                    mr, iova = dmabuf.register(pd, dma_buf, length, address, _flags(access))
                mrs.append(mr)
                keys.append((iova, mr.lkey, mr.rkey))
        except pv().PyverbsRDMAError as exc:
            for mr in mrs:
                mr.close()
            rail = self.verbs.rails[len(mrs)].device.name
            raise dmabuf.refused(exc.error_code, length, rail, by_address=dma_buf is None) from None
        return mrs, keys, 0

    def _unregister(self, region: Region) -> None:
        for mr in region.handles:
            mr.close()

    def endpoint(
        self, role: Role, remote: RemoteTable | None = None, *, depth: int = 128, dial: bool = False
    ) -> VerbsEndpoint:
        return VerbsEndpoint(self, role, remote, depth)

    def close(self) -> None:
        for endpoint in list(self.endpoints):
            endpoint.close()
        for region in list(self.regions.values()):
            region.close()
        for pd in self.pds:
            pd.close()


class VerbsEndpoint(Endpoint):
    """A queue pair per rail, from RESET to RTS, and for a reader the C channel over them."""

    def __init__(self, domain: VerbsDomain, role: Role, remote: RemoteTable | None, depth: int) -> None:
        self.domain = domain
        self.role = role
        self.remote = remote
        self.depth = depth
        self.qps: list[Any] = []
        self.cqs: list[Any] = []
        self.comps: list[Any] = []
        self._channel: Any = ffi.NULL
        self._psn = [secrets.randbelow(1 << 24) for _ in domain.pds]
        try:
            for i in range(len(domain.pds)):
                self._make(i)
        except pv().PyverbsError as exc:
            self.close()
            code = getattr(exc, "error_code", 0)
            raise DeviceError(f"a queue pair cannot be made: {exc}", code, MEMLOCK_HINT) from None
        self.offer = Offer("verbs", rails=tuple(self._end(i) for i in range(len(self.qps))))
        domain.endpoints.add(self)

    def _sq_depth(self, rail: int) -> int:
        limit: int = self.domain.verbs.rails[rail].device.max_qp_wr
        return min(self.depth, limit - _SQ_SPARE) if self.role == "read" else 1

    def _make(self, rail: int) -> None:
        ctx = self.domain.verbs.contexts[rail]
        send = self._sq_depth(rail) + _SQ_SPARE
        comp = pv().CompChannel(ctx)
        cq = pv().CQ(ctx, send + 8, None, comp, 0)
        cap = pv().QPCap(max_send_wr=send, max_recv_wr=1, max_send_sge=4, max_recv_sge=1, max_inline_data=0)
        init = pv().QPInitAttr(qp_type=pv().IBV_QPT_RC, scq=cq, rcq=cq, cap=cap, sq_sig_all=0)
        self.comps.append(comp)
        self.cqs.append(cq)
        self.qps.append(pv().QP(self.domain.pds[rail], init))

    def _end(self, rail: int) -> RailEnd:
        s = self.domain.verbs.rails[rail]
        return RailEnd(
            s.device.name,
            s.gid.gid.value.packed,
            self.qps[rail].qp_num,
            self._psn[rail],
            s.port.mtu,
            min(s.device.max_rd_atomic, 128),
            s.port.lid,
        )

    def connect(self, other: Offer, host: str = "", timeout: float = 5.0) -> None:
        if len(other.rails) != len(self.qps):
            raise LocalError(
                f"{len(self.qps)} rails here, {len(other.rails)} on the other side", "--device on both sides"
            )
        for i, end in enumerate(other.rails):
            self._to_rts(i, end)
        if self.role == "read":
            self._open_channel()

    def _to_rts(self, rail: int, end: RailEnd) -> None:
        s = self.domain.verbs.rails[rail]
        attr = pv().QPAttr()
        attr.port_num = s.port.number
        attr.pkey_index = 0
        attr.qp_access_flags = int(pv().IBV_ACCESS_REMOTE_READ)
        dgid = pv().GID(ipaddress.IPv6Address(end.gid).exploded)
        route = pv().GlobalRoute(dgid=dgid, sgid_index=s.gid.gid.index, hop_limit=64)
        attr.ah_attr = pv().AHAttr(port_num=s.port.number, is_global=1, gr=route, dlid=end.lid)
        attr.path_mtu = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}[min(end.mtu, s.port.mtu)]
        attr.dest_qp_num = end.qpn
        attr.rq_psn = end.psn
        attr.sq_psn = self._psn[rail]
        attr.max_dest_rd_atomic = min(s.device.max_rd_atomic, 128)
        attr.max_rd_atomic = max(1, min(s.device.max_init_rd_atomic, end.rd_atomic, 128))
        attr.min_rnr_timer = 12
        attr.timeout = _ack_timeout(self.domain.verbs.grace_ns)
        attr.retry_cnt = 6  # soft-RoCE takes 7 for ever
        attr.rnr_retry = 6
        try:
            self.qps[rail].to_rts(attr)
        except pv().PyverbsError as exc:
            raise DeviceError(
                f"queue pair {self.qps[rail].qp_num} cannot be connected: {exc}",
                getattr(exc, "error_code", 0),
                f"GID index {s.gid.gid.index} was used; --gid-index, memkv-node doctor lists them",
            ) from None

    def _open_channel(self) -> None:
        assert self.remote is not None
        rails = ffi.new("struct mkv_verbs_rail[]", len(self.qps))
        for i, qp in enumerate(self.qps):
            rails[i].qp = qp_pointer(qp, self.domain.pds[i])
            rails[i].sq_depth = self._sq_depth(i)
            rails[i].max_sge = 4
            rails[i].max_msg = self.domain.verbs.longest(i)
        self._channel = lib.mkv_verbs_channel_new(
            rails, len(self.qps), self.depth, self.domain.table.ptr, self.remote.ptr
        )
        if self._channel == ffi.NULL:
            raise DeviceError("no channel over these queue pairs", ffi.errno)

    @property
    def channel(self) -> Any:
        return self._channel

    def close(self) -> None:
        for things in (self.qps, self.cqs, self.comps):
            while things:
                things.pop().close()
        if self._channel != ffi.NULL:
            lib.mkv_verbs_channel_free(self._channel)
            self._channel = ffi.NULL
        self.domain.endpoints.discard(self)

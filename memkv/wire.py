"""Between the fabrics' descriptions and the control protocol's messages: the same facts for the wire."""

from __future__ import annotations

from .rdma.fabric import Offer, RailEnd, RegionDesc
from .store import messages as m


def to_region(desc: RegionDesc) -> m.RegionInfo:
    keys = [m.RailKey(iova, rkey) for iova, rkey in desc.rails]
    return m.RegionInfo(desc.id, desc.length, desc.access, desc.secret, keys)


def from_region(info: m.RegionInfo) -> RegionDesc:
    rails = tuple((key.iova, key.rkey) for key in info.rails)
    return RegionDesc(info.id, info.length, info.access, info.secret, rails)


def to_rails(offer: Offer) -> list[m.RailInfo]:
    return [m.RailInfo(e.device, e.gid, e.qpn, e.psn, e.mtu, e.rd_atomic, e.lid) for e in offer.rails]


def from_channel(fabric: str, info: m.ChannelInfo) -> Offer:
    rails = tuple(RailEnd(r.device, r.gid, r.qpn, r.psn, r.mtu, r.rd_atomic, r.lid) for r in info.rails)
    return Offer(fabric, rails, info.port, info.token, info.streams)

"""A connected pair: memory on the serving side, memory on the reading side, a channel between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.rdma.fabric import Domain, Endpoint, Fabric, Region, RemoteTable
from memkv.rdma.jobs import READ
from memkv.rdma.memory import HostMemory

NBYTES = 8 << 20


@dataclass
class Pair:
    serve: Domain
    read: Domain
    source: HostMemory
    target: HostMemory
    offered: Region
    into: Region
    remote: RemoteTable
    ends: list[Endpoint]

    def connect(self, depth: int = 64) -> Any:
        """A new channel from read to serve."""
        here = self.serve.endpoint("serve")
        there = self.read.endpoint("read", self.remote, depth=depth, dial=True)
        self.ends += [there, here]
        if here.offer.fabric == "verbs":
            here.connect(there.offer, "", 5)
        there.connect(here.offer, "127.0.0.1", 5)
        return there.channel

    def reads(self, offsets: npt.ArrayLike, lengths: npt.ArrayLike) -> npt.NDArray[np.void]:
        """READs of those spans, each to the same place on our side."""
        at = np.atleast_1d(np.asarray(offsets, np.uint64))
        out = np.zeros(len(at), READ)
        out["cookie"] = np.arange(len(at)) + 7
        out["offset"], out["region"], out["nseg"] = at, self.offered.id, 1
        out["seg"]["offset"][:, 0], out["seg"]["region"][:, 0] = at, self.into.id
        out["seg"]["length"][:, 0] = lengths
        return out


@pytest.fixture
def pair(fabrics: tuple[Fabric, Fabric]) -> Iterator[Pair]:
    serve, read = fabrics[0].domain(), fabrics[1].domain()
    source, target = HostMemory(NBYTES), HostMemory(NBYTES)
    source.array[:] = np.random.default_rng(1).integers(0, 256, source.nbytes, dtype=np.uint8)
    offered = serve.register(source.address, source.nbytes, remote_read=True, owner=source)
    into = read.register(target.address, target.nbytes, owner=target)
    remote = RemoteTable()
    remote.add(offered.desc)
    made = Pair(serve, read, source, target, offered, into, remote, [])
    yield made
    for end in made.ends:
        end.close()
    read.close()
    serve.close()

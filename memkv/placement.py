"""Placement: which node holds a key. Rendezvous hashing of the key's tag over a list of names.

Every (node, tag) pair has a weight that anyone can compute; the node with the highest weight holds the
tag's keys. So peers agree without talking, nodes know nothing of each other, and when a node leaves the
list only its own keys move: every other tag still finds the same highest weight. The order of the list
does not matter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from .keys import KEY_BYTES, TAG_BYTES
from .rdma.errors import LocalError

_PERSON = b"memkv-node-v1"
_ROWS = 1 << 16  # weights computed at once: half a MiB
_FEW = 32  # tags in a short batch
_KNOWN = 1 << 16  # tags that are remembered


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Stafford's 64-bit mixer, variant 13: mkv_mix64 in store/native/layout.h."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Placement:
    """A fixed list of nodes. ``names``: as given.

    LocalError for an empty list, or names that occur twice (after Unicode normalisation).
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names or not all(names):
            raise LocalError("placement needs at least one node, and no empty name")
        normal = [unicodedata.normalize("NFC", name).encode() for name in names]
        digests = [
            int.from_bytes(blake2b(name, digest_size=8, person=_PERSON).digest(), "little") for name in normal
        ]
        if len(set(digests)) != len(digests):
            raise LocalError("a node's name occurs twice", "give each node a name of its own")
        self.names = tuple(names)
        self._digests = np.array(digests, np.uint64)
        self._known: dict[int, int] = {}  # tag → node, for short batches: ten times cheaper than weighing

    def __len__(self) -> int:
        return len(self.names)

    def nodes(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        """(n,) index into ``names`` of the node of each of the (n, 16) uint8 ``keys``.

        Costs one evaluation per node for each run of keys with the same tag. LocalError for another shape
        or dtype.
        """
        if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
            raise LocalError(f"keys of shape {keys.shape} and type {keys.dtype}, where (n, 16) uint8 is due")
        n = len(keys)
        if len(self.names) == 1 or n == 0:
            return np.zeros(n, np.intp)
        tags = np.ascontiguousarray(keys[:, :TAG_BYTES]).view("<u4").ravel()
        starts = np.flatnonzero(tags[1:] != tags[:-1]) + 1
        if not len(starts):
            return np.full(n, self._few([int(tags[0])])[0], np.intp)
        starts = np.concatenate(([0], starts))
        tags = tags[starts]
        nodes = self._few(tags.tolist()) if len(tags) <= _FEW else self._weigh(tags)
        return np.repeat(nodes, np.diff(starts, append=n))

    def _few(self, tags: list[int]) -> npt.NDArray[np.intp]:
        """As _weigh, by way of what is known already."""
        found = [self._known.get(tag) for tag in tags]
        if None in found:
            found = self._weigh(np.array(tags, np.uint32)).tolist()
            if len(self._known) > _KNOWN:
                self._known.clear()
            self._known.update(zip(tags, found, strict=True))
        return np.array(found, np.intp)

    def _weigh(self, tags: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
        out = np.empty(len(tags), np.intp)
        step = max(1, _ROWS // len(self.names))
        for start in range(0, len(tags), step):
            part = tags[start : start + step].astype(np.uint64)[:, None]
            weights = _mix64(_mix64(part ^ self._digests) + self._digests)
            out[start : start + step] = weights.argmax(axis=1)
        return out

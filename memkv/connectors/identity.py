"""What a connector's blocks are of: all that their bytes depend on besides the tokens.

Whatever differs here can never hit, and two processes, two hosts or a restart in which all of it agrees can:
from it come the namespace (with the size of its blocks) and the key space, whose root is part of every key
(docs/keys.md). Ranks are in the keys only, so that the ranks of one deployment share a namespace.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np

from ..keys import KEY_BYTES, TAG_BYTES, Keys, KeySpace, keys_from_digests
from ..rdma.errors import LocalError

READABLE_BYTES = 96  # of a namespace's name, before its digest


def piece_mask(content: bytes, person: bytes) -> Keys:
    """(16,) what a piece's key differs by (exclusive or) from that of its block: a digest of 12 bytes. The
    placement tag is left alone, so that a block's pieces lie on one node. Keys are as good as random, and so
    are these: which two are alike is as likely as with digests of their own, at a hundredth of the time.
    """
    out = np.zeros(KEY_BYTES, np.uint8)
    digest = blake2b(content, digest_size=KEY_BYTES - TAG_BYTES, person=person).digest()
    out[TAG_BYTES:] = np.frombuffer(digest, np.uint8)
    return out


@dataclass(frozen=True, kw_only=True)
class Identity:
    """:param engine: whose block hashes and layout these are, and in which version of the format.
    :param model: as the engine names it, with its revision if there is one.
    :param layout: the order of the dimensions in a block, in the engine's words.
    :param block_tokens: tokens of one block.
    :param labels: whatever else the bytes depend on: quantisation, LoRA adapter, layer group, pool, head
        counts, …

    LocalError as for :class:`memkv.keys.KeySpace`, for all but empty fields.
    """

    engine: str
    model: str
    dtype: str
    layout: str
    block_tokens: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    salt: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.engine or "engine" in self.labels:
            raise LocalError("an identity needs engine, and no label of that name")
        _ = self.space

    @cached_property
    def space(self) -> KeySpace:
        """The key space: where every key of these blocks starts."""
        return KeySpace(
            model=self.model,
            dtype=self.dtype,
            layout=self.layout,
            block_tokens=self.block_tokens,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            salt=self.salt,
            labels={"engine": self.engine, **self.labels},
        )

    def keys(self, hashes: Iterable[bytes]) -> Keys:
        """(n, 16) keys of blocks that the engine names by hashes of their own, each of block *and prefix*."""
        return keys_from_digests(hashes, space=self.space)

    def namespace(self, block_bytes: int, *, prefix: str = "") -> str:
        """The namespace's name: readable, and with a digest of everything but the ranks and of the size of
        its blocks, so that no two kinds of block ever meet in one.
        """
        anywhere = replace(self, tp_rank=0, pp_rank=0)
        content = anywhere.space.canonical() + block_bytes.to_bytes(8, "little")
        digest = blake2b(content, digest_size=8, person=b"memkv-space-name").hexdigest()
        words = [prefix, self.engine, self.model.rstrip("/").rpartition("/")[2], self.dtype]
        readable = "/".join(re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", w)) for w in words if w)
        cut = readable.encode()[:READABLE_BYTES].decode(errors="ignore")
        return f"{cut}/{digest}"

"""Keys: sixteen bytes that name a block by everything which determines it, the same in every process.

    key  =  │ tag, 4 bytes │ digest, 12 bytes │

                root(space)                                   space: model, dtype, layout, ranks, salt, …
                    │ ‖ tokens of block 0
                   c[0] ──────► tag of blocks 0 to 63         c: chain values, 32 bytes each
                    │ ‖ tokens of block 1
                   c[1] ──────► digest of block 1             every c[i] gives the digest of its block,
                    ⋮                                         every c[64·j] the tag of a group of 64
                   c[64] ─────► tag of blocks 64 to 127

A key therefore says: this block, after exactly this prefix, in exactly this space. The tag chooses the node
(:mod:`memkv.placement`), so that neighbours stay together. docs/keys.md defines every byte.

Arrays of keys are (n, 16) uint8, C-contiguous. Hashing costs about 1 µs a block of 16 tokens, 2.5 µs
of 256.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from .rdma.errors import LocalError

KEY_BYTES = 16
TAG_BYTES = 4
Keys = npt.NDArray[np.uint8]

_SPACE = b"memkv-space-v1"
_BLOCK = b"memkv-block-v1"
_KEY = b"memkv-key-v1"
_TAG = b"memkv-tag-v1"
_DIGEST = b"memkv-digest-v1"
_ID = b"memkv-id-v1"
_ID_TAG = b"memkv-id-tag-v1"
_TEXT, _NUMBER = 1, 2
_STATE = struct.Struct("<4sB3x32s32s4sQI")


@dataclass(frozen=True, kw_only=True)
class KeySpace:
    """All that a block's bytes depend on besides the tokens: only where all of it agrees is a block shared.

    ``labels``: whatever else matters (a LoRA adapter, a quantisation), text to text. ``salt``: keeps
    tenants apart who must not see each other's hits. ``group_blocks``: blocks that share a tag, and with
    it a node: fewer spread long common prompts over more nodes, more lose less of a prefix when a node is
    lost.

    LocalError for an empty model, dtype or layout, a rank outside its size, or labels that collide.
    """

    model: str
    dtype: str
    layout: str
    block_tokens: int
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    layers: str = "all"
    salt: str = ""
    group_blocks: int = 64
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "layout", "layers"):
            if not getattr(self, name):
                raise LocalError(f"a key space needs {name}", f"KeySpace({name}=…)")
        for name in ("tp", "pp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size <= 0xFFFFFFFF:
                raise LocalError(f"{name}_rank {rank} is outside {name}_size {size}")
        for name in ("block_tokens", "group_blocks"):
            if not 1 <= getattr(self, name) <= 0xFFFFFFFF:
                raise LocalError(f"{name} is {getattr(self, name)}, where 1 or more is due")
        object.__setattr__(self, "labels", dict(self.labels))
        self.canonical()

    def canonical(self) -> bytes:
        """The byte string that stands for this space: see docs/keys.md, "Key space"."""
        items = {name.encode(): _number(getattr(self, name)) for name in _NUMBERS}
        items |= {name.encode(): _text(getattr(self, name)) for name in _TEXTS}
        for label, value in self.labels.items():
            name = b"x." + _utf8(label)
            if name in items or len(name) > 0xFFFF:
                raise LocalError(f"the label {label!r} occurs twice, once normalised, or is too long")
            items[name] = _text(value)
        out = [b"memkv-keyspace\0\1"]
        for name, content in sorted(items.items()):
            out += [struct.pack("<H", len(name)), name, content]
        return b"".join(out)

    def __hash__(self) -> int:
        return hash(self.root)

    @cached_property
    def root(self) -> bytes:
        """32 bytes: where every chain of this space starts."""
        return blake2b(self.canonical(), digest_size=32, person=_SPACE).digest()


_NUMBERS = ("block_tokens", "tp_rank", "tp_size", "pp_rank", "pp_size", "group_blocks")
_TEXTS = ("model", "dtype", "layout", "layers", "salt")


def _number(value: int) -> bytes:
    return struct.pack("<BIQ", _NUMBER, 8, value)


def _utf8(value: str) -> bytes:
    try:
        return unicodedata.normalize("NFC", value).encode()
    except (UnicodeEncodeError, TypeError) as error:
        raise LocalError(f"{value!r} is no text: {error}") from None


def _text(value: str) -> bytes:
    data = _utf8(value)
    return struct.pack("<BI", _TEXT, len(data)) + data


class Chain:
    """The keys of one growing sequence of tokens: each ``append`` hashes only the blocks that it completes.

    ``blocks``: full blocks so far. ``pending``: tokens of the unfinished last block, which has no key yet.
    """

    __slots__ = ("_parent", "_rest", "_tag", "blocks", "space")

    def __init__(self, space: KeySpace) -> None:
        self.space = space
        self.blocks = 0
        self._parent = space.root
        self._tag = bytes(TAG_BYTES)
        self._rest = b""

    @property
    def pending(self) -> int:
        return len(self._rest) // 4

    def append(self, tokens: npt.ArrayLike, extras: Mapping[int, bytes] | None = None) -> Keys:
        """(k, 16) keys of the k blocks that these tokens complete.

        ``tokens``: one-dimensional, integers from 0 to 2³²-1. ``extras``: block number in the whole
        sequence → bytes that its content depends on besides the tokens, such as the digest of an image
        behind placeholder tokens; later blocks inherit it through the chain. LocalError for tokens of
        another kind, or an extra for a block that is not completed here; then the chain has not changed.
        """
        data = self._rest + _token_bytes(tokens)
        size = 4 * self.space.block_tokens
        count = len(data) // size
        extras = extras or {}
        for block in extras:
            if not self.blocks <= block < self.blocks + count:
                raise LocalError(
                    f"an extra for block {block}, which these tokens do not complete",
                    f"they complete {count} blocks from {self.blocks} on; give it with the tokens that do",
                )
        group, parent, tag = self.space.group_blocks, self._parent, self._tag
        out = bytearray()
        for block in range(self.blocks, self.blocks + count):
            start = (block - self.blocks) * size
            content = parent + data[start : start + size]
            if block in extras:
                content += extras[block]
            parent = blake2b(content, digest_size=32, person=_BLOCK).digest()
            if block % group == 0:
                tag = blake2b(parent, digest_size=4, person=_TAG).digest()
            out += tag
            out += blake2b(parent, digest_size=12, person=_KEY).digest()
        self.blocks += count
        self._parent, self._tag, self._rest = parent, tag, data[count * size :]
        return np.frombuffer(out, np.uint8).reshape(count, KEY_BYTES)

    def fork(self) -> Chain:
        """A chain that goes on from here by itself."""
        other = Chain(self.space)
        other.blocks, other._parent, other._tag, other._rest = (
            self.blocks,
            self._parent,
            self._tag,
            self._rest,
        )
        return other

    def save(self) -> bytes:
        """The chain's state: 88 bytes and four per pending token, for :meth:`restore` in any process."""
        head = _STATE.pack(
            b"MKVK", 1, self.space.root, self._parent, self._tag, self.blocks, len(self._rest) // 4
        )
        return head + self._rest

    @classmethod
    def restore(cls, space: KeySpace, state: bytes) -> Chain:
        """The chain that ``save`` described. LocalError if that was no chain, or one of another space."""
        if len(state) < _STATE.size:
            raise LocalError(f"a chain's state of {len(state)} bytes")
        magic, version, root, parent, tag, blocks, pending = _STATE.unpack_from(state)
        rest = state[_STATE.size :]
        if magic != b"MKVK" or version != 1 or len(rest) != 4 * pending or pending >= space.block_tokens:
            raise LocalError("not the state of a chain of version 1")
        if root != space.root:
            raise LocalError("the chain was saved in another key space")
        chain = cls(space)
        chain.blocks, chain._parent, chain._tag, chain._rest = blocks, parent, tag, rest
        return chain


def block_keys(
    tokens: npt.ArrayLike,
    *,
    space: KeySpace,
    parent: Chain | None = None,
    extras: Mapping[int, bytes] | None = None,
) -> Keys:
    """(n, 16) keys of the full blocks of a sequence, or of what ``tokens`` add to the chain ``parent``
    (which is left as it is). A last block that is not full has no key. Errors and ``extras``: see
    :meth:`Chain.append`.
    """
    if parent is not None and parent.space.root != space.root:
        raise LocalError("the parent belongs to another key space")
    chain = Chain(space) if parent is None else parent.fork()
    return chain.append(tokens, extras)


def keys_from_digests(digests: Iterable[bytes], *, space: KeySpace) -> Keys:
    """(n, 16) keys for an engine that gives each block's own hash (of the block *and its prefix*) and
    nothing else.

    The tag comes from the digest: neighbours do not stay together. LocalError for an empty digest.
    """
    root = space.root
    out = bytearray()
    for digest in digests:
        if not digest:
            raise LocalError("an empty digest")
        out += blake2b(root + digest, digest_size=16, person=_DIGEST).digest()
    return np.frombuffer(out, np.uint8).reshape(-1, KEY_BYTES)


def keys_from_ids(ids: npt.ArrayLike, *, space: KeySpace) -> Keys:
    """(n, 16) keys for block ids of a trace (Mooncake's ``hash_ids``), for benchmarks.

    Such ids are handed out in order of first appearance, so that a prompt's new blocks have consecutive
    ids: ids with the same id // group_blocks share a tag, and neighbours stay together as they would with
    tokens. LocalError unless the ids are one-dimensional integers from 0 to 2⁶⁴-1.
    """
    array = _integers(ids, 2**64 - 1, "ids")
    root, group = space.root, space.group_blocks
    tags: dict[int, bytes] = {}
    out = bytearray()
    for number in array.tolist():
        place = number // group
        tag = tags.get(place)
        if tag is None:
            content = root + place.to_bytes(8, "little")
            tag = tags[place] = blake2b(content, digest_size=4, person=_ID_TAG).digest()
        out += tag
        out += blake2b(root + number.to_bytes(8, "little"), digest_size=12, person=_ID).digest()
    return np.frombuffer(out, np.uint8).reshape(-1, KEY_BYTES)


def _token_bytes(tokens: npt.ArrayLike) -> bytes:
    return _integers(tokens, 2**32 - 1, "tokens").astype("<u4", copy=False).tobytes()


def _integers(values: npt.ArrayLike, top: int, what: str) -> npt.NDArray[np.integer]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise LocalError(f"{what}: {error}") from None
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise LocalError(
            f"{what} of shape {array.shape} and type {array.dtype}, where a list of integers is due"
        )
    if int(array.min()) < 0 or int(array.max()) > top:
        raise LocalError(f"{what} from {array.min()} to {array.max()}, where 0 to {top} are due")
    return array

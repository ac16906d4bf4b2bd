"""The messages of the control protocol, and the columns that they carry.

Each message is a msgpack array: its tag, then its fields in the order given here. Blocks travel as
columns: packed little-endian bytes of one number (or key) per block, never one object per block.
docs/protocol.md has the table of all messages, and says how a new field or message is added; a test
compares it with this file.

Structs check their columns when they are made, here and on receipt: a message that exists is well-formed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from .framing import MAX_BODY, LocalProtocolError
from .framing import Code as Code  # part of what messages say

VERSIONS = (1,)  # of the protocol, oldest first
MAX_BATCH = 65536  # blocks in one message
MAX_SLABS = 65536  # regions in one message
KEY_BYTES = 16
SLOT_BYTES = 32
NONCE_BYTES = 32

U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0)]  # msgpack itself ends at 2**64 - 1
Text = Annotated[str, Meta(max_length=1024)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
Token = Annotated[bytes, Meta(max_length=64)]
Gid = Annotated[bytes, Meta(min_length=16, max_length=16)]
Keys = Annotated[bytes, Meta(max_length=KEY_BYTES * MAX_BATCH)]
U32s = Annotated[bytes, Meta(max_length=4 * MAX_BATCH)]
U64s = Annotated[bytes, Meta(max_length=8 * MAX_BATCH)]
U8s = Annotated[bytes, Meta(max_length=MAX_BATCH)]
Slots = Annotated[bytes, Meta(max_length=SLOT_BYTES * MAX_BATCH)]
Versions = Annotated[list[U16], Meta(min_length=1, max_length=16)]
Scalar = int | float | str | bool
Sections = dict[str, dict[str, Scalar]]
Fabric = Literal["verbs", "tcp"]
Durability = Literal["memory", "flash"]


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What messages are made of; has no tag."""


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message. ``COLUMNS`` names the columns and the bytes that each has per block."""

    COLUMNS: ClassVar[dict[str, int]] = {}

    def __post_init__(self) -> None:
        if self.COLUMNS:
            _count(self)

    @property
    def blocks(self) -> int:
        """The number of blocks (or ids) that the columns describe; 0 for a message without columns."""
        return _count(self) if self.COLUMNS else 0


def _count(message: Message) -> int:
    """Blocks in a message; LocalProtocolError unless all its columns agree (an optional one may be empty)."""
    n = -1
    for column, size in message.COLUMNS.items():
        data = getattr(message, column)
        count, rest = divmod(len(data), size)
        if n < 0:
            n = count
        if rest or (count != n and not (column == "checksums" and count == 0)):
            raise LocalProtocolError(
                f"{type(message).__name__}.{column} has {len(data)} bytes where {n} × {size} are due"
            )
    if n > MAX_BATCH:
        raise LocalProtocolError(f"{n} blocks in one message, where {MAX_BATCH} are allowed")
    return n


# --- parts ------------------------------------------------------------------------------------------------


class RailKey(Part, frozen=True):
    """A region as one device knows it."""

    iova: U64
    rkey: U32


Rails = Annotated[list[RailKey], Meta(max_length=4)]


class RegionInfo(Part, frozen=True):
    """A registered span of the sender's memory. ``access``: MKV_REMOTE_READ (2). ``secret``: tcp only,
    else 0.
    """

    id: U32
    length: U64
    access: U32 = 2
    secret: U64 = 0
    rails: Rails = []


class TableInfo(Part, frozen=True):
    """An index table: its version, its number of buckets (a power of two) and the region that holds it."""

    version: U64
    buckets: U64
    region: RegionInfo


class RailInfo(Part, frozen=True):
    """One end of a queue pair."""

    device: Text  # label, for messages
    gid: Gid
    qpn: U32
    psn: U32
    mtu: U32  # bytes: 256 to 4096
    rd_atomic: U16  # READs that this end can answer at once
    lid: U16 = 0


Ends = Annotated[list[RailInfo], Meta(max_length=4)]
Regions = Annotated[list[RegionInfo], Meta(max_length=MAX_SLABS)]

# --- handshake --------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=1):
    """First frame of the peer. Its layout never changes: every version must be able to read it."""

    versions: Versions
    software: Text
    role: Text
    nonce: Nonce


class Challenge(Message, frozen=True, tag=2):
    """The node's answer: the version chosen, its own nonce, and the proof that it knows the secret."""

    version: U16
    nonce: Nonce
    incarnation: U64
    proof: Proof


class Auth(Message, frozen=True, tag=3):
    """The peer's proof."""

    proof: Proof


class Welcome(Message, frozen=True, tag=4):
    """Authentication has succeeded; the first sealed frame."""

    node: Text
    software: Text
    fabrics: list[Text]
    max_body: U32 = MAX_BODY  # longest body that the node accepts


class Refusal(Message, frozen=True, tag=5):
    """Answers a request that is refused as a whole; ``request`` 0: this connection is refused and ends."""

    request: U64
    code: U16
    message: Text
    hint: Text = ""


class Bye(Message, frozen=True, tag=6):
    """The sender leaves; its last message."""

    reason: Text


class Ping(Message, frozen=True, tag=7):
    """Either side may ask; the id is the asker's."""

    request: U64


class Pong(Message, frozen=True, tag=8):
    request: U64


class Done(Message, frozen=True, tag=9):
    """Carried out; there is nothing more to say."""

    request: U64


# --- namespaces, channels, regions ------------------------------------------------------------------------


class OpenNamespace(Message, frozen=True, tag=16):
    """Asks for a namespace; may be repeated at any time to learn its present table and slabs.

    ``mode``: "create" makes it if it is missing, "open" does not. 0 means: the node's default, or what it
    has.
    """

    request: U64
    name: Name
    mode: Literal["create", "open"] = "create"
    block_bytes: U32 = 0
    align: U32 = 0
    grace_ms: U32 = 0


class NamespaceInfo(Message, frozen=True, tag=17):
    request: U64
    namespace: U32
    name: Name
    block_bytes: U32
    align: U32
    grace_ns: U64
    salt: U64
    incarnation: U64  # of the node
    table: TableInfo
    slabs: Regions
    checksum: U16 = 1  # version of its definition in docs/layout.md
    clock: Literal["plain", "strict"] = "plain"  # what the node advises


class OpenChannel(Message, frozen=True, tag=18):
    """``purpose``: "get", the peer READs from the node; "pull", the node READs from the peer."""

    request: U64
    namespace: U32
    purpose: Literal["get", "pull"]
    fabric: Fabric
    rails: Ends = []  # verbs
    port: U16 = 0  # tcp: where the sender listens, 0: it does not
    token: Token = b""  # tcp: to be shown by whoever dials that port, once per stream
    streams: U16 = 0  # tcp: sockets wanted; 0: the node's choice
    deadline_ms: U32 = 0


class ChannelInfo(Message, frozen=True, tag=19):
    """The node's end of it."""

    request: U64
    channel: U32
    rails: Ends = []
    port: U16 = 0
    token: Token = b""
    streams: U16 = 0


class CloseChannel(Message, frozen=True, tag=20):
    """Done: the node's end is destroyed, and none of its READs is under way any more."""

    request: U64
    channel: U32


class OfferRegions(Message, frozen=True, tag=21):
    """Memory that puts may name; ids are the peer's. Done: known."""

    request: U64
    regions: Regions


class WithdrawRegions(Message, frozen=True, tag=22):
    """Done: the node will not READ from them any more, and no READ is under way."""

    COLUMNS: ClassVar = {"ids": 4}
    request: U64
    ids: U32s


# --- batches ----------------------------------------------------------------------------------------------


class Put(Message, frozen=True, tag=32):
    """Asks the node to pull and keep blocks. ``checksums`` empty: the node computes them."""

    COLUMNS: ClassVar = {"keys": 16, "lengths": 4, "regions": 4, "offsets": 8, "checksums": 8}
    request: U64
    namespace: U32
    keys: Keys
    lengths: U32s
    regions: U32s
    offsets: U64s
    checksums: U64s = b""
    durability: Durability = "memory"
    deadline_ms: U32 = 0


class PutDone(Message, frozen=True, tag=33):
    """One MKV_* status per block, in the order of the Put. From now on its sources may change."""

    COLUMNS: ClassVar = {"statuses": 1}
    request: U64
    statuses: U8s


class Lookup(Message, frozen=True, tag=34):
    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys


class Statuses(Message, frozen=True, tag=35):
    """One MKV_* status per key, in the order of the request."""

    COLUMNS: ClassVar = {"statuses": 1}
    request: U64
    statuses: U8s


class Match(Message, frozen=True, tag=36):
    """How many of these keys, from the first on, does the node hold without a gap?"""

    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys


class Count(Message, frozen=True, tag=37):
    request: U64
    count: U32


class Touch(Message, frozen=True, tag=38):
    """These blocks were READ; a hint for eviction, never answered."""

    COLUMNS: ClassVar = {"keys": 16}
    namespace: U32
    keys: Keys


class Pin(Message, frozen=True, tag=39):
    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys
    ttl_ms: U32


class Unpin(Message, frozen=True, tag=40):
    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys


class Delete(Message, frozen=True, tag=41):
    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys
    deadline_ms: U32 = 0


class Stats(Message, frozen=True, tag=42):
    request: U64


class StatsInfo(Message, frozen=True, tag=43):
    """Sections ("node", a namespace's name, …) of flat values: json.dumps takes it as it is."""

    request: U64
    sections: Sections


class Stage(Message, frozen=True, tag=44):
    """Asks for blocks that are in flash only to be brought into memory.

    ``prefetch``: nobody waits for them: they are brought and published, and the answers name no place.
    """

    COLUMNS: ClassVar = {"keys": 16}
    request: U64
    namespace: U32
    keys: Keys
    deadline_ms: U32 = 0
    prefetch: bool = False


class Staged(Message, frozen=True, tag=45):
    """Some answers to a Stage, as blocks arrive; each index comes once, ``last`` is true in the final one.

    ``indices`` point into the keys of the Stage. ``slots`` (struct mkv_slot) say where to READ a HIT; zero
    for every other status, and for a prefetch.
    """

    COLUMNS: ClassVar = {"indices": 4, "statuses": 1, "slots": 32}
    request: U64
    indices: U32s
    statuses: U8s
    slots: Slots
    last: bool


class Unstage(Message, frozen=True, tag=46):
    """The places that a Staged named for these keys have been READ, and will not be READ again; never
    answered. Who sends it keeps such places to itself: a location that others READ by is never given back.
    """

    COLUMNS: ClassVar = {"keys": 16, "generations": 4}
    namespace: U32
    keys: Keys
    generations: U32s


# --- notices of the node ----------------------------------------------------------------------------------


class SlabAdded(Message, frozen=True, tag=48):
    """Blocks may appear in this slab from now on; not acknowledged."""

    namespace: U32
    slab: RegionInfo


class SlabRetired(Message, frozen=True, tag=49):
    """Empty for a grace period already; deregistered once every peer has acknowledged. Ids never recur."""

    COLUMNS: ClassVar = {"ids": 4}
    notice: U64
    namespace: U32
    ids: U32s


class TableChanged(Message, frozen=True, tag=50):
    """The index has a new table; the old one is deregistered once every peer has acknowledged."""

    notice: U64
    namespace: U32
    table: TableInfo


class Ack(Message, frozen=True, tag=51):
    """The peer has acted on a notice: no READ of what went away is under way, and none will be posted."""

    notice: U64

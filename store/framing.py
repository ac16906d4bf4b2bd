"""Frames of the control protocol: cut out of a byte stream, numbered, sealed with a MAC.

    0         4              12                       28
    │ length  │ sequence     │ MAC                    │ body …
      u32       u64            16 bytes, zero before     msgpack, `length` bytes
                               authentication

``length`` counts the body only. ``sequence`` starts at 0 in each direction and grows by one per frame,
the handshake included. The MAC is BLAKE2b with a 16-byte digest, keyed with the session key, personalised
with the direction, over sequence and body. Everything is little-endian. docs/protocol.md tells the rest.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import Any

from ..rdma.errors import LocalError, MemKVError, RemoteError

HEADER = struct.Struct("<IQ16s")
HEADER_BYTES = HEADER.size
MAC_BYTES = 16
NO_MAC = bytes(MAC_BYTES)
MAX_BODY = 16 << 20  # after authentication, unless the other side announced less
MAX_BODY_UNPROVEN = 4096  # before it
TO_NODE = b"memkv peer>node\0"  # BLAKE2b personalisation, 16 bytes
TO_PEER = b"memkv node>peer\0"


class Code(IntEnum):
    """Why something was refused. On the wire it is a plain number: an older reader survives a newer code."""

    SECRET = 1  # the shared secret differs
    VERSION = 2  # no protocol version in common
    PROTOCOL = 3  # a malformed or misplaced message
    NOT_FOUND = 4  # no such namespace, channel or region
    MISMATCH = 5  # the namespace exists with other settings
    LIMIT = 6  # more than this node allows
    FULL = 7  # no memory left for it
    DEADLINE = 8  # not done in time
    UNSUPPORTED = 9  # this node cannot do that (a fabric, a durability)
    CLOSING = 10  # the node is going down
    INTERNAL = 11  # the node's own fault; its log says more


class ProtocolError(MemKVError):
    """Base of the two below; never raised itself. ``code``: a :class:`Code`, or a newer side's number."""

    def __init__(self, message: str, hint: str = "", *, code: int = Code.PROTOCOL) -> None:
        if type(self) is ProtocolError:
            raise TypeError("raise LocalProtocolError or RemoteProtocolError")
        super().__init__(message, hint)
        self.message = message
        self.code = code


class LocalProtocolError(ProtocolError, LocalError):
    """This side tried something that the protocol forbids; nothing was sent, nothing has changed."""


class RemoteProtocolError(ProtocolError, RemoteError):
    """The other side broke the protocol, or refused this connection.

    ``reply``: bytes to send before hanging up, so that the other side learns why (may be empty).
    ``messages``: what had arrived whole, before the fault, in the same call of ``receive_data``.
    """

    def __init__(self, message: str, hint: str = "", *, code: int = Code.PROTOCOL) -> None:
        super().__init__(message, hint, code=code)
        self.reply = b""
        self.messages: list[Any] = []


class RefusedError(RemoteProtocolError):
    """The other side refused this connection; message, hint and code are its own."""


def seal(key: bytes, direction: bytes, sequence: int, body: bytes | memoryview) -> bytes:
    """The MAC of one frame; ``key`` empty: before authentication, sixteen zero bytes."""
    if not key:
        return NO_MAC
    mac = hashlib.blake2b(sequence.to_bytes(8, "little"), digest_size=MAC_BYTES, key=key, person=direction)
    mac.update(body)
    return mac.digest()


class FrameWriter:
    """Numbers and seals the frames of one direction. ``key`` is empty until authentication has succeeded."""

    def __init__(self, direction: bytes) -> None:
        self.direction = direction
        self.key = b""
        self.limit = MAX_BODY_UNPROVEN
        self.sequence = 0

    def frame(self, body: bytes) -> bytes:
        """One frame. LocalProtocolError if the body is empty or over the limit (the sequence stays)."""
        if not 0 < len(body) <= self.limit:
            raise LocalProtocolError(
                f"a message of {len(body)} bytes, where {self.limit} may be sent", "send smaller batches"
            )
        mac = seal(self.key, self.direction, self.sequence, body)
        header = HEADER.pack(len(body), self.sequence, mac)
        self.sequence += 1
        return header + body


class FrameReader:
    """Cuts the frames of one direction out of whatever chunks arrive.

    Holds at most one unfinished frame besides the chunk just fed: an announced length reserves nothing, and a
    length over the limit is refused when its four bytes are in.
    """

    def __init__(self, direction: bytes) -> None:
        self.direction = direction
        self.key = b""
        self.limit = MAX_BODY_UNPROVEN
        self.sequence = 0
        self.lenient = False  # a frame without a MAC is handed out even though a key is set
        self._buffer = bytearray()
        self._position = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes in."""
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        self._buffer += data

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame that are held."""
        return len(self._buffer) - self._position

    def next_body(self) -> tuple[bytes, bool] | None:
        """The next whole frame's body, and whether it was sealed; None: more bytes are needed.

        Raises LocalProtocolError (the caller translates) for a wrong length, sequence or MAC.
        """
        start = self._position
        if self.pending < 4:
            return None
        length = int.from_bytes(self._buffer[start : start + 4], "little")
        if not 0 < length <= self.limit:
            raise LocalProtocolError(f"a frame of {length} bytes, where 1 to {self.limit} are allowed")
        if self.pending < HEADER_BYTES:
            return None
        _, sequence, mac = HEADER.unpack_from(self._buffer, start)
        if sequence != self.sequence:
            raise LocalProtocolError(f"frame {sequence} where frame {self.sequence} was due")
        end = start + HEADER_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[start + HEADER_BYTES : end])
        sealed = bool(self.key) and not (self.lenient and mac == NO_MAC)
        if not hmac.compare_digest(mac, seal(self.key if sealed else b"", self.direction, sequence, body)):
            raise LocalProtocolError(f"the MAC of frame {sequence} is wrong")
        self._position = end
        self.sequence += 1
        return body, sealed

"""The control protocol as two state machines, without I/O: bytes in, messages out.

Theory of operation
===================

A :class:`NodeProtocol` or :class:`PeerProtocol` is one end of one connection. It opens no socket, reads
no clock and starts no thread; whoever owns the socket does three things with it:

    for message in protocol.receive_data(bytes_from_the_socket): act(message)
    socket.write(protocol.data_to_send())           # handshake frames that it wrote itself; mostly b""
    socket.write(protocol.send(SomeMessage(...)))   # everything else

and when the socket ends, ``receive_eof()``. Frames (framing.py) give order and integrity, messages.py
gives shape. What is left for this file is *who may say what, and when*. It is said once, in the tables
``RECEIVES`` and ``SENDS`` below: a message that its state does not list is an error, a message that it
lists moves the connection to the state beside it. Nothing else changes ``state``, but for a fault, which
makes it DEAD.

          peer                                                node
     CHALLENGE │ ── Hello(versions, nonce) ─────────────────► │ HELLO
               │ ◄─ Challenge(version, nonce, proof of node)─ │ AUTH
       WELCOME │ ── Auth(proof of peer) ────────────────────► │ WELCOME  (the caller says Welcome)
               │ ◄─ Welcome ──────────────── sealed from here │ READY
         READY │ ◄═ requests, replies, notices ═════════════► │

Both proofs are HMAC-SHA256 under the shared secret over the *transcript*: the Hello's bytes as they
travelled, the version chosen, the incarnation and the node's nonce. Each has its own label, so that a
proof sent back, or one taken from another connection, proves nothing; and since the offered versions are
in the transcript, nobody can talk two new ends into an old version. The session key is a third HMAC of
the same transcript. The node proves itself first: a peer with a good secret never answers an impostor,
and a wrong secret is noticed by the peer, which knows where its user could have mistyped it.

Before authentication a frame is at most 4 KiB, only handshake messages are accepted, and the caller is given
nothing at all: the first message that ``receive_data`` returns is, on the node, the Hello of a peer that
has proved itself, on the peer the Welcome of a node that has.

Faults. What the other side does wrong raises RemoteProtocolError: ``messages`` of the exception are those
that had arrived whole before the fault, ``reply`` is a last frame to send, telling the other side why.
Then the object is DEAD and every further call a LocalProtocolError. What this side does wrong raises
LocalProtocolError, sends nothing and changes nothing. Inside this file faults are always of the local
kind; ``receive_data`` alone translates.

Memory. Between calls an end holds at most one unfinished frame: 4 KiB before authentication, 16 MiB (or the
node's ``max_body``) after it. An announced length reserves nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from enum import Enum
from typing import Any, Final

import msgspec

from . import messages as m
from .framing import (
    MAX_BODY,
    MAX_BODY_UNPROVEN,
    TO_NODE,
    TO_PEER,
    Code,
    FrameReader,
    FrameWriter,
    LocalProtocolError,
    RefusedError,
    RemoteProtocolError,
)

__all__ = [
    "Code",
    "LocalProtocolError",
    "NodeProtocol",
    "PeerProtocol",
    "RefusedError",
    "RemoteProtocolError",
    "State",
]

SECRET_HINT = "give both sides the same secret: --secret-file, or the environment variable MEMKV_SECRET"


class State(Enum):
    """Where one end of a connection stands."""

    HELLO = "node: waiting for the peer's Hello"
    CHALLENGE = "peer: Hello is sent, waiting for the node's Challenge"
    AUTH = "node: Challenge is sent, waiting for the peer's Auth"
    WELCOME = "peer: Auth is sent, waiting for Welcome; node: the peer is authenticated, Welcome is due"
    READY = "authenticated"
    LEFT = "we said Bye; what still arrives is ignored"
    CLOSED = "the other side said Bye"
    DEAD = "broken by a fault or a refusal"


_REQUESTS: Final = (
    m.OpenNamespace, m.OpenChannel, m.CloseChannel, m.OfferRegions, m.WithdrawRegions,
    m.Put, m.Lookup, m.Match, m.Touch, m.Pin, m.Unpin, m.Delete, m.Stats, m.Stage, m.Unstage,
)  # fmt: skip
_REPLIES: Final = (
    m.NamespaceInfo, m.ChannelInfo, m.PutDone, m.Statuses, m.Count, m.StatsInfo, m.Staged, m.Done,
)  # fmt: skip
_NOTICES: Final = (m.SlabAdded, m.SlabRetired, m.TableChanged)
_EITHER: Final = (m.Ping, m.Pong)

Table = dict[State, dict[type[m.Message], State]]


def _ready(*kinds: type[m.Message]) -> dict[type[m.Message], State]:
    return dict.fromkeys((*kinds, *_EITHER), State.READY)


TO_NODE_READY = _ready(*_REQUESTS, m.Ack)
TO_PEER_READY = _ready(*_REPLIES, *_NOTICES)

# A Refusal whose request is not 0 leaves READY as it is; see _next.
RECEIVES: dict[str, Table] = {
    "node": {
        State.HELLO: {m.Hello: State.AUTH},
        State.AUTH: {m.Auth: State.WELCOME, m.Refusal: State.DEAD},
        State.WELCOME: {m.Refusal: State.DEAD},
        State.READY: {**TO_NODE_READY, m.Refusal: State.DEAD, m.Bye: State.CLOSED},
    },
    "peer": {
        State.CHALLENGE: {m.Challenge: State.WELCOME, m.Refusal: State.DEAD},
        State.WELCOME: {m.Welcome: State.READY, m.Refusal: State.DEAD},
        State.READY: {**TO_PEER_READY, m.Refusal: State.DEAD, m.Bye: State.CLOSED},
    },
}
SENDS: dict[str, Table] = {
    "node": {
        State.HELLO: {m.Refusal: State.DEAD},
        State.AUTH: {m.Refusal: State.DEAD},
        State.WELCOME: {m.Welcome: State.READY, m.Refusal: State.DEAD},
        State.READY: {**TO_PEER_READY, m.Refusal: State.DEAD, m.Bye: State.LEFT},
    },
    "peer": {
        State.CHALLENGE: {m.Refusal: State.DEAD},
        State.WELCOME: {m.Refusal: State.DEAD},
        State.READY: {**TO_NODE_READY, m.Refusal: State.DEAD, m.Bye: State.LEFT},
    },
}


def _decoder(side: str) -> msgspec.msgpack.Decoder[Any]:
    kinds: dict[type[m.Message], None] = {}
    for row in RECEIVES[side].values():
        kinds.update(dict.fromkeys(row))
    union: Any = None
    for kind in kinds:
        union = kind if union is None else union | kind
    return msgspec.msgpack.Decoder(union, strict=True)


_DECODER: Final = {side: _decoder(side) for side in RECEIVES}
_ENCODER: Final = msgspec.msgpack.Encoder()
_OTHER: Final = {"node": "peer", "peer": "node"}


def _encode(message: m.Message, side: str) -> bytes:
    """A message's body, which the other side's decoder has accepted: no field out of range gets out."""
    try:
        body = _ENCODER.encode(message)
        _DECODER[_OTHER[side]].decode(body)
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError) as error:
        raise LocalProtocolError(f"{type(message).__name__}: {error}") from None
    return body


class _Protocol:
    """What both ends share: frames in and out, the tables, faults."""

    side: str
    state: State

    def __init__(self, secret: bytes, nonce: bytes | None) -> None:
        if nonce is not None and len(nonce) != m.NONCE_BYTES:
            raise LocalProtocolError(f"a nonce of {len(nonce)} bytes, where {m.NONCE_BYTES} are due")
        self.authenticated = False  # both sides have proved that they know the secret
        self.version = 0  # agreed; 0: not yet
        self._secret = secret
        self._nonce = nonce or secrets.token_bytes(m.NONCE_BYTES)
        inward, outward = (TO_NODE, TO_PEER) if self.side == "node" else (TO_PEER, TO_NODE)
        self._reader = FrameReader(inward)
        self._writer = FrameWriter(outward)
        self._out = b""

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[m.Message]:
        """Takes bytes from the socket, in whatever chunks, and returns the messages that are now whole.

        RemoteProtocolError: see the module. RefusedError, a kind of it: the other side refused the
        connection. LocalProtocolError: the connection is DEAD already.
        """
        if self.state is State.LEFT:
            return []
        if self.state is State.DEAD:
            raise LocalProtocolError("the connection is dead", "make a new one")
        got: list[m.Message] = []
        try:
            self._reader.feed(data)
            while (frame := self._reader.next_body()) is not None:
                message = self._receive(*frame)
                if message is not None:
                    got.append(message)
            if self.state is State.CLOSED and self._reader.pending:
                raise LocalProtocolError("bytes after Bye")
        except RefusedError as refusal:
            refusal.messages = got
            self._die()
            raise
        except LocalProtocolError as fault:
            raise self._fault(fault, got) from None
        return got

    def receive_eof(self) -> None:
        """The other side has closed its end. RemoteProtocolError if that cut a frame, or came without Bye.

        A connection may end in any way at any time; the exception tells which it was, and nothing hangs
        on it.
        """
        if self.state in (State.LEFT, State.CLOSED, State.DEAD):
            return
        cut = self._reader.pending
        self._die()
        raise RemoteProtocolError(
            f"the {_OTHER[self.side]} closed the connection "
            + (f"inside a frame, {cut} bytes into it" if cut else "without saying why")
        )

    def data_to_send(self) -> bytes:
        """Takes the handshake frames that are due; write them to the socket. b"" if there are none."""
        out, self._out = self._out, b""
        return out

    def send(self, message: m.Message) -> bytes:
        """The bytes of one message, after whatever data_to_send still held.

        LocalProtocolError if the state does not allow it, a field is out of range, or the frame would be
        too long for the other side; then nothing has changed.
        """
        following = self._next(SENDS, message, "send")
        out = self._frame(message)
        if self._out:
            out = self.data_to_send() + out
        self.state = following
        if type(message) is m.Welcome:
            self._writer.limit = MAX_BODY
        if following is State.DEAD:
            self._die()
        return out

    def _fault(self, fault: LocalProtocolError, got: list[m.Message]) -> RemoteProtocolError:
        """Ends the connection over what the other side did wrong."""
        text = printable(fault.message)
        reply = b""
        if self.state is not State.CLOSED:
            reply = self._out + self._frame(m.Refusal(0, fault.code, text, fault.hint))
        if fault.code == Code.PROTOCOL:
            text = f"the {_OTHER[self.side]} broke the protocol: {text}"
        error = RemoteProtocolError(text, fault.hint, code=fault.code)
        error.reply, error.messages = reply, got
        self._die()
        return error

    # --- inside: everything below raises LocalProtocolError, or RefusedError ---

    def _receive(self, body: bytes, sealed: bool) -> m.Message | None:
        try:
            message: m.Message = _DECODER[self.side].decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise LocalProtocolError(f"a malformed message: {error}") from None
        if self._reader.key and not sealed and type(message) is not m.Refusal:
            raise LocalProtocolError("a frame without a MAC after authentication")
        following = self._next(RECEIVES, message, "receive")
        if type(message) is m.Refusal and message.request == 0:
            raise RefusedError(
                f"the {_OTHER[self.side]} refused: {printable(message.message)}",
                printable(message.hint),
                code=message.code,
            )
        result = self._shake(message, body) if following is not self.state else message
        self.state = following
        return result

    def _next(self, table: dict[str, Table], message: m.Message, verb: str) -> State:
        row = table[self.side].get(self.state, {})
        following = row.get(type(message))
        if following is None:
            raise LocalProtocolError(f"cannot {verb} {type(message).__name__} in state {self.state.name}")
        if type(message) is m.Refusal and message.request:
            if self.state is not State.READY or (verb == "send") != (self.side == "node"):
                raise LocalProtocolError(f"cannot {verb} a Refusal of one request here")
            return self.state
        return following

    def _shake(self, message: m.Message, body: bytes) -> m.Message | None:
        raise NotImplementedError

    def _frame(self, message: m.Message) -> bytes:
        return self._writer.frame(_encode(message, self.side))

    def _die(self) -> None:
        self.state = State.DEAD
        self._secret = b""
        self._out = b""
        self._reader = FrameReader(self._reader.direction)  # lets go of what it held

    def _prove(self, label: bytes, transcript: bytes) -> bytes:
        return hmac.digest(self._secret, label + transcript, "sha256")

    def _check(self, label: bytes, transcript: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._prove(label, transcript)):
            raise LocalProtocolError("the shared secret differs", SECRET_HINT, code=Code.SECRET)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.name} version {self.version}>"


_NODE_LABEL: Final = b"memkv control: the node's proof\0"
_PEER_LABEL: Final = b"memkv control: the peer's proof\0"
_KEY_LABEL: Final = b"memkv control: the session key\0"


def _transcript(hello: bytes, version: int, nonce: bytes, incarnation: int) -> bytes:
    """What both proofs and the session key cover; every field has a fixed length or is hashed."""
    return hashlib.sha256(hello).digest() + struct.pack("<HQ", version, incarnation) + nonce


class NodeProtocol(_Protocol):
    """The node's end. ``secret`` b"": none is configured. ``nonce``: for tests; else drawn from ``secrets``.
    ``max_body``: the longest body that it accepts, 4 KiB to 16 MiB; it announces it in its Welcome.

    ``hello`` is the peer's Hello once it has proved itself, else None; ``version`` the one in use.
    """

    side = "node"

    def __init__(
        self, secret: bytes = b"", *, incarnation: int, nonce: bytes | None = None, max_body: int = MAX_BODY
    ) -> None:
        super().__init__(secret, nonce)
        if not MAX_BODY_UNPROVEN <= max_body <= MAX_BODY:
            raise LocalProtocolError(f"max_body {max_body}, where {MAX_BODY_UNPROVEN} to {MAX_BODY} are due")
        self.max_body = max_body
        self.state = State.HELLO
        self.incarnation = incarnation
        self.hello: m.Hello | None = None
        self._claimed: m.Hello | None = None
        self._transcript = b""

    def _shake(self, message: m.Message, body: bytes) -> m.Message | None:
        if type(message) is m.Hello:
            common = set(message.versions) & set(m.VERSIONS)
            if not common:
                offered = ", ".join(map(str, message.versions))
                spoken = ", ".join(map(str, m.VERSIONS))
                raise LocalProtocolError(
                    f"no protocol version in common: the peer offers {offered}, the node speaks {spoken}",
                    "upgrade the older side",
                    code=Code.VERSION,
                )
            self.version = max(common)
            self._claimed = message
            self._transcript = _transcript(body, self.version, self._nonce, self.incarnation)
            proof = self._prove(_NODE_LABEL, self._transcript)
            self._out += self._frame(m.Challenge(self.version, self._nonce, self.incarnation, proof))
            return None
        if type(message) is m.Auth:
            self._check(_PEER_LABEL, self._transcript, message.proof)
            self._reader.key = self._writer.key = self._prove(_KEY_LABEL, self._transcript)
            self._reader.limit = self.max_body
            self._secret = b""
            self.authenticated = True
            self.hello = self._claimed
            return self.hello
        return message

    def welcome(self, node: str, software: str, fabrics: list[str]) -> bytes:
        """The bytes of the Welcome that is due after the Hello; see :meth:`send`."""
        return self.send(m.Welcome(node, software, fabrics, self.max_body))


class PeerProtocol(_Protocol):
    """The peer's end; its Hello waits in ``data_to_send`` from the start.

    ``welcome`` is the node's Welcome once both sides are authenticated, else None; ``incarnation`` the
    node's, 0 before its proof.
    """

    side = "peer"

    def __init__(
        self,
        secret: bytes = b"",
        *,
        software: str = "memkv",
        role: str = "peer",
        nonce: bytes | None = None,
        versions: tuple[int, ...] = m.VERSIONS,
    ) -> None:
        super().__init__(secret, nonce)
        self.state = State.CHALLENGE
        self.incarnation = 0
        self.welcome: m.Welcome | None = None
        self._versions = versions
        self._hello = _encode(m.Hello(list(versions), software, role, self._nonce), self.side)
        self._out = self._writer.frame(self._hello)

    def _shake(self, message: m.Message, body: bytes) -> m.Message | None:
        if type(message) is m.Challenge:
            if message.version not in self._versions:
                raise LocalProtocolError(
                    f"the node chose version {message.version}, which was not offered", code=Code.VERSION
                )
            transcript = _transcript(self._hello, message.version, message.nonce, message.incarnation)
            self._check(_NODE_LABEL, transcript, message.proof)
            self._out += self._frame(m.Auth(self._prove(_PEER_LABEL, transcript)))
            self._reader.key = self._writer.key = self._prove(_KEY_LABEL, transcript)
            self._reader.lenient = True  # the node may still refuse our proof, and cannot seal that
            self._secret = b""
            self.version = message.version
            self.incarnation = message.incarnation
            return None
        if type(message) is m.Welcome:
            self.authenticated = True
            self._reader.lenient = False
            self._reader.limit = MAX_BODY
            self._writer.limit = max(MAX_BODY_UNPROVEN, min(MAX_BODY, message.max_body))
            self.welcome = message
        return message


def printable(text: str) -> str:
    """Text from the other side, fit for a log or a terminal: no control characters, at most 500 in all."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])

"""The control protocol: what gets through, what does not, and what docs/protocol.md says of it."""

from __future__ import annotations

import contextlib
import re
import string
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv.store import messages as m
from memkv.store.columns import PutColumns, pack_column, pack_keys, unpack_column, unpack_keys
from memkv.store.framing import HEADER, HEADER_BYTES, MAX_BODY, MAX_BODY_UNPROVEN, ProtocolError
from memkv.store.protocol import (
    RECEIVES,
    SENDS,
    Code,
    LocalProtocolError,
    NodeProtocol,
    PeerProtocol,
    RefusedError,
    RemoteProtocolError,
    State,
)

DOCS = Path(__file__).parents[2] / "docs" / "protocol.md"
MESSAGES = sorted(m.Message.__subclasses__(), key=lambda kind: int(kind.__struct_config__.tag or 0))
PARTS = m.Part.__subclasses__()
TO_NODE = [kind for kind in MESSAGES if SENDS["peer"][State.READY].get(kind) is State.READY]
TO_PEER = [kind for kind in MESSAGES if SENDS["node"][State.READY].get(kind) is State.READY]
INCARNATION = 2**63 + 5


def ends(
    secret: bytes = b"s3cret", other: bytes | None = None, **options: Any
) -> tuple[NodeProtocol, PeerProtocol]:
    """Two new ends; ``other``: the peer's secret where it differs."""
    node = NodeProtocol(secret, incarnation=INCARNATION, nonce=b"n" * 32, **options)
    return node, PeerProtocol(secret if other is None else other, nonce=b"p" * 32)


def ready(**options: Any) -> tuple[NodeProtocol, PeerProtocol]:
    """Two ends after the handshake."""
    node, peer = ends(**options)
    node.receive_data(peer.data_to_send())
    peer.receive_data(node.data_to_send())
    node.receive_data(peer.data_to_send())
    peer.receive_data(node.welcome("node-1", "memkv 0", ["tcp"]))
    return node, peer


def forge(end: Any, message: Any) -> bytes:
    """A frame of ``end`` that its own state would not let it send."""
    return bytes(end._writer.frame(msgspec.msgpack.encode(message)))


# --- any message at all -----------------------------------------------------------------------------------

TYPES: dict[str, st.SearchStrategy[Any]] = {
    "U16": st.integers(0, 2**16 - 1),
    "U32": st.integers(0, 2**32 - 1),
    "U64": st.integers(0, 2**64 - 1),
    "Text": st.text(max_size=20),
    "Name": st.text(min_size=1, max_size=20),
    "Nonce": st.binary(min_size=32, max_size=32),
    "Proof": st.binary(min_size=32, max_size=32),
    "Token": st.binary(max_size=64),
    "Gid": st.binary(min_size=16, max_size=16),
    "bool": st.booleans(),
    "Sections": st.dictionaries(
        st.text(max_size=5),
        st.dictionaries(
            st.text(max_size=5),
            st.integers(-(2**63), 2**64 - 1)
            | st.floats(allow_nan=False)
            | st.booleans()
            | st.text(max_size=5),
            max_size=3,
        ),
        max_size=3,
    ),
    "list[Text]": st.lists(st.text(max_size=5), max_size=3),
}


def strategy(kind: type, name: str) -> st.SearchStrategy[Any]:
    annotation = kind.__annotations__[name]
    if annotation in TYPES:
        return TYPES[annotation]
    by_name = {part.__name__: part for part in PARTS}
    lists = {"Rails": m.RailKey, "Ends": m.RailInfo, "Regions": m.RegionInfo}
    if annotation in by_name:
        return struct(by_name[annotation])
    if annotation in lists:
        return st.lists(struct(lists[annotation]), max_size=3)
    return st.sampled_from(typing.get_args(get_type_hints(kind)[name]))


@st.composite
def struct(draw: st.DrawFn, kind: type[Any]) -> Any:
    columns = getattr(kind, "COLUMNS", {})
    n = draw(st.integers(0, 5))
    values = {}
    for name in kind.__struct_fields__:
        if name in columns:
            empty = name == "checksums" and draw(st.booleans())
            values[name] = (
                b"" if empty else draw(st.binary(min_size=n * columns[name], max_size=n * columns[name]))
            )
        else:
            values[name] = draw(strategy(kind, name))
    return kind(**values)


def one_of(kinds: list[type[m.Message]]) -> st.SearchStrategy[Any]:
    return st.sampled_from(kinds).flatmap(struct)


@pytest.mark.parametrize("kind", TO_NODE + TO_PEER, ids=lambda kind: kind.__name__)
def test_every_message_arrives_as_it_was_sent(kind: type[m.Message]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(struct(kind))
    def check(message: m.Message) -> None:
        node, peer = ready()
        sender, receiver = (peer, node) if kind in TO_NODE else (node, peer)
        assert receiver.receive_data(sender.send(message)) == [message]

    check()


@settings(max_examples=40, deadline=None)
@given(st.lists(one_of(TO_NODE), max_size=5), st.lists(st.integers(1, 60), min_size=1))
def test_chunks_do_not_matter(sent: list[m.Message], sizes: list[int]) -> None:
    node, peer = ready()
    stream = b"".join(peer.send(message) for message in sent)
    got: list[m.Message] = []
    for chunk in chunks(stream, sizes):
        got += node.receive_data(chunk)
    assert got == sent


def chunks(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    turn = 0
    while stream:
        size = sizes[turn % len(sizes)]
        yield stream[:size]
        stream = stream[size:]
        turn += 1


# --- handshake --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [b"", b"s3cret", bytes(range(256))])
def test_the_handshake_authenticates_both_and_shows_nothing_before(secret: bytes) -> None:
    node, peer = ends(secret)
    assert node.receive_data(peer.data_to_send()) == []
    assert peer.receive_data(node.data_to_send()) == []
    assert (node.authenticated, node.hello) == (False, None)
    assert node.receive_data(peer.data_to_send()) == [node.hello]
    assert isinstance(node.hello, m.Hello)
    assert peer.receive_data(node.welcome("node-1", "memkv 0", ["verbs", "tcp"])) == [peer.welcome]
    assert (node.state, peer.state) == (State.READY, State.READY)
    assert node.authenticated
    assert peer.authenticated
    assert peer.incarnation == INCARNATION
    assert node.version == peer.version == 1


@pytest.mark.parametrize(("secret", "other"), [(b"a", b"b"), (b"", b"b"), (b"a", b"")])
def test_a_wrong_secret_is_noticed_by_the_peer_and_told_to_the_node(secret: bytes, other: bytes) -> None:
    node, peer = ends(secret, other)
    node.receive_data(peer.data_to_send())
    with pytest.raises(RemoteProtocolError, match=r"secret differs.*--secret-file.*MEMKV_SECRET") as caught:
        peer.receive_data(node.data_to_send())
    assert caught.value.code == Code.SECRET
    assert peer.data_to_send() == b""
    with pytest.raises(RefusedError, match="the peer refused: the shared secret differs") as told:
        node.receive_data(caught.value.reply)
    assert told.value.code == Code.SECRET
    assert not node.authenticated


def test_a_peer_that_goes_on_with_a_wrong_secret_is_refused() -> None:
    node, peer = ends(b"a", b"b")
    node.receive_data(peer.data_to_send())
    node.data_to_send()
    with pytest.raises(RemoteProtocolError, match="secret differs") as caught:
        node.receive_data(forge(peer, m.Auth(b"x" * 32)))
    body = caught.value.reply[HEADER_BYTES:]
    assert msgspec.msgpack.decode(body, type=m.Refusal).code == Code.SECRET
    assert HEADER.unpack_from(caught.value.reply)[2] == bytes(16)


def test_the_nodes_refusal_of_a_proof_is_understood_although_it_cannot_be_sealed() -> None:
    node, peer = ends()
    node.receive_data(peer.data_to_send())
    peer.receive_data(node.data_to_send())
    peer.data_to_send()
    with pytest.raises(RefusedError, match="secret differs"):
        peer.receive_data(forge(node, m.Refusal(0, Code.SECRET, "the shared secret differs")))


def test_an_unsealed_welcome_is_not_believed() -> None:
    node, peer = ends()
    node.receive_data(peer.data_to_send())
    peer.receive_data(node.data_to_send())
    with pytest.raises(RemoteProtocolError, match="without a MAC"):
        peer.receive_data(forge(node, m.Welcome("evil", "", [])))


def test_a_proof_reflected_or_from_another_connection_proves_nothing() -> None:
    node, peer = ends()
    node.receive_data(peer.data_to_send())
    challenge = msgspec.msgpack.decode(node.data_to_send()[HEADER_BYTES:], type=m.Challenge)
    with pytest.raises(RemoteProtocolError, match="secret differs"):
        node.receive_data(forge(peer, m.Auth(challenge.proof)))

    node, peer = ends()
    node.receive_data(peer.data_to_send())
    peer.receive_data(node.data_to_send())
    auth = peer.data_to_send()
    other = NodeProtocol(b"s3cret", incarnation=INCARNATION, nonce=b"m" * 32)
    other.receive_data(PeerProtocol(b"s3cret", nonce=b"p" * 32).data_to_send())
    with pytest.raises(RemoteProtocolError, match="secret differs"):
        other.receive_data(auth)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_byte_of_the_handshake_can_be_changed(data: st.DataObject) -> None:
    node, peer = ends()
    victim = data.draw(st.integers(0, 3))
    try:
        for turn in range(4):
            sender, receiver = (peer, node) if turn % 2 == 0 else (node, peer)
            frame = node.welcome("n", "s", ["tcp"]) if turn == 3 else sender.data_to_send()
            if turn == victim:
                place = data.draw(st.integers(0, len(frame) - 1))
                flip = data.draw(st.integers(1, 255))
                frame = frame[:place] + bytes([frame[place] ^ flip]) + frame[place + 1 :]
            receiver.receive_data(frame)
            if turn == victim and receiver._reader.pending:
                return  # it waits for a longer frame
    except RemoteProtocolError:
        return
    pytest.fail("authenticated over an altered handshake")


def test_no_common_version_is_refused_with_both_lists() -> None:
    node = NodeProtocol(incarnation=1)
    peer = PeerProtocol(versions=(7, 9))
    with pytest.raises(RemoteProtocolError, match=r"offers 7, 9, the node speaks 1") as caught:
        node.receive_data(peer.data_to_send())
    with pytest.raises(RefusedError, match="offers 7, 9") as told:
        peer.receive_data(caught.value.reply)
    assert told.value.code == Code.VERSION


def test_nobody_can_talk_two_ends_into_an_older_version() -> None:
    node = NodeProtocol(b"s", incarnation=1)
    peer = PeerProtocol(b"s", versions=(1, 2), nonce=b"p" * 32)
    honest = peer.data_to_send()
    hello = msgspec.msgpack.decode(honest[HEADER_BYTES:], type=m.Hello)
    body = msgspec.msgpack.encode(m.Hello([1], hello.software, hello.role, hello.nonce))
    node.receive_data(HEADER.pack(len(body), 0, bytes(16)) + body)
    with pytest.raises(RemoteProtocolError, match="secret differs"):
        peer.receive_data(node.data_to_send())


def test_the_peer_does_not_take_a_version_that_it_did_not_offer() -> None:
    node, peer = ends()
    node.receive_data(peer.data_to_send())
    node.data_to_send()
    node._writer.sequence = 0
    with pytest.raises(RemoteProtocolError, match="not offered"):
        peer.receive_data(forge(node, m.Challenge(3, b"n" * 32, 1, b"x" * 32)))


# --- noise and attacks ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_noise_before_authentication_yields_at_most_one_refusal(noise: list[bytes], at_node: bool) -> None:
    end: Any = ends()[not at_node]
    end.data_to_send()
    fault = None
    for chunk in noise:
        try:
            assert end.receive_data(chunk) == []
        except RemoteProtocolError as error:
            fault = error
            break
    if fault is None:
        assert end._reader.pending <= HEADER_BYTES + MAX_BODY_UNPROVEN
        assert end.data_to_send() == b""
        return
    assert fault.messages == []
    assert msgspec.msgpack.decode(fault.reply[HEADER_BYTES:], type=m.Refusal).request == 0
    assert end.state is State.DEAD
    with pytest.raises(LocalProtocolError):
        end.receive_data(b"x")
    with pytest.raises(LocalProtocolError):
        end.send(m.Ping(1))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_well_framed_noise_is_malformed_not_a_crash(body: bytes) -> None:
    node, peer = ready()
    with contextlib.suppress(RemoteProtocolError):
        node.receive_data(peer._writer.frame(body))


@settings(max_examples=150, deadline=None)
@given(st.lists(one_of(TO_NODE), min_size=1, max_size=3), st.data())
def test_any_changed_byte_is_detected(sent: list[m.Message], data: st.DataObject) -> None:
    node, peer = ready()
    stream = b"".join(peer.send(message) for message in sent)
    place = data.draw(st.integers(0, len(stream) - 1))
    flip = data.draw(st.integers(1, 255))
    stream = stream[:place] + bytes([stream[place] ^ flip]) + stream[place + 1 :]
    try:
        got = node.receive_data(stream)
        with pytest.raises(
            RemoteProtocolError, match="inside a frame"
        ):  # a longer length waits until the end
            node.receive_eof()
    except RemoteProtocolError as fault:
        got = fault.messages
    assert got == sent[: len(got)]
    assert len(got) < len(sent)


def three(peer: PeerProtocol) -> list[bytes]:
    return [peer.send(m.Ping(request)) for request in (1, 2, 3)]


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ([0, 0], "frame 2 where frame 3 was due"),
        ([0, 1, 0], "frame 2 where frame 4 was due"),
        ([1, 0], "frame 3 where frame 2 was due"),
        ([0, 2], "frame 4 where frame 3 was due"),
    ],
    ids=["replayed", "replayed later", "reordered", "dropped"],
)
def test_frames_come_once_and_in_order(order: list[int], fault: str) -> None:
    node, peer = ready()
    frames = three(peer)
    with pytest.raises(RemoteProtocolError, match=fault):
        node.receive_data(b"".join(frames[i] for i in order))


def test_a_frame_reflected_to_its_sender_is_detected() -> None:
    node, peer = ready()
    with pytest.raises(RemoteProtocolError, match="the MAC of frame 2 is wrong"):
        peer.receive_data(peer.send(m.Ping(1)))
    assert node.state is State.READY


def test_a_frame_of_another_connection_is_detected() -> None:
    node, _ = ready()
    other = NodeProtocol(b"s3cret", incarnation=INCARNATION)
    stranger = PeerProtocol(b"s3cret")
    other.receive_data(stranger.data_to_send())
    stranger.receive_data(other.data_to_send())
    other.receive_data(stranger.data_to_send())
    stranger.receive_data(other.welcome("n", "s", []))
    with pytest.raises(RemoteProtocolError, match="MAC of frame 2"):
        node.receive_data(stranger.send(m.Ping(1)))


def test_a_frame_without_mac_is_detected_even_a_refusal() -> None:
    node, peer = ready()
    body = msgspec.msgpack.encode(m.Refusal(0, Code.CLOSING, "bye"))
    for end in (node, peer):
        with pytest.raises(RemoteProtocolError, match="MAC of frame 2"):
            end.receive_data(HEADER.pack(len(body), 2, bytes(16)) + body)


@pytest.mark.parametrize("length", [0, MAX_BODY_UNPROVEN + 1, 2**32 - 1])
def test_before_authentication_four_bytes_betray_an_oversized_frame(length: int) -> None:
    node, _ = ends()
    with pytest.raises(RemoteProtocolError, match=f"frame of {length} bytes"):
        node.receive_data(length.to_bytes(4, "little"))


def test_after_it_the_limit_is_what_the_node_announced() -> None:
    node, peer = ready(max_body=MAX_BODY_UNPROVEN)
    with pytest.raises(LocalProtocolError, match="4096 may be sent"):
        peer.send(m.Lookup(1, 1, bytes(16 * 300)))
    assert node.receive_data(peer.send(m.Lookup(1, 1, bytes(16 * 200))))
    node, _ = ready()
    with pytest.raises(RemoteProtocolError, match=f"frame of {MAX_BODY + 1} bytes"):
        node.receive_data((MAX_BODY + 1).to_bytes(4, "little"))


def test_an_announced_length_reserves_nothing() -> None:
    node, _ = ready()
    node.receive_data(HEADER.pack(MAX_BODY, 2, b"m" * 16))
    assert len(node._reader._buffer) == HEADER_BYTES


def test_text_of_the_other_side_cannot_drive_a_terminal() -> None:
    node, peer = ready()
    with pytest.raises(RefusedError) as caught:
        peer.receive_data(node.send(m.Refusal(0, Code.CLOSING, "a\x1b[2J\nb", "c\rd")))
    assert str(caught.value) == "the node refused: a?[2J?b (c?d)"


# --- who may say what, when -------------------------------------------------------------------------------


def sample(kind: type[Any]) -> Any:
    """The plainest message of a kind."""
    plain: dict[str, Any] = {
        "U16": 1, "U32": 1, "U64": 1, "Text": "t", "Name": "n", "Nonce": b"x" * 32, "Proof": b"x" * 32,
        "Gid": b"g" * 16, "Token": b"", "Sections": {}, "list[Text]": [], "Versions": [1],
        "Rails": [], "Ends": [], "Regions": [], "bool": False,
    }  # fmt: skip
    values = {}
    for name in kind.__struct_fields__:
        annotation = kind.__annotations__[name]
        if name in getattr(kind, "COLUMNS", {}):
            values[name] = b""
        elif annotation in plain:
            values[name] = plain[annotation]
        elif annotation in {part.__name__ for part in PARTS}:
            values[name] = sample(getattr(m, annotation))
        else:
            values[name] = typing.get_args(get_type_hints(kind)[name])[0]
    return kind(**values)


def stand(side: str, state: State) -> tuple[Any, Any]:
    """(that end in that state, its other end)."""
    node, peer = ends()
    steps: list[Callable[[], Any]] = [
        lambda: node.receive_data(peer.data_to_send()),
        lambda: peer.receive_data(node.data_to_send()),
        lambda: node.receive_data(peer.data_to_send()),
        lambda: peer.receive_data(node.welcome("n", "s", [])),
    ]
    end, other = (node, peer) if side == "node" else (peer, node)
    for step in steps:
        if end.state is state:
            break
        step()
    assert end.state is state
    return end, other


@pytest.mark.parametrize(
    ("side", "state"), [(side, state) for side in RECEIVES for state in RECEIVES[side]], ids=str
)
def test_a_message_that_the_state_does_not_list_is_refused_both_ways(side: str, state: State) -> None:
    for kind in MESSAGES:
        if kind not in RECEIVES[side][state]:
            end, other = stand(side, state)
            body = msgspec.msgpack.encode(sample(kind))
            other._writer.key, other._writer.sequence = end._reader.key, end._reader.sequence
            with pytest.raises(RemoteProtocolError, match=r"cannot receive|malformed|MAC"):
                end.receive_data(other._writer.frame(body))
            assert end.state is State.DEAD
        if kind not in SENDS[side].get(state, {}):
            end, _ = stand(side, state)
            before = end._writer.sequence
            with pytest.raises(LocalProtocolError, match="cannot send"):
                end.send(sample(kind))
            assert (end.state, end._writer.sequence) == (state, before)


def test_what_one_side_may_send_the_other_may_receive() -> None:
    for side, other in (("node", "peer"), ("peer", "node")):
        assert set(SENDS[side][State.READY]) == set(RECEIVES[other][State.READY])
    assert {kind for table in SENDS.values() for row in table.values() for kind in row} | {
        m.Hello, m.Challenge, m.Auth,
    } == set(MESSAGES)  # fmt: skip


def test_a_refused_request_leaves_the_connection_as_it_is() -> None:
    node, peer = ready()
    refusal = m.Refusal(7, Code.NOT_FOUND, "no such namespace", "create it first")
    assert peer.receive_data(node.send(refusal)) == [refusal]
    assert (node.state, peer.state) == (State.READY, State.READY)
    with pytest.raises(LocalProtocolError, match="Refusal of one request"):
        peer.send(refusal)


def test_after_bye_nothing_is_sent_and_what_still_comes_is_ignored() -> None:
    node, peer = ready()
    late = node.send(m.Ping(1))
    assert node.receive_data(peer.send(m.Bye("done"))) == [m.Bye("done")]
    assert (node.state, peer.state) == (State.CLOSED, State.LEFT)
    assert peer.receive_data(late) == []
    for end in (node, peer):
        with pytest.raises(LocalProtocolError):
            end.send(m.Ping(2))
        end.receive_eof()
    with pytest.raises(RemoteProtocolError, match="bytes after Bye") as caught:
        node.receive_data(b"x")
    assert caught.value.reply == b""


def test_an_end_without_bye_is_told_apart_from_a_cut_frame() -> None:
    node, _ = ready()
    with pytest.raises(RemoteProtocolError, match="without saying why"):
        node.receive_eof()
    node, peer = ready()
    node.receive_data(peer.send(m.Ping(1))[:-1])
    with pytest.raises(RemoteProtocolError, match="inside a frame, 30 bytes"):
        node.receive_eof()


def test_what_came_before_a_fault_is_not_lost() -> None:
    node, peer = ready()
    frames = three(peer)
    with pytest.raises(RemoteProtocolError) as caught:
        node.receive_data(frames[0] + frames[1] + b"\0" * 30)
    assert caught.value.messages == [m.Ping(1), m.Ping(2)]
    with pytest.raises(RefusedError, match="the node refused: a frame of 0 bytes"):
        peer.receive_data(caught.value.reply)


@pytest.mark.parametrize(
    "message",
    [m.Ping(-1), m.Ping(2**64), m.Ping("1"), m.Count(1, 2**32), m.Bye("x" * 1025), m.Stats(np.int64(1))],  # type: ignore[arg-type]
)
def test_a_field_out_of_range_never_leaves(message: m.Message) -> None:
    node, peer = ready()
    end = node if type(message) is m.Count else peer
    with pytest.raises(LocalProtocolError):
        end.send(message)
    assert (peer if end is node else node).receive_data(end.send(m.Ping(5))) == [m.Ping(5)]


def test_protocol_error_itself_is_abstract() -> None:
    with pytest.raises(TypeError):
        ProtocolError("no")


# --- shapes -----------------------------------------------------------------------------------------------


def test_columns_must_agree_here_and_on_the_wire() -> None:
    with pytest.raises(LocalProtocolError, match=r"Put.lengths has 4 bytes where 2 × 4 are due"):
        m.Put(1, 1, bytes(32), bytes(4), bytes(8), bytes(16))
    with pytest.raises(LocalProtocolError, match=r"Lookup.keys has 17 bytes"):
        m.Lookup(1, 1, bytes(17))
    node, peer = ready()
    with pytest.raises(RemoteProtocolError, match=r"malformed.*Put.offsets has 8 bytes where 2 × 8"):
        node.receive_data(forge(peer, [32, 1, 1, bytes(32), bytes(8), bytes(8), bytes(8)]))


def test_the_number_of_blocks_is_bounded() -> None:
    assert m.Statuses(1, bytes(m.MAX_BATCH)).blocks == m.MAX_BATCH
    with pytest.raises(LocalProtocolError, match="65537 blocks"):
        m.Statuses(1, bytes(m.MAX_BATCH + 1))
    with pytest.raises(LocalProtocolError, match="65537 blocks"):
        pack_keys(np.zeros((m.MAX_BATCH + 1, 16), np.uint8))


def test_an_older_sender_leaves_trailing_fields_out_a_newer_one_must_not_add_any() -> None:
    node, peer = ready()
    keys, lengths, regions, offsets = bytes(16), bytes(4), bytes(4), bytes(8)
    short = forge(peer, [32, 1, 1, keys, lengths, regions, offsets])
    assert node.receive_data(short) == [m.Put(1, 1, keys, lengths, regions, offsets, b"", "memory", 0)]
    with pytest.raises(RemoteProtocolError, match="malformed"):
        node.receive_data(forge(peer, [7, 1, "new"]))


def test_a_put_of_the_largest_batch_fits_a_frame() -> None:
    n = m.MAX_BATCH
    rng = np.random.default_rng(1)
    columns = PutColumns(
        rng.integers(0, 256, (n, 16), np.uint8),
        rng.integers(0, 2**32, n, np.uint32),
        np.arange(n, dtype=np.uint32),
        np.arange(n, dtype=np.uint64) << np.uint64(40),
        rng.integers(0, 2**64, n, np.uint64),
    )
    node, peer = ready()
    (put,) = node.receive_data(peer.send(columns.message(1, 2, "flash", 500)))
    assert isinstance(put, m.Put)
    assert (put.blocks, put.durability, put.deadline_ms) == (n, "flash", 500)
    for ours, theirs in zip(columns, PutColumns.of(put), strict=True):
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("values", "size"),
    [([-1], 4), ([2**32], 4), ([256], 1), ([0.5], 8), ([[1]], 4), (np.array([2**64 - 1], np.uint64), 4)],
)
def test_a_column_takes_only_what_fits(values: Any, size: Any) -> None:
    with pytest.raises(LocalProtocolError):
        pack_column(values, size)


def test_columns_are_little_endian_and_come_back() -> None:
    assert pack_column([1, 2], 4) == b"\1\0\0\0\2\0\0\0"
    assert pack_column(np.array([1], ">u8"), 8) == b"\1" + bytes(7)
    assert pack_column([], 8) == b""
    assert unpack_column(b"\1\0\0\0", 4).tolist() == [1]
    assert unpack_keys(b"k" * 32).shape == (2, 16)
    for call in (lambda: unpack_column(b"abc", 4), lambda: unpack_keys(b"abc")):
        with pytest.raises(LocalProtocolError):
            call()
    with pytest.raises(LocalProtocolError, match="shape"):
        pack_keys(np.zeros(16, np.uint8))


# --- the document -----------------------------------------------------------------------------------------

WORDS = {
    "U16": "u16", "U32": "u32", "U64": "u64", "Text": "text", "Name": "name", "Nonce": "bytes 32",
    "Proof": "bytes 32", "Token": "bytes ≤ 64", "Gid": "bytes 16", "Versions": "list u16",
    "Sections": "sections",
    "list[Text]": "list text", "Regions": "list RegionInfo", "Rails": "list RailKey", "Ends": "list RailInfo",
    "Keys": "16·n", "U32s": "4·n", "U64s": "8·n", "U8s": "1·n", "Slots": "32·n", "Fabric": '"verbs" "tcp"',
    "Durability": '"memory" "flash"',
}  # fmt: skip


def described(kind: type[Any]) -> str:
    """A struct's fields as the document writes them."""
    fields = []
    for field in msgspec.structs.fields(kind):
        annotation = kind.__annotations__[field.name]
        word = WORDS.get(annotation, annotation)
        if annotation.startswith("Literal"):
            word = " ".join(f'"{choice}"' for choice in re.findall(r'"(\w+)"', annotation.replace("'", '"')))
        text = f"{field.name} {word}"
        if not field.required:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            text += " = " + {"b''": "empty", "''": "empty", "[]": "empty"}.get(repr(default), str(default))
        fields.append(text)
    return " · ".join(fields)


def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading of the document: {second cell: all cells}."""
    text = DOCS.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {row[1].strip("`"): row for row in cells[2:]}


def test_the_document_lists_every_message_with_its_fields() -> None:
    table = rows("Messages")
    assert list(table) == [kind.__name__ for kind in MESSAGES]
    for kind in MESSAGES:
        tag, _, way, fields, *_ = table[kind.__name__]
        assert int(tag) == kind.__struct_config__.tag
        assert fields == described(kind), kind.__name__
        receivers = {side for side, states in RECEIVES.items() if any(kind in row for row in states.values())}
        assert way == ("both" if len(receivers) == 2 else "P → N" if receivers == {"node"} else "N → P")


def test_the_document_lists_every_part_and_code() -> None:
    parts = rows("Parts")
    assert {name: row[2] for name, row in parts.items()} == {kind.__name__: described(kind) for kind in PARTS}
    codes = rows("Refusals")
    assert {name: int(row[0]) for name, row in codes.items()} == {code.name: code.value for code in Code}


def test_names_are_plain_ascii() -> None:
    for kind in [*MESSAGES, *PARTS]:
        assert set("".join(kind.__struct_fields__)) <= set(string.ascii_lowercase + "_0123456789")

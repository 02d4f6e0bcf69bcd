"""Frames: what is sent arrives, however it is cut; nothing that is sent breaks a reader."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core import frames
from deskgrid.core.frames import MAX_FRAME_BYTES, FrameReader, Message, encode
from deskgrid.errors import ProtocolError
from deskgrid.model.overlay import Address

text = st.text(max_size=50)
addresses = st.builds(Address, text, st.integers(-(2**63), 2**63 - 1))
candidates = st.builds(
    frames.Candidates,
    observed=text,
    port=st.integers(-(2**63), 2**63 - 1),
    private=st.lists(text, max_size=5).map(tuple),
    punch=st.none() | addresses,
    relay_only=st.booleans(),
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(frames.Register, st.integers(-5, 5)),
    st.builds(frames.Registered, observed=addresses, ping_s=st.floats(0, 1000)),
    st.builds(frames.Connect, id=text, grant=text, candidates=candidates),
    st.builds(frames.Invite, id=text, grant=text, candidates=candidates, relay=text),
    st.builds(frames.Accept, id=text, candidates=candidates),
    st.builds(frames.Accepted, id=text, candidates=candidates, relay=text),
    st.builds(frames.Reject, id=text, reason=text),
    st.builds(frames.Rejected, id=text, reason=text, absent=st.booleans()),
    st.builds(frames.Ping, st.integers(0, 100)),
    st.builds(frames.Pong, st.integers(0, 100)),
    st.builds(frames.Goodbye, text),
)


def _read_all(data: bytes, cuts: list[int]) -> tuple[list[Message], bool]:
    """Feed data in pieces; return the messages and whether it was refused."""
    reader, found = FrameReader(), []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        try:
            found += reader.feed(data[start:end])
        except ProtocolError:
            with pytest.raises(ProtocolError):
                reader.feed(encode(frames.Ping()))
            return found, True
    return found, False


@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 10_000), max_size=12))
def test_what_is_sent_arrives_however_it_is_cut(sent: list[Message], cuts: list[int]):
    assert _read_all(b"".join(encode(message) for message in sent), cuts) == (sent, False)


@given(messages)
def test_messages_arrive_byte_by_byte(message: Message):
    reader, data = FrameReader(), encode(message)
    assert [found for byte in data for found in reader.feed(bytes([byte]))] == [message]


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=5))
@settings(max_examples=500)
def test_random_bytes_are_refused_or_waited_on(data: bytes, cuts: list[int]):
    found, refused = _read_all(data, cuts)
    assert refused or len(data) < 4 or int.from_bytes(data[:4], "big") + 4 > len(data) or found


@given(st.lists(messages, min_size=1, max_size=3), st.data())
@settings(max_examples=500)
def test_mutated_frames_break_nothing(sent: list[Message], data: st.DataObject):
    raw = bytearray(b"".join(encode(message) for message in sent))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    _read_all(bytes(raw), data.draw(st.lists(st.integers(0, 5000), max_size=4)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"type":"elsewhere"}',
        b'{"type":"ping","number":1e400}',
        b'{"type":"ping","number":99999999999999999999999999}',
        b'{"type":"ping","number":' + b"9" * 5000 + b"}",
        b'{"type":"ping","number":"1"}',
        b'{"type":"connect","id":"a","grant":"b"}',
        b'{"type":"goodbye","reason":"\xff"}',
        b'{"type":"goodbye","reason":"\\ud800"}',
        b'{"type":"ping"}x',
        b"[" * MAX_FRAME_BYTES,
        b'{"x":' * 3000,
    ],
)
def test_what_is_no_message_is_refused(body: bytes):
    with pytest.raises(ProtocolError):
        FrameReader().feed(len(body).to_bytes(4, "big") + body)


def test_a_long_frame_is_refused_at_its_head():
    with pytest.raises(ProtocolError, match="at most"):
        FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert FrameReader().feed(MAX_FRAME_BYTES.to_bytes(4, "big")) == []


def test_a_message_that_no_reader_takes_is_not_sent():
    with pytest.raises(ValueError, match="bytes"):
        encode(frames.Goodbye("x" * MAX_FRAME_BYTES))


def test_unknown_fields_are_ignored():
    body = b'{"type":"ping","number":3,"colour":"red"}'
    assert FrameReader().feed(len(body).to_bytes(4, "big") + body) == [frames.Ping(3)]


def test_many_small_frames_at_once_cost_linear_time():
    def seconds(count: int) -> float:
        data = encode(frames.Ping()) * count
        started = time.process_time()
        assert len(FrameReader().feed(data)) == count
        return time.process_time() - started

    seconds(100)
    assert seconds(40_000) < 40 * max(min(seconds(4_000) for _ in range(3)), 0.001)

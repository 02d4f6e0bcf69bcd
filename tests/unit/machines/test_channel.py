"""The agent's channel: what the agent writes comes back, and no guest can do harm with it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.machines.channel import MAX_LINE_BYTES, ChannelParser, channel_lines
from deskgrid.machines.driver import Booted, ContextExited, ContextStarted, Listening, MachineEvent, Output, Stream


def joined(events: list[MachineEvent], stream: Stream) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Output) and event.stream is stream)


def test_notices_become_events_in_order() -> None:
    told = ChannelParser().feed(b"! booted\n! context-started\n1 hello\n! context-exited 3\n")
    assert told == [Booted(), ContextStarted(), Output(Stream.STDOUT, b"hello\n"), ContextExited(3)]


def test_each_notice_counts_once() -> None:
    assert ChannelParser().feed(b"! context-exited 3\n! context-exited 0\n! booted\n! booted\n") == [ContextExited(3), Booted()]


def test_exit_codes_that_cannot_be_are_ignored() -> None:
    assert ChannelParser().feed(b"! context-exited 256\n! context-exited -1\n! context-exited\n! context-exited 1 2\n") == []


def test_ports_that_are_offered_are_told_once_each() -> None:
    sent = b"! listening 80\n! listening 22\n! listening 80\n! listening 23\n! listening 99999\n! listening -1\n! listening\n"
    assert ChannelParser(frozenset({22, 80})).feed(sent + sent) == [Listening(80), Listening(22)]
    assert ChannelParser().feed(sent) == []


def test_notice_inside_output_is_output() -> None:
    assert ChannelParser().feed(b"1 ! booted\n") == [Output(Stream.STDOUT, b"! booted\n")]


def test_line_without_end_is_dropped_and_the_next_one_is_read() -> None:
    parser = ChannelParser()
    for _ in range(100):
        assert parser.feed(b"1 " + b"x" * MAX_LINE_BYTES) == []
        assert len(parser._rest) <= MAX_LINE_BYTES
    assert parser.feed(b"tail\n! booted\n") == [Booted()]


@given(st.lists(st.tuples(st.sampled_from([Stream.STDOUT, Stream.STDERR]), st.binary(max_size=200))), st.integers(1, 50))
def test_any_output_comes_back_however_it_is_cut(writes: list[tuple[Stream, bytes]], step: int) -> None:
    sent = b"".join(channel_lines(stream, data) for stream, data in writes)
    parser = ChannelParser()
    events = [event for start in range(0, len(sent), step) for event in parser.feed(sent[start : start + step])]
    for stream in (Stream.STDOUT, Stream.STDERR):
        assert joined(events, stream) == b"".join(data for where, data in writes if where is stream)


@given(st.lists(st.binary(max_size=100)))
def test_any_bytes_are_survived_and_give_nothing_but_events(chunks: list[bytes]) -> None:
    parser = ChannelParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    assert all(isinstance(event, Booted | ContextStarted | ContextExited | Output) for event in events)


def test_longest_line_of_an_agent_is_taken_however_it_is_cut():
    line = b"1-" + b"x" * 65536 + b"\n"
    for cut in (65536, 65537, 65538):
        parser = ChannelParser()
        assert parser.feed(line[:cut]) == []
        assert parser.feed(line[cut:]) == [Output(Stream.STDOUT, b"x" * 65536)]

"""What the agent in a guest tells over its serial line, read as hostile input: any bytes, any length.

A line each (machines/agent.sh writes them):

    ! booted | ! context-started | ! context-exited RC      each counts once
    ! listening PORT       once for each port that the machine offers
    1 text | 2 text        a line of stdout or stderr
    1-text | 2-text        a piece of a line

Everything else is ignored.
"""

from __future__ import annotations

import re

from deskgrid.machines.driver import Booted, ContextExited, ContextStarted, Listening, MachineEvent, Output, Stream

__all__ = ["MAX_LINE_BYTES", "ChannelParser", "channel_lines"]

MAX_LINE_BYTES = 65 << 10
"""An agent's longest line is a chunk of 64 KiB behind its prefix."""
_STREAMS = {b"1": Stream.STDOUT, b"2": Stream.STDERR}
_EXITED = re.compile(rb"context-exited (\d{1,3})")
_LISTENING = re.compile(rb"listening (\d{1,5})")


class ChannelParser:
    """Bytes in, events out; holds at most MAX_LINE_BYTES. `offered` are the ports whose listeners matter."""

    def __init__(self, offered: frozenset[int] = frozenset()) -> None:
        self._offered = offered
        self._rest = b""
        self._skipping = False
        self._told: set[object] = set()

    def feed(self, data: bytes) -> list[MachineEvent]:
        """Return the events of all lines that are whole now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = [event for line in lines if (event := self._whole_line(line)) is not None]
        if len(self._rest) > MAX_LINE_BYTES:
            # No agent of ours writes such a line: drop it up to its end.
            self._rest, self._skipping = b"", True
        return events

    def _whole_line(self, line: bytes) -> MachineEvent | None:
        if self._skipping:
            self._skipping = False
            return None
        kind, mark, text = line[:1], line[1:2], line[2:]
        if kind in _STREAMS and mark in (b" ", b"-"):
            return Output(_STREAMS[kind], text if mark == b"-" else text + b"\n")
        event = _notice(text) if line[:2] == b"! " else None
        if event is None:
            return None
        subject = event if isinstance(event, Listening) else type(event)
        if subject in self._told or (isinstance(event, Listening) and event.port not in self._offered):
            return None
        self._told.add(subject)
        return event


def channel_lines(stream: Stream, data: bytes) -> bytes:
    """Return output as an agent would write it on the channel: the inverse of the parser."""
    prefix = next(key for key, value in _STREAMS.items() if value is stream)
    *lines, rest = data.split(b"\n")
    told = b"".join(prefix + b" " + line + b"\n" for line in lines)
    return told + (prefix + b"-" + rest + b"\n" if rest else b"")


def _notice(text: bytes) -> MachineEvent | None:
    if text == b"booted":
        return Booted()
    if text == b"context-started":
        return ContextStarted()
    listening = _LISTENING.fullmatch(text)
    if listening is not None:
        return Listening(int(listening[1]))
    match = _EXITED.fullmatch(text)
    if match is None or int(match[1]) > 255:
        return None
    return ContextExited(int(match[1]))

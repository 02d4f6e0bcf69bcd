"""What a worker and a warm program say to each other: a line of JSON for each job, a line of JSON for each answer.

    {"job": 41, "index": 7, "parameters": {"alpha": "0.1"}}            to the program's stdin
    {"job": 41, "exit_code": 0, "value": "0.25"}                       from its stdout
    {"job": 41, "exit_code": 0, "value": "AAEC", "encoding": "base64"}  for a value that is no text

A program may be given some jobs before it has answered the first; it does one after the other. It is hostile: a line is bounded, and one that is
no answer ends the conversation.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta, Struct

from deskgrid.errors import ProtocolError
from deskgrid.model.workers import MOST_VALUE_BYTES

__all__ = ["MOST_LINE_BYTES", "Answer", "AnswerReader", "Conversation", "Task", "task_line", "value_of"]

MOST_LINE_BYTES = 6 * MOST_VALUE_BYTES + 1024
"""A character of a text takes up to six bytes as JSON writes it."""
_MOST_BLANKS = 1000
_SHOWN = 80


class Task(Struct, frozen=True):
    """One job, as the program is told."""

    job: int
    index: int
    parameters: dict[str, str]


class Answer(Struct, frozen=True):
    """What the program says of one job."""

    job: int
    exit_code: Annotated[int, Meta(ge=0, le=255)]
    value: str | None = None
    encoding: Literal["text", "base64"] = "text"


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Answer)


def task_line(task: Task) -> bytes:
    """Return the line that gives a job to a program."""
    return _encoder.encode(task) + b"\n"


def value_of(answer: Answer) -> bytes | None:
    """Return the value of an answer, None if it has none. Raise ProtocolError if it is too long or no base64."""
    if answer.value is None:
        return None
    try:
        value = answer.value.encode() if answer.encoding == "text" else base64.b64decode(answer.value, validate=True)
    except ValueError as error:
        raise ProtocolError("its value is not in base64") from error
    if len(value) > MOST_VALUE_BYTES:
        raise ProtocolError(f"its value is longer than {MOST_VALUE_BYTES} bytes")
    return value


class AnswerReader:
    """Makes answers of what a program writes. Keeps at most a line and what came with it."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._blanks = 0
        self.fault = ""
        """Why nothing more is read; "" while all is well."""

    def feed(self, data: bytes) -> list[Answer]:
        """Return the answers that are whole now, in order; those before a fault, too."""
        if self.fault:
            return []
        end = data.rfind(b"\n") + 1
        if not end:
            self._rest += data
            self._check_rest()
            return []
        whole = bytes(self._rest) + data[:end]
        self._rest = bytearray(data[end:])
        found = self._decode(whole)
        self._check_rest()
        return found

    def _check_rest(self) -> None:
        if len(self._rest) > MOST_LINE_BYTES:
            self._give_up(f"it wrote a line longer than {MOST_LINE_BYTES} bytes")

    def _decode(self, whole: bytes) -> list[Answer]:
        try:
            found = _decoder.decode_lines(whole)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self._decode_one_by_one(whole)
        self._blanks += max(0, whole.count(b"\n") - len(found))
        if self._blanks > _MOST_BLANKS:
            self._give_up(f"it wrote more than {_MOST_BLANKS} empty lines")
        return found

    def _decode_one_by_one(self, whole: bytes) -> list[Answer]:
        """Return the answers before the line that is none."""
        found = []
        for line in whole.split(b"\n"):
            if not line.strip():
                continue
            try:
                found.append(_decoder.decode(line))
            except (msgspec.MsgspecError, ValueError, RecursionError):
                self._give_up(f"it wrote a line that is no answer: {_shown(line)}")
                break
        return found

    def _give_up(self, fault: str) -> None:
        self.fault = fault
        self._rest.clear()


class Conversation(asyncio.Protocol):
    """The worker's end of the stream. `answered` is called with what came, `ended` once, with the fault of the program or "" at its end."""

    def __init__(self, answered: Callable[[list[Answer]], None], ended: Callable[[str], None]) -> None:
        self._answered = answered
        self._ended = ended
        self._reader = AnswerReader()
        self._transport: asyncio.Transport | None = None

    def send(self, lines: Iterable[bytes]) -> None:
        """Give the program lines; never waits. What is sent to one that has ended is lost."""
        if self._transport is not None:
            self._transport.write(b"".join(lines))

    def close(self) -> None:
        """Read and write nothing more. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if answers := self._reader.feed(data):
            self._answered(answers)
        if self._reader.fault:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self._ended(self._reader.fault)


def _shown(line: bytes) -> str:
    text = line[:_SHOWN].decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)

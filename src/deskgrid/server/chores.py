"""Work that a call only begins: filling arrays with their jobs, clearing cancelled ones away, giving sets their turn to start, letting
jobs fail whose disk was revoked.

It is done in small transactions, so that calls of workers never wait for long, and what is left to do is in the store: after a kill the next
process goes on where this one stopped, and several processes do no harm to each other.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import msgspec
import structlog

from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.server.routes.handler import Services
from deskgrid.server.store import attempts, jobs, manifests, sets, submissions
from deskgrid.server.store.submissions import Chore, SubmissionState

__all__ = ["do_chores", "do_chores_forever"]

_log = structlog.get_logger("deskgrid.server")

_JOBS_AT_ONCE = 5000
"""Jobs made or moved in one transaction: some hundredths of a second."""
_LONGEST_LINE_BYTES = 1 << 16
_LOOK_AGAIN_S = 5.0


async def do_chores_forever(services: Services, rng: Random) -> None:
    """Do what there is to do, as soon as there is."""
    while True:
        mark = services.live.mark(submissions.CHORES)
        left, pause_s = False, _LOOK_AGAIN_S
        try:
            left = await do_chores(services)
            pause_s = await _give_turns(services, rng)
        except DeskgridError as error:
            _log.error("chores failed", error=str(error))
        except Exception as error:
            # As a disk that cannot be written: arrays would stay half-filled for ever, and the server's end would be worse.
            _log.error("chores failed", error=repr(error), exc_info=error)
        if not left:
            await services.live.wait({submissions.CHORES: mark}, pause_s)


async def do_chores(services: Services) -> bool:
    """Do one piece of each chore; return whether something is left."""
    left = await _fail_revoked(services)
    for chore in await services.store.read(submissions.chores):
        left = await _do_piece(services, chore) or left
    return left


async def _fail_revoked(services: Services) -> bool:
    """Let some jobs fail whose disk must not be started any more."""
    if not await services.store.read(manifests.any_revoked):
        return False
    return bool(await services.store.write(lambda tx: attempts.fail_revoked(tx, _JOBS_AT_ONCE // 10)))


async def _give_turns(services: Services, rng: Random) -> float:
    """Let sets that start together try in turn; return the seconds until the next look."""
    turn_s = services.settings.together_s
    next_s = await services.store.write(lambda tx: sets.take_turns(tx, turn_s=turn_s, rng=rng))
    return _LOOK_AGAIN_S if next_s is None else min(_LOOK_AGAIN_S, next_s)


async def _do_piece(services: Services, chore: Chore) -> bool:
    if chore.state is SubmissionState.CANCELLING:
        return bool(await services.store.write(lambda tx: jobs.cancel_array_jobs(tx, chore.array_id, _JOBS_AT_ONCE)))
    if chore.table is None:
        return bool(await services.store.write(lambda tx: submissions.fill(tx, chore.array_id, _JOBS_AT_ONCE)))
    try:
        path = await services.repository.local_path(chore.table)
        lines, reads_at = await asyncio.to_thread(_read_lines, path, chore)
    except DeskgridError as error:
        message = f"its table cannot be read: {error.message}"
        await services.store.write(lambda tx: submissions.fail_filling(tx, chore.array_id, message))
        return True
    return bool(await services.store.write(lambda tx: submissions.fill_table(tx, chore.array_id, chore.filled, lines, reads_at)))


def _read_lines(path: Path, chore: Chore) -> tuple[list[str], int]:
    """Return the next lines of an array's table, and where the rest begins. Raise InvalidInput if they are not what was said."""
    wanted = min(_JOBS_AT_ONCE, chore.size - chore.filled)
    lines: list[str] = []
    with path.open("rb") as table:
        table.seek(chore.reads_at)
        while len(lines) < wanted:
            line = table.readline(_LONGEST_LINE_BYTES + 1)
            lines.append(_checked(line, len(chore.names), chore.filled + len(lines)))
        reads_at = table.tell()
        if chore.filled + len(lines) == chore.size and table.read(1):
            raise InvalidInput(f"it has more than the {chore.size} lines announced")
    return lines, reads_at


def _checked(line: bytes, columns: int, number: int) -> str:
    if not line:
        raise InvalidInput(f"it ends after {number} lines")
    if len(line) > _LONGEST_LINE_BYTES:
        raise InvalidInput(f"line {number + 1} is longer than {_LONGEST_LINE_BYTES} bytes")
    try:
        values = msgspec.json.decode(line, type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"line {number + 1} is not a JSON list of texts") from error
    if len(values) != columns or any("\0" in value for value in values):
        raise InvalidInput(f"line {number + 1} has {len(values)} values, not {columns}, or a NUL")
    return msgspec.json.encode(values).decode()

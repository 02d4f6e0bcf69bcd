"""Secrets on their way through the server: sealed to it in the table, opened in memory, sealed anew to the worker that holds the lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from deskgrid.core.sealing import for_attempt, seal_secrets
from deskgrid.errors import InvalidInput
from deskgrid.model.wire import SyncAnswer
from deskgrid.model.workers import Assignment
from deskgrid.server.authority import Authority

__all__ = ["sealed_to_worker"]

_log = structlog.get_logger()


async def sealed_to_worker(answer: SyncAnswer, authority: Authority, key: str) -> SyncAnswer:
    """Return what a worker is told with the secrets of its jobs sealed to its key, each for its attempt. Raise InvalidInput for what is no key.

    What cannot be opened, because the server's key was replaced, is left out: the worker says of such a job that it failed, and why.
    """
    if not any(one.spec.secrets for one in answer.assignments):
        return answer
    assignments = await asyncio.to_thread(_sealed_anew, answer.assignments, authority, key)  # some milliseconds each
    return msgspec.structs.replace(answer, assignments=assignments)


def _sealed_anew(assignments: Sequence[Assignment], authority: Authority, key: str) -> tuple[Assignment, ...]:
    opened: dict[tuple[int, bytes], dict[str, bytes] | None] = {}
    sealed = []
    for one in assignments:
        if one.spec.secrets:
            mark = (one.owner_id, one.secrets)  # the same for all jobs of an array
            if mark not in opened:
                opened[mark] = _opened(one, authority)
            plain = opened[mark]
            anew = seal_secrets(plain, key, for_attempt(one.attempt_id)) if plain is not None else b""
            one = msgspec.structs.replace(one, secrets=anew)
        sealed.append(one)
    return tuple(sealed)


def _opened(assignment: Assignment, authority: Authority) -> dict[str, bytes] | None:
    try:
        return authority.open_secrets(assignment.secrets, assignment.owner_id)
    except InvalidInput as error:
        _log.error("secrets_not_opened", job_id=assignment.job_id, error=error.message)
        return None

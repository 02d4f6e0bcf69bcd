"""Cleaning: what nobody needs any more goes, little by little, in every server process at once without harm (store/retention.py, store/data.py).

A kill at any point leaves what the next round finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import structlog

from deskgrid.errors import DeskgridError
from deskgrid.model.ids import Sha256
from deskgrid.server.routes.handler import Services
from deskgrid.server.store import accounts, data, retention, swarm
from deskgrid.server.store.engine import Transaction

__all__ = ["clean", "clean_forever", "remove_unused"]

_log = structlog.get_logger("deskgrid.server")
_ROUND_S = 60.0
_STRAYS_EVERY = 24 * 60
"""Rounds between looks for bytes that the store knows nothing of, which only a kill leaves."""
_AT_ONCE = 500
"""Rows looked at in one transaction: some milliseconds."""
_MOST_PER_ROUND = 200
"""Transactions of one kind of work in a round."""
T = TypeVar("T")


async def clean_forever(services: Services) -> None:
    """Clean again and again."""
    number = 0
    while True:
        await services.clock.sleep(_ROUND_S)
        with _failures_logged():
            await clean(services, strays=number % _STRAYS_EVERY == 0)
        number += 1


async def clean(services: Services, *, strays: bool = True) -> None:
    """Do one round: forget what is too old, then remove bytes that nothing has referred to for long enough."""
    settings, now = services.settings, services.clock.now()
    oldest = now - settings.upload_lifetime_s
    await services.store.write(lambda tx: accounts.drop_tokens_of_ended_attempts(tx, oldest))
    await _while(services, lambda tx: retention.expire_results(tx, _AT_ONCE))
    await _while(services, lambda tx: retention.forget_idempotency(tx, oldest, _AT_ONCE))
    await _while(services, lambda tx: data.forget_uploads(tx, oldest, _AT_ONCE))
    await _through(services, lambda tx, after: retention.free_submissions(tx, after, _AT_ONCE))
    await _through(services, lambda tx, after: retention.forget_attempt_results(tx, after, _AT_ONCE, oldest))
    if settings.forget_s:
        await _forget_jobs(services, now - settings.forget_s)
    if strays:
        await _adopt_strays(services)
    await _forget_upload_bytes(services)
    await remove_unused(services)
    await services.store.write(swarm.forget_members)


async def remove_unused(services: Services, *, wait_s: float = data.REMOVAL_WAIT_S) -> int:
    """Note what is not referred to, and remove what has not been for `wait_s`; return how many blobs went."""
    after: str | None = ""
    while after is not None:
        after = await services.store.write(lambda tx, at=after: data.mark_unused(tx, at, _AT_ONCE))  # type: ignore[misc]
    gone = 0
    while claimed := await services.store.write(lambda tx: data.claim_unused(tx, 100, wait_s=wait_s)):
        removed = await _remove_claimed(services, claimed)
        await services.store.write(lambda tx, these=removed: data.note_removed(tx, these))  # type: ignore[misc]
        gone += len(removed)
        if len(removed) < len(claimed):
            break
    return gone


async def _remove_claimed(services: Services, claimed: list[Sha256]) -> list[Sha256]:
    """Remove the bytes of blobs while the claim on them holds; return those that are gone."""
    until = services.clock.monotonic() + data.CLAIM_S
    removed = []
    for sha256 in claimed:
        if services.clock.monotonic() >= until:
            break  # they are claimed anew later: by then another process may have begun to
        try:
            await services.repository.remove(sha256)
        except DeskgridError as error:
            _log.error("a blob could not be removed", sha256=sha256, error=error.message)
            break
        removed.append(sha256)
    return removed


async def _while(services: Services, piece: Callable[[Transaction], int]) -> None:
    for _ in range(_MOST_PER_ROUND):
        if await services.store.write(piece) < _AT_ONCE:
            return


async def _through(services: Services, piece: Callable[[Transaction, int], int | None]) -> None:
    """Go through a table; each look begins after the row where the last one ended."""
    after: int | None = 0
    while after is not None:
        after = await services.store.write(lambda tx, at=after: piece(tx, at))  # type: ignore[misc]


async def _forget_jobs(services: Services, before: float) -> None:
    after: int | None = 0
    while after is not None:
        found, after = await services.store.read(lambda tx, at=after: retention.forgettable(tx, before, at, _AT_ONCE))  # type: ignore[misc]
        for submission_id in found:
            while await services.store.write(lambda tx, one=submission_id: retention.remove_submission(tx, one, _AT_ONCE)):  # type: ignore[misc]
                pass


async def _forget_upload_bytes(services: Services) -> None:
    """Remove bytes of uploads that are not known. They are listed first: an upload's row is there before its first byte, and no number is
    given out twice, so what has no row now will never have one."""
    found = await services.repository.upload_ids()
    if found:
        live = await services.store.read(lambda tx: data.live_uploads(tx, found))
        await services.repository.forget_uploads(found - live)


async def _adopt_strays(services: Services) -> None:
    async for blobs in services.repository.blobs():
        if blobs and (adopted := await services.store.write(lambda tx, these=blobs: data.adopt(tx, these))):  # type: ignore[misc]
            _log.warning("blobs were found that nothing knew of", number=adopted)


@contextlib.contextmanager
def _failures_logged() -> Iterator[None]:
    try:
        yield
    except DeskgridError as error:
        _log.error("cleaning failed", error=str(error))
    except Exception as error:
        _log.error("cleaning failed", error=repr(error), exc_info=error)

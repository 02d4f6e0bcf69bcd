"""deskgrid audit: who did what."""

from __future__ import annotations

import time
from datetime import datetime

from deskgrid.cli.connection import connected
from deskgrid.cli.output import Json, clean, print_json, print_table
from deskgrid.cli.user import lifetime_of
from deskgrid.model.users import AuditEntry

__all__ = ["audit"]

_PAGE = 1000


async def audit(*, user: str = "", since: str | None = None, limit: int = 100, json: Json = False) -> None:
    """Show who did what, newest first (admins).

    For example:

        deskgrid audit --user ann --since 7d
        deskgrid audit --limit 10000 --json

    Parameters
    ----------
    user
        Only what this user did, himself or by his jobs.
    since
        Only what was done in this time, as in 1d.
    limit
        At most so many.
    """
    begin = time.time() - lifetime_of(since, "--since") if since else None
    entries: list[AuditEntry] = []
    before: int | None = None
    more = True
    async with connected() as grid:
        while more and len(entries) < limit:
            page = await grid.audit_log(user=user, since=begin, before=before, limit=min(_PAGE, limit - len(entries)))
            entries += page.entries
            more, before = page.more and bool(page.entries), page.entries[-1].id if page.entries else None
    if json:
        print_json(entries)
        return
    rows = [
        (
            f"{datetime.fromtimestamp(one.at).astimezone():%Y-%m-%d %H:%M:%S}",
            one.name or one.principal,
            one.action,
            one.object,
            clean(one.detail),
            one.request,
        )
        for one in entries
    ]
    print_table(("when", "who", "did", "to", "with", "request"), rows, empty="nothing was done")

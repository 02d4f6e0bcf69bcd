"""Who may reach which service. Rules:

1. A job reaches only what its own spec names, whatever its owner may reach.
2. A service of a job or of a user's program is reached by the same user: his programs and his jobs.
3. `share` widens that: group:NAME to members, user:NAME to one user, everyone to all. A job counts as its owner.
4. Who may not reach a job is told the same as if there were none; who may not reach a program's service, as if nobody offered it.
5. The console of a job (console.py) is never shared, and no job reaches it: only its owner's programs do.
6. Workers reach each other's engines while they are in one swarm (transfer.py), and nothing else, and are reached by nobody else.

An admin has no more rights here than another user: what goes on in jobs is their owners' affair.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from msgspec import Struct

from deskgrid.core.console import CONSOLE
from deskgrid.errors import Forbidden, InvalidInput, NotFound
from deskgrid.model.ids import JobId, UserId
from deskgrid.model.overlay import ServiceRef

__all__ = ["EVERYONE", "Source", "TargetJob", "check_job", "check_named", "check_share", "is_console", "is_trust", "may_use"]

EVERYONE = "everyone"
_SHARE = re.compile(r"(?:group|user):[a-z][a-z0-9_.-]{0,62}|everyone")


class Source(Struct, frozen=True, kw_only=True):
    """Who wants to reach something: a program of a user's, or a job of his."""

    user_id: UserId
    user: str
    groups: frozenset[str] = frozenset()
    job_id: JobId | None = None
    reach: tuple[ServiceRef, ...] = ()
    """Of a job: what its spec names."""


class TargetJob(Struct, frozen=True, kw_only=True):
    """A job whose service is asked for."""

    owner_id: UserId
    offers: tuple[str, ...]
    share: tuple[str, ...] = ()
    has_screen: bool = False


def check_share(text: str, where: str = "") -> None:
    """Check that a text says with whom to share. Raise InvalidInput otherwise."""
    if not _SHARE.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} is nobody to share with", where=where, hint="group:NAME, user:NAME or everyone")


def is_trust(text: str) -> bool:
    """Tell whether a text says whose PCs a job trusts: mine, or as to share with."""
    return text == "mine" or _SHARE.fullmatch(text) is not None


def may_use(source: Source, owner_id: UserId, share: Collection[str]) -> bool:
    """Say whether a service of `owner_id`, shared so, is for this source."""
    if source.user_id == owner_id or EVERYONE in share or f"user:{source.user}" in share:
        return True
    return any(f"group:{group}" in share for group in source.groups)


def check_named(source: Source, service: ServiceRef) -> None:
    """Raise Forbidden if the source is a job whose spec does not name the service, or that is a job's console."""
    if source.job_id is not None and is_console(service):
        raise Forbidden(f"job {source.job_id} may not reach {service}: only programs of its owner may")
    if source.job_id is not None and service not in source.reach:
        raise Forbidden(f"job {source.job_id} may not reach {service}: its spec does not name it", hint="add it to machine.reach")


def check_job(source: Source, service: ServiceRef, job: TargetJob | None) -> None:
    """Check that the source may reach a service of a job; None stands for a job that does not exist.

    Raise Forbidden if the source's own spec does not name it, NotFound for a job that is not for this source or does not offer it.
    """
    check_named(source, service)
    if job is None or not may_use(source, job.owner_id, job.share):
        raise NotFound(f"there is no job {service.job_id} that {source.user} may reach", hint="deskgrid peers")
    if is_console(service):
        if source.user_id != job.owner_id:
            raise Forbidden(f"the screen of job {service.job_id} is for its owner only")
        if not job.has_screen:
            raise NotFound(f"job {service.job_id} has no screen", hint="only virtual machines have one")
        return
    if service.service not in job.offers:
        offers = ", ".join(job.offers) or "nothing"
        raise NotFound(f"job {service.job_id} offers no service {service.service}", hint=f"it offers {offers}")


def is_console(service: ServiceRef) -> bool:
    """Tell whether this is the screen of a job's machine."""
    return service.service == CONSOLE and service.job_id is not None

"""deskgrid data place, unplace, placements, where: on which workers data should be, and is."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from cyclopts import Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.data import Reference, app
from deskgrid.cli.output import Json, age, print_json, print_lines, print_table
from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model.placement import ALL, Attributes, CopyState, Holder, Placement, Protocol
from deskgrid.units import format_duration, parse_duration

__all__ = ["app"]


@app.command
async def place(
    pattern: Annotated[str, Parameter(help="NAME (its newest version), NAME@VERSION, or a name with * and ?.")],
    /,
    *,
    replicas: str = "",
    lifetime: str = "",
    lives_with: str = "",
    affinity: str = "",
    where: str = "",
    max_per_worker: int = 0,
    protocol: Protocol = Protocol.AUTO,
    not_fault_tolerant: Annotated[bool, Parameter(show_default=False)] = False,
    json: Json = False,
) -> None:
    """Say on how many workers your data should be, which, and for how long. Workers fetch it in the background and do not evict it.

    It is for data of these names that comes later, too. Said again for the same names, it goes in the place of what was said before.

    For example:

        deskgrid data place debian --replicas 5 --lifetime 7d
        deskgrid data place 'calibration-*' --replicas all --where tag:lab-2
        deskgrid data place events --affinity data:debian --lives-with array-3

    Parameters
    ----------
    replicas
        Number of workers, or all.
    lifetime
        How long from now on, as in 7d; then the workers remove it.
    lives_with
        Until job-N or array-N has ended, or for as long as you have data:NAME.
    affinity
        Instead of a number: where data:NAME is, where job-N or array-N runs, or on all workers with tag:NAME.
    where
        Only on such workers, with commas between: tag:NAME, group:NAME (of the PC's owner), worker:NUMBER.
    max_per_worker
        Of all data of this pattern, so many at most on one worker.
    protocol
        How it travels: auto, swarm (only to workers that share) or https (only from the server).
    not_fault_tolerant
        A worker that holds it counts, however long it is not heard of: nobody takes its place.
    """
    attributes = Attributes(
        replicas=_number(replicas),
        fault_tolerant=not not_fault_tolerant,
        lives_with=lives_with,
        affinity=affinity,
        protocol=protocol,
        max_per_worker=max_per_worker,
        where=tuple(one.strip() for one in where.split(",") if one.strip()),
    )
    async with connected() as grid:
        found = await grid.place(pattern, attributes, lifetime_s=parse_duration(lifetime) if lifetime else 0.0)
    if json:
        print_json(found)
    else:
        print_lines(f"placement {found.id}: {found.pattern}, {_what(found.attributes)}; {found.data} data for now")


def _number(text: str) -> int:
    if text == "all":
        return ALL
    if text and not text.isdecimal():
        raise InvalidInput(f"{text[:40]!r} is no number of replicas", where="--replicas", hint="a number, or all")
    return int(text or "0")


def _what(attributes: Attributes) -> str:
    """Return what is wanted, for people."""
    if attributes.affinity:
        parts = [f"with {attributes.affinity}"]
    else:
        parts = ["on all workers" if attributes.replicas == ALL else f"on {attributes.replicas} workers"]
    if attributes.where:
        parts.append(f"of {', '.join(attributes.where)}")
    if attributes.max_per_worker:
        parts.append(f"at most {attributes.max_per_worker} on each")
    if attributes.expires_at is not None:
        parts.append(f"for {format_duration(max(attributes.expires_at - time.time(), 0))}")
    if attributes.lives_with:
        parts.append(f"as long as {attributes.lives_with}")
    return " ".join(parts)


@app.command
async def placements(*, json: Json = False) -> None:
    """List what you want of your data.

    For example:

        deskgrid data placements
    """
    async with connected() as grid:
        found = await grid.placements()
    if json:
        print_json(found)
        return
    rows = [(one.id, one.pattern, _what(one.attributes), one.data, one.holders) for one in found]
    print_table(("placement", "data", "wanted", "pieces", "copies held"), rows, empty="no placements")


@app.command
async def unplace(pattern: str, /, *, json: Json = False) -> None:
    """Let workers hold nothing any more for a placement. What they have stays in their caches until its room is needed.

    For example:

        deskgrid data unplace debian

    Parameters
    ----------
    pattern
        As it was placed, or the number of the placement.
    """
    async with connected() as grid:
        one = _find(await grid.placements(), pattern)
        await grid.remove_placement(one.id)
    if json:
        print_json({"removed": one})
    else:
        print_lines(f"placement {one.id} of {one.pattern} removed")


def _find(found: tuple[Placement, ...], pattern: str) -> Placement:
    for one in found:
        if pattern in (one.pattern, str(one.id)):
            return one
    raise NotFound(f"you have no placement of {pattern[:80]!r}", hint="deskgrid data placements")


@app.command
async def where(reference: Reference, /, *, wait_held: int = 0, timeout: str = "", json: Json = False) -> None:
    """Show which workers have data of yours, or are to have it.

    held: kept as you want it. ordered: about to be. cached: there for now, of a job.

    For example:

        deskgrid data where debian
        deskgrid data where debian --wait-held 5 --timeout 10m

    Parameters
    ----------
    wait_held
        Return once so many workers hold it.
    timeout
        Give up after this time, as in 10m.
    """
    async with connected() as grid:
        if not wait_held:
            found = await grid.holders(reference)
        else:
            try:
                async with asyncio.timeout(parse_duration(timeout) if timeout else None):
                    async for found in grid.copies(reference):
                        if sum(one.state is CopyState.HELD for one in found) >= wait_held:
                            break
            except TimeoutError:
                raise NotFound(
                    f"{reference} is not held by {wait_held} workers yet", hint="deskgrid data where shows by which"
                ) from None
    if json:
        print_json(found)
    else:
        _print_holders(found)


def _print_holders(found: tuple[Holder, ...]) -> None:
    rows = [(one.worker_id, one.worker, one.state.value, age(one.since), "online" if one.online else "offline") for one in found]
    print_table(("worker", "name", "state", "since", ""), rows, empty="no worker has it")

"""Fetching a blob together."""

from __future__ import annotations

from random import Random

import msgspec
from starlette.requests import Request as HttpRequest

from deskgrid.core.torrents import torrent_name, torrent_of
from deskgrid.model import wire
from deskgrid.model.ids import Sha256
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.server.authority import read_peer_key
from deskgrid.server.routes.handler import Call, Services, serves
from deskgrid.server.store import data, swarm

_CERTIFICATE_S = 86400.0
_rng = Random()  # noqa: S311 - who meets whom


@serves(wire.TAKE_TURN)
async def take_turn(services: Services, call: Call[Turn], http: HttpRequest) -> TurnAnswer:
    """Turns come all the time and may be repeated without harm, so they leave no idempotency key in the store."""
    sha256 = Sha256(data.check_sha256(call.path["sha256"]))
    key = read_peer_key(call.body.key) if call.body.key else None
    public = http.client.host if http.client is not None else ""
    taken = await services.store.write(lambda tx: swarm.take_turn(tx, call.caller, sha256, call.body, public=public, rng=_rng))
    answer = taken.answer
    if taken.layer:
        answer = msgspec.structs.replace(answer, torrent=torrent_of(taken.blob, taken.layer, services.authority.pem))
    if key is not None and answer.ready:
        certificate = services.authority.sign_sharer(torrent_name(sha256), key, now=services.clock.now(), lifetime_s=_CERTIFICATE_S)
        answer = msgspec.structs.replace(answer, certificate=certificate, certificate_s=_CERTIFICATE_S)
    return answer

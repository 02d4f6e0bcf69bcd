"""The SDK for programs without an event loop: what needs no grid."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pytest

from deskgrid.client.blocking import _pass_on
from deskgrid.errors import Unreachable


def test_who_waits_for_an_address_hears_why_none_comes() -> None:
    carrying: Future[None] = Future()
    ready: Future[tuple[str, int]] = Future()
    carrying.set_exception(Unreachable("it is away"))
    _pass_on(carrying, ready)
    with pytest.raises(Unreachable):
        ready.result(0)


def test_who_waits_for_an_address_hears_that_the_grid_was_closed() -> None:
    carrying: Future[None] = Future()
    ready: Future[tuple[str, int]] = Future()
    carrying.cancel()
    _pass_on(carrying, ready)
    with pytest.raises(CancelledError):
        ready.result(0)

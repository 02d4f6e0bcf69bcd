"""For all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import structlog


def pytest_configure() -> None:
    """A shell lets what runs in its background ignore Ctrl-C, and so would what the tests start: some are about just that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process says how to log: not for the tests after it."""
    yield
    structlog.reset_defaults()

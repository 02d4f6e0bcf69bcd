"""For all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# No test fails because the machine was busy for a moment.
hypothesis.settings.register_profile("deskgrid", deadline=None)
hypothesis.settings.load_profile("deskgrid")


def pytest_configure() -> None:
    """A shell lets what runs in its background ignore Ctrl-C, and so would what the tests start: some are about just that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the virtual machines of the system tests be another driver's, on a PC where that one works."""
    parser.addoption(
        "--driver", default="qemu", choices=("qemu", "virtualbox"), help="driver of the system tests' virtual machines"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests of a contract to `make test-full` that a class with real machines names as LONG."""
    for item in items:
        if getattr(item, "originalname", "") in getattr(getattr(item, "cls", None), "LONG", ()):
            item.add_marker(pytest.mark.full)


@pytest.fixture
def vm_worker(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the settings of a worker that runs virtual machines."""
    return {"DESKGRID_WORKER_DRIVERS": request.config.getoption("--driver"), "DESKGRID_WORKER_ACCELERATOR": "tcg"}


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process says how to log: not for the tests after it."""
    yield
    structlog.reset_defaults()

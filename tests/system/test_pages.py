"""The pages that the server shows, in a real browser."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deskgrid.model import wire
from tests.system.harness import System

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--ignore-certificate-errors",
]


@pytest.mark.full
def test_api_page_shows_every_call_and_needs_nothing_from_elsewhere(system: System, tmp_path: Path):
    def browse(*arguments: str) -> str:
        command = ["chromium", *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *arguments, f"https://{system.address}/docs"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    page = browse("--dump-dom")
    for route in wire.ROUTES.values():
        assert f"{route.method} {route.path}" in page
    assert "src=" not in page
    assert 'href="http' not in page
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,900")
    assert (tmp_path / "page.png").stat().st_size > 20_000

"""For the tests of machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.testing.images import make_gallery


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of every kind. Not to be changed."""
    return make_gallery(tmp_path_factory.mktemp("gallery"))

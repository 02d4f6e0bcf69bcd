from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.worker.play import Rig


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)

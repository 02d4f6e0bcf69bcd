"""Settings: files and environment, with clear words for what is wrong; and what the defaults promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.errors import InvalidInput
from deskgrid.settings import ServerSettings, WorkerSettings, load_settings


def test_file_speaks_in_peoples_units_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "worker.toml"
    file.write_text('memory_bytes = "4GiB"\ncpus = 2\nmax_backoff_s = "2m"\n')
    monkeypatch.setenv("DESKGRID_WORKER_CPUS", "3")
    monkeypatch.setenv("DESKGRID_WORKER_DRIVERS", "qemu,fake")
    found = load_settings(WorkerSettings, file, "DESKGRID_WORKER")
    assert (found.memory_bytes, found.cpus, found.max_backoff_s, found.drivers) == (4 << 30, 3, 120.0, ("qemu", "fake"))


@pytest.mark.parametrize("text", ["cpu = 2", "cpus = 'many'", "cpus = ", 'memory_bytes = "4 lots"', "\xff"])
def test_mistake_in_the_file_is_told_with_the_file(tmp_path: Path, text: str):
    file = tmp_path / "worker.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput) as caught:
        load_settings(WorkerSettings, file, "DESKGRID_WORKER")
    assert str(caught.value)


def test_job_of_a_dead_worker_waits_again_within_90_seconds_by_default():
    settings = ServerSettings()
    assert settings.lease_s + 2 * settings.sweep_s <= 90
    assert settings.interval_s * 3 <= settings.lease_s

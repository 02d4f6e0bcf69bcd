"""Folders for large files: what a killed process leaves goes, what others work in stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deskgrid.machines.work_folders import work_folder

HOLD = "import sys, pathlib\nfrom deskgrid.machines.work_folders import work_folder\n"
HOLD += "with work_folder(pathlib.Path(sys.argv[1]), 'w-') as folder:\n"
HOLD += "    (folder / 'large').write_text('x'); print(folder, flush=True); sys.stdin.read()\n"


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_is_removed_at_the_end_and_that_of_a_killed_process_at_the_next_start(tmp_path: Path):
    killed, left = holder(tmp_path)
    killed.kill()
    killed.communicate()
    assert (left / "large").exists()
    with work_folder(tmp_path, "w-") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_works_in_or_is_something_else_stays(tmp_path: Path):
    other, theirs = holder(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "w-file").touch()
    try:
        with work_folder(tmp_path, "w-") as mine, work_folder(tmp_path, "w-") as again:
            assert mine != again
            assert {mine, again, theirs} < set(tmp_path.iterdir())
        assert (theirs / "large").exists()
    finally:
        other.communicate("")
    assert {one.name for one in tmp_path.iterdir()} == {"elsewhere", "w-link", "w-file"}

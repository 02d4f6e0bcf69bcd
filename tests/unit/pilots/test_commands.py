"""Systems driven by commands: real programs, some of which refuse, print nonsense, or are not there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deskgrid.core import pilots
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.pilots.commands import Commands, CommandSystem, slurm_commands, ssh_commands
from deskgrid.pilots.system import Order, pilot_script

PLAN = pilots.System(name="batch", packages=frozenset({"root", "a b"}), cpus=3, memory_bytes=1 << 30)
ORDER = Order(name="batch-1", link="deskgrid://grid:1/join?secret='x'", lifetime_s=90.0, idle_s=30.0)


def system(submit: tuple[str, ...], alive: tuple[str, ...] = ("true",), cancel: tuple[str, ...] = ("true",)) -> CommandSystem:
    return CommandSystem(PLAN, Commands(submit=submit, alive=alive, cancel=cancel), lifetime_s=90.0, idle_s=30.0)


async def test_script_comes_on_standard_input_and_the_last_line_is_the_reference(tmp_path: Path) -> None:
    submit = (
        "sh",
        "-c",
        'cat >"$0"; echo queued; echo "$1:$2:$3:$4;cluster"',
        str(tmp_path / "got"),
        "{name}",
        "{minutes}",
        "{cpus}",
        "{megabytes}",
    )
    assert await system(submit).send(ORDER) == "batch-1:7:3:1024"
    script = (tmp_path / "got").read_text()
    assert ORDER.link in script and "--lifetime 90s" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("submit", "words"),
    [
        (("sh", "-c", "echo no such partition >&2; exit 1"), "no such partition"),
        (("sh", "-c", "true"), "names no pilot"),
        (("sh", "-c", "echo '1 2; rm -rf /'"), "names no pilot"),
        (("/nonexistent/sbatch",), "does not start"),
        (("sh", "{colour}"), "colour"),
    ],
)
async def test_refusal_is_told(submit: tuple[str, ...], words: str) -> None:
    with pytest.raises(DeskgridError, match=words):
        await system(submit).send(ORDER)


async def test_what_is_alive_says_so() -> None:
    made = system(("true",), alive=("sh", "-c", 'case "$0" in 1) echo RUNNING;; 2) ;; 3) exit 1;; esac', "{reference}"))
    assert await made.gone(["1", "2", "3"]) == {"2", "3"}
    with pytest.raises(OperatorError, match="does not start"):
        await system(("true",), alive=("/nonexistent/squeue",)).gone(["1"])


async def test_calling_back_what_is_gone_is_no_error(tmp_path: Path) -> None:
    cancel = ("sh", "-c", 'echo "$0" >>"$1"; exit 1', "{reference}", str(tmp_path / "cancelled"))
    await system(("true",), cancel=cancel).call_back("7")
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_script_joins_by_a_file_leaves_nothing_and_ends_its_worker(tmp_path: Path) -> None:
    deskgrid = tmp_path / "deskgrid"
    deskgrid.write_text(
        '#!/bin/sh\nenv | grep ^DESKGRID_WORKER_ | sort >"$OUT/env"; echo "$@" >"$OUT/arguments"; cat "${8#}" 2>/dev/null\n'
        'while [ "$1" != --join ]; do shift; done; cp "$2" "$OUT/link"; dirname "$2" >"$OUT/place"\n'
        "trap 'echo ended >\"$OUT/ended\"; exit' TERM\nwhile :; do sleep 0.1; done\n"
    )
    deskgrid.chmod(0o755)
    settings = {"packages": ["root", "a b"], "overlay": False, "cpus": 3}
    script = pilot_script(ORDER, command=str(deskgrid), settings=settings, setup='export OUT="$0"')
    with subprocess.Popen(["sh", "-c", script, str(tmp_path)], start_new_session=True) as process:
        for _ in range(600):
            if (tmp_path / "place").exists() and (tmp_path / "place").read_text():
                break
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        place = Path((tmp_path / "place").read_text().strip())
        assert place.stat().st_mode & 0o077 == 0
        process.terminate()
        process.wait(30)
    assert (tmp_path / "ended").read_text() == "ended\n"
    assert (tmp_path / "link").read_text().strip() == ORDER.link
    assert ORDER.link not in (tmp_path / "arguments").read_text()
    assert "DESKGRID_WORKER_PACKAGES=root,a b" in (tmp_path / "env").read_text()
    assert "DESKGRID_WORKER_OVERLAY=false" in (tmp_path / "env").read_text()
    assert not place.exists()


def test_commands_of_slurm_and_ssh_are_argument_lists() -> None:
    slurm, ssh = slurm_commands(["--partition=short"]), ssh_commands("ann@desk", ["-p", "2222"])
    assert slurm.submit[0] == "sbatch" and slurm.submit[-1] == "--partition=short"
    assert ssh.submit[:6] == ("ssh", "-o", "BatchMode=yes", "-p", "2222", "ann@desk")
    with pytest.raises(InvalidInput, match="colour"):
        from deskgrid.pilots.commands import _filled

        _filled("{colour}", {"name": "x"})

"""Systems driven by commands: real programs, some of which refuse, print nonsense, or are not there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.pilots.commands import Commands, CommandSystem, check_commands, slurm_commands, ssh_commands
from deskgrid.pilots.system import NoAnswer, Order, pilot_script

PLAN = pilots.System(name="batch", packages=frozenset({"root", "a b"}), cpus=3, memory_bytes=1 << 30)
ORDER = Order(name="batch-1", link="deskgrid://grid:1/join?secret='x'", lifetime_s=90.0, idle_s=30.0)


def system(submit: tuple[str, ...], alive: tuple[str, ...] = ("true",), cancel: tuple[str, ...] = ("true",)) -> CommandSystem:
    return CommandSystem(PLAN, Commands(submit=submit, alive=alive, cancel=(cancel,)), idle_s=30.0)


def sent(reference: str = "", name: str = "") -> Sent:
    return Sent(name=name or f"batch-{reference}", system="batch", sent_at=0.0, reference=reference)


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
    assert await system(submit).send(ORDER) == "batch-1:7:3:1408"
    script = (tmp_path / "got").read_text()
    assert ORDER.link in script and "--lifetime 90s" in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


async def test_commands_do_not_get_the_users_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DESKGRID_TOKEN", "s3cr3t")
    await system(("sh", "-c", 'env >"$0"; echo 1', str(tmp_path / "got"))).send(ORDER)
    assert "s3cr3t" not in (tmp_path / "got").read_text()


@pytest.mark.parametrize(
    ("submit", "words"),
    [
        (("sh", "-c", "echo no such partition >&2; exit 1"), "no such partition"),
        (("sh", "-c", "true"), "names no pilot"),
        (("sh", "-c", "echo '1 2; rm -rf /'"), "names no pilot"),
        (("/nonexistent/sbatch",), "does not start"),
    ],
)
async def test_refusal_is_told(submit: tuple[str, ...], words: str) -> None:
    with pytest.raises(DeskgridError, match=words):
        await system(submit).send(ORDER)


async def test_failure_is_sure_only_if_the_system_cannot_be_asked_by_name() -> None:
    fails = ("sh", "-c", "echo socket timed out >&2; exit 1")
    with pytest.raises(NoAnswer, match="timed out"):
        await system(fails, alive=("squeue", "--name={name}")).send(ORDER)
    with pytest.raises(OperatorError, match="timed out") as caught:
        await system(fails, alive=("squeue", "--jobs={reference}")).send(ORDER)
    assert not isinstance(caught.value, NoAnswer)
    with pytest.raises(OperatorError, match="does not start") as caught:
        await system(("/nonexistent/sbatch",), alive=("squeue", "--name={name}")).send(ORDER)
    assert not isinstance(caught.value, NoAnswer)


async def test_submit_command_that_takes_too_long_has_perhaps_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.pilots.commands._LIMIT_S", 0.05)
    with pytest.raises(NoAnswer, match="does not end"):
        await system(("sleep", "100")).send(ORDER)


async def test_only_what_says_nothing_and_ends_well_is_gone() -> None:
    made = system(("true",), alive=("sh", "-c", 'case "$0" in 1) echo RUNNING;; 2) ;; 3) exit 1;; esac', "{reference}"))
    assert await made.gone([sent("1"), sent("2"), sent("3"), sent(name="x")]) == {"batch-2"}
    with pytest.raises(OperatorError, match="ended with 1"):
        await made.gone([sent("3")])
    with pytest.raises(OperatorError, match="does not start"):
        await system(("true",), alive=("/nonexistent/squeue",)).gone([sent("1")])


async def test_pilot_without_a_reference_is_asked_for_and_cancelled_by_name(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    command = ("sh", "-c", 'echo "$0" >>"$1"', "{name}", str(seen))
    made = system(("true",), alive=command, cancel=command)
    assert await made.gone([sent(name="batch-x")]) == {"batch-x"}
    await made.call_back(sent(name="batch-x"))
    assert seen.read_text() == "batch-x\nbatch-x\n"


async def test_cancel_that_fails_is_told(tmp_path: Path) -> None:
    cancel = ("sh", "-c", 'echo "$0" >>"$1"; exit 1', "{reference}", str(tmp_path / "cancelled"))
    with pytest.raises(OperatorError, match="ended with 1"):
        await system(("true",), cancel=cancel).call_back(sent("7"))
    await system(("true",), cancel=cancel).call_back(sent(name="it has no reference"))
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


def test_script_that_is_told_to_end_before_its_worker_begins_begins_none(tmp_path: Path) -> None:
    fifo, begun = tmp_path / "fifo", tmp_path / "begun"
    os.mkfifo(fifo)
    script = pilot_script(ORDER, command=f"touch {begun}; true", settings={}, setup=f'echo "$place" >{fifo}; cat {fifo} >/dev/null')
    with subprocess.Popen(["sh", "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        place = Path(fifo.read_text().strip())
        assert place.is_dir()
        process.terminate()
        fifo.write_text("go on\n")
        assert process.wait(30) == 1
    assert not begun.exists() and not place.exists()


@pytest.mark.parametrize("left", [1, 40, -1, -3, -60])
def test_script_that_was_cut_off_on_its_way_runs_nothing(left: int, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    script = pilot_script(ORDER, command=f"touch {begun}; true", settings={}, setup=f"touch {begun}")[:left]
    script = script[: script.rindex("}")] if left == -1 else script
    subprocess.run(["sh"], input=script, text=True, capture_output=True, check=False)
    assert not begun.exists()


def test_commands_of_slurm_and_ssh_are_argument_lists_that_need_a_name_only() -> None:
    slurm, ssh = slurm_commands(["--partition=short"]), ssh_commands("ann@desk", ["-p", "2222"])
    for commands in (slurm, ssh):
        check_commands(commands, where="here")
        later = [word for command in (commands.alive, *commands.cancel) for word in command]
        assert any("{name}" in word for word in later) and not any("{reference}" in word for word in later)
    assert slurm.submit[0] == "sbatch" and slurm.submit[-1] == "--partition=short"
    assert ssh.submit[:6] == ("ssh", "-o", "BatchMode=yes", "-p", "2222", "-o")


@pytest.mark.parametrize(
    ("part", "word", "told"),
    [
        ("submit", "{colour}", "colour"),
        ("submit", "{reference}", "reference"),
        ("alive", "{minutes}", "minutes"),
        ("cancel", "a\nb", "line ends"),
    ],
)
def test_command_that_names_what_there_is_not_is_told(part: str, word: str, told: str) -> None:
    words = {name: ("run", word) if name == part else ("true",) for name in ("submit", "alive", "cancel")}
    with pytest.raises(InvalidInput, match=f"here: {part}: .*{told}"):
        check_commands(Commands(submit=words["submit"], alive=words["alive"], cancel=(words["cancel"],)), where="here")

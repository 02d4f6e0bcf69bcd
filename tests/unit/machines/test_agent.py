"""The agent's shell code, in every shell that guests have."""

from __future__ import annotations

import importlib.resources
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from deskgrid.machines.channel import ChannelParser
from deskgrid.machines.disks import create_scratch
from deskgrid.machines.driver import Output, Stream

AGENT = (importlib.resources.files("deskgrid.machines") / "agent.sh").read_text()
SHELLS = {
    name: command
    for name, command in {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}.items()
    if shutil.which(command[0])
}


def functions(folder: Path) -> str:
    """Return the agent without its last part, which acts, and with its places moved into `folder`."""
    code = AGENT[: AGENT.index("\nlink_places\nif ")]
    moved = {"RUN=/run/deskgrid": f"RUN={folder}/run", "SCRATCH=/scratch": f"SCRATCH={folder}/scratch", "/dev/ttyS1": "/dev/no-tty"}
    for old, new in (
        *moved.items(),
        ("exec 3>/dev/null", f"exec 3>{folder}/channel"),
        ("CONTEXT=/context", f"CONTEXT={folder}/context"),
    ):
        assert old in code
        code = code.replace(old, new)
    return code


def told(folder: Path, stream: Stream) -> bytes:
    events = ChannelParser().feed((folder / "channel").read_bytes())
    return b"".join(event.data for event in events if isinstance(event, Output) and event.stream is stream)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    (tmp_path / "scratch" / ".deskgrid").mkdir(parents=True)
    (tmp_path / "context").mkdir()
    return SHELLS[request.param]


def run(shell: list[str], folder: Path, action: str) -> int:
    shutil.rmtree(folder / "run", ignore_errors=True)
    script = folder / "script.sh"
    script.write_text(f"{functions(folder)}\n{action}\n")
    return subprocess.run([*shell, script], timeout=60, check=False).returncode


def test_the_usual_shells_are_tried() -> None:
    assert "dash" in SHELLS or "bash" in SHELLS


@pytest.mark.parametrize(
    "output", [b"", b"x", b"\n", b"\n\n", b"a\nb", b"\0\0\nz\0", b"1 x\n! booted\n", b"- -\n\\n%s\n", bytes(range(256))]
)
def test_any_output_arrives_as_it_was(shell: list[str], tmp_path: Path, output: bytes) -> None:
    report = tmp_path / "scratch" / ".deskgrid"
    (report / "stdout").write_bytes(output)
    (report / "stderr").write_bytes(output[::-1])
    assert run(shell, tmp_path, "follow last") == 0
    assert told(tmp_path, Stream.STDOUT) == output
    assert told(tmp_path, Stream.STDERR) == output[::-1]


def test_output_longer_than_a_chunk_arrives_as_it_was_and_much_more_is_cut(shell: list[str], tmp_path: Path) -> None:
    report = tmp_path / "scratch" / ".deskgrid"
    rng = random.Random(7)
    output = b"".join(rng.randbytes(rng.randrange(3000)) + b"\n" for _ in range(100))
    (report / "stdout").write_bytes(output)
    (report / "stderr").write_bytes(b"line\n" * (600 << 10))
    assert run(shell, tmp_path, "follow last") == 0
    assert told(tmp_path, Stream.STDOUT) == output
    assert 1 << 20 <= len(told(tmp_path, Stream.STDERR)) <= (1 << 20) + (64 << 10)


def test_follower_that_is_told_to_end_tells_the_rest_first(shell: list[str], tmp_path: Path) -> None:
    action = (
        ': >"$REPORT/stdout"; : >"$REPORT/stderr"\n'
        'follow "" & follower=$!\n'
        'i=0; while [ $i -lt 200 ]; do echo "line $i"; i=$((i + 1)); done >>"$REPORT/stdout"\n'
        "kill -TERM $follower; wait $follower || follow last\n"
    )
    assert run(shell, tmp_path, action) == 0
    assert told(tmp_path, Stream.STDOUT) == b"".join(b"line %d\n" % number for number in range(200))


def test_context_script_gets_environment_folder_and_no_channel(shell: list[str], tmp_path: Path) -> None:
    (tmp_path / "context" / ".deskgrid").mkdir()
    (tmp_path / "context" / ".deskgrid" / "environment").write_text("export NAME='a b'\n")
    (tmp_path / "context" / "context.sh").write_text('echo "$NAME"; pwd; echo x >&3 || exit 5\n')
    assert run(shell, tmp_path, "run_context; code=$?; exec 3>&-; exit $code") != 0
    assert (tmp_path / "scratch" / ".deskgrid" / "stdout").read_text() == f"a b\n{tmp_path}/scratch\n"
    assert (tmp_path / "channel").read_bytes() == b""


def test_exit_code_is_reported_whole(shell: list[str], tmp_path: Path) -> None:
    assert run(shell, tmp_path, "report_exit 42") == 0
    assert (tmp_path / "scratch" / ".deskgrid" / "exit").read_text() == "42\n"
    assert not (tmp_path / "scratch" / ".deskgrid" / "exit.new").exists()


def test_label_of_a_scratch_disk_is_read_without_tools(shell: list[str], tmp_path: Path) -> None:
    create_scratch(tmp_path / "disk", 8 << 20)
    assert run(shell, tmp_path, f'[ "$(ext_label {tmp_path}/disk)" = SCRATCH ]') == 0
    (tmp_path / "other").write_bytes(bytes(4096))
    assert run(shell, tmp_path, f"ext_label {tmp_path}/other") == 1

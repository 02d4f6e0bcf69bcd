"""The agent's shell code, in every shell that guests have."""

from __future__ import annotations

import importlib.resources
import json
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deskgrid.machines.channel import ChannelParser
from deskgrid.machines.disks import create_scratch
from deskgrid.machines.driver import Listening, Output, Stream

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
        ("ETC=/etc", f"ETC={folder}/etc"),
        ("APP=/app", f"APP={folder}/app"),
        ("ROOT_HOME=/root", f"ROOT_HOME={folder}/root"),
        ("NET=/proc/net", f"NET={folder}/net"),
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


def test_command_runs_in_the_place_of_the_script_with_its_arguments_as_they_are(shell: list[str], tmp_path: Path) -> None:
    arguments = ["a b", "", "'", '"$(id)"', "*", "-n", "\\"]
    own = tmp_path / "context" / ".deskgrid"
    own.mkdir()
    (own / "command").write_text(f"set -- {shlex.join(['printf', '%s|', *arguments])}\n")
    (tmp_path / "context" / "context.sh").write_text("exit 7\n")
    assert run(shell, tmp_path, "run_context") == 0
    assert (tmp_path / "scratch" / ".deskgrid" / "stdout").read_text() == "".join(f"{one}|" for one in arguments)


def test_files_of_an_app_are_at_one_place_for_all_jobs(shell: list[str], tmp_path: Path) -> None:
    (tmp_path / "context" / "app").mkdir()
    (tmp_path / "context" / "app" / "tool").write_text("tool\n")
    (tmp_path / "context" / "context.sh").write_text(f"cat {tmp_path}/app/tool\n")
    assert run(shell, tmp_path, "run_context") == 0
    assert (tmp_path / "scratch" / ".deskgrid" / "stdout").read_text() == "tool\n"


def test_exit_code_is_reported_whole(shell: list[str], tmp_path: Path) -> None:
    assert run(shell, tmp_path, "report_exit 42") == 0
    assert (tmp_path / "scratch" / ".deskgrid" / "exit").read_text() == "42\n"
    assert not (tmp_path / "scratch" / ".deskgrid" / "exit.new").exists()


def test_label_of_a_scratch_disk_is_read_without_tools(shell: list[str], tmp_path: Path) -> None:
    create_scratch(tmp_path / "disk", 8 << 20)
    assert run(shell, tmp_path, f'[ "$(ext_label {tmp_path}/disk)" = SCRATCH ]') == 0
    (tmp_path / "other").write_bytes(bytes(4096))
    assert run(shell, tmp_path, f"ext_label {tmp_path}/other") == 1


# ---- network

TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 100 0 0 10 0
   1: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0000000000000000 100 0 0 10 0
   2: 0F02000A:01BB 0202000A:C350 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0000000000000000 100 0 0 10 0
"""
TCP6 = """  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt
   0: 00000000000000000000000000000000:1538 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   1: 00000000000000000000000001000000:1539 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   2: 0000000000000000FFFF00000100007F:153A 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0
"""


def give_network(folder: Path, **files: str) -> None:
    """Put files of a network into the context, and what the kernel says of ports."""
    own = folder / "context" / ".deskgrid"
    own.mkdir()
    for name, text in {"network": "10.0.2.15/24 10.0.2.2\n", "hosts": "", "reach": "", "offer": "", **files}.items():
        (own / name).write_text(text)
    for name in ("etc", "net"):
        (folder / name).mkdir()
    (folder / "net" / "tcp").write_text(TCP)
    (folder / "net" / "tcp6").write_text(TCP6)


def listening_told(folder: Path, *ports: int) -> list[int]:
    events = ChannelParser(frozenset(ports)).feed((folder / "channel").read_bytes())
    return [event.port for event in events if isinstance(event, Listening)]


def test_ports_that_others_can_reach_are_told_once(shell: list[str], tmp_path: Path) -> None:
    give_network(tmp_path)
    (tmp_path / "scratch/.deskgrid/stdout").write_text("")
    (tmp_path / "scratch/.deskgrid/stderr").write_text("")
    ports = {8080: "1F90", 22: "0016", 443: "01BB", 5432: "1538", 5433: "1539", 5434: "153A", 9: "0009"}
    silent = " ".join(f"{number}:{text}" for number, text in ports.items())
    assert run(shell, tmp_path, f'silent="{silent}"; tell_listening; echo "$silent" >{tmp_path}/rest; follow last') == 0
    assert listening_told(tmp_path, *ports) == [8080, 5432]
    assert (tmp_path / "channel").read_bytes().count(b"listening") == 2
    assert [word.partition(":")[0] for word in (tmp_path / "rest").read_text().split()] == ["22", "443", "5433", "5434", "9"]


def test_port_that_is_opened_later_is_told_by_the_follower(shell: list[str], tmp_path: Path) -> None:
    give_network(tmp_path)
    action = (
        ': >"$REPORT/stdout"; : >"$REPORT/stderr"; : >"$NET/tcp6"; : >"$NET/tcp"\n'
        'silent=" 8080:1F90"; follow "" & follower=$!\n'
        "while ! [ -s $RUN/../net/tcp ]; do cp $RUN/../net/later $NET/tcp; done\n"
        f"i=0; while ! grep -q listening {tmp_path}/channel && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done\n"
        "kill -TERM $follower; wait $follower || follow last\n"
    )
    (tmp_path / "net" / "later").write_text(TCP)
    assert run(shell, tmp_path, action) == 0
    assert listening_told(tmp_path, 8080) == [8080]


@pytest.mark.parametrize("before", [None, "127.0.0.1 localhost\n", "127.0.0.1 localhost"])
def test_hosts_file_keeps_its_lines_and_gets_ours(shell: list[str], tmp_path: Path, before: str | None) -> None:
    give_network(tmp_path, hosts="10.64.1.1 db\n10.64.1.2 site\n")
    if before is not None:
        (tmp_path / "etc/hosts").write_text(before)
    assert run(shell, tmp_path, "add_hosts") == 0
    lines = (tmp_path / "etc/hosts").read_text().split("\n")
    assert [line for line in lines if line] == ["127.0.0.1 localhost", "10.64.1.1 db", "10.64.1.2 site"]


def test_keys_are_added_for_root_only(shell: list[str], tmp_path: Path) -> None:
    give_network(tmp_path, authorized_keys="ssh-ed25519 AAAA ann@pc\nssh-rsa BBBB\n")
    (tmp_path / "root/.ssh").mkdir(parents=True)
    (tmp_path / "root/.ssh/authorized_keys").write_text("ssh-rsa old")
    assert run(shell, tmp_path, "umask 022; add_keys") == 0
    keys = tmp_path / "root/.ssh/authorized_keys"
    assert [line for line in keys.read_text().split("\n") if line] == ["ssh-rsa old", "ssh-ed25519 AAAA ann@pc", "ssh-rsa BBBB"]
    assert (keys.stat().st_mode & 0o777, keys.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_without_keys_nothing_is_made(shell: list[str], tmp_path: Path) -> None:
    give_network(tmp_path)
    assert run(shell, tmp_path, "add_keys") == 0
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("offer", "started"),
    [("web 8080\nssh 2222\n", "2222\n"), ("web 8080\n", None), ("", None), ("ssh 5432\n", None)],
    ids=["offered", "other service", "nothing", "runs already"],
)
def test_ssh_server_is_started_only_if_ssh_is_offered_and_none_runs(
    shell: list[str], tmp_path: Path, offer: str, started: str | None
) -> None:
    give_network(tmp_path, offer=offer)
    starter = tmp_path / "etc/deskgrid/start-ssh"
    starter.parent.mkdir()
    starter.write_text(f'#!/bin/sh\necho "$1" >{tmp_path}/started\n')
    starter.chmod(0o755)
    assert run(shell, tmp_path, "start_ssh") == 0
    told_port = (tmp_path / "started").read_text() if (tmp_path / "started").exists() else None
    assert told_port == started


def test_services_are_forwarded_at_localhost_where_the_port_is_free(shell: list[str], tmp_path: Path) -> None:
    reach = "db 10.64.1.1 5000\nother 10.64.1.2 5000\nweb 10.64.1.3 8080\nown 10.64.1.4 6000\nmail 10.64.1.5 25\n"
    give_network(tmp_path, reach=reach, offer="x 6000\n")
    names = [line.split()[0] for line in reach.splitlines()]
    lines = ",\n".join(f'    "{name}": {{"port":1}}' for name in names)
    (tmp_path / "context/.deskgrid/services.json").write_text(f'{{\n  "reach": {{\n{lines}\n  }}\n}}\n')
    action = f'socat() {{ echo "$@" >>{tmp_path}/forwards; }}\nforward_localhost; wait'
    assert run(shell, tmp_path, action) == 0
    assert sorted((tmp_path / "forwards").read_text().splitlines()) == [
        "-t 86400 TCP-LISTEN:25,bind=127.0.0.1,fork,reuseaddr TCP:10.64.1.5:25",
        "-t 86400 TCP-LISTEN:5000,bind=127.0.0.1,fork,reuseaddr TCP:10.64.1.1:5000",
    ]
    services = json.loads((tmp_path / "run/services.json").read_text())
    assert {name for name, service in services["reach"].items() if service.get("localhost")} == {"db", "mail"}


def test_without_a_network_nothing_of_it_runs(shell: list[str], tmp_path: Path) -> None:
    (tmp_path / "context/.deskgrid").mkdir()
    assert run(shell, tmp_path, 'set_up_network && [ -z "$silent" ]') == 0
    assert not (tmp_path / "etc").exists()
    assert not (tmp_path / "run/network.log").exists()

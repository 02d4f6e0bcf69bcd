"""The cage holds one process and nothing else, hands out sockets to whoever owns it, and ends with its process.

All of it with real namespaces: each test makes its own.
"""

from __future__ import annotations

import array
import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import psutil
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import MachineFailed
from deskgrid.machines import cage, cage_entry, processes
from deskgrid.machines.processes import ProcessIdentity

LIMIT_S = 20.0
CLOCK = SystemClock()
IDLE = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
SYSTEM_PYTHON = "/usr/bin/python3"
"""One that any user may run; ours may be in a home folder."""
NOBODY = 65534


class Caged:
    """A process in a cage, and what became of it."""

    def __init__(self, workdir: Path, command: Sequence[str] = IDLE) -> None:
        workdir.mkdir(parents=True)
        self.workdir = workdir
        self.identity = processes.spawn(cage.enter(command, workdir), cwd=workdir, log=workdir / "log")

    def running(self) -> bool:
        return processes.is_alive(self.identity)

    async def socket(self) -> socket.socket:
        return await cage.open_socket(self.workdir, self.running)

    async def keeper(self) -> ProcessIdentity:
        (await self.socket()).close()
        found = processes.identify(int((self.workdir / cage_entry.KEEPER_FILE).read_text()), "--keep")
        assert found is not None
        return found

    async def words(self) -> str:
        """Return what it said, once it has ended."""
        assert await processes.wait_gone(self.identity, CLOCK, limit_s=LIMIT_S)
        return (self.workdir / "log").read_text()

    async def end(self) -> None:
        await processes.kill(self.identity, CLOCK)
        await cage.wait_keeper_gone(self.workdir, CLOCK)


def caged_processes(folder: Path) -> list[int]:
    """Return the processes whose cage is somewhere in `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if {"--keep", "--enter"} & set(words) and any(word.startswith(str(folder)) for word in words):
            found.append(process.pid)
    return found


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Caged]]:
    """Make caged processes, and hold each test to leaving none."""
    made: list[Caged] = []

    def new(command: Sequence[str] = IDLE, workdir: Path | None = None) -> Caged:
        made.append(Caged(workdir or tmp_path / f"machine-{len(made)}", command))
        return made[-1]

    yield new
    for caged in made:
        await caged.end()
    assert caged_processes(tmp_path) == []


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


async def eventually(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not claim():
            await asyncio.sleep(0.005)


def listening(listener: socket.socket, address: tuple[str, int]) -> socket.socket:
    listener.settimeout(LIMIT_S)
    listener.bind(address)
    listener.listen()
    return listener


# ---- what is in it


async def test_worker_listens_at_any_address_of_the_network_and_at_low_ports(make: Callable[..., Caged]) -> None:
    code = (
        "import socket, time\n"
        "for address in (('10.64.0.1', 80), ('10.64.1.1', 5432), ('10.64.1.2', 5432), ('10.64.255.254', 1)):\n"
        "    end = time.monotonic() + 20\n"
        "    while True:\n"
        "        try:\n"
        "            print(socket.create_connection(address).recv(99).decode(), flush=True)\n"
        "            break\n"
        "        except ConnectionRefusedError:\n"
        "            assert time.monotonic() < end\n"
    )
    caged = make(python(code))
    for address in (("10.64.0.1", 80), ("10.64.1.1", 5432), ("10.64.1.2", 5432), ("10.64.255.254", 1)):
        with listening(await caged.socket(), address) as listener:
            connection, _ = await asyncio.to_thread(listener.accept)
            with connection:
                connection.sendall(address[0].encode())
    assert (await caged.words()).split() == ["10.64.0.1", "10.64.1.1", "10.64.1.2", "10.64.255.254"]


async def test_worker_reaches_what_listens_in_it(make: Callable[..., Caged]) -> None:
    code = "import socket\nserver = socket.create_server(('127.0.0.1', 22))\nserver.accept()[0].sendall(b'from inside')\n"
    caged = make(python(code))

    def answers() -> bool:
        try:
            connection.connect(("127.0.0.1", 22))
        except ConnectionRefusedError:
            return False
        return True

    connection = await caged.socket()
    with connection:
        assert connection.getblocking()
        await eventually(answers)
        assert connection.recv(99) == b"from inside"


def host_addresses() -> list[str]:
    found = [address.address for card in psutil.net_if_addrs().values() for address in card if address.family == socket.AF_INET]
    assert "127.0.0.1" in found
    return found


async def test_nothing_of_the_host_and_of_the_world_is_reached_from_it(make: Callable[..., Caged], tmp_path: Path) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("0.0.0.0", 0))
        abstract.bind(f"\0deskgrid-test-{os.getpid()}")
        abstract.listen()
        port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
        for address in host_addresses():
            socket.create_connection((address, port)).close()  # so that the test could fail
        targets = [*host_addresses(), "1.1.1.1", "8.8.8.8", "10.0.2.2", "192.168.1.1", "169.254.169.254"]
        code = (
            "import os, socket\n"
            f"for target in {targets}:\n"
            f"    for port in ({port}, 53, 80):\n"
            "        try: socket.create_connection((target, port), 2); print('reached', target, port)\n"
            "        except ConnectionRefusedError: assert target.startswith('127.'), target\n"
            "        except OSError as error: assert error.errno == 101, (target, error)\n"
            "    try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (target, "
            f"{udp_port}))\n"
            "    except OSError: pass\n"
            "for target in ('::1', '2001:4860:4860::8888'):\n"
            f"    try: socket.create_connection((target, {port}), 2); print('reached', target)\n"
            "    except OSError: pass\n"
            f"try: socket.socket(socket.AF_UNIX).connect('\\0deskgrid-test-{os.getpid()}'); print('reached abstract')\n"
            "except ConnectionRefusedError: pass\n"
            "print(sorted(name for _, name in socket.if_nameindex()), 'done')\n"
        )
        assert await make(python(code)).words() == "['lo'] done\n"
        udp.setblocking(False)
        with pytest.raises(BlockingIOError):
            udp.recv(1)


async def test_process_has_no_rights_and_gets_none_and_keeps_its_id(make: Callable[..., Caged]) -> None:
    caged = make(["cat", "/proc/self/status", "/proc/self/uid_map", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])
    said = await caged.words()
    status = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert int(status["SigIgn"], 16) & ~_ignored_here() & 0x7FFF_FFFF == 0  # of the others some are the C library's own
    assert int(status["Pid"]) == caged.identity.pid
    assert said.splitlines()[-2].split() == [str(os.geteuid() or 1000), str(os.geteuid()), "1"]
    assert said.splitlines()[-1] == "0"


def _ignored_here() -> int:
    """Return the signals that were ignored before Python began, which ignores two more: under nohup, SIGHUP."""
    own = re.search(r"^SigIgn:\t([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert own
    return int(own[1], 16) & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


async def test_two_cages_are_apart(make: Callable[..., Caged]) -> None:
    first, second = make(), make()
    with listening(await first.socket(), ("10.64.1.1", 80)), await second.socket() as stranger, await first.socket() as own:
        own.connect(("10.64.1.1", 80))
        with pytest.raises(ConnectionRefusedError):
            stranger.connect(("10.64.1.1", 80))


async def test_command_that_cannot_be_started_is_told_and_leaves_no_keeper(make: Callable[..., Caged]) -> None:
    caged = make(["/no/such/program"])
    assert await caged.words() == "cage: /no/such/program cannot be started: No such file or directory\n"
    with pytest.raises(MachineFailed, match="off"):
        await caged.socket()


async def test_path_longer_than_a_socket_address_will_do(make: Callable[..., Caged], tmp_path: Path) -> None:
    (await make(workdir=tmp_path / ("long" * 40) / "machine").socket()).close()


# ---- the keeper


async def test_keeper_is_small_and_for_its_user_only(make: Callable[..., Caged]) -> None:
    caged = make()
    keeper = psutil.Process((await caged.keeper()).pid)
    assert keeper.num_threads() == 1
    assert keeper.memory_info().rss < 14 << 20
    assert keeper.ppid() == caged.identity.pid
    assert Path(caged.workdir / cage_entry.SOCKET_NAME).stat().st_mode & 0o777 == 0o600


async def test_keeper_cannot_be_traced_by_what_is_in_the_cage(make: Callable[..., Caged]) -> None:
    code = (
        "import os, time\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "for process in (os.getpid(), int(open('cage.pid').read())):\n"
        "    try: print(bool(open(f'/proc/{process}/environ').read()))\n"
        "    except PermissionError: print('refused')\n"
    )
    caged = make(python(code))
    await caged.keeper()
    (caged.workdir / "go").touch()
    assert (await caged.words()).split() == ["True", "refused"]


async def test_machine_is_found_by_its_token_and_the_keeper_is_not(make: Callable[..., Caged]) -> None:
    caged = make([*IDLE, "t0ken-of-this-test"])
    assert processes.find_by_token("t0ken-of-this-test") == caged.identity
    await caged.keeper()
    assert processes.find_by_token("t0ken-of-this-test") == caged.identity
    await caged.end()
    assert processes.find_by_token("t0ken-of-this-test") is None


async def test_any_garbage_and_any_number_of_connections_leave_the_keeper_serving(
    make: Callable[..., Caged], tmp_path: Path
) -> None:
    caged = make()
    keeper = psutil.Process((await caged.keeper()).pid)
    rng = random.Random(11)
    idle = []
    os.chdir(caged.workdir)
    try:
        for number in range(400):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(cage_entry.SOCKET_NAME)
            connection.settimeout(LIMIT_S)
            try:
                if number % 3:
                    connection.sendall(rng.randbytes(rng.randrange(1, 5000)))
                if number % 5 == 0:
                    with Path("log").open() as file:
                        socket.send_fds(connection, [b"x"], [file.fileno()] * 5)
            except OSError:
                pass
            idle.append(connection)
    finally:
        os.chdir("/")
    before = keeper.memory_info().rss
    for _ in range(200):
        (await caged.socket()).close()
    assert keeper.memory_info().rss < before + (1 << 20)
    if os.geteuid() == 0:  # others may not see its files
        assert keeper.num_fds() < 80
    for connection in idle:
        connection.close()
    if os.geteuid() == 0:
        await eventually(lambda: keeper.num_fds() < 10)


async def test_hundreds_of_sockets_are_given_at_the_same_time(make: Callable[..., Caged]) -> None:
    caged = make()
    given = await asyncio.gather(*(caged.socket() for _ in range(300)))
    assert len({one.fileno() for one in given}) == 300
    for one in given:
        one.close()


# ---- ends, in every order


async def test_keeper_ends_with_the_killed_process(make: Callable[..., Caged]) -> None:
    caged = make()
    keeper = await caged.keeper()
    os.kill(caged.identity.pid, signal.SIGKILL)
    await eventually(lambda: not processes.is_alive(keeper))
    with pytest.raises(MachineFailed, match="off"):
        await caged.socket()


async def test_process_killed_at_any_moment_of_its_start_leaves_no_keeper(make: Callable[..., Caged], tmp_path: Path) -> None:
    rng = random.Random(5)
    for _ in range(25):
        caged = make()
        time.sleep(rng.random() * 0.06)
        os.kill(caged.identity.pid, signal.SIGKILL)
    await eventually(lambda: caged_processes(tmp_path) == [])


async def test_process_lives_on_without_its_keeper_and_new_sockets_are_refused_at_once(make: Callable[..., Caged]) -> None:
    caged = make()
    with listening(await caged.socket(), ("10.64.1.1", 80)), await caged.socket() as connection:
        os.kill((await caged.keeper()).pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MachineFailed, match="keeper"):
            await caged.socket()
        assert time.monotonic() - began < 5
        assert caged.running()
        connection.connect(("10.64.1.1", 80))


async def test_killed_worker_leaves_both_and_the_next_worker_gets_sockets(tmp_path: Path) -> None:
    workdir = tmp_path / "machine"
    workdir.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from deskgrid.machines import cage, processes\n"
        f"folder = Path({str(workdir)!r})\n"
        f"processes.write_identity(folder, processes.spawn(cage.enter({IDLE!r}, folder), cwd=folder, log=folder / 'log'))\n"
        "print('made', flush=True); time.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"made\n"
    worker.kill()
    worker.communicate()
    identity = processes.read_identity(workdir)
    assert identity is not None
    try:
        assert processes.is_alive(identity)
        with await cage.open_socket(workdir, lambda: processes.is_alive(identity)) as given:
            given.bind(("10.64.1.1", 80))
    finally:
        await processes.kill(identity, CLOCK)
    await cage.wait_keeper_gone(workdir, CLOCK)
    assert caged_processes(tmp_path) == []


async def test_number_of_a_keeper_that_another_process_has_now_is_not_touched(tmp_path: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        (tmp_path / cage_entry.KEEPER_FILE).write_text(str(stranger.pid))
        await cage.wait_keeper_gone(tmp_path, CLOCK)
        assert stranger.returncode is None
    finally:
        stranger.kill()
        assert await stranger.wait() == -signal.SIGKILL


# ---- a keeper that was taken over


@pytest.mark.parametrize("kind", ["nothing", "file", "two", "local", "udp", "six"])
async def test_what_is_no_tcp_socket_is_refused_and_closed(tmp_path: Path, kind: str) -> None:
    own = [socket.socket(), socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(type=socket.SOCK_DGRAM)]
    with (tmp_path / "file").open("wb") as file, socket.socket(socket.AF_UNIX) as listener:
        gifts = {"nothing": [], "file": [file], "two": own[:2], "local": [own[2]], "udp": [own[3]], "six": [file] * 6}[kind]
        os.chdir(tmp_path)
        listener.bind(cage_entry.SOCKET_NAME)
        os.chdir("/")
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1)
                numbers = array.array("i", [gift.fileno() for gift in gifts])
                connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else [])

        server = threading.Thread(target=answer)
        server.start()
        before = psutil.Process().num_fds()
        with pytest.raises(MachineFailed, match="gave"):
            await cage.open_socket(tmp_path, lambda: True)
        server.join()
        assert psutil.Process().num_fds() <= before
    for one in own:
        one.close()


# ---- this PC


async def test_cages_work_here_and_the_probe_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert await cage.probe_cage() == ""
    assert list(tmp_path.iterdir()) == []
    assert caged_processes(tmp_path) == []


@pytest.mark.parametrize("pause_s", [0.0, 0.005, 0.01, 0.02])
async def test_probe_that_is_cancelled_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pause_s: float) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    probing = asyncio.create_task(cage.probe_cage())
    await asyncio.sleep(pause_s)
    probing.cancel()
    await asyncio.wait({probing})
    assert list(tmp_path.iterdir()) == []
    await eventually(lambda: caged_processes(tmp_path) == [])


@pytest.mark.parametrize(
    ("file", "words"), [("max_user_namespaces", "user namespaces"), ("max_net_namespaces", "network namespaces")]
)
def test_pc_that_forbids_namespaces_is_told_why(file: str, words: str) -> None:
    """In a user namespace of the test's own, where the bound can be set to nothing."""
    code = "import asyncio; from deskgrid.machines.cage import probe_cage; print(asyncio.run(probe_cage()))"
    script = f'echo 0 >/proc/sys/user/{file} && exec "$0" -c "$1"'
    done = subprocess.run(["unshare", "-Ur", "sh", "-c", script, sys.executable, code], capture_output=True, text=True, check=True)
    assert "cannot make a user and network namespace" in done.stdout
    assert f"{words} are switched off" in done.stdout


async def test_other_systems_have_no_cage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage.sys, "platform", "darwin")
    assert "only on Linux" in await cage.probe_cage()


ORDINARY = """
import os, socket, subprocess, sys, time
folder, program = sys.argv[1:]
python = [sys.executable, "-I", "-S"]
code = "import socket; socket.create_server(('127.0.0.1', 22)).accept()[0].send(b'yes')"
child = subprocess.Popen([*python, program, "--enter", folder, *python, "-c", code])
os.chdir(folder)
end = time.monotonic() + 10
try:
    while True:
        try:
            keeper = socket.socket(socket.AF_UNIX)
            keeper.connect("cage.sock")
            keeper.send(b".")
            given = socket.socket(fileno=socket.recv_fds(keeper, 1, 1)[1][0])
            given.connect(("127.0.0.1", 22))
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.005)
    print(os.getuid(), given.recv(9), child.wait(10))
finally:
    child.kill()
"""


def test_ordinary_user_can_make_one_and_open_low_ports_in_it() -> None:
    """The very programs, run by another user where the test is root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder)
        program = place / "cage_entry.py"
        shutil.copy(cage_entry.__file__, program)
        (place / "machine").mkdir()
        python, user = sys.executable, {}
        if os.getuid() == 0:
            python, user = SYSTEM_PYTHON, {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            for path in (place, place / "machine"):
                os.chown(path, NOBODY, NOBODY)
        command = [python, "-I", "-S", "-c", ORDINARY, place / "machine", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **user)
        assert done.stdout == f"{os.getuid() or NOBODY} b'yes' 0\n", done.stderr
        end = time.monotonic() + LIMIT_S
        while caged_processes(place):
            assert time.monotonic() < end
            time.sleep(0.01)

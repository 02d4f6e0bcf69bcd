"""The command line as a user types it, on a real server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deskgrid.testing.images import iso_bytes
from tests.unit.cli.conftest import Deskgrid, Owner, Server, Worker

# ---- who I am


def test_login_keeps_a_private_file_and_works_once(server: Server, deskgrid: Deskgrid, tmp_path: Path):
    link = server.login_link()
    ran = deskgrid("login", link, "--json")
    assert ran.document["name"] == "admin"
    file = Path(ran.document["file"])
    assert file == tmp_path / "client" / "credentials.json"
    assert file.stat().st_mode & 0o077 == 0
    again = deskgrid("login", link, "--json")
    assert (again.code, again.error["error"]) == (1, "Unauthenticated")


def test_login_reads_the_link_from_stdin(server: Server, deskgrid: Deskgrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").write_text(server.login_link() + "\n")
    with (tmp_path / "link").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert deskgrid("login", "-").code == 0


def test_login_with_another_link_than_a_login_link_says_what_it_is_for(server: Server, deskgrid: Deskgrid):
    for link, message in ((server.join_link(), "worker join LINK"), ("deskgrid://x", "not a whole deskgrid link")):
        ran = deskgrid("login", link)
        assert ran.code == 2
        assert message in ran.err


def test_login_to_another_grid_says_that_it_replaces_the_first(server: Server, user: Deskgrid):
    assert user("user", "add", "ann").code == 0
    ran = user("login", server.login_link("ann"))
    assert "as ann" in ran.out
    assert "replaces the login" in ran.err


def test_users_and_groups_are_added_and_listed(user: Deskgrid):
    assert user("user", "add", "ann").out.startswith("deskgrid://")
    assert user("user", "token", "ann", "--lifetime", "1h", "--json").document["link"].startswith("deskgrid://")
    assert user("user", "token", "ann", "--lifetime", "soon").code == 2
    assert [found["name"] for found in user("user", "list", "--json").document] == ["admin", "ann"]
    assert user("group", "add", "physics").code == 0
    assert user("group", "members", "physics", "--add", "ann", "--add", "admin").code == 0
    assert user("group", "members", "physics", "--remove", "admin", "--json").document["members"] == ["ann"]
    assert user("group", "list").out.split() == ["group", "weight", "members", "physics", "1", "ann"]
    assert user("group", "members", "chemistry").code == 2


def test_user_who_is_no_admin_may_not_add_users(server: Server, user: Deskgrid):
    user("user", "add", "ann")
    user("login", server.login_link("ann"))
    ran = user("user", "add", "eve", "--json")
    assert (ran.code, ran.error["error"]) == (1, "Forbidden")


# ---- data and disks


def test_data_goes_up_and_comes_back(user: Deskgrid, tmp_path: Path):
    (tmp_path / "events.root").write_bytes(b"events" * 1000)
    assert user("data", "put", tmp_path / "events.root", "--public").out == "events.root@1\n"
    (tmp_path / "events.root").write_bytes(b"more events")
    assert user("data", "put", tmp_path / "events.root", "--json").document["version"] == 2
    assert user("data", "get", "events.root").out == "events.root\n"
    assert Path("events.root").read_bytes() == b"more events"
    refused = user("data", "get", "events.root@1")
    assert (refused.code, Path("events.root").read_bytes()) == (2, b"more events")
    assert user("data", "get", "events.root@1", "-o", "old").code == 0
    assert Path("old").read_bytes() == b"events" * 1000
    listed = user("data", "list", "--json").document
    assert {(data["name"], data["version"], data["visibility"]) for data in listed} >= {("events.root", 2, "private")}
    assert "sha256" in user("data", "show", "events.root").out
    assert user("data", "remove", "events.root@2").out == "removed events.root@2\n"
    assert user("data", "show", "events.root", "--json").document["version"] == 1
    assert user("data", "show", "nothing").code == 2


def test_file_that_is_not_there_is_a_usage_error(user: Deskgrid):
    for command in (("data", "put", "gone"), ("disk", "import", "gone"), ("job", "submit", "gone.toml")):
        ran = user(*command)
        assert ran.code == 2
        assert "gone" in ran.err


def test_disk_is_published_with_the_label_that_it_looks_for(user: Deskgrid, disk: str, tmp_path: Path):
    (found,) = user("disk", "list", "--json").document
    data = found["data"]
    assert (data["name"], data["disk"]["format"], data["disk"]["context_label"]) == (disk, "iso", "CONTEXT")
    assert user("disk", "import", tmp_path / "tiny.iso", "--name", "cloud", "--public").out == "cloud@1\n"
    shown = user("data", "show", "cloud", "--json").document
    assert (shown["disk"]["context_label"], shown["visibility"]) == ("CIDATA", "public")
    assert "context label CIDATA" in user("data", "show", "cloud").out


class Site(SimpleHTTPRequestHandler):
    """A web server that keeps its log to itself."""

    def log_message(self, *_: object) -> None: ...


def test_disk_of_another_hypervisor_is_imported_from_a_file_and_from_the_web(user: Deskgrid, tmp_path: Path):
    (tmp_path / "raw").write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", tmp_path / "raw", tmp_path / "box.vmdk"], check=True)
    subprocess.run(["tar", "-C", tmp_path, "-czf", tmp_path / "box.ova.gz", "box.vmdk"], check=True)
    assert user("disk", "import", tmp_path / "box.ova.gz").out == "box@1\n"
    digest = hashlib.sha256((tmp_path / "box.vmdk").read_bytes()).hexdigest()
    handler = partial(Site, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        serving = threading.Thread(target=site.serve_forever)
        serving.start()
        address = f"http://127.0.0.1:{site.server_port}/box.vmdk"
        try:
            assert user("disk", "import", address).code == 2
            assert user("disk", "import", address, "--sha256", "0" * 64, "--json").error["error"] == "BadImage"
            assert user("disk", "import", address, "--sha256", digest).out == "box@1\n"  # the same disk, whatever it came in
        finally:
            site.shutdown()
            serving.join()
    assert user("disk", "import", tmp_path / "box.vmdk", "--sha256", "0" * 64, "--json").error["error"] == "BadImage"


def test_owner_declares_a_disk_that_jobs_find_on_the_pc(user: Deskgrid, tmp_path: Path):
    home = ("--home", tmp_path / "pc")
    (tmp_path / "mine.iso").write_bytes(iso_bytes())
    assert user("worker", "disk", "list", *home).out == "no disk is declared\n"
    assert user("worker", "disk", "add", tmp_path / "mine.iso", "--name", "mine", *home).out == "installed:mine\n"
    (listed,) = user("worker", "disk", "list", *home, "--json").document
    assert (listed["usable"], listed["disk"]["name"], listed["disk"]["context_label"]) == (True, "mine", "CIDATA")
    assert "mine.iso" in user("worker", "disk", "list", *home).out
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "context.sh").write_text("true\n")
    job = user("job", "submit", "--disk", "installed:mine", "--context", tmp_path / "context", "--json").document["id"]
    assert "installed:mine" in user("job", "show", job).out
    assert user("worker", "disk", "remove", "mine", *home).out == "removed mine\n"
    assert user("worker", "disk", "remove", "mine", *home).code == 2


def test_image_that_is_none_is_refused_as_a_usage_error(user: Deskgrid, tmp_path: Path):
    (tmp_path / "notes.qcow2").write_text("not a disk")
    ran = user("disk", "import", tmp_path / "notes.qcow2", "--json")
    assert (ran.code, ran.error["error"]) == (2, "BadImage")


def test_building_a_disk_of_another_kind_is_refused_before_it_starts(deskgrid: Deskgrid):
    assert deskgrid("disk", "build", "tiny", "-o", "tiny.vdi").code == 2
    assert deskgrid("disk", "build", "huge").code == 2


# ---- jobs


def test_submit_prints_the_number_and_show_the_job(user: Deskgrid, disk: str):
    ran = user("job", "submit", "--disk", disk, "--name", "hi", "--memory", "64MiB", "--paths", "a", "--paths", "b/**")
    assert ran.out == "1\n"
    shown = user("job", "show", "1", "--json").document
    assert shown["job"]["spec"]["machine"]["memory_bytes"] == 64 << 20
    assert shown["job"]["spec"]["results"]["paths"] == ["a", "b/**"]
    assert shown["attempts"] == []
    text = user("job", "show", "1").out
    assert "job 1 is waiting" in text
    assert "no attempts yet" in text


def test_submit_of_a_wrong_file_points_at_the_line(user: Deskgrid, disk: str):
    Path("job.toml").write_text('[machine]\ndisk = "tiny"\nmemroy = "1GiB"\n')
    ran = user("job", "submit", "job.toml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("deskgrid: job.toml:3: unknown key 'memroy' in [machine]\n  did you mean memory?")
    assert user("job", "submit", "job.toml", "--json").error["exit_code"] == 2
    assert user("job", "submit", "--disk", "no-such-disk").code == 2


def test_jobs_are_listed_by_state_newest_first(user: Deskgrid, disk: str):
    for name in ("a", "b", "c"):
        user("job", "submit", "--disk", disk, "--name", name)
    assert user("job", "cancel", "2").out == "job 2: cancelled\n"
    assert [job["spec"]["name"] for job in user("job", "list", "--json").document] == ["c", "b", "a"]
    assert [job["id"] for job in user("job", "list", "--state", "waiting", "--json").document] == [3, 1]
    page = user("job", "list", "--limit", "1")
    assert page.out.splitlines()[0].split()[:3] == ["job", "name", "owner"]
    assert "--before 3" in page.err
    assert user("job", "list", "--state", "lost").code == 2
    assert user("job", "wait", "2").code == 1
    assert user("job", "wait").code == 2


def test_run_brings_the_result_as_a_folder(user: Deskgrid, disk: str, worker: Worker):
    Path("context").mkdir()
    Path("context/context.sh").write_text("echo hello")

    def play() -> None:
        work = worker.take()
        assert work.context is not None
        worker.say(work, b"hello\n")
        worker.say(work, b"careful\n", stream="stderr")
        worker.succeed(work, {"answer.txt": "42"})

    with Owner(play):
        ran = user("run", "--disk", disk, "--context", "context")
    assert (ran.code, ran.out) == (0, "results-1\n")
    assert Path("results-1/answer.txt").read_text() == "42"
    assert "job 1 completed, exit code 0" in ran.err
    assert user("job", "logs", "1").out == "hello\n"
    assert user("job", "logs", "1", "--follow", "--attempt", "1").out == "hello\n"
    assert user("job", "logs", "1", "--stderr", "--json").document["text"] == "careful\n"
    assert user("job", "logs", "1", "--console").out == ""
    assert user("job", "logs", "1", "--console", "--stderr").code == 2
    assert user("job", "wait", "1", "--json").document[0]["job"]["state"] == "completed"
    assert user("job", "results", "1").code == 2  # results-1 is there
    fetched = user("job", "results", "1", "-o", "again", "--json").document
    assert (fetched["folder"], fetched["unpacked"]["left_out"]) == ("again", 0)
    assert user("job", "show", "1").out.splitlines()[-1].split()[:3] == ["1", "lab-7", "succeeded"]


def test_run_with_json_prints_one_document_and_no_progress(user: Deskgrid, disk: str, worker: Worker):
    with Owner(lambda: worker.succeed(worker.take(), {"a": "1"})):
        ran = user("run", "--disk", disk, "-o", "out", "--json")
    assert (ran.code, ran.err, ran.document["folder"]) == (0, "", "out")
    assert ran.document["job"]["job"]["state"] == "completed"


def test_failed_job_exits_with_1_and_tells_every_attempt(user: Deskgrid, disk: str, worker: Worker):
    def play() -> None:
        for number in (1, 2):
            work = worker.take()
            worker.say(work, b"out of beer\n", stream="stderr")
            worker.fail(work, f"reason {number}")

    with Owner(play):
        ran = user("run", "--disk", disk, "--attempts", "2")
    assert ran.code == 1
    assert "attempt 1 on lab-7: failed, exit code 3, reason 1" in ran.err
    assert "attempt 2 on lab-7: failed, exit code 3, reason 2" in ran.err
    assert "stderr: out of beer" in ran.err
    assert user("job", "wait", "1").code == 1


def test_result_folder_that_exists_is_refused_before_the_job_is_submitted(user: Deskgrid, disk: str):
    Path("out").mkdir()
    ran = user("run", "--disk", disk, "-o", "out")
    assert ran.code == 2
    assert user("job", "list", "--json").document == []


def test_result_that_is_not_there_yet_is_told(user: Deskgrid, disk: str):
    user("job", "submit", "--disk", disk)
    ran = user("job", "results", "1")
    assert (ran.code, "has no result" in ran.err) == (1, True)


def test_names_cannot_steer_the_terminal(user: Deskgrid, disk: str, worker: Worker):
    user("job", "submit", "--disk", disk, "--attempts", "1", "--name", "[red]x[/red]")
    worker.fail(worker.take(), "\x1b[2Jgone\nforged line")
    shown = user("job", "show", "1").out
    assert "\x1b" not in shown
    assert not any(line.startswith("forged") for line in shown.splitlines())
    assert "[red]x[/red]" in user("job", "list").out


# ---- the grid


def test_status_shows_workers_jobs_and_storage(user: Deskgrid, disk: str, worker: Worker):
    worker.sync()
    document = user("status", "--json").document
    assert document["workers_online"] == 1
    assert document["workers"][0]["name"] == "lab-7"
    assert set(document["jobs"]) == {"blocked", "waiting", "active", "completed", "failed", "cancelled"}
    text = user("status").out
    assert "1 online" in text
    assert "lab-7" in text
    assert "fake (none)" in text


def test_worker_joins_once_per_folder(server: Server, deskgrid: Deskgrid, tmp_path: Path):
    ran = deskgrid("worker", "join", server.join_link(), "--name", "pc", "--home", tmp_path / "pc", "--json")
    assert (tmp_path / "pc" / "credentials.json").exists()
    assert ran.document["home"] == str(tmp_path / "pc")
    link = server.join_link()
    again = deskgrid("worker", "join", link, "--home", tmp_path / "pc")
    assert (again.code, "is a worker already" in again.err) == (1, True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "worker.toml").write_text("cpu = 1\n")
    wrong = deskgrid("worker", "join", link, "--home", tmp_path / "other")
    assert (wrong.code, "worker.toml" in wrong.err) == (2, True)
    assert deskgrid("worker", "join", link, "--home", tmp_path / "third").code == 0  # the link was not used up


def test_worker_that_does_not_run_is_paused_and_leaves_on_disk(server: Server, deskgrid: Deskgrid, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DESKGRID_WORKER_DRIVERS", "fake")
    assert deskgrid("worker", "status").code == 2  # there is none yet
    deskgrid("worker", "join", server.join_link(), "--name", "pc")
    assert "worker pc of 127.0.0.1" in deskgrid("worker", "status").out
    assert "paused" in deskgrid("worker", "pause").out
    assert deskgrid("worker", "status", "--json").document["paused"] is True
    assert deskgrid("worker", "resume", "--json").document["paused"] is False
    assert "left the grid" in deskgrid("worker", "leave").out
    assert deskgrid("worker", "leave").code == 2


# ---- the server's own commands


def test_server_init_keeps_options_and_says_what_is_next(deskgrid: Deskgrid, tmp_path: Path):
    ran = deskgrid("server", "init", "--listen", "127.0.0.1:7777", "--name", 'phys"ics', "--admin", "root")
    assert "deskgrid server run" in ran.out
    assert "deskgrid login 'deskgrid://127.0.0.1:7777/login?" in ran.out
    again = deskgrid("server", "init", "--json").document
    assert again["login_link"].startswith("deskgrid://127.0.0.1:7777/login?")
    other = deskgrid("server", "init", "--listen", "127.0.0.1:8888")
    assert (other.code, "server.toml" in other.err) == (2, True)
    link = deskgrid("server", "join-link", "--uses", "3", "--lifetime", "2d", "--json").document
    assert (link["uses"], link["lifetime_s"]) == (3, 172800)
    assert deskgrid("server", "join-link", "--uses", "0").code == 2
    assert deskgrid("server", "join-link", "--home", tmp_path / "empty").code == 2


# ---- what fails


def test_server_that_is_gone_is_3_and_says_so(server: Server, user: Deskgrid, tmp_path: Path):
    credentials = tmp_path / "client" / "credentials.json"
    address = json.loads(credentials.read_text())["address"]
    credentials.write_text(credentials.read_text().replace(address, "127.0.0.1:1"))
    ran = user("status")
    assert ran.code == 3
    assert "127.0.0.1:1" in ran.err
    assert "is the server running" in ran.err
    assert user("job", "list", "--json").error["error"] == "Unreachable"


def test_without_login_the_way_to_log_in_is_told(deskgrid: Deskgrid):
    ran = deskgrid("job", "list")
    assert ran.code == 2
    assert "deskgrid login LINK" in ran.err

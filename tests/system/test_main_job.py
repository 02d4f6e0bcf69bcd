"""The main job as a user types it, on the fake driver: everything around the machine is real."""

from __future__ import annotations

import json

from tests.system.harness import System


def test_run_brings_the_result_back_as_a_folder(system: System):
    system.publish()
    system.add_worker()
    job = system.job_file('stdout = "hello\\n"\nstderr = "careful\\n"\n[files]\n"out/a.txt" = "result"\n')
    done = system.cli("run", job, "-o", system.folder / "out")
    assert (system.folder / "out" / "out" / "a.txt").read_text() == "result", done.stderr
    assert system.cli("job", "logs", "1").stdout == "hello\n"
    assert system.cli("job", "logs", "1", "--stderr").stdout == "careful\n"
    assert system.json("status")["jobs"]["completed"] == 1
    assert [job["state"] for job in system.json("job", "list")] == ["completed"]
    system.nothing_left()


def test_second_job_finds_the_disk_in_the_cache(system: System):
    system.publish()
    system.add_worker()
    for number in (1, 2):
        system.submit(name=f"j{number}")
        system.wait_for(number, "completed", ["succeeded"])
    assert len([file for file in (system.folder / "pc" / "cache").iterdir() if file.is_file()]) == 1


def test_failed_job_is_tried_three_times_and_says_why(system: System):
    system.publish()
    system.add_worker()
    job = system.job_file('exit_code = 3\n[files]\n"core" = "look at me"\n')
    done = system.cli("run", job, "-o", system.folder / "out", expect=1)
    detail = system.wait_for(1, "failed", ["failed"] * 3)
    assert [attempt["exit_code"] for attempt in detail["attempts"]] == [3, 3, 3]
    assert "3" in detail["job"]["message"]
    assert "ended with 3" in done.stderr + done.stdout
    system.cli("job", "results", "1", "-o", system.folder / "look")
    assert (system.folder / "look" / "core").read_text() == "look at me"
    system.nothing_left()


def test_only_the_paths_asked_for_come_back(system: System):
    system.publish()
    system.add_worker()
    job = system.job_file('[files]\n"keep/a.root" = "1"\n"b.txt" = "2"\n')
    job.write_text(job.read_text() + '[results]\npaths = ["**/*.root"]\n')
    system.cli("run", job, "-o", system.folder / "out")
    assert (system.folder / "out" / "keep" / "a.root").read_text() == "1"
    assert not (system.folder / "out" / "b.txt").exists()


def test_json_everywhere_is_one_document(system: System):
    system.publish()
    system.add_worker()
    system.submit()
    system.wait_for(1, "completed")
    for command in (
        ("status",),
        ("job", "list"),
        ("job", "show", "1"),
        ("job", "wait", "1"),
        ("disk", "list"),
        ("data", "list"),
        ("data", "show", "tiny"),
        ("user", "list"),
        ("group", "list"),
        ("worker", "status", "--home", str(system.folder / "pc")),
        ("server", "join-link"),
    ):
        json.loads(system.cli(*command, "--json").stdout)


def test_revoked_token_ends_at_once(system: System):
    system.cli("user", "add", "ann")
    link = system.json("user", "token", "ann")["link"]
    ann = {"DESKGRID_CLIENT_HOME": str(system.folder / "ann")}
    system.cli("login", link, **ann)
    assert "valid" in system.cli("user", "tokens", **ann).stdout
    [mine] = json.loads(system.cli("user", "tokens", "--json", **ann).stdout)
    system.cli("user", "tokens", "--revoke", str(mine["id"]), expect=None, **ann)
    system.cli("job", "list", expect=1, **ann)


def test_data_goes_up_and_comes_back(system: System):
    (system.folder / "table.csv").write_text("1,2\n")
    system.cli("data", "put", system.folder / "table.csv", "--name", "table")
    system.cli("data", "get", "table", "-o", system.folder / "back.csv")
    assert (system.folder / "back.csv").read_text() == "1,2\n"
    system.cli("data", "remove", "table")
    system.cli("data", "show", "table", expect=2)


def test_user_without_rights_and_wrong_input_are_told_apart(system: System):
    system.cli("user", "add", "ann")
    link = system.json("user", "token", "ann")["link"]
    system.cli("login", link, DESKGRID_CLIENT_HOME=str(system.folder / "ann"))
    system.cli("user", "add", "eve", DESKGRID_CLIENT_HOME=str(system.folder / "ann"), expect=1)
    system.cli("job", "show", "99", expect=2)
    assert system.server is not None
    system.server.stop()
    system.cli("status", expect=3)

"""Apps as a user types them, on a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import Deskgrid, Server, Worker

DEFAULTS = """
command = ["/app/blast", "{query}"]
[machine]
kind = "process"
memory = "2GiB"
[limits]
wall_time = "10m"
"""


@pytest.fixture
def blast(user: Deskgrid) -> str:
    for name in ("linux", "any"):
        Path(name).mkdir()
        Path(name, "blast").write_text(f"for {name}\n")
    Path("app.toml").write_text(DEFAULTS)
    ran = user(
        "app",
        "publish",
        "any",
        "--file",
        "linux-x86_64=linux",
        "--name",
        "blast",
        "--defaults",
        "app.toml",
        "--visibility",
        "public",
    )
    assert ran.out == "blast@1\n"
    return "blast"


def test_an_app_is_listed_shown_and_removed(user: Deskgrid, blast: str):
    (found,) = user("app", "list", "--json").document
    assert (found["name"], found["version"], found["visibility"], set(found["files"])) == (
        "blast",
        1,
        "public",
        {"any", "linux-x86_64"},
    )
    assert "blast" in user("app", "list").out
    text = user("app", "show", "blast").out
    assert text.startswith("blast@1, of admin, public, published now\n")
    assert "default    machine.memory = 2GiB" in text
    assert user("app", "publish", "any", "--name", "blast", "--json").document["version"] == 2
    assert user("app", "remove", "blast@2").out == "removed blast@2\n"
    assert user("app", "show", "blast", "--json").document["version"] == 1
    assert user("app", "remove", "blast").code == 0
    assert user("app", "show", "blast").code == 2
    assert user("app", "list").out == "no apps\n"


def test_a_job_has_what_its_app_says_where_it_says_nothing(user: Deskgrid, blast: str, worker: Worker):
    Path("job.toml").write_text('app = "blast"\n[machine]\nmemory = "1GiB"\n')
    assert user("job", "submit", "job.toml", "--wall-time", "5m").out == "1\n"
    spec = user("job", "show", "1", "--json").document["job"]["spec"]
    assert (spec["app"], spec["command"]) == ("blast@1", ["/app/blast", "{query}"])
    assert (spec["machine"]["kind"], spec["machine"]["memory_bytes"], spec["limits"]["wall_time_s"]) == ("process", 1 << 30, 300)
    work = worker.take()
    assert work.program is not None


def test_what_an_app_fills_in_is_checked_with_the_users_table(user: Deskgrid, blast: str):
    Path("queries.csv").write_text("query\na\nb\n")
    assert user("job", "submit", "--app", "blast", "--table", "queries.csv").out == "array-1\n"
    Path("queries.csv").write_text("search\na\nb\n")
    ran = user("job", "submit", "--app", "blast", "--table", "queries.csv")
    assert (ran.code, "app blast@1: nothing fills in {query}\n  one of index, search;" in ran.err) == (2, True), ran.err


def test_an_app_of_others_is_used_once_it_is_public(server: Server, user: Deskgrid, blast: str):
    user("app", "publish", "any", "--name", "secret")
    user("user", "add", "ann")
    user("login", server.login_link("ann"))
    assert [one["name"] for one in user("app", "list", "--json").document] == ["blast"]
    assert user("job", "submit", "--app", "blast").out == "1\n"
    assert user("job", "submit", "--app", "secret").code == 2
    assert user("app", "remove", "blast").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone",), "there is no folder 'gone'"),
        (("any", "--file", "linux"), "--file: 'linux' is not PLATFORM=FOLDER"),
        (("any", "--file", "amiga=any"), "'amiga' is not a platform"),
        (("any", "--defaults", "gone.toml"), "gone.toml: cannot"),
        (("any", "--defaults", "wrong.toml"), "wrong.toml: 'app' cannot be a default"),
        (("any", "--defaults", "broken.toml"), "broken.toml:2: not TOML"),
    ],
)
def test_what_is_no_app_is_refused(user: Deskgrid, arguments: tuple[str, ...], message: str):
    Path("any").mkdir()
    Path("wrong.toml").write_text('app = "x"\n')
    Path("broken.toml").write_text("a = 1\nb = \n")
    ran = user("app", "publish", *arguments, "--name", "x")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert user("app", "list").out == "no apps\n"

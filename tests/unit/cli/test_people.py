"""Users, tokens, shares, PCs and the audit log by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Deskgrid, Server


def test_narrowed_token_in_the_environment_does_what_it_may_and_no_more(user: Deskgrid, monkeypatch: pytest.MonkeyPatch):
    made = user("user", "token", "--right", "jobs:read", "--lifetime", "1h", "--label", "ci", "--json").document
    assert made["rights"] == ["jobs:read"]
    monkeypatch.setenv("DESKGRID_TOKEN", made["token"])
    assert user("job", "list").code == 0
    refused = user("user", "add", "eve", "--json")
    assert (refused.code, refused.error["error"]) == (1, "Forbidden")
    monkeypatch.delenv("DESKGRID_TOKEN")
    shown = user("user", "tokens", "--json").document
    assert ["ci", ["jobs:read"]] in [[one["label"], one["rights"]] for one in shown]
    assert made["token"] not in json.dumps(shown)


def test_login_file_with_a_narrowed_token_is_a_login(user: Deskgrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "ci" / "credentials.json"
    assert user("user", "token", "--right", "jobs", "--file", file).out == f"{file}\n"
    assert file.stat().st_mode & 0o077 == 0
    assert user("user", "token", "--right", "jobs", "--file", file).code == 2
    monkeypatch.setenv("DESKGRID_CLIENT_HOME", str(file.parent))
    assert user("job", "list").code == 0
    assert user("audit").code == 1


def test_token_is_for_a_user_or_has_rights_but_not_both(user: Deskgrid):
    assert user("user", "token").code == 2
    assert user("user", "token", "admin", "--right", "jobs").code == 2
    assert user("user", "token", "--right", "everything").code == 2


def test_login_says_until_when_and_is_renewed(user: Deskgrid):
    assert "is logged in until" in user("user", "renew").out
    assert "valid until" in user("user", "tokens").out


def test_shares_and_bounds_are_set(user: Deskgrid):
    user("user", "add", "ann")
    user("group", "add", "hep")
    ran = user("user", "set", "ann", "--weight", "2", "--max-running", "5", "--max-bytes", "10GiB")
    assert ran.out == "ann: weight 2; bounds: running 5, keeps 10GiB\n"
    assert user("user", "set", "ann", "--max-running=-1", "--json").document["max_running"] is None
    assert user("user", "set", "ann", "--max-bytes", "much").code == 2
    assert user("group", "set", "hep", "--weight", "3").out == "hep has weight 3\n"


def test_pc_of_a_user_is_listed_reserved_and_removed(server: Server, user: Deskgrid, tmp_path: Path):
    user("user", "add", "ann")
    user("group", "add", "hep")
    link = user("worker", "link", "--owner", "ann").out.strip()
    assert user("worker", "join", link, "--name", "home", "--home", tmp_path / "pc").code == 0
    [found] = user("worker", "list", "--json").document
    assert (found["name"], found["owner"]) == ("home", "ann")
    number = str(found["id"])
    assert (
        user("worker", "reserve", number, "--for", "group:hep", "--until", "7d").out == f"worker {number} is kept for group:hep\n"
    )
    assert "group:hep" in user("worker", "list").out
    assert user("worker", "reserve", number, "--clear").code == 0
    assert user("worker", "reserve", number).code == 2
    assert user("worker", "remove", number).code == 0
    assert user("worker", "list", "--json").document == []


def test_audit_log_is_shown_by_user_and_time(user: Deskgrid):
    user("user", "add", "ann")
    assert "add_user" in user("audit", "--user", "admin", "--since", "1h").out
    assert user("audit", "--user", "ann", "--json").document == []
    assert len(user("audit", "--limit", "1", "--json").document) == 1
    assert user("audit", "--since", "soon").code == 2


def test_data_is_shared_with_a_group(user: Deskgrid, tmp_path: Path):
    user("group", "add", "hep")
    user("group", "members", "hep", "--add", "admin")
    (tmp_path / "events").write_bytes(b"events")
    assert user("data", "put", tmp_path / "events", "--group", "hep", "--json").document["group"] == "hep"
    assert user("data", "put", tmp_path / "events", "--public", "--group", "hep").code == 2

"""Progress counted in jobs: on a terminal, into a log, and with --json."""

from __future__ import annotations

import sys

import pytest

from deskgrid.cli.counts import counting


def test_a_count_into_a_log_is_one_line(capsys: pytest.CaptureFixture[str]):
    with counting("run the jobs", json=False) as count:
        count.show(1, 2000, "5 running")
        count.show(2000, 2000)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("run the jobs: done, 2,000 of 2,000, ")


def test_a_count_that_an_error_ends_is_told_as_stopped(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt), counting("run the jobs", json=False) as count:
        count.show(1, 2)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("run the jobs: stopped, 1 of 2, ")


def test_no_count_with_json(capsys: pytest.CaptureFixture[str]):
    with counting("run the jobs", json=True) as count:
        count.show(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_count_on_a_terminal_is_a_bar_with_what_is_happening(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with counting("run the jobs", json=False) as count:
        count.show(500, 2000, "5 running\x1b[2J")
    said = capsys.readouterr().err
    assert "500 of 2,000" in said
    assert "5 running\\x1b[2J" in said

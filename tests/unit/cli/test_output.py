"""What is printed: tables for pipes, progress for terminals and for logs."""

from __future__ import annotations

import io
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.cli import output
from deskgrid.cli.output import age, clean, make_reporter, print_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text())
def test_cleaned_text_is_one_printable_line(text: str):
    assert clean(text).isprintable()


def test_text_in_other_languages_stays_as_it_is():
    assert clean("Ωmega 猫 é") == "Ωmega 猫 é"


def test_table_into_a_pipe_is_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]):
    print_table(("name", "why"), [("a", "x" * 300), ("long name", "\x1b[1m")], empty="none")
    assert capsys.readouterr().out.splitlines() == [
        "name       why",
        f"a          {'x' * 300}",
        "long name  \\x1b[1m",
    ]
    print_table(("name",), [], empty="nothing here")
    assert capsys.readouterr().out == "nothing here\n"


def test_table_on_a_terminal_shows_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table(("name",), [("[red]x[/red]",)], empty="none")
    assert "[red]x[/red]" in terminal.getvalue()


def test_age_is_told_roughly():
    now = time.time()
    assert [age(now), age(now + 50), age(now - 100), age(None)] == ["now", "now", "1m40s ago", "-"]


def test_progress_into_a_log_is_a_line_a_phase(capsys: pytest.CaptureFixture[str]):
    with make_reporter(False) as reporter:
        upload = reporter.begin("upload tiny", 3 << 20)
        upload.done(1 << 20)
        upload.note("half")
        reporter.begin("wait for a worker")
        reporter.end("failed")
        reporter.say("job 1 failed")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["upload tiny (3MiB): done, 0.0s", "wait for a worker: failed, 0.0s", "job 1 failed"]


def test_phase_that_an_error_ends_is_told_as_stopped(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt), make_reporter(False) as reporter:
        reporter.begin("run")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "run: stopped, 0.0s\n"


def test_no_progress_with_json(capsys: pytest.CaptureFixture[str]):
    with make_reporter(True) as reporter:
        reporter.begin("upload", 10).done(5)
        reporter.say("x")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_moves_and_ends_full(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with make_reporter(False) as reporter:
        packing = reporter.begin("pack [x]")
        packing.done(1 << 20, 2 << 20)
        packing.note("\x1b[2Jhalf")
        reporter.begin("boot")
        reporter.say("a [line] that stays")
    shown = terminal.getvalue()
    assert "pack [x]" in shown
    assert "1MiB of 2MiB" in shown
    assert "a [line] that stays" in shown
    assert "\x1b[2J" not in shown


def test_json_on_one_line_can_be_waited_for(capsys: pytest.CaptureFixture[str]):
    output.print_json({"address": "x:1", "home": "y"}, indent=0)
    assert capsys.readouterr().out.count("\n") == 1

"""The script of a TES task, run by real shells in a place of its own, as on a PC without a sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.tes_script import TAIL_BYTES, Ended, Plan, Staged, Wanted, ended_of, printed_by, quote, script_of, sizes_of
from deskgrid.model.tes import TesExecutor

MARK = "deskgrid-task-0123456789abcdef"
SHELLS = ("sh", "bash")
words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
printable = st.text(
    st.characters(exclude_characters="/", exclude_categories=("Cs", "Cc", "Zl", "Zp", "Cn", "Co", "Cf")), min_size=1, max_size=30
)
names = printable.filter(lambda name: name.isprintable() and name not in (".", "..") and not set(name) & set("*?["))


class Machine:
    """Folders in the place of /scratch, /tmp and /context."""

    def __init__(self, folder: Path, shell: str = "sh") -> None:
        self.folder, self.shell = folder, shell
        for name in ("scratch", "tmp", "context"):
            (folder / name).mkdir()

    def run(self, plan: Plan) -> subprocess.CompletedProcess[bytes]:
        script = self.folder / "context" / "context.sh"
        script.write_text(script_of(plan))
        places = {f"DESKGRID_{name.upper()}": str(self.folder / name) for name in ("scratch", "tmp", "context")}
        environment = {"PATH": os.environ["PATH"], **places}
        return subprocess.run(
            [self.shell, str(script)], env=environment, cwd=self.folder / "scratch", capture_output=True, timeout=30, check=False
        )


@pytest.fixture(params=SHELLS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)


def command(*line: str, **more: object) -> TesExecutor:
    return TesExecutor(image="process", command=line, **more)  # type: ignore[arg-type]


def plan(*executors: TesExecutor, **more: object) -> Plan:
    return Plan(mark=MARK, executors=executors, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("shell", SHELLS)
@settings(max_examples=60, deadline=None)
@given(
    given_words=st.lists(words, max_size=5),
    variables=st.dictionaries(st.from_regex(r"[A-Z_][A-Za-z0-9_]{0,10}", fullmatch=True), words, max_size=3),
)
def test_every_word_and_variable_reaches_the_program_as_it_is(shell: str, given_words: list[str], variables: dict[str, str]):
    variables = {name: value for name, value in variables.items() if not name.startswith(("DESKGRID", "PATH", "LD_", "LC_"))}
    with tempfile.TemporaryDirectory() as folder:
        done = Machine(Path(folder), shell).run(
            plan(
                command("printf", "%s\\0", *given_words, stdout="/scratch/words"),
                command("env", "-0", env=variables, stdout="/scratch/variables"),
            )
        )
        assert done.returncode == 0, done.stderr
        placed = [_placed(word, folder) for word in given_words]
        # Without words printf prints its format once.
        assert (Path(folder) / "scratch" / "words").read_bytes().split(b"\0")[:-1] == [word.encode() for word in placed or [""]]
        seen = (Path(folder) / "scratch" / "variables").read_bytes().split(b"\0")
        assert {f"{name}={_placed(value, folder)}".encode() for name, value in variables.items()} <= set(seen)


def _placed(word: str, folder: str) -> str:
    for place in ("/scratch", "/tmp", "/context"):
        if word == place or word.startswith(f"{place}/"):
            return f"{folder}{word}"
    return word


@settings(max_examples=60, deadline=None)
@given(name=names, folder_name=names)
def test_every_name_of_a_file_is_the_one_that_was_meant(name: str, folder_name: str):
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        (Path(folder) / "context" / "0").write_text("content")
        at, out = f"/tmp/{folder_name}/{name}", f"/scratch/{folder_name}/{name}"
        staged = Staged("/context/0", at, False)
        kept = Wanted(out, out.removeprefix("/scratch/")), Wanted(at, at[1:])
        done = machine.run(plan(command("cat", stdin=at, stdout=out), inputs=(staged,), outputs=kept))
        assert done.returncode == 0, done.stderr
        assert (Path(folder) / out[1:]).read_text() == "content"
        assert (Path(folder) / "scratch" / at[1:]).read_text() == "content"
        assert sizes_of(done.stderr, MARK) == {0: 7, 1: 7}


def test_commands_run_one_after_the_other_and_tell_how_they_went(machine: Machine):
    done = machine.run(
        plan(
            command("sh", "-c", "echo one; echo problem >&2; exit 3", ignore_error=True),
            command("echo", "two"),
            command("sh", "-c", "printf three; kill -9 $$"),
            command("echo", "never"),
        )
    )
    assert done.returncode == 137
    found = ended_of(done.stderr, MARK, 4)
    assert [one.exit_code for one in found] == [3, 0, 137]
    assert all(one.begun_at and one.ended_at and one.begun_at <= one.ended_at for one in found)
    assert found == ended_of(done.stdout, MARK, 4)
    assert printed_by(done.stdout, MARK) == {0: "one\n", 1: "two\n", 2: "three"}
    assert printed_by(done.stderr, MARK)[0] == "problem\n"


def test_end_of_what_goes_to_a_file_is_told_too(machine: Machine):
    done = machine.run(plan(command("sh", "-c", "seq 10000; echo bad >&2", stdout="/scratch/out/numbers", stderr="/tmp/errors")))
    assert done.returncode == 0
    told = printed_by(done.stdout, MARK)[0]
    assert told.endswith("\n10000\n") and len(told) == TAIL_BYTES
    assert printed_by(done.stderr, MARK) == {0: "bad\n"}
    assert (machine.folder / "scratch" / "out" / "numbers").read_text().startswith("1\n2\n")


def test_both_streams_may_go_to_one_file(machine: Machine):
    done = machine.run(plan(command("sh", "-c", "echo a; echo b >&2", stdout="/scratch/both", stderr="/scratch/both")))
    assert done.returncode == 0
    assert (machine.folder / "scratch" / "both").read_text() == "a\nb\n"


def test_program_is_run_and_never_a_word_of_the_shell(machine: Machine):
    for line in (("exit", "0"), ("eval", "echo x"), ("cd", "/"), ("if",), (":",), ("nothing-of-this-name",)):
        done = machine.run(plan(command(*line)))
        found = ended_of(done.stderr, MARK, 1)
        assert [one.exit_code for one in found] == [127] or shutil.which(line[0]), line


def test_command_without_its_stdin_fails_and_the_next_does_not_run(machine: Machine):
    done = machine.run(plan(command("cat", stdin="/tmp/nothing"), command("echo", "next")))
    assert done.returncode != 0
    assert len(ended_of(done.stderr, MARK, 2)) == 1


def test_data_is_linked_contents_are_copied_and_volumes_are_there(machine: Machine):
    for name in ("data", "content"):
        (machine.folder / "context" / name).write_text(name)
    inputs = (Staged("/context/data", "/scratch/in/data", True), Staged("/context/content", "/scratch/in/content", False))
    done = machine.run(
        plan(command("sh", "-c", "echo more >>content; ls", workdir="/scratch/in"), inputs=inputs, volumes=("/scratch/vol/a",))
    )
    assert done.returncode == 0, done.stderr
    assert (machine.folder / "scratch" / "in" / "data").is_symlink()
    assert (machine.folder / "scratch" / "in" / "content").read_text() == "contentmore\n"
    assert (machine.folder / "context" / "content").read_text() == "content"
    assert (machine.folder / "scratch" / "vol" / "a").is_dir()


def test_output_that_is_not_there_fails_the_task(machine: Machine):
    made = command("sh", "-c", "mkdir -p there /tmp; echo x >there/x; mkdir $0/away; echo y >$0/away/y", "/tmp")
    outputs = (Wanted("/scratch/there", "there", folder=True), Wanted("/tmp/away", "tmp/away", folder=True))
    done = machine.run(plan(made, outputs=outputs))
    assert done.returncode == 0, done.stderr
    assert (machine.folder / "scratch" / "tmp" / "away" / "y").read_text() == "y\n"
    done = machine.run(plan(command("true"), outputs=(*outputs, Wanted("/scratch/nothing", "nothing"))))
    assert done.returncode == 1 and b"there is no file /scratch/nothing" in done.stderr
    assert [one.exit_code for one in ended_of(done.stderr, MARK, 1)] == [0]


def test_command_that_fails_still_leaves_its_outputs(machine: Machine):
    done = machine.run(
        plan(
            command("sh", "-c", "echo log >/tmp/log; exit 9".replace("/tmp", str(machine.folder / "tmp"))),
            outputs=(Wanted("/tmp/log", "tmp/log"),),
        )
    )
    assert done.returncode == 9
    assert (machine.folder / "scratch" / "tmp" / "log").read_text() == "log\n"


@settings(max_examples=200)
@given(told=st.binary(max_size=300), number=st.integers(0, 99999), past=st.text("0123456789@- ", max_size=80))
def test_lines_that_a_command_makes_up_are_read_without_harm(told: bytes, number: int, past: str):
    whole = (
        told
        + f"\n{MARK} begin {number}{past}\n{MARK} output {number} {'9' * 30}\n".encode()
        + told
        + f"\n{MARK} end {number} {past}\n".encode()
    )
    for text in (told, whole, whole[7:], whole[:-3]):
        assert len(ended_of(text, MARK, 3)) <= 3
        assert all(isinstance(one, Ended) for one in ended_of(text, MARK, 3))
        assert all(len(printed) <= TAIL_BYTES for printed in printed_by(text, MARK).values())
        assert all(size < 10**18 for size in sizes_of(text, MARK).values())


def test_what_is_cut_at_its_beginning_is_still_understood():
    whole = f"\n{MARK} begin 0 @1\nlong output\n{MARK} end 0 3@1-2\n\n{MARK} begin 1 3@1-2 @2\nmore".encode()
    cut = whole[whole.index(b"output") :]
    assert printed_by(cut, MARK) == {0: "output", 1: "more"}
    assert ended_of(cut, MARK, 2) == [Ended(3, 1, 2), Ended(None, 2, None)]


def test_word_of_a_place_is_a_variable_there():
    assert quote("/scratch") == '"${DESKGRID_SCRATCH:-/scratch}"'
    assert quote("/tmp/a b") == "\"${DESKGRID_TMP:-/tmp}\"'/a b'"
    assert quote("/scratchy") == "/scratchy"

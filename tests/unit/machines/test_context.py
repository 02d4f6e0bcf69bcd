"""The context disk holds the user's files as they are, and ours."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycdlib import PyCdlib

from deskgrid.errors import InvalidInput
from deskgrid.machines.context import create_context, environment_file, meta_data
from deskgrid.machines.driver import MachineSpec
from deskgrid.model.machines import ContextLabel, MachineKind


def spec_with(context: Path | None, label: ContextLabel = ContextLabel.CONTEXT) -> MachineSpec:
    return MachineSpec("job-7/attempt-2", MachineKind.VM, 1, 1, 1, context=context, context_label=label, environment=(("A", "b"),))


def make(tmp_path: Path, context: Path | None, label: ContextLabel = ContextLabel.CONTEXT) -> PyCdlib:
    create_context(tmp_path / "context.iso", spec_with(context, label), instance="token")
    image = PyCdlib()
    image.open(str(tmp_path / "context.iso"))
    return image


def read(image: PyCdlib, path: str) -> bytes:
    data = io.BytesIO()
    image.get_file_from_iso_fp(data, rr_path=path)
    return data.getvalue()


def listing(image: PyCdlib) -> set[str]:
    return {f"{folder.rstrip('/')}/{name}" for folder, folders, files in image.walk(rr_path="/") for name in (*folders, *files)}


def test_empty_context_has_only_our_files(tmp_path: Path) -> None:
    image = make(tmp_path, None)
    own = {"/.deskgrid", "/.deskgrid/agent.sh", "/.deskgrid/environment", "/user-data", "/meta-data"}
    assert listing(image) == own
    assert read(image, "/.deskgrid/environment") == b"export A=b\n"
    assert read(image, "/.deskgrid/agent.sh").startswith(b"#!/bin/sh\n")


@pytest.mark.parametrize("label", ContextLabel)
def test_label_is_where_guests_look_for_it(tmp_path: Path, label: ContextLabel) -> None:
    make(tmp_path, None, label)
    assert (tmp_path / "context.iso").read_bytes()[32808:32840].rstrip() == label.value.encode()
    image = PyCdlib()
    image.open(str(tmp_path / "context.iso"))
    assert f"LABEL={label.value}".encode() in read(image, "/user-data")


def test_files_of_any_depth_name_and_mode_are_kept(tmp_path: Path) -> None:
    context = tmp_path / "context"
    names = ["context.sh", "blank and 'quote\"", "ümläut", "new\nline", "x" * 255, "a;1", "*?:", "UPPER", "upper"]
    deep = context.joinpath(*(f"level {number}" for number in range(15)))
    deep.mkdir(parents=True)
    for name in names:
        (context / name).write_text(name)
    (deep / "file").write_text("deep")
    (context / "context.sh").chmod(0o755)
    (context / "link").symlink_to("../outside/" + "long/" * 60)
    (context / "empty").mkdir()
    (context / "nothing").touch()
    os.mkfifo(context / "pipe")
    image = make(tmp_path, context)
    for name in names:
        assert read(image, f"/{name}") == name.encode()
    inside = "/" + "/".join(f"level {number}" for number in range(15))
    assert read(image, f"{inside}/file") == b"deep"
    record = image.get_record(rr_path="/context.sh")
    assert stat.S_IMODE(record.rock_ridge.get_file_mode()) == 0o755
    link = image.get_record(rr_path="/link")
    assert link.rock_ridge.symlink_path() == b"../outside/" + b"/".join([b"long"] * 60)
    assert {"/empty", "/nothing"} <= listing(image)
    assert "/pipe" not in listing(image)


def test_links_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the owner")
    context = tmp_path / "context"
    context.mkdir()
    (context / "file").symlink_to(tmp_path / "secret")
    (context / "folder").symlink_to(tmp_path)
    make(tmp_path, context)
    assert b"of the owner" not in (tmp_path / "context.iso").read_bytes()


def test_own_user_data_of_the_user_goes_first_and_ours_cannot_be_replaced(tmp_path: Path) -> None:
    context = tmp_path / "context"
    (context / ".deskgrid").mkdir(parents=True)
    (context / ".deskgrid" / "agent.sh").write_text("not the agent")
    (context / "user-data").write_text("mine")
    image = make(tmp_path, context)
    assert read(image, "/user-data") == b"mine"
    assert b"instance-id" in read(image, "/meta-data")
    assert read(image, "/.deskgrid/agent.sh") != b"not the agent"


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / os.fsdecode(b"bad\xff")).touch()
    with pytest.raises(InvalidInput, match="UTF-8"):
        create_context(tmp_path / "context.iso", spec_with(context), instance="token")


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60))
def test_any_value_reaches_the_shell_unchanged(value: str) -> None:
    script = environment_file([("VALUE", value)]) + b'printf %s "$VALUE"'
    assert subprocess.run(["sh"], input=script, capture_output=True, check=True).stdout == value.encode()


@pytest.mark.parametrize(("name", "value"), [("1A", ""), ("A-B", ""), ("", ""), ("A=B", ""), ("A;reboot", ""), ("A", "\0")])
def test_what_is_no_variable_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidInput):
        environment_file([(name, value)])


def test_instance_is_told_without_giving_the_token_away() -> None:
    told = meta_data("job-7/attempt-2", "secret-token")
    assert b"secret-token" not in told
    assert b"local-hostname: job-7-attempt-2\n" in told
    assert told != meta_data("job-7/attempt-2", "another-token")

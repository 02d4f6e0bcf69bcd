"""The context disk holds the user's files as they are, and ours."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycdlib import PyCdlib

from deskgrid.errors import InvalidInput
from deskgrid.machines.context import create_context, environment_file, meta_data, network_environment
from deskgrid.machines.driver import Doorway, MachineSpec
from deskgrid.model.machines import ContextLabel, MachineKind, Network


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


def test_command_and_files_of_the_app_are_on_it(tmp_path: Path) -> None:
    (tmp_path / "program" / "bin").mkdir(parents=True)
    (tmp_path / "program" / "bin" / "tool").write_bytes(b"tool")
    spec = msgspec.structs.replace(spec_with(None), command=("/app/bin/tool", "a b"), program=tmp_path / "program")
    create_context(tmp_path / "context.iso", spec, instance="token")
    image = PyCdlib()
    image.open(str(tmp_path / "context.iso"))
    assert read(image, "/.deskgrid/command") == b"set -- /app/bin/tool 'a b'\n"
    assert read(image, "/app/bin/tool") == b"tool"


def test_data_is_on_it_and_nothing_of_the_users_may_be_in_its_place(tmp_path: Path) -> None:
    for name in ("cached", "context"):
        (tmp_path / name).mkdir()
    (tmp_path / "cached" / "sha256").write_bytes(b"events")
    data = (("events.root", tmp_path / "cached" / "sha256"), ("again", tmp_path / "cached" / "sha256"))
    spec = msgspec.structs.replace(spec_with(tmp_path / "context"), data=data)
    create_context(tmp_path / "context.iso", spec, instance="token")
    image = PyCdlib()
    image.open(str(tmp_path / "context.iso"))
    assert read(image, "/data/events.root") == read(image, "/data/again") == b"events"
    (tmp_path / "context" / "data").mkdir()
    with pytest.raises(InvalidInput, match="'data'"):
        create_context(tmp_path / "context.iso", spec, instance="token")


def test_context_with_a_file_where_the_app_goes_is_refused(tmp_path: Path) -> None:
    for name in ("program", "context"):
        (tmp_path / name).mkdir()
    (tmp_path / "context" / "app").touch()
    spec = msgspec.structs.replace(spec_with(tmp_path / "context"), program=tmp_path / "program")
    with pytest.raises(InvalidInput, match="app"):
        create_context(tmp_path / "context.iso", spec, instance="token")


@pytest.mark.parametrize("label", [ContextLabel.CONTEXT, ContextLabel.CIDATA])
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


# ---- with a network

KEY = 'ssh-ed25519 AAAAC3Nza ann "the user" @ pc'
NETWORKED = MachineSpec(
    "job-7/attempt-2",
    MachineKind.VM,
    1,
    1,
    1,
    network=Network.OVERLAY,
    reach=(Doorway("db", "10.64.1.1", 5432, "db.job-41"), Doorway("my-site", "10.64.1.2", 80, "web.user-ann")),
    offer=(("ssh", 22), ("web", 8080)),
    ssh_keys=(KEY,),
    environment=(("A", "b"), ("DESKGRID_DB", "mine:1")),
)


def make_networked(tmp_path: Path, context: Path | None = None, **changes: object) -> PyCdlib:
    spec = msgspec.structs.replace(NETWORKED, context=context, **changes)
    create_context(tmp_path / "context.iso", spec, instance="token")
    image = PyCdlib()
    image.open(str(tmp_path / "context.iso"))
    return image


def test_services_are_listed_for_programs_and_for_the_agent(tmp_path: Path) -> None:
    image = make_networked(tmp_path)
    assert json.loads(read(image, "/services.json")) == {
        "reach": {
            "db": {"host": "db", "address": "10.64.1.1", "port": 5432, "service": "db.job-41"},
            "my-site": {"host": "my-site", "address": "10.64.1.2", "port": 80, "service": "web.user-ann"},
        },
        "offer": {"ssh": 22, "web": 8080},
        "socks": "10.64.0.1:1080",
    }
    assert read(image, "/.deskgrid/hosts") == b"10.64.1.1 db\n10.64.1.2 my-site\n"
    assert read(image, "/.deskgrid/reach") == b"db 10.64.1.1 5432\nmy-site 10.64.1.2 80\n"
    assert read(image, "/.deskgrid/offer") == b"ssh 22\nweb 8080\n"
    assert read(image, "/.deskgrid/authorized_keys").decode() == f"{KEY}\n"


def test_services_file_without_services_is_whole(tmp_path: Path) -> None:
    image = make_networked(tmp_path, reach=(), offer=())
    assert json.loads(read(image, "/services.json")) == {"reach": {}, "offer": {}, "socks": "10.64.0.1:1080"}


def test_environment_names_services_and_the_users_own_variables_win(tmp_path: Path) -> None:
    script = read(make_networked(tmp_path), "/.deskgrid/environment") + b"env"
    done = subprocess.run(["sh"], input=script, capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    variables = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert variables["DESKGRID_DB"] == "mine:1"
    assert variables["DESKGRID_MY_SITE"] == "my-site:80"
    assert variables["DESKGRID_SOCKS"] == "10.64.0.1:1080"
    assert "http_proxy" not in variables


def test_way_out_is_named_by_the_usual_variables_and_services_do_not_take_it() -> None:
    variables = dict(network_environment(msgspec.structs.replace(NETWORKED, network=Network.INTERNET)))
    assert {variables[name] for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} == {"http://10.64.0.1:3128"}
    assert variables["all_proxy"] == "socks5h://10.64.0.1:1080"
    assert {"db", "my-site", "10.64.0.0/16", "localhost"} <= set(variables["no_proxy"].split(","))


def test_keys_are_told_to_cloud_init_too(tmp_path: Path) -> None:
    lines = read(make_networked(tmp_path), "/user-data").decode().splitlines()
    assert lines[:4] == ["#cloud-config", "disable_root: false", "ssh_authorized_keys:", f"  - {json.dumps(KEY)}"]
    assert lines[4] == "runcmd:"


def test_credentials_are_for_root_only_and_live_in_a_folder_that_the_user_may_have_too(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    context = tmp_path / "context"
    (context / "grid" / "deep").mkdir(parents=True)
    (context / "grid" / "mine").write_text("mine")
    image = make_networked(tmp_path, context, credentials=tmp_path / "secret")
    assert read(image, "/grid/credentials.json") == b"{}"
    assert read(image, "/grid/mine") == b"mine"
    assert stat.S_IMODE(image.get_record(rr_path="/grid/credentials.json").rock_ridge.get_file_mode()) == 0o600
    found = {name for name in listing(image) if name.startswith("/grid")}
    assert found == {"/grid", "/grid/mine", "/grid/deep", "/grid/credentials.json"}


def test_files_of_the_user_with_our_names_win(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    context = tmp_path / "context"
    (context / "grid").mkdir(parents=True)
    (context / ".deskgrid").mkdir()
    (context / ".deskgrid" / "hosts").write_text("6.6.6.6 db")
    (context / "services.json").write_text("mine")
    (context / "grid" / "credentials.json").write_text("mine")
    image = make_networked(tmp_path, context, credentials=tmp_path / "secret")
    assert read(image, "/services.json") == b"mine"
    assert read(image, "/grid/credentials.json") == b"mine"
    assert b"6.6.6.6" not in read(image, "/.deskgrid/hosts")
    assert b"db.job-41" in read(image, "/.deskgrid/services.json")


def test_file_of_the_user_where_our_folder_would_be_is_kept(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    context = tmp_path / "context"
    context.mkdir()
    (context / "grid").write_text("mine")
    assert read(make_networked(tmp_path, context, credentials=tmp_path / "secret"), "/grid") == b"mine"


@pytest.mark.parametrize("key", ["ssh-rsa A\nssh-rsa B", "ssh-rsa \0", "a\rb"])
def test_key_that_is_more_than_a_line_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidInput):
        make_networked(tmp_path, ssh_keys=(key,))


def test_without_a_network_nothing_of_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    image = make_networked(tmp_path, network=Network.NONE, credentials=tmp_path / "secret")
    own = {"/.deskgrid", "/.deskgrid/agent.sh", "/.deskgrid/environment", "/user-data", "/meta-data"}
    assert listing(image) == own
    assert b"ssh" not in read(image, "/user-data")
    assert b"SOCKS" not in read(image, "/.deskgrid/environment")


# ---- CernVM


def test_cernvm_finds_its_user_data_and_no_context_script_to_source(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "context.sh").write_text("echo the job\n")
    image = make(tmp_path, tmp_path / "context", ContextLabel.CERNVM)
    top = {path for path in listing(image) if path.count("/") == 1}
    assert top == {"/job", "/openstack", "/ec2"}  # HEPiX's scripts source /context.sh and run /prolog.sh of any volume
    assert {"/job/context.sh", "/job/.deskgrid/agent.sh", "/job/.deskgrid/environment"} <= listing(image)
    user_data = read(image, "/openstack/latest/user_data")
    assert read(image, "/ec2/latest/user-data") == user_data
    assert json.loads(read(image, "/ec2/latest/meta-data.json")) == {}
    script, _, sections = user_data.decode().partition("\nexit 0\n")
    assert script.startswith("#!/bin/sh.after\n")
    assert sections.strip().splitlines() == ["[amiconfig]", "plugins=cernvm"]
    subprocess.run(["sh", "-n"], input=script.encode(), check=True)


def test_own_user_data_of_the_user_goes_first_for_cernvm_too(tmp_path: Path) -> None:
    own = b"[amiconfig]\nplugins=cernvm\n[cernvm]\norganisations=atlas\n"
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "user-data").write_bytes(own)
    image = make(tmp_path, tmp_path / "context", ContextLabel.CERNVM)
    assert read(image, "/openstack/latest/user_data") == read(image, "/ec2/latest/user-data") == own

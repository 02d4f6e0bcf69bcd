"""The context disk: an ISO 9660 image with Rock Ridge (long names, modes, symlinks) made from the user's files and ours.

    /...                      the user's files, as they are
    /.deskgrid/agent.sh       what a template runs at the end of its boot
    /.deskgrid/environment    variables for context.sh, for a POSIX shell to read
    /.deskgrid/command        what runs in its place, if the job has a command: `set -- PROGRAM ARGUMENTS`, quoted
    /user-data, /meta-data    cloud-init NoCloud, for disks without our agent; the user's own files go first

    /data/NAME                the job's data
    /secrets/NAME             the job's secrets, for root only; the image itself is for the worker's user only

For CernVM (label CERNVM) all that is in the folder /job, and at the top

    /openstack/latest/user_data, /ec2/latest/user-data, /ec2/latest/meta-data.json     its user-data, the user's own if there is one

With a network:

    /services.json            the services that the job reaches and offers, for programs
    /grid/credentials.json    with what the job itself may talk to the server; for root only
    /.deskgrid/network        there if the machine has a network card
    /.deskgrid/hosts          lines for /etc/hosts: ADDRESS NAME
    /.deskgrid/reach          a line for each service that it reaches: NAME ADDRESS PORT
    /.deskgrid/offer          a line for each service that it offers: NAME PORT
    /.deskgrid/authorized_keys

ISO 9660:1999 (level 4) has no limit on depth. There is no Joliet: only Windows needs it, and that could not read scratch.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct
from pycdlib import PyCdlib
from pycdlib.pycdlibexception import PyCdlibException

from deskgrid.errors import InvalidInput
from deskgrid.machines.cage import CAGE_NETWORK, GATEWAY, HTTP_PROXY_PORT, SOCKS_PORT
from deskgrid.machines.clear_secrets import SECRETS_FOLDER
from deskgrid.machines.driver import MachineSpec
from deskgrid.model.machines import ContextLabel, Network

__all__ = [
    "DATA_FOLDER",
    "OWN_FOLDER",
    "cernvm_user_data",
    "check_places",
    "create_context",
    "environment_file",
    "meta_data",
    "network_environment",
    "secret_files",
    "services_file",
    "user_data",
]

OWN_FOLDER = ".deskgrid"
APP_FOLDER, DATA_FOLDER = "app", "data"
JOB_FOLDER = "job"
SOCKS = f"{GATEWAY}:{SOCKS_PORT}"
HTTP_PROXY = f"{GATEWAY}:{HTTP_PROXY_PORT}"
"""Where in the cage the worker listens itself."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME_BYTES = 255


def create_context(path: Path, spec: MachineSpec, *, instance: str) -> None:
    """Write the context disk of `spec` to `path`. `instance` tells this boot from others, for cloud-init.

    Sockets and devices are left out, links are kept and never followed. Raise InvalidInput for what an ISO cannot hold.
    """
    check_places(spec)
    image = PyCdlib()
    image.new(interchange_level=4, rock_ridge="1.09", vol_ident=spec.context_label.value)
    writer = _Writer(image, JOB_FOLDER if spec.context_label is ContextLabel.CERNVM else "")
    try:
        if spec.context:
            writer.add_folder(spec.context)
        if spec.program:
            writer.add_program(spec.program)
        writer.add_data(spec.data)
        for file in _own_files(spec, instance):
            writer.add_own(file)
        if spec.context_label is ContextLabel.CERNVM:
            writer.add_at_top(_cernvm_files(spec))
        # Nobody else on the PC may read it: there may be secrets in it.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
            image.write_fp(target)
    except PyCdlibException as error:
        raise InvalidInput(f"the context folder cannot be put on a disk: {error}") from error
    finally:
        image.close()


def check_places(spec: MachineSpec) -> None:
    """Raise InvalidInput if the user's context has something where the job's secrets or data go."""
    for what, folder, comes in (("secrets", SECRETS_FOLDER, spec.secrets is not None), ("data", DATA_FOLDER, bool(spec.data))):
        if comes and spec.context is not None and os.path.lexists(spec.context / folder):
            raise InvalidInput(f"the context has {folder!r}, which is where the job's {what} go", hint="give it another name")


def secret_files(spec: MachineSpec) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the job's secrets."""
    if spec.secrets is not None:
        for file in sorted(spec.secrets.iterdir()):
            yield file.name, file.read_bytes()


def environment_file(variables: Iterable[tuple[str, str]]) -> bytes:
    """Return lines that a POSIX shell reads as exactly these variables. Raise InvalidInput for what is no variable."""
    lines = []
    for name, value in variables:
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise InvalidInput(f"{name!r} cannot be an environment variable", hint="letters, digits and _, and a value without NUL")
        lines.append(f"export {name}={shlex.quote(value)}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def meta_data(name: str, instance: str) -> bytes:
    """Return NoCloud's meta-data. The instance id is new for each machine, or cloud-init would take it for a reboot."""
    hostname = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63] or "job"
    mark = hashlib.sha256(instance.encode()).hexdigest()[:16]
    return f"instance-id: deskgrid-{mark}\nlocal-hostname: {hostname}\n".encode()


def user_data(label: ContextLabel, ssh_keys: Iterable[str] = ()) -> bytes:
    """Return NoCloud's user-data, which does what a template's own start-up does."""
    keys = [f"  - {msgspec.json.encode(key).decode()}\n" for key in ssh_keys]
    return "".join(
        (
            "#cloud-config\n",
            *(("disable_root: false\n", "ssh_authorized_keys:\n", *keys) if keys else ()),
            "runcmd:\n",
            "  - mkdir -p /context\n",
            f"  - test -e /context/{OWN_FOLDER}/agent.sh || mount -o ro LABEL={label.value} /context\n",
            f"  - sh /context/{OWN_FOLDER}/agent.sh\n",
        )
    ).encode()


def cernvm_user_data() -> bytes:
    """Return CernVM's user-data, which runs the agent at the end of its contextualisation.

    Format: a script from `#!/bin/sh.after` to a line `exit`, then sections for amiconfig (cernvm/amiconfig on GitHub, hepix/commands/amiconfig.sh and
    rpath/; contexts in cernvm/public-contexts). Others may run it, too, so it does no harm to run it twice.
    """
    return (
        "#!/bin/sh.after\n"
        "mkdir -p /context /run/deskgrid-disk\n"
        f"if [ ! -e /context/{OWN_FOLDER}/agent.sh ]; then\n"
        f"    mount -o ro LABEL={ContextLabel.CERNVM.value} /run/deskgrid-disk\n"
        f"    mount --bind /run/deskgrid-disk/{JOB_FOLDER} /context\n"
        "fi\n"
        f"sh /context/{OWN_FOLDER}/agent.sh\n"
        "exit 0\n"
        "\n"
        "[amiconfig]\n"
        "plugins=cernvm\n"
    ).encode()


def _cernvm_files(spec: MachineSpec) -> Iterator[_OwnFile]:
    """Yield what µCernVM's boot loader (cernvm/cernvm-micro, scripts.d/06context) and the HEPiX scripts (cernvm/amiconfig, hepix_functions) look for."""
    own = spec.context / "user-data" if spec.context is not None else None
    data = own.read_bytes() if own is not None and own.is_file() and not own.is_symlink() else cernvm_user_data()
    yield _OwnFile("openstack/latest/user_data", data)
    yield _OwnFile("ec2/latest/user-data", data)
    yield _OwnFile("ec2/latest/meta-data.json", b"{}\n")


def services_file(spec: MachineSpec, *, localhost: frozenset[str] = frozenset()) -> bytes:
    """Return services.json: JSON with a line for each service that is reached, so that a shell can work on it, too.

    `localhost` has the names of those that are at localhost, too; the agent adds them itself.
    """
    reach = [
        f"    {_json(door.name)}: "
        + _json(
            {
                **({"localhost": True} if door.name in localhost else {}),
                **{"host": door.name, "address": door.host, "port": door.port, "service": door.service},
            }
        )
        for door in spec.reach
    ]
    lines = ",\n".join(reach)
    doors = f"{{\n{lines}\n  }}" if reach else "{}"
    return f'{{\n  "reach": {doors},\n  "offer": {_json(dict(spec.offer))},\n  "socks": {_json(SOCKS)}\n}}\n'.encode()


def network_environment(spec: MachineSpec) -> tuple[tuple[str, str], ...]:
    """Return the variables that tell programs their services, and with `internet` the way out. Nothing without a network."""
    if spec.network is Network.NONE:
        return ()
    doors = [(f"DESKGRID_{door.name.upper().replace('-', '_')}", f"{door.name}:{door.port}") for door in spec.reach]
    told = (("DESKGRID_SOCKS", SOCKS), *doors)
    if spec.network is not Network.INTERNET:
        return told
    inside = ",".join(("localhost", "127.0.0.1", CAGE_NETWORK, *(word for door in spec.reach for word in (door.name, door.host))))
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    proxies = [(name, f"http://{HTTP_PROXY}") for name in names]
    return (*told, *proxies, ("all_proxy", f"socks5h://{SOCKS}"), ("no_proxy", inside), ("NO_PROXY", inside))


class _OwnFile(Struct, frozen=True):
    """A file of ours. `path` is relative and at most one folder deep."""

    path: str
    data: bytes
    mode: int = 0o644


def _own_files(spec: MachineSpec, instance: str) -> Iterator[_OwnFile]:
    yield _OwnFile(f"{OWN_FOLDER}/agent.sh", (importlib.resources.files("deskgrid.machines") / "agent.sh").read_bytes())
    # The user's own variables come later, so they win.
    yield _OwnFile(f"{OWN_FOLDER}/environment", environment_file((*network_environment(spec), *spec.environment)))
    if spec.command:
        yield _OwnFile(f"{OWN_FOLDER}/command", f"set -- {shlex.join(spec.command)}\n".encode())
    if spec.context_label is not ContextLabel.CERNVM:
        yield from _seed(spec, instance)
    for name, data in secret_files(spec):
        yield _OwnFile(f"{SECRETS_FOLDER}/{name}", data, 0o600)
    if spec.network is not Network.NONE:
        yield from _network_files(spec)


def _seed(spec: MachineSpec, instance: str) -> Iterator[_OwnFile]:
    """Yield a seed for cloud-init."""
    yield _OwnFile("user-data", user_data(spec.context_label, spec.ssh_keys if spec.network is not Network.NONE else ()))
    yield _OwnFile("meta-data", meta_data(spec.name, instance))


def _network_files(spec: MachineSpec) -> Iterator[_OwnFile]:
    services = services_file(spec)
    yield _OwnFile("services.json", services)
    yield _OwnFile(f"{OWN_FOLDER}/services.json", services)
    yield _OwnFile(f"{OWN_FOLDER}/network", b"10.0.2.15/24 10.0.2.2\n")
    yield _OwnFile(f"{OWN_FOLDER}/hosts", _lines(f"{door.host} {door.name}" for door in spec.reach))
    yield _OwnFile(f"{OWN_FOLDER}/reach", _lines(f"{door.name} {door.host} {door.port}" for door in spec.reach))
    yield _OwnFile(f"{OWN_FOLDER}/offer", _lines(f"{name} {port}" for name, port in spec.offer))
    if spec.ssh_keys:
        yield _OwnFile(f"{OWN_FOLDER}/authorized_keys", _lines(spec.ssh_keys), 0o600)
    if spec.credentials is not None:
        yield _OwnFile("grid/credentials.json", spec.credentials.read_bytes(), 0o600)


def _lines(lines: Iterable[str]) -> bytes:
    """Return lines of a file that a program of the guest reads. Raise InvalidInput for what is not one line."""
    whole = []
    for line in lines:
        if not line.isprintable():
            raise InvalidInput(f"{line[:60]!r} is not one line of text")
        whole.append(f"{line}\n")
    return "".join(whole).encode()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class _Place(Struct, frozen=True):
    """A folder on the host, its identifier path on the ISO, and its path there as guests see it (a / at the end, "" for the top)."""

    folder: Path
    identifier: str
    path: str


class _Writer:
    """Gives every entry a short unique ISO identifier; guests see the Rock Ridge name."""

    def __init__(self, image: PyCdlib, top: str = "") -> None:
        self._image = image
        self._count = 0
        self._top = self._directory("", top, 0o755) if top else ""
        """Identifier of the folder in which all is."""
        self._taken: set[str] = set()
        """What there is at the top and in the folders there, by path."""
        self._folders: dict[str, str] = {}
        """Identifiers of the folders at the top."""

    def add_folder(self, root: Path) -> None:
        """Add what is in `root`, at any depth."""
        places = [_Place(root, self._top, "")]
        while places:
            places.extend(self._add_entries(places.pop()))

    def add_program(self, root: Path) -> None:
        """Add the files of the job's app, as /app in the guest. Raise InvalidInput if the user's context has something of that name."""
        if APP_FOLDER in self._taken:
            raise InvalidInput(f"the context has {APP_FOLDER!r}, which is where the app's files go", hint="give it another name")
        self._taken.add(APP_FOLDER)
        self._folders[APP_FOLDER] = self._directory(self._top, APP_FOLDER, 0o755)
        places = [_Place(root, self._folders[APP_FOLDER], f"{APP_FOLDER}/")]
        while places:
            places.extend(self._add_entries(places.pop()))

    def add_data(self, files: Iterable[tuple[str, Path]]) -> None:
        """Add the job's data as files, where nothing of the user's is."""
        folder = ""
        for name, path in files:
            folder = folder or self._directory(self._top, DATA_FOLDER, 0o755)
            self._image.add_file(str(path), f"{folder}/{self._next('F')}.;1", rr_name=name, file_mode=stat.S_IFREG | 0o444)

    def add_own(self, file: _OwnFile) -> None:
        """Add a file of ours, but not if the user's has that name, or a file the name of its folder."""
        folder, _, name = file.path.rpartition("/")
        if file.path in self._taken or (folder in self._taken and folder not in self._folders):
            return
        if folder and folder not in self._folders:
            self._folders[folder] = self._directory(self._top, folder, 0o700 if folder == SECRETS_FOLDER else 0o755)
        self._add_bytes(self._folders[folder] if folder else self._top, name, file)

    def add_at_top(self, files: Iterable[_OwnFile]) -> None:
        """Add files outside of the folder in which all else is."""
        folders = {"": ""}
        for file in files:
            *parts, name = file.path.split("/")
            path = ""
            for part in parts:
                above, path = path, f"{path}/{part}"
                if path not in folders:
                    folders[path] = self._directory(folders[above], part, 0o755)
            self._add_bytes(folders[path], name, file)

    def _add_bytes(self, folder: str, name: str, file: _OwnFile) -> None:
        identifier = f"{folder}/{self._next('F')}.;1"
        mode = stat.S_IFREG | file.mode
        self._image.add_fp(io.BytesIO(file.data), len(file.data), identifier, rr_name=name, file_mode=mode)

    def _add_entries(self, place: _Place) -> Iterator[_Place]:
        with os.scandir(place.folder) as entries:
            for entry in sorted(entries, key=lambda found: found.name):
                path = f"{place.path}{entry.name}"
                if path == OWN_FOLDER:
                    continue
                _check_name(entry.name)
                if place.path.count("/") <= 1:
                    self._taken.add(path)
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    identifier = self._directory(place.identifier, entry.name, stat.S_IMODE(mode))
                    if not place.path:
                        self._folders[path] = identifier
                    yield _Place(Path(entry.path), identifier, f"{path}/")
                elif stat.S_ISLNK(mode):
                    self._symlink(place.identifier, entry.name, str(Path(entry.path).readlink()))
                elif stat.S_ISREG(mode):
                    target = f"{place.identifier}/{self._next('F')}.;1"
                    # Read only when the image is written, so a thousand files are not a thousand open ones.
                    self._image.add_file(
                        entry.path, target, rr_name=entry.name, file_mode=stat.S_IFREG | (stat.S_IMODE(mode) & 0o777)
                    )

    def _directory(self, parent: str, name: str, mode: int) -> str:
        identifier = f"{parent}/{self._next('D')}"
        self._image.add_directory(identifier, rr_name=name, file_mode=stat.S_IFDIR | (mode & 0o777))
        return identifier

    def _symlink(self, parent: str, name: str, target: str) -> None:
        _check_utf8(target)
        self._image.add_symlink(f"{parent}/{self._next('L')}.;1", rr_symlink_name=name, rr_path=target)

    def _next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count:07d}"


def _check_name(name: str) -> None:
    _check_utf8(name)
    if len(name.encode()) > _NAME_BYTES:
        raise InvalidInput(f"the name {name[:40]!r}... in the context folder is too long", hint=f"at most {_NAME_BYTES} bytes")


def _check_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"the name {name!r} in the context folder is not UTF-8") from error

"""factory.toml: what is right, and what is said of what is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deskgrid.errors import InvalidInput
from deskgrid.pilots.commands import CommandSystem
from deskgrid.pilots.file import make_system, read_factory
from deskgrid.pilots.grid_jobs import GridSystem
from deskgrid.pilots.htcondor import HTCondorSystem
from deskgrid.units import GIB, MIB

WHOLE = """
poll = "1m"
[[system]]
kind = "grid"
name = "vm"
disk = "root"
packages = ["root"]
cpus = 2
memory = "3GiB"
[[system]]
kind = "slurm"
name = "cluster"
options = ["--partition=short"]
setup = "module load deskgrid"
worker = { unsandboxed = true, tags = ["cluster"] }
[[system]]
kind = "htcondor"
name = "pool"
options = ["accounting_group = physics"]
[[system]]
kind = "ssh"
name = "desk"
host = "ann@desk.example.org"
[[system]]
kind = "command"
name = "other"
submit = ["batch", "submit", "{name}"]
alive = ["batch", "alive", "{reference}"]
cancel = ["batch", "cancel", "{reference}"]
"""


def read(folder: Path, text: str) -> Path:
    file = folder / "factory.toml"
    file.write_text(text)
    return file


def test_each_kind_is_made_of_its_part(tmp_path: Path) -> None:
    found = read_factory(read(tmp_path, WHOLE))
    systems = [make_system(part, None) for part in found.system]  # type: ignore[arg-type]
    assert [type(system) for system in systems] == [GridSystem, CommandSystem, HTCondorSystem, CommandSystem, CommandSystem]
    assert [system.plan.name for system in systems] == ["vm", "cluster", "pool", "desk", "other"]
    assert systems[0].plan.memory_bytes == 3 * GIB - 384 * MIB, "the machine's system needs some"
    assert (systems[1].plan.memory_bytes, systems[1].plan.lifetime_s) == (2 * GIB - 384 * MIB, 4 * 3600.0), "the worker does, too"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "system"),
        ("[[system]]\nkind = 'grid'\nname = 'vm'\n", "disk is missing"),
        ("[[system]]\nkind = 'pbs'\nname = 'vm'\n", "pbs"),
        ("[[system]]\nkind = 'slurm'\nname = 'Vm 1'\n", "no name"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\ndisk = 'root'\n", "a slurm has no disk"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\ncolour = 'red'\n", "colour"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\nmost = -1\n", "most = -1"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\nlifetime = 'long'\n", "long"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\nmemory = 'much'\n", "toml: vm: memory: 'much'"),
        ("[[system]]\nkind = 'grid'\nname = 'vm'\ndisk = 'root'\nscratch = 'much'\n", "toml: vm: scratch: 'much'"),
        ("[[system]]\nkind = 'grid'\nname = 'vm'\ndisk = 'root'\nmemory = '10MiB'\n", "toml: vm: .*too little for a pilot"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\noptions = ['--comment={colour}']\n", "toml: vm: submit: .*colour"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\noptions = ['--array=1-3']\n", "toml: vm: options: .*array"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\noptions = ['-Mother']\n", "toml: vm: options: .*-M"),
        ("[[system]]\nkind = 'htcondor'\nname = 'vm'\noptions = ['physics']\n", "toml: vm: .*no line"),
        ("[[system]]\nkind = 'htcondor'\nname = 'vm'\noptions = ['Executable = x']\n", "toml: vm: Executable is set"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\nworker = { colour = 'red' }\n", "toml: vm: 'colour' is no setting"),
        ("[[system]]\nkind = 'command'\nname = 'vm'\nsubmit = ['{x}']\nalive = ['x']\ncancel = ['x']\n", "toml: vm: submit: .*x"),
        ("[[system]]\nkind = 'ssh'\nname = 'vm'\nhost = '-oProxyCommand=x'\n", "no host"),
        ("[[system]]\nkind = 'command'\nname = 'vm'\nsubmit = ['x']\n", "alive is missing"),
        ("[[system]]\nkind = 'slurm'\nname = 'vm'\nmemory = '10MiB'\n", "toml: vm: .*too little for a pilot"),
        ("poll = '6m'\n[[system]]\nkind = 'slurm'\nname = 'vm'\nidle = '10m'\n", "toml: vm: .*between two looks"),
        ("[[system]]\nkind = 'slurm'\nname = 'a'\n" * 2, "different names"),
        ("[[system]\n", "factory.toml"),
    ],
)
def test_mistake_is_told_with_its_place(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        read_factory(read(tmp_path, text))
    assert "factory.toml" in str(caught.value) or "duration" in str(caught.value)


def test_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.toml"):
        read_factory(tmp_path / "none.toml")


def test_file_of_the_how_to_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to.md").read_text()
    [block] = [block for block in re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "[[system]]" in block]
    assert [part.name for part in read_factory(read(tmp_path, block)).system] == ["vm", "cluster", "pool", "desk", "batch"]

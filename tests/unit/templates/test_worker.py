"""The worker template: the debian template with deskgrid in it, whose packages are pinned as those of a checkout are."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deskgrid
from deskgrid.errors import OperatorError
from deskgrid.templates import program
from deskgrid.templates.debian import debian_recipe
from deskgrid.templates.program import PROGRAM_FOLDER, program_files
from deskgrid.templates.root import root_recipe
from deskgrid.templates.worker import worker_recipe

ROOT = Path(__file__).parents[3]
LOCK = Path(program.__file__).parent / "worker.lock"


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)(?:\[\S+\])?==([^\s;]+)", lock.read_text(), re.MULTILINE))


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose pip does what the file says that is returned; by default it installs two modules and a script."""
    script = tmp_path / "pip.sh"
    script.write_text(
        'mkdir -p "$1"/bin "$1"/msgspec/__pycache__; touch "$1"/bin/x "$1"/msgspec/{a,b}.py "$1"/msgspec/__pycache__/a.pyc'
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nwhile [ "$1" != --target ]; do shift; done; shift\n. {script}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return script


def test_worker_is_the_debian_template_with_a_python_and_a_sandbox() -> None:
    recipe, base = worker_recipe(["bc"]), debian_recipe(["bc"])
    assert (recipe.name, recipe.program) == ("worker", True)
    assert set(recipe.packages) - set(base.packages) == {"python3", "bubblewrap", "util-linux"}
    assert set(recipe.files) - set(base.files) == {"/usr/local/bin/deskgrid"}
    assert recipe.commands.startswith(base.commands)
    checked = subprocess.run(["sh", "-n"], input=recipe.commands, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_lock_pins_all_that_deskgrid_needs_to_what_a_checkout_has() -> None:
    here, checkout = pins(LOCK), pins(ROOT / "requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z0-9.-]+", line.lower())[0].replace(".", "-") for line in project["dependencies"]}  # type: ignore[index]
    assert names <= {name.replace(".", "-") for name in here}
    assert here.items() <= checkout.items()
    assert ";" not in LOCK.read_text(), "a marker would be judged by the Python that builds"
    assert "://" not in LOCK.read_text()


def test_root_is_the_worker_template_with_root_a_compiler_and_nothing_from_an_address() -> None:
    recipe, base = root_recipe(["bc"]), worker_recipe(["bc"])
    assert (recipe.name, recipe.program) == ("root", True)
    assert {"g++", "libsm6"} <= set(recipe.packages) - set(base.packages)
    assert set(recipe.files) - set(base.files) == {"/usr/local/bin/root"}
    checked = subprocess.run(["sh", "-n"], input=recipe.commands, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    [(folder, lock)] = recipe.python.items()
    text = (Path(program.__file__).parent / lock).read_text()
    assert folder.startswith("/usr/local/lib/") and "root" in pins(Path(program.__file__).parent / lock)
    assert "://" not in text and ";" not in text


def test_files_are_this_deskgrid_and_the_packages_without_scripts_and_bytecode(pip: Path, tmp_path: Path) -> None:
    files = program_files(tmp_path / "cache")
    inside = {path.removeprefix(f"{PROGRAM_FOLDER}/") for path in files}
    assert {path for path in inside if not path.startswith("deskgrid/")} == {"msgspec/a.py", "msgspec/b.py"}
    assert {"deskgrid/__main__.py", "deskgrid/machines/agent.sh", "deskgrid/templates/worker.lock"} <= inside
    assert not [path for path in inside if "__pycache__" in path]
    assert files[f"{PROGRAM_FOLDER}/deskgrid/__init__.py"] == Path(deskgrid.__file__)


def test_packages_are_fetched_once_and_those_of_another_lock_go(pip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "python3.11-worker-older" / "msgspec").mkdir(parents=True)
    (cache / "python3.11-worker-cut.new").mkdir()
    first = program_files(cache)
    pip.write_text("exit 1")
    assert program_files(cache) == first
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "hint"), [("No module named pip", "-m ensurepip"), ("Could not find a version of msgspec", "check the network")]
)
def test_packages_that_cannot_be_had_leave_nothing_and_say_what_to_do(words: str, hint: str, pip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    pip.write_text(f'mkdir "$1"; echo "{words}" >&2; exit 1')
    with pytest.raises(OperatorError, match=words) as refused:
        program_files(cache)
    assert hint in refused.value.hint
    assert not list(cache.iterdir())

"""deskgrid disk build: what is refused before minutes are spent, and what is told about a failed build."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.templates import debian_disk
from deskgrid.templates.debian_disk import DebianRecipe, Progress
from deskgrid.units import GIB
from tests.unit.cli.conftest import Deskgrid


class Builder:
    """Stands for the builder: keeps what it was asked for, and writes a small file or fails."""

    def __init__(self) -> None:
        self.recipes: list[DebianRecipe] = []
        self.caches: list[Path] = []
        self.error: Exception | None = None

    def __call__(self, disk: Path, cache: Path, recipe: DebianRecipe, progress: Progress) -> None:
        self.recipes.append(recipe)
        self.caches.append(cache)
        progress("packages", 0.5)
        if self.error is not None:
            raise self.error
        disk.write_text("the disk")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    made = Builder()
    monkeypatch.setattr(debian_disk, "build_disk", made)
    return made


def test_debian_disk_is_built_with_packages_and_size(deskgrid: Deskgrid, builder: Builder, tmp_path: Path):
    ran = deskgrid("disk", "build", "debian", "--packages", "bc, apache2", "--size", "8GiB", "-o", "my.qcow2", "--json")
    assert ran.document == {"template": "debian", "file": "my.qcow2", "size_bytes": 8}
    (recipe,) = builder.recipes
    assert (recipe.packages[-2:], recipe.size_bytes) == (("apache2", "bc"), 8 * GIB)
    assert builder.caches == [tmp_path / "cache" / "templates" / "debian"]


def test_debian_disk_has_a_name_and_a_size_by_default(deskgrid: Deskgrid, builder: Builder):
    ran = deskgrid("disk", "build", "debian")
    assert (ran.code, ran.out) == (0, "debian.qcow2\n")
    assert "build the debian disk: done" in ran.err
    assert builder.recipes[0].size_bytes == 4 * GIB


def test_disk_is_built_after_a_recipe_of_the_users(deskgrid: Deskgrid, builder: Builder):
    Path("physics.toml").write_text('packages = ["bc"]\nsize = "2GiB"\ncommands = ["true"]\n')
    ran = deskgrid("disk", "build", "physics.toml")
    assert (ran.code, ran.out) == (0, "physics.qcow2\n")
    assert "build the physics disk: done" in ran.err
    (recipe,) = builder.recipes
    assert (recipe.name, recipe.size_bytes, recipe.packages[-1]) == ("physics", 2 * GIB, "bc")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["debian", "-o", "debian.iso"], "debian.iso does not end in .qcow2"),
        (["tiny", "-o", "tiny.vdi"], "tiny.vdi does not end in .qcow2 or .iso"),
        (["debian", "-o", "gone/debian.qcow2"], "in a folder that exists"),
        (["debian", "--packages", "apache2;reboot"], "not the name of a package"),
        (["debian", "--size", "huge"], "'huge' is not a size"),
        (["debian", "--size", "1MiB"], "between 1GiB and 1TiB"),
        (["gone.toml"], "cannot be read"),
        (["gone.toml", "--size", "8GiB"], "a recipe says that itself"),
        (["huge"], "tiny, debian, worker, root, or a recipe"),
        (["tiny", "--packages", "bc"], "--packages: tiny is always the same"),
        (["tiny", "--size", "8GiB"], "--size: tiny is always the same"),
    ],
)
def test_what_cannot_be_built_is_refused_before_it_starts(arguments: list[str], told: str, deskgrid: Deskgrid, builder: Builder):
    ran = deskgrid("disk", "build", *arguments)
    assert ran.code == 2
    assert told in ran.err
    assert not builder.recipes
    assert not list(Path.cwd().iterdir())


def test_package_that_debian_does_not_have_is_a_usage_error(deskgrid: Deskgrid, builder: Builder):
    builder.error = InvalidInput("Debian has no package no-such")
    ran = deskgrid("disk", "build", "debian", "--packages", "no-such", "--json")
    assert (ran.code, ran.error["error"]) == (2, "InvalidInput")
    assert not Path("debian.qcow2").exists()


def test_failed_build_is_told_with_what_to_do(deskgrid: Deskgrid, builder: Builder):
    builder.error = OperatorError("packages could not be fetched", hint="run: sudo apt-get update")
    ran = deskgrid("disk", "build", "debian")
    assert ran.code == 1
    assert "build the debian disk: stopped" in ran.err
    assert "run: sudo apt-get update" in ran.err

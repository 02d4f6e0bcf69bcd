"""Recipes that users write."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from deskgrid.errors import InvalidInput
from deskgrid.templates import debian_disk
from deskgrid.templates.debian import DEFAULT_SIZE_BYTES, debian_recipe
from deskgrid.templates.recipe import read_recipe
from deskgrid.units import GIB

WHOLE = """\
name = "physics"
size = "8GiB"
packages = ["gnuplot-nox", "bc"]
commands = ["useradd --create-home physicist", "true"]

[files]
"/usr/local/bin/analyse" = "analyse.py"
"/etc/motd" = { text = "hello\\n" }
"""


def written(folder: Path, text: str) -> Path:
    (folder / "My Recipe.toml").write_text(text)
    return folder / "My Recipe.toml"


def test_recipe_is_the_debian_template_with_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "analyse.py").write_bytes(b"\x7fELF\0\xff")
    (tmp_path / "analyse.py").chmod(0o755)
    recipe, base = read_recipe(written(tmp_path, WHOLE)), debian_recipe()
    assert (recipe.name, recipe.size_bytes, recipe.packages) == ("physics", 8 * GIB, (*base.packages, "bc", "gnuplot-nox"))
    assert recipe.commands == base.commands + "useradd --create-home physicist\ntrue\n"
    assert recipe.files == {**base.files, "/usr/local/bin/analyse": tmp_path / "analyse.py", "/etc/motd": "hello\n"}
    debian_disk._write_files(tmp_path / "tar", recipe.files)
    with tarfile.open(tmp_path / "tar") as tar:
        member = tar.getmember("usr/local/bin/analyse")
        content = tar.extractfile(member)
        assert content is not None
        assert (member.mode, member.uid, content.read()) == (0o755, 0, b"\x7fELF\0\xff")


def test_recipe_that_says_nothing_is_the_template_under_its_own_name(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, ""))
    assert (recipe.name, recipe.size_bytes, recipe.files) == ("my-recipe", DEFAULT_SIZE_BYTES, debian_recipe().files)


@pytest.mark.parametrize("name", ["{outside}", "../secret", "sub/../../secret", "link"])
def test_recipe_takes_no_files_from_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "recipe"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    content = name.format(outside=tmp_path / "secret")
    with pytest.raises(InvalidInput, match="outside of the recipe's folder"):
        read_recipe(written(folder, f'[files]\n"/etc/x" = "{content}"'))


def test_recipe_takes_files_from_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    written(tmp_path, '[files]\n"/etc/x" = "sub/file"')
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("My Recipe.toml")).files["/etc/x"] == (tmp_path / "sub" / "file").resolve()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = [", "Invalid"),
        ("colour = 1", "colour"),
        ("packages = [1]", "packages"),
        ('packages = ["a b"]', "not the name of a package"),
        ('commands = [""]', "length >= 1"),
        ('size = "huge"', "huge"),
        ('name = "My PC"', "machine's name"),
        ('[files]\n"etc/motd" = { text = "x" }', "no place"),
        ('[files]\n"/etc/../motd" = { text = "x" }', "no place"),
        ('[files]\n"/" = { text = "x" }', "no place"),
        ('[files]\n"/etc/" = { text = "x" }', "no place"),
        ('[files]\n"/etc/x" = "gone"', "no file 'gone'"),
        ('[files]\n"/etc/x" = { txt = "gone" }', "txt"),
        ('[files]\n"/etc/hosts" = { text = "x" }', "template's own"),
        ('[files]\n"//etc/./hosts" = { text = "x" }', "template's own"),
    ],
)
def test_mistake_is_refused_with_what_and_where(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        read_recipe(written(tmp_path, text))

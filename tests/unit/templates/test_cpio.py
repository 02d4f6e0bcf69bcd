"""The archive is what cpio tools read, and the same for the same input."""

from __future__ import annotations

import io
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.templates.cpio import CpioWriter


def members(archive: bytes) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    """Read an archive by the format's description: name, mode, data, device."""
    stream = io.BytesIO(archive)

    def padded(size: int) -> bytes:
        data = stream.read(size)
        stream.read(-stream.tell() % 4)
        return data

    while True:
        header = stream.read(110)
        assert header[:6] == b"070701"
        fields = [int(header[start : start + 8], 16) for start in range(6, 110, 8)]
        name = padded(fields[11])[:-1].decode()
        data = padded(fields[6])
        if name == "TRAILER!!!":
            assert stream.read() == b""
            return
        assert fields[2:4] == [0, 0], "all belongs to root"
        yield name, fields[1], data, (fields[9], fields[10])


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}/[a-z]{1,4}", fullmatch=True), st.binary(max_size=50)))
def test_files_come_back_behind_their_folders(files: dict[str, bytes]) -> None:
    writer = CpioWriter()
    for name, data in files.items():
        writer.file(name, data)
    found = list(members(writer.finish()))
    assert {name: data for name, mode, data, _ in found if mode == 0o100644} == files
    order = [name for name, *_ in found]
    assert len(order) == len(set(order))
    assert all(order.index(name.split("/")[0]) < order.index(name) for name in files)


def test_kinds_and_modes_are_kept() -> None:
    writer = CpioWriter()
    writer.file("bin/tool", b"x", executable=True)
    writer.symlink("bin/sh", "tool")
    writer.character_device("dev/console", 5, 1)
    found = {name: (mode, data, device) for name, mode, data, device in members(writer.finish())}
    assert found == {
        "bin": (0o040755, b"", (0, 0)),
        "bin/tool": (0o100755, b"x", (0, 0)),
        "bin/sh": (0o120777, b"tool", (0, 0)),
        "dev": (0o040755, b"", (0, 0)),
        "dev/console": (0o020600, b"", (5, 1)),
    }


def test_first_member_of_a_name_counts() -> None:
    writer = CpioWriter()
    writer.file("a", b"first")
    writer.file("a", b"second")
    assert [data for _, _, data, _ in members(writer.finish())] == [b"first"]

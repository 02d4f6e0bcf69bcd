"""Tables of parameters: what is taken, where a refusal points, and that a large one is never held whole."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.client.tables import read_columns, write_rows, write_table
from deskgrid.errors import InvalidInput


def written(tmp_path: Path, content: bytes) -> tuple[int, tuple[str, ...], list[list[str]]]:
    (tmp_path / "t.csv").write_bytes(content)
    count, names = write_table(tmp_path / "t.csv", tmp_path / "lines")
    assert read_columns(tmp_path / "t.csv") == names
    return count, names, [json.loads(line) for line in (tmp_path / "lines").read_bytes().splitlines()]


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,x y\n2,\n",
        b"a,b\r\n1,x y\r\n2,\r\n",
        b"\xef\xbb\xbfa, b\n1,x y\n2,",
        b'"a","b"\n\n"1","x y"\n"2",""\n\n',
    ],
)
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path: Path, content: bytes):
    assert written(tmp_path, content) == (2, ("a", "b"), [["1", "x y"], ["2", ""]])


def test_what_is_in_quotes_may_have_commas_quotes_and_ends_of_lines(tmp_path: Path):
    assert written(tmp_path, b'a\n"x,""y""\nz"\n')[2] == [['x,"y"\nz']]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv:1: the first line names the columns"),
        (b"a,b\n", "t.csv: a table has at least one line below the names"),
        (b"a,a\n1,2\n", "t.csv:1: the columns of a table have different names"),
        (b"a,1b\n1,2\n", "t.csv:1: '1b' is not a parameter's name (a letter, then"),
        (b"index\n1\n", "t.csv:1: 'index' is not a parameter's name"),
        (b"a,b\n1,2\n1,2,3\n", "t.csv:3: 3 values, but 2 columns"),
        (b"a,b\n1,2\n\n\n1\n", "t.csv:5: 1 values, but 2 columns"),
        (b'a\n1\n"x" y\n', "t.csv:3: not CSV: "),
        (b"a\n1\n\xff\n", "t.csv:3: this is not a text in UTF-8"),
        (b"a\nx\0y\n", "t.csv:2: a value has a NUL"),
        (b"a\n" + b"x" * 70_000 + b"\n", "t.csv:2: not CSV: field larger than field limit"),
        (b"a,b\n" + b"x" * 40_000 + b"," + b"y" * 40_000 + b"\n", "t.csv:2: longer than 65536 bytes"),
        (b"a\n" + b"x" * 300_000, "t.csv:2: longer than 65536 bytes (is a quote open?)"),
        (b"x" * 300_000, "t.csv:1: longer than 65536 bytes"),
    ],
)
def test_a_mistake_in_a_table_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(InvalidInput) as refused:
        written(tmp_path, content)
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_a_table_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(InvalidInput, match="cannot read the table"):
        read_columns(tmp_path / "gone.csv")


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8), min_size=2, max_size=2),
        min_size=1,
        max_size=8,
    )
)
def test_what_csv_wrote_comes_out_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]):
    folder = tmp_path_factory.mktemp("table")
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b"], *rows])
    write_table(folder / "t.csv", folder / "lines")
    assert [json.loads(line) for line in (folder / "lines").read_bytes().split(b"\n")[:-1]] == rows


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    folder = tmp_path_factory.mktemp("table")
    (folder / "t.csv").write_bytes(content)
    try:
        count, names = write_table(folder / "t.csv", folder / "lines")
    except InvalidInput as error:
        assert str(error).startswith(str(folder))
    else:
        lines = (folder / "lines").read_bytes().split(b"\n")[:-1]
        assert len(lines) == count
        assert all(len(json.loads(line)) == len(names) for line in lines)


def test_a_large_table_is_never_in_memory(tmp_path: Path):
    with (tmp_path / "t.csv").open("w") as file:
        file.write("alpha,beta\n")
        file.writelines(f"{number},{number * number}\n" for number in range(100_000))
    told: list[int] = []
    tracemalloc.start()
    try:
        assert write_table(tmp_path / "t.csv", tmp_path / "lines", told.append)[0] == 100_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert told == sorted(told)
    assert 0 < told[-1] <= (tmp_path / "t.csv").stat().st_size


def test_rows_of_a_program_are_a_table(tmp_path: Path):
    rows = ({"alpha": number, "name": f"n{number}"} for number in range(3))
    assert write_rows(rows, tmp_path / "lines") == (3, ("alpha", "name"))
    assert json.loads((tmp_path / "lines").read_bytes().splitlines()[2]) == ["2", "n2"]


@pytest.mark.parametrize(
    "rows", [[], [{}], [{"a": 1}, {"b": 1}], [{"1": 1}], [{"a": "\udc80"}], [{"a": "\0"}], [{"a": "x" * 70_000}]]
)
def test_rows_that_are_no_table_are_refused(tmp_path: Path, rows: list[dict[str, object]]):
    with pytest.raises(InvalidInput, match=r"^table"):
        write_rows(rows, tmp_path / "lines")

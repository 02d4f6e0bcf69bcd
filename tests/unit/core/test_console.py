"""The line before a console's VNC."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.console import MOST_LINE_BYTES, first_line, password_in
from deskgrid.errors import ProtocolError


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=8))
def test_password_comes_out_as_it_went_in(password: str):
    assert password_in(first_line(password)) == password
    assert len(first_line(password)) <= MOST_LINE_BYTES


@pytest.mark.parametrize(
    "line",
    [b"", b"RFB 003.008\n", b"deskgrid-console 2 password\n", b"deskgrid-console 1 password", b"deskgrid-console 1 a\x1b[31mbcd\n"],
)
def test_anything_else_is_no_console(line: bytes):
    with pytest.raises(ProtocolError):
        password_in(line)

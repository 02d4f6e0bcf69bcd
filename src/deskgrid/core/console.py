"""The screen of a job's virtual machine: a service that every such job has without offering it.

Rules:

1. Only programs of the job's owner reach it (reach.py), whatever is shared.
2. Its worker offers it while somebody wants it: each wish for it counts for WANTED_S, and is noted again when RENEW_S or less are left.
3. Each stream has a password of its own, made by the worker, good for one login within LOGIN_S or until the next stream begins. It goes through
   the stream's TLS only and is kept nowhere. It is for the last steps, on the PCs at both ends, where other programs may connect to a port.

A stream begins with a line of the worker's:

    deskgrid-console 1 PASSWORD

From there on it is VNC (RFB 3.8, RFC 6143), with that password.
"""

from __future__ import annotations

import re

from deskgrid.errors import ProtocolError

__all__ = ["CONSOLE", "LOGIN_S", "MOST_LINE_BYTES", "RENEW_S", "WANTED_S", "first_line", "password_in"]

CONSOLE = "console"
WANTED_S, RENEW_S = 120.0, 60.0
LOGIN_S = 120.0
MOST_LINE_BYTES = 64
_LINE = re.compile(rb"deskgrid-console 1 ([!-~]{8})\n")


def first_line(password: str) -> bytes:
    """Return what a worker says before VNC begins. `password` has 8 printable characters of ASCII: VNC uses no more."""
    return f"deskgrid-console 1 {password}\n".encode("ascii")


def password_in(line: bytes) -> str:
    """Return the password in a stream's first line. Raise ProtocolError if it is not such a line."""
    found = _LINE.fullmatch(line)
    if found is None:
        raise ProtocolError("this is not a machine's console", hint="another version of deskgrid may run on the worker")
    return found[1].decode("ascii")

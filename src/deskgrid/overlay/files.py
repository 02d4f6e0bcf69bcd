"""How many files a process of the overlay may have open: each connection is one, and strangers can make some."""

from __future__ import annotations

import contextlib

__all__ = ["raise_file_limit"]


def raise_file_limit() -> None:
    """Let this process have as many open files as it may. What it starts inherits that."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""What macOS tells of the person at the PC. Untested. Whether a program fills the screen is not known."""

from __future__ import annotations

import asyncio
import re

from deskgrid.worker.presence import Presented

__all__ = ["MacDesktop"]

_LIMIT_S = 1.0


class MacDesktop:
    """See Desktop, by ioreg(8): HIDIdleTime, in nanoseconds."""

    async def look(self, *, idle: bool = True) -> Presented | None:
        """See Desktop."""
        try:
            async with asyncio.timeout(_LIMIT_S):
                child = await asyncio.create_subprocess_exec(
                    *("/usr/sbin/ioreg", "-c", "IOHIDSystem", "-d", "4", "-r", "-k", "HIDIdleTime"),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                output, _ = await child.communicate()
        except (OSError, TimeoutError):
            return None
        found = re.search(rb'"HIDIdleTime" = (\d+)', output)
        return Presented(int(found[1]) / 1e9) if found else None

    async def close(self) -> None:
        """See Desktop."""

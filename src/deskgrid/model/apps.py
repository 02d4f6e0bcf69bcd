"""Apps: named, versioned things to run."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from deskgrid.model.data import Blob, Visibility
from deskgrid.model.ids import AppId, UserId

__all__ = ["ANY_PLATFORM", "App"]

ANY_PLATFORM = "any"
"""In App.files: for every platform that has no files of its own."""


class App(Struct, frozen=True, kw_only=True):
    """A named, versioned thing to run: what its jobs have where they say nothing, and its files for each platform."""

    id: AppId
    name: str
    version: int
    """Counted from 1 within the name; `name` alone means the newest."""
    owner_id: UserId
    owner: str
    visibility: Visibility
    group: str = ""
    """With visibility `group`: whose members may use it."""
    created_at: float
    defaults: dict[str, Any] = {}
    """Keys of a job file with their section, as in {"machine.memory": "1GiB"}, and values as written there."""
    files: dict[str, Blob] = {}
    """Archives by platform (OS-ARCH, or any): they appear as /app."""

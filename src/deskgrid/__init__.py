"""deskgrid: a desktop grid whose jobs run in virtual machines on volunteers' PCs.

from deskgrid import Grid          the SDK (client/blocking.py)
from deskgrid import AsyncGrid     the same with coroutines (client/grid.py)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the SDK when it is asked for: the command, confined children and what watches a job are to start fast, so nothing is imported here."""
    import importlib

    places = {"Grid": "deskgrid.client.blocking", "AsyncGrid": "deskgrid.client.grid"}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(places[name]).Grid

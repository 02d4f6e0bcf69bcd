# What __init__.py loads when it is asked for; a file of its own, so that importing the version does not count as importing the SDK.

from deskgrid.client.blocking import Grid as Grid
from deskgrid.client.grid import Grid as AsyncGrid

__all__ = ["AsyncGrid", "Grid", "__version__"]

__version__: str

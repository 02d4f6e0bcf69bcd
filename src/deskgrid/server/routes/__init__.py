"""Handlers, one file per noun. Importing this package fills handler.HANDLERS."""

from deskgrid.server.routes import accounts, data, grid, hubs, jobs, peers, workers

__all__ = ["accounts", "data", "grid", "hubs", "jobs", "peers", "workers"]

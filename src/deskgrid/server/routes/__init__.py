"""Handlers, one file per noun. Importing this package fills handler.HANDLERS."""

from deskgrid.server.routes import (
    accounts,
    apps,
    data,
    grid,
    hubs,
    jobs,
    manifests,
    operation,
    peers,
    placement,
    removal,
    sets,
    swarm,
    tes,
    workers,
)

__all__ = [
    "accounts",
    "apps",
    "data",
    "grid",
    "hubs",
    "jobs",
    "manifests",
    "operation",
    "peers",
    "placement",
    "removal",
    "sets",
    "swarm",
    "tes",
    "workers",
]

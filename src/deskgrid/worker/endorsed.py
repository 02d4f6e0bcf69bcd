"""Whether a disk of the grid may be booted on this PC: one of those whom its owner named must vouch for it, and the grid have signed that."""

from __future__ import annotations

from cryptography import x509

from deskgrid.core.manifests import endorsers_of, is_accepted
from deskgrid.errors import DriverUnusable
from deskgrid.model.data import Disk
from deskgrid.model.workers import Assignment
from deskgrid.worker.kit import Kit

__all__ = ["check_endorsed"]


def check_endorsed(kit: Kit, assignment: Assignment, disk: Disk) -> None:
    """Raise DriverUnusable if the owner does not take this disk. The server has matched that; but the PC is the owner's, not the server's."""
    wanted = kit.settings.endorsers
    if not wanted:
        return
    authority = x509.load_pem_x509_certificate(kit.authority_pem.encode())
    if not is_accepted(wanted, endorsers_of(assignment.statements, disk.sha256, authority, now=kit.clock.now())):
        raise DriverUnusable(f"the owner of this PC takes only disks that {' or '.join(wanted)} vouch for")

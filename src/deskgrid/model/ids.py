"""Names of things. Numbers are given out by the store and never used twice."""

from __future__ import annotations

import re
from typing import NewType

__all__ = ["AppId", "ArrayId", "AttemptId", "DataId", "JobId", "SetId", "Sha256", "UserId", "WorkerId", "attempt_name", "is_sha256"]

JobId = NewType("JobId", int)
ArrayId = NewType("ArrayId", int)
AppId = NewType("AppId", int)
SetId = NewType("SetId", int)
AttemptId = NewType("AttemptId", int)
WorkerId = NewType("WorkerId", int)
UserId = NewType("UserId", int)
DataId = NewType("DataId", int)
Sha256 = NewType("Sha256", str)
"""64 lower-case hexadecimal digits."""


_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Tell whether a text is a `Sha256`."""
    return _SHA256.fullmatch(text) is not None


def attempt_name(job_id: JobId, number: int) -> str:
    """Return the name of a job's n-th attempt (counted from 1), as people see it."""
    return f"job-{job_id}/attempt-{number}"

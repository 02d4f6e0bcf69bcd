"""Names of things. Numbers are given out by the store and never used twice."""

from __future__ import annotations

from typing import NewType

__all__ = ["AppId", "ArrayId", "AttemptId", "DataId", "JobId", "SetId", "Sha256", "UserId", "WorkerId", "attempt_name"]

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


def attempt_name(job_id: JobId, number: int) -> str:
    """Return the name of a job's n-th attempt (counted from 1), as people see it."""
    return f"job-{job_id}/attempt-{number}"

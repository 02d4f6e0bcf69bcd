"""GA4GH TES 1.1 on the wire: its messages, as far as we have them, and its routes. What they mean here: core/tes.py.

The specification is `task_execution_service.openapi.yaml` 1.1.0 in ga4gh/task-execution-schemas. Names and case are its own. Fields that a client
leaves out or sends as null are None here, and are left out of answers.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from msgspec import Struct, field

from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model.wire import Method, Nothing, Route

__all__ = [
    "CANCEL_TASK",
    "CREATE_TASK",
    "GET_TASK",
    "LIST_TASKS",
    "SERVICE_INFO",
    "TesCreated",
    "TesExecutor",
    "TesExecutorLog",
    "TesFileType",
    "TesInput",
    "TesOrganization",
    "TesOutput",
    "TesOutputFileLog",
    "TesResources",
    "TesServiceInfo",
    "TesServiceType",
    "TesState",
    "TesTask",
    "TesTaskList",
    "TesTaskLog",
    "TesView",
]

TES_VERSION = "1.1.0"


class TesState(StrEnum):
    UNKNOWN = "UNKNOWN"
    QUEUED = "QUEUED"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    EXECUTOR_ERROR = "EXECUTOR_ERROR"
    SYSTEM_ERROR = "SYSTEM_ERROR"
    CANCELED = "CANCELED"
    PREEMPTED = "PREEMPTED"
    CANCELING = "CANCELING"


class TesView(StrEnum):
    """How much of a task is told: id and state; all but output and contents; all."""

    MINIMAL = "MINIMAL"
    BASIC = "BASIC"
    FULL = "FULL"


class TesFileType(StrEnum):
    FILE = "FILE"
    DIRECTORY = "DIRECTORY"


class TesInput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file that a task finds at `path`."""

    path: str
    type: TesFileType | None = None
    url: str | None = None
    content: str | None = None
    name: str | None = None
    description: str | None = None
    streamable: bool | None = None


class TesOutput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file, a folder or, with wildcards, some files that come back."""

    path: str
    url: str
    type: TesFileType | None = None
    path_prefix: str | None = None
    name: str | None = None
    description: str | None = None


class TesExecutor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command, and where it runs."""

    image: str
    command: tuple[str, ...]
    workdir: str | None = None
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    env: dict[str, str] | None = None
    ignore_error: bool | None = None


class TesResources(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a task asks for. A gigabyte has 10^9 bytes."""

    cpu_cores: int | None = None
    preemptible: bool | None = None
    ram_gb: float | None = None
    disk_gb: float | None = None
    zones: tuple[str, ...] | None = None
    backend_parameters: dict[str, str] | None = None
    backend_parameters_strict: bool | None = None


class TesExecutorLog(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a command went. Times are in RFC 3339 format, by the clock of the worker's PC."""

    start_time: str | None = None
    end_time: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    exit_code: int | None = None


class TesOutputFileLog(Struct, frozen=True, kw_only=True):
    url: str
    path: str
    size_bytes: str
    """A number, as text."""


class TesTaskLog(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an attempt went."""

    logs: tuple[TesExecutorLog, ...]
    outputs: tuple[TesOutputFileLog, ...]
    metadata: dict[str, str] | None = None
    start_time: str | None = None
    end_time: str | None = None
    system_logs: tuple[str, ...] | None = None


class TesTask(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client submits, and what it is told of it; `id`, `state`, `logs` and `creation_time` are the server's."""

    id: str | None = None
    state: TesState | None = None
    executors: tuple[TesExecutor, ...] | None = None
    name: str | None = None
    description: str | None = None
    inputs: tuple[TesInput, ...] | None = None
    outputs: tuple[TesOutput, ...] | None = None
    resources: TesResources | None = None
    volumes: tuple[str, ...] | None = None
    tags: dict[str, str] | None = None
    logs: tuple[TesTaskLog, ...] | None = None
    creation_time: str | None = None


class TesCreated(Struct, frozen=True):
    id: str


class TesTaskList(Struct, frozen=True, kw_only=True, omit_defaults=True):
    tasks: tuple[TesTask, ...]
    """Newest first."""
    next_page_token: str | None = None


class TesServiceType(Struct, frozen=True, kw_only=True):
    group: str = "org.ga4gh"
    artifact: str = "tes"
    version: str = TES_VERSION


class TesOrganization(Struct, frozen=True, kw_only=True):
    name: str
    url: str


class TesServiceInfo(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    version: str
    organization: TesOrganization
    type: TesServiceType = TesServiceType()
    storage: tuple[str, ...] = ()
    backend_parameters: tuple[str, ...] = field(name="tesResources_backend_parameters", default=())


class _TesRoute(Route[Any, Any]):
    """A call of TES: what is wrong with it is 400, as its clients expect."""

    def status_of(self, error: DeskgridError) -> int:
        return 400 if isinstance(error, InvalidInput) else super().status_of(error)


_ROOT = "/ga4gh/tes/v1"

SERVICE_INFO = _TesRoute(
    "tes_info", Method.GET, f"{_ROOT}/service-info", Nothing, TesServiceInfo, "GA4GH TES: what this service is"
)
CREATE_TASK = _TesRoute(
    "tes_create", Method.POST, f"{_ROOT}/tasks", TesTask, TesCreated, "GA4GH TES: submit a task, which is a job"
)
LIST_TASKS = _TesRoute(
    "tes_list",
    Method.GET,
    f"{_ROOT}/tasks",
    Nothing,
    TesTaskList,
    "GA4GH TES: the caller's tasks, newest first; `tag_key` and `tag_value` in pairs",
    query={
        "name_prefix": str,
        "state": str,
        "tag_key": list[str],
        "tag_value": list[str],
        "page_size": int,
        "page_token": str,
        "view": str,
    },
)
GET_TASK = _TesRoute("tes_get", Method.GET, f"{_ROOT}/tasks/{{id}}", Nothing, TesTask, "GA4GH TES: a task", query={"view": str})
CANCEL_TASK = _TesRoute("tes_cancel", Method.POST, f"{_ROOT}/tasks/{{id}}:cancel", Nothing, Nothing, "GA4GH TES: cancel a task")

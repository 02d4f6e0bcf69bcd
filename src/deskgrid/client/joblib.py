"""joblib on the grid: its batches as calls of an executor. The PCs need no joblib.

from deskgrid.client.joblib import register

register(grid, need=["numpy"])
with joblib.parallel_config("deskgrid"):
    joblib.Parallel()(joblib.delayed(analyse)(name) for name in names)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from joblib.parallel import ParallelBackendBase, register_parallel_backend

from deskgrid.client.calls import of_module

if TYPE_CHECKING:
    from deskgrid.client.blocking import Grid
    from deskgrid.client.executor import GridExecutor

__all__ = ["register"]

_MANY = 1000
"""Batches on their way, where nobody says how many."""


def register(grid: Grid, name: str = "deskgrid", **options: Any) -> None:
    """Make a backend known to joblib that runs on a grid; `options` as of Grid.executor."""
    register_parallel_backend(name, lambda **_: _Backend(grid, options))


class _Backend(ParallelBackendBase):  # type: ignore[misc]
    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, grid: Grid, options: dict[str, Any]) -> None:
        super().__init__()
        self._grid, self._options = grid, options
        self._executor: GridExecutor | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        return n_jobs if n_jobs is not None and n_jobs > 0 else _MANY

    def start_call(self) -> None:
        self._executor = self._grid.executor(**self._options)

    def stop_call(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        if ensure_ready:
            self.start_call()

    def submit(self, func: Any, callback: Callable[[Future[Any]], object] | None = None) -> Future[Any]:
        if self._executor is None:
            raise RuntimeError("joblib begins a call first")
        future = self._executor.submit(_of_batch(func.items), func.items)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()


_Items = Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


def _of_batch(items: _Items) -> Callable[[_Items], list[Any]]:
    def call(items: _Items) -> list[Any]:  # not a function of this module, which PCs do not have
        return [function(*arguments, **keywords) for function, arguments, keywords in items]

    return of_module(call, items[0][0])

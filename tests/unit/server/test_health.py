"""How a server process is watched: /health, /ready, /metrics, request ids."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import time
from pathlib import Path

import aiohttp
import pytest
import sqlalchemy as sa
import structlog
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import Forbidden
from deskgrid.model import wire
from deskgrid.server.health import serving_figures, why_not_ready
from deskgrid.server.metrics import Metrics
from deskgrid.testing.grids import TestGrid, played_sync, running_grid


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def ask(known: Credentials, path: str, *, token: str = "", **headers: str) -> tuple[int, str, dict[str, str]]:
    """Call a path as curl would."""
    context = ssl.create_default_context(cadata=known.authority_pem)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"https://{known.address}{path}", ssl=context, server_hostname=wire.SERVER_NAME, headers=headers) as answer,
    ):
        return answer.status, await answer.text(), {name.lower(): value for name, value in answer.headers.items()}


def figures(text: str) -> dict[str, float]:
    """Return the samples without labels, and those of jobs by state."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels.get("state", sample.name): sample.value for sample in samples if set(sample.labels) <= {"state"}}


async def test_healthy_process_is_ready(grid: TestGrid):
    known = await grid.admin()
    assert (await ask(known, "/health"))[:2] == (200, "ok\n")
    assert (await ask(known, "/ready"))[:2] == (200, "ok\n")


async def test_process_without_its_blobs_or_with_other_tables_is_alive_but_not_ready(grid: TestGrid):
    known = await grid.admin()
    newest = await grid.services.store.read(lambda tx: tx.value(sa.text("SELECT version_num FROM alembic_version")))
    await grid.services.store.write(lambda tx: tx.run(sa.text("UPDATE alembic_version SET version_num = '0001'")))
    status, reason, _ = await ask(known, "/ready")
    assert status == 503
    assert "0001" in reason
    await grid.services.store.write(lambda tx: tx.run(sa.text(f"UPDATE alembic_version SET version_num = '{newest}'")))
    assert not await why_not_ready(grid.services)
    shutil.rmtree(grid.home / "blobs")
    assert await why_not_ready(grid.services)
    assert (await ask(known, "/health"))[0] == 200


async def test_process_whose_store_is_gone_is_not_ready(tmp_path: Path):
    async with running_grid(tmp_path / "server") as grid:
        await grid.services.store.close()
        reason = await why_not_ready(grid.services)
        assert "the server's log says why" in reason and "closed" not in reason


async def test_metrics_are_for_admins_and_tokens_with_that_right(grid: TestGrid):
    known = await grid.admin()
    assert (await ask(known, "/metrics"))[0] == 401
    async with Grid(known) as boss:
        await boss.add_user("ann")
        token, _ = await boss.add_token(("metrics",), lifetime_s=60)
    assert (await ask(known, "/metrics", token=(await grid.user("ann")).token))[0] == 403
    status, text, headers = await ask(known, "/metrics", token=token)
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert figures(text)["completed"] == 0
    async with Transport(Credentials(address=known.address, authority_pem=known.authority_pem, token=token)) as small:
        with pytest.raises(Forbidden):
            await small.call(wire.LIST_USERS)


async def test_metrics_tell_of_calls_store_and_grid(grid: TestGrid):
    known = await grid.admin()
    async with Transport(await grid.worker()) as worker, Grid(known) as boss:
        for _ in range(3):
            await worker.call(wire.SYNC, played_sync())
        await boss.workers()
        _, text, _ = await ask(known, "/metrics", token=known.token)
    found = figures(text)
    assert found["deskgrid_workers_online"] == 1
    assert found["deskgrid_store_batch_writes_count"] == found["deskgrid_store_commit_seconds_count"] > 3
    assert 'deskgrid_call_seconds_count{route="sync",status="200"} 3.0' in text
    assert found.keys() >= {
        "waiting",
        "active",
        "deskgrid_chores_left",
        "deskgrid_stored_bytes",
        "deskgrid_free_bytes",
        "deskgrid_hub_peers",
        "deskgrid_hub_streams",
        "deskgrid_leases_expired_total",
        "deskgrid_store_waiting_writes",
    }


async def test_own_address_tells_figures_without_a_token_and_nothing_else(grid: TestGrid):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with serving_figures(grid.services, listener), aiohttp.ClientSession() as session:
            statuses = {}
            for path in ("/metrics", "/health", "/ready", "/v1/users", "/v1/grid"):
                async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                    statuses[path] = answer.status
    assert statuses == {"/metrics": 200, "/health": 200, "/ready": 200, "/v1/users": 404, "/v1/grid": 404}


async def test_request_id_is_in_answer_error_and_logs(grid: TestGrid):
    known = await grid.admin()
    status, text, headers = await ask(known, "/v1/jobs/7", token=known.token, **{"X-Request-Id": "mine-42"})
    assert status == 404
    assert headers["x-request-id"] == "mine-42"
    assert '"request":"mine-42"' in text
    assert len((await ask(known, "/v1/grid"))[2]["x-request-id"]) == 16


@pytest.mark.parametrize("hostile", ["a b", "x" * 65, "{}", "\u00e9", 'a"b'])
async def test_request_id_that_is_not_sane_is_replaced(grid: TestGrid, hostile: str):
    known = await grid.admin()
    given = (await ask(known, "/v1/grid", **{"X-Request-Id": hostile}))[2]["x-request-id"]
    assert given != hostile
    assert len(given) == 16


async def test_log_lines_of_calls_at_the_same_time_have_the_id_of_their_own_call(grid: TestGrid):
    known = await grid.admin()
    structlog.contextvars.clear_contextvars()
    shutil.rmtree(grid.home / "blobs")  # what an operator must look at is logged
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        wanted = [f"call-{number}" for number in range(8)]
        await asyncio.gather(*(ask(known, "/v1/status", token=known.token, **{"X-Request-Id": one}) for one in wanted))
    told = [line["request"] for line in lines if "request" in line and line["event"] != "call"]
    assert sorted(set(told)) == wanted


def test_measuring_a_call_costs_a_few_microseconds():
    metrics = Metrics()
    metrics.measure_call("sync", 200, 0.001)
    began = time.perf_counter()
    for _ in range(20_000):
        metrics.measure_call("sync", 200, 0.001)
    assert (time.perf_counter() - began) / 20_000 < 30e-6

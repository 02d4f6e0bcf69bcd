"""`network = "internet"`: a job gets out to public addresses through the proxies of its cage, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deskgrid.testing.natlab import Host, Nat, NatLab
from tests.system.cage import inside
from tests.system.harness import System, until
from tests.system.lab import LabGrid

PROXIES = {"http": "http://10.64.0.1:3128", "socks": "socks5h://10.64.0.1:1080"}
PORT = 8000


@contextmanager
def web_server(host: Host, folder: Path) -> Iterator[None]:
    """A web server at all addresses of a host; every page of it names the host."""
    (folder / host.name).mkdir(parents=True)
    (folder / host.name / "index.html").write_text(f"page of {host.name}\n")
    command = [sys.executable, "-m", "http.server", str(PORT), "-d", str(folder / host.name)]
    server = host.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: f":{PORT} " in host.run("ss", "-ltn"), what=f"{host.name} serves")
        yield
    finally:
        server.kill()
        server.wait()


def fetch(prefix: tuple[str, ...], url: str, *options: str) -> str:
    """Return what is there, or why it cannot be had."""
    command = [*prefix, "curl", "-sS", "-f", "--noproxy", "", "--max-time", "30", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr.strip()}"


@pytest.fixture
def lab() -> Iterator[NatLab]:
    """A volunteer's PC and another of his at a site, a web server on the internet, the user."""
    with NatLab({"home": Nat.MASQUERADE, "web": Nat.NONE, "user": Nat.NONE}, hosts=2) as lab:
        lab.sites["home"][0].run("ip", "addr", "add", "169.254.7.7/16", "dev", "eth0")
        yield lab


@pytest.fixture
def grid(lab: NatLab, tmp_path: Path) -> Iterator[LabGrid]:
    grid = LabGrid(tmp_path, lab, lab.sites["user"][0])
    try:
        grid.start_server()
        grid.publish()
        grid.add_worker_at(lab.sites["home"][0], DESKGRID_WORKER_INTERNET="true")
        yield grid
    finally:
        grid.stop()
        for process in grid.machines():
            process.kill()


def test_job_reaches_the_internet_and_nothing_that_is_near(lab: NatLab, grid: LabGrid):
    pc, neighbour = lab.sites["home"]
    router, [web] = lab.routers["home"], lab.sites["web"]
    places = {
        "a PC of the same site": neighbour.address,
        "the router": "192.168.1.1",
        "the router, by its address outside": router.address,
        "the worker's PC": pc.address,
        "the worker's PC by a loopback address": "127.0.0.1",
        "the worker's PC by name": "localhost",
        "the worker's PC by a link-local address": "169.254.7.7",
        "the worker's PC by an address for all": "0.0.0.0",
        "the worker's PC by IPv4 in IPv6": "[::ffff:127.0.0.1]",
    }
    with ExitStack() as servers:
        for host in (web, pc, neighbour, router, lab.server):
            servers.enter_context(web_server(host, grid.folder / "www"))
        job = grid.submit("hangs = true\n", network='"internet"')
        grid.wait_for(job, "active", ["running"])
        cage = inside(grid)
        until(lambda: [peer for peer in grid.json("peers") if peer["hub"]], what="the job's peer is at a hub")
        for scheme, proxy in PROXIES.items():
            assert fetch(cage, f"http://{web.address}:{PORT}/", "--proxy", proxy) == "page of web\n", grid.logs()
            assert fetch(cage, f"http://{web.address}:{PORT}/", "--proxy", proxy, "--proxytunnel") == "page of web\n", scheme
            # The server's firewall lets its two ports in, for the job as for everybody.
            assert '"wire"' in fetch(cage, "https://9.9.1.1:8470/v1/grid", "--proxy", proxy, "-k")
        for place, address in places.items():
            url = f"http://{address}:{PORT}/"
            assert fetch(pc.prefix, url).startswith("page of "), f"{place} answers the PC itself, or this test shows nothing"
            assert "403" in fetch(cage, url, "--proxy", PROXIES["http"]), place
            assert "403" in fetch(cage, url, "--proxy", PROXIES["http"], "--proxytunnel"), place
            assert fetch(cage, url, "--proxy", PROXIES["socks"]).endswith("(2)"), f"{place}: not allowed, says RFC 1928"
        with ThreadPoolExecutor() as threads:  # these take until the proxy gives up
            options = [("--proxy", proxy) for proxy in PROXIES.values()]
            closed = threads.map(lambda words: fetch(cage, f"http://{lab.server.address}:{PORT}/", *words), options)
        assert all(said.startswith("failed") for said in closed)
        assert "Couldn't connect" in fetch(cage, f"http://{web.address}:{PORT}/"), "there is no way around the proxies"


def test_job_that_wants_the_internet_is_given_only_to_a_worker_whose_owner_allows_it(system: System):
    system.publish()
    system.add_worker("careful")
    wanting = system.submit(name="wanting", network='"internet"')
    content = system.submit(name="content", network='"overlay"')  # came later, and overtakes it
    system.wait_for(content, "completed", ["succeeded"])
    assert system.states(wanting) == ("waiting", [])
    system.add_worker("generous", DESKGRID_WORKER_INTERNET="true")
    detail = system.wait_for(wanting, "completed", ["succeeded"])
    assert detail["attempts"][0]["worker"] == "generous"

"""Disks and data on real workers at several sites: behind routers, with BitTorrent blocked, killed, moved to another address.

The server's link is slow, so that there is time for all that.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from deskgrid.testing.natlab import Host, Nat, NatLab
from deskgrid.units import MIB
from tests.system.harness import until
from tests.system.lab import LabGrid

SIZE = 16 * MIB
SHARES = {"DESKGRID_WORKER_SHARE": "true"}


class Distribution(LabGrid):
    """A grid whose workers share."""

    def slow_down(self, mib_per_s: float) -> None:
        """Let the server's link carry so much."""
        rate = f"{round(mib_per_s * MIB * 8)}bit"
        self.lab.server.run("tc", "qdisc", "add", "dev", "ext", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms")

    def publish_large(self, name: str = "large", size_bytes: int = SIZE) -> None:
        """Publish an ISO that does not compress."""
        content = bytearray(random.Random(name).randbytes(size_bytes))
        content[:32774] = bytes(32769) + b"CD001"
        self.publish(name, bytes(content))

    def holders(self, name: str = "large") -> dict[str, str]:
        """Return the state of the data on each worker."""
        return {one["worker"]: one["state"] for one in self.json("data", "where", name)}

    def fetched(self, worker: str) -> list[int]:
        """Return what a worker's log says of blobs that it fetched together with others: how many bytes came from the server."""
        return [
            int(found) for found in re.findall(r"event=fetched_from_others .*of_server_bytes=(\d+)", self.workers[worker].said())
        ]

    def sent_bytes(self) -> int:
        """Return what has left the server."""
        [link] = json.loads(self.lab.server.run("ip", "-json", "-s", "link", "show", "dev", "ext"))
        return int(link["stats64"]["tx"]["bytes"])

    def there_bytes(self, *workers: str) -> int:
        """Return what is on the disks of these workers, or of all."""
        there = 0
        for file in (file for name in workers or self.workers for file in (self.folder / name / "cache" / "shared").glob("*")):
            with contextlib.suppress(FileNotFoundError):  # it has just been renamed
                there += file.stat().st_blocks * 512
        return there

    def server_bytes(self) -> int:
        """Return what the server sent of the blob to all workers, as they say."""
        return sum(sum(self.fetched(worker)) for worker in self.workers)


@contextmanager
def distribution(folder: Path, sites: dict[str, Nat], *, hosts: int = 1) -> Iterator[Distribution]:
    with NatLab({**sites, "user": Nat.NONE}, hosts=hosts) as lab:
        grid = Distribution(folder, lab, lab.sites["user"][0], DESKGRID_SERVER_INTERVAL_S="2")
        try:
            grid.start_server()
            yield grid
        finally:
            grid.stop()
            for worker in grid.workers:
                for process in grid.machines(worker):
                    process.kill()


@pytest.mark.full
def test_workers_behind_routers_fetch_a_disk_together_and_a_job_runs_on_it(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.MASQUERADE, "b": Nat.FULLY_RANDOM, "c": Nat.NONE}, hosts=2) as grid:
        names = [f"{site}{at}" for site in "abc" for at in range(len(grid.lab.sites[site]))]
        for name, host in zip(names, (host for site in "abc" for host in grid.lab.sites[site]), strict=True):
            grid.add_worker_at(host, name, **SHARES)
        grid.publish_large()
        grid.slow_down(4)
        grid.cli("data", "place", "large", "--replicas", "all", "--protocol", "swarm")
        until(lambda: list(grid.holders().values()) == ["held"] * len(names), what="all hold it")
        assert all(len(grid.fetched(name)) == 1 for name in names), grid.logs()
        assert grid.server_bytes() < 2 * SIZE, grid.logs()
        job = grid.submit("", disk='"large"')
        grid.wait_for(job, "completed")
        for name in names:
            grid.nothing_left(name)


def test_pcs_behind_routers_of_their_own_give_to_each_other_through_the_overlay(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.MASQUERADE, "b": Nat.MASQUERADE}) as grid:
        for site in "ab":
            grid.add_worker_at(grid.lab.sites[site][0], site, **SHARES)
        grid.publish_large()
        grid.slow_down(2)
        grid.cli("data", "place", "large", "--replicas", "all")
        until(lambda: list(grid.holders().values()) == ["held"] * 2, what="both hold it")
        assert grid.server_bytes() < 1.5 * SIZE, grid.logs()
        assert any("service=swarm" in grid.workers[site].said() and "path=punched" in grid.workers[site].said() for site in "ab")


@pytest.mark.full
def test_all_get_it_over_slow_links_though_workers_are_killed_again_and_again(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.MASQUERADE, "b": Nat.MASQUERADE}, hosts=2) as grid:
        hosts = {f"{site}{at}": host for site in "ab" for at, host in enumerate(grid.lab.sites[site])}
        for name, host in hosts.items():
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "32mbit", "burst", "64kb", "latency", "100ms")
            grid.add_worker_at(host, name, **SHARES)
        grid.publish_large()
        grid.slow_down(2)
        before = grid.sent_bytes()
        grid.cli("data", "place", "large", "--replicas", "all")
        rng = random.Random(7)
        for part in range(1, 7):
            until(
                lambda part=part: grid.there_bytes() > part / 8 * len(hosts) * SIZE, what=f"{part} eighths are there", limit_s=120
            )
            name = rng.choice(sorted(hosts))
            grid.workers[name].kill()
            grid.workers[name].start()
        until(lambda: list(grid.holders().values()) == ["held"] * len(hosts), what="all hold it", limit_s=120)
        assert grid.sent_bytes() - before < 2.5 * SIZE, grid.logs()


@pytest.mark.full
def test_peer_that_sends_garbage_costs_some_pieces_and_is_dropped(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.NONE, "b": Nat.MASQUERADE}) as grid:
        grid.publish_large()
        grid.submit("", disk='"large"')
        [liars], [honest] = grid.lab.sites["a"], grid.lab.sites["b"]
        home = grid.join_at(liars, "liar")
        liar = liars.popen(
            [sys.executable, "-m", "tests.liar", str(home)], stdin=PIPE, stdout=PIPE, env=grid.environment, text=True
        )
        with liar:
            assert liar.stdout is not None
            assert liar.stdout.readline() == "lies\n"
            grid.slow_down(4)
            grid.add_worker_at(honest, "honest", **SHARES)
            grid.cli("data", "place", "large", "--replicas", "all")
            until(lambda: grid.holders().get("honest") == "held", what="the honest one holds it")
            said, _ = liar.communicate()
        assert 0 < int(said) < SIZE // 2, grid.logs()
        grid.wait_for(1, "completed")
        grid.nothing_left("honest")


@pytest.mark.full
def test_seeds_that_vanish_at_99_percent_are_not_waited_for(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.NONE, "b": Nat.NONE, "c": Nat.MASQUERADE}) as grid:
        for site in "abc":
            grid.add_worker_at(grid.lab.sites[site][0], site, **SHARES)
        grid.publish_large()
        grid.slow_down(1)
        before = grid.sent_bytes()
        grid.cli("data", "place", "large", "--replicas", "all")
        until(lambda: grid.sent_bytes() - before > SIZE, what="the server has sent nearly all")
        grid.lab.cut(grid.lab.server)
        until(lambda: grid.there_bytes("c") > 0.9 * SIZE, what="the last one has what the others had")
        for site in "ab":
            grid.workers[site].kill()
        assert not grid.fetched("c")
        grid.lab.heal(grid.lab.server)
        until(lambda: grid.holders().get("c") == "held", what="it has the rest, too")
        assert grid.sent_bytes() - before < 1.5 * SIZE, grid.logs()


@pytest.mark.full
def test_where_bittorrent_is_blocked_the_disk_comes_from_the_server(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.NONE, "b": Nat.NONE}) as grid:
        for site in "ab":
            block(grid.lab.sites[site][0])
            grid.add_worker_at(grid.lab.sites[site][0], site, **SHARES)
        grid.publish_large(size_bytes=8 * MIB)
        grid.cli("data", "place", "large", "--replicas", "2")
        until(lambda: list(grid.holders().values()) == ["held"] * 2, what="both hold it")
        assert grid.server_bytes() >= 1.9 * 8 * MIB, grid.logs()


def block(host: Host) -> None:
    """Let nothing through but the server's ports and names for them."""
    rules = (
        "table ip blocked {\n chain output {\n type filter hook output priority 0; policy drop\n"
        ' oifname "lo" accept\n tcp dport { 8470, 8471 } accept\n tcp sport 8470 accept\n }\n'
        ' chain input {\n type filter hook input priority 0; policy drop\n iifname "lo" accept\n tcp sport { 8470, 8471 } accept\n }\n }\n'
    )
    host.run("nft", "-f", "-", input=rules)


@pytest.mark.full
def test_killed_and_moved_workers_go_on_and_one_that_stays_away_is_replaced(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.MASQUERADE}, hosts=2) as grid:
        first, second = grid.lab.sites["a"]
        grid.add_worker_at(first, "first", **SHARES)
        grid.publish_large()
        grid.slow_down(2)
        grid.cli("data", "place", "large", "--replicas", "1", "--lifetime", "1h")
        part = next(until(lambda: list((tmp_path / "first" / "cache" / "shared").glob("*.part")), what="it begins").__iter__())
        until(lambda: part.exists() and part.stat().st_blocks * 512 > 4 * MIB, what="some of it is there")
        grid.workers["first"].kill()
        move(first)
        grid.workers["first"].start()
        until(lambda: grid.holders() == {"first": "held"}, what="it holds it")
        assert grid.server_bytes() < SIZE - 2 * MIB, grid.logs()  # the log is the second process's: it went on
        grid.cli("data", "place", "large", "--replicas", "2", "--lifetime", "1h")
        grid.add_worker_at(second, "second", **SHARES)
        until(lambda: grid.holders() == {"first": "held", "second": "held"}, what="both hold it")
        [fetched] = grid.fetched("second")
        assert fetched < SIZE // 2, grid.logs()
        grid.cli("data", "place", "large", "--replicas", "2", "--lifetime", "1s")
        until(lambda: grid.holders() == {}, what="its time is over, and it is removed")


def move(host: Host) -> None:
    """Give a PC another address, as a lease that ended does."""
    host.run("ip", "addr", "flush", "dev", "eth0")
    host.run("ip", "addr", "add", "192.168.1.77/24", "dev", "eth0")
    host.run("ip", "route", "replace", "default", "via", "192.168.1.1")


def test_results_of_a_command_wait_until_data_is_held(tmp_path: Path):
    with distribution(tmp_path, {"a": Nat.NONE}) as grid:
        grid.add_worker_at(grid.lab.sites["a"][0], "a", DESKGRID_WORKER_KEEP_BYTES="1GiB", DESKGRID_WORKER_TAGS="lab")
        (tmp_path / "events").write_bytes(b"events")
        grid.cli("data", "put", tmp_path / "events")
        grid.cli("data", "place", "events", "--replicas", "all", "--where", "tag:lab")
        held = grid.json("data", "where", "events", "--wait-held", "1", "--timeout", "1m")
        assert [one["state"] for one in held] == ["held"]
        [listed] = grid.json("data", "placements")
        assert listed["holders"] == 1
        grid.cli("data", "unplace", "events")
        until(lambda: grid.holders("events") == {"a": "cached"}, what="it is not held any more")

"""A laboratory of network namespaces: an internet, a firewalled server, sites behind NAT.

                       core, a router: the internet
        9.9.1.1 /        9.9.1.2 |           9.9.1.3 \\
            server           router a             router b          nftables: masquerade, new connections from outside dropped
         (firewall)             |                    |
                       192.168.1.0/24         192.168.1.0/24       the same private range at both sites, as in real life

Public addresses are such that the world calls global, since peers dial others only with care; nothing leaves the laboratory, whose core has no
way out. Each namespace lives as long as one process of ours with a parent-death signal, so nothing stays after any end of the
test, kill -9 included. Root's own namespaces for root; for others all is inside a user namespace.

Delay: this laboratory does not need sch_netem, which not every kernel has. A link with a delay is a pair of TUN devices with a process between
them that holds every packet back; that costs throughput, which the yardstick of a benchmark pays, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import selectors
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

__all__ = ["Host", "Nat", "NatLab"]

_GATEWAY = "9.9.1.254"
_NEWNET = 0x40000000
_TUNSETIFF, _TUN, _NO_PACKET_INFORMATION = 0x400454CA, 0x0001, 0x1000
_TUN_MTU, _TUN_QUEUE = 65_000, 10_000
_LIMIT_S = 20.0


class Nat(StrEnum):
    """What stands between a site and the internet."""

    NONE = "none"
    """Its one host has a public address of its own."""
    MASQUERADE = "masquerade"
    """Linux's NAT: keeps the port if it is free."""
    PERSISTENT = "masquerade persistent"
    RANDOM = "masquerade random"
    FULLY_RANDOM = "masquerade fully-random"
    REJECTING = "masquerade, rejecting"
    """As masquerade, but connections from outside are refused instead of ignored."""


class Host:
    """A PC in the laboratory: a network namespace."""

    def __init__(self, name: str, address: str, holder: subprocess.Popen[bytes], inside: Sequence[str]) -> None:
        self.name = name
        self.address = address
        """Its own, private behind a NAT."""
        self.holder = holder
        self.prefix = (*inside, "nsenter", f"--net=/proc/{holder.pid}/ns/net")
        """What to write in front of a command to run it here."""

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program here."""
        return subprocess.Popen([*self.prefix, *command], **options)

    def run(self, *command: str, input: str | None = None, check: bool = True) -> str:
        """Run a program here and return what it prints."""
        done = subprocess.run(
            [*self.prefix, *command], input=input, capture_output=True, text=True, timeout=_LIMIT_S * 6, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} on {self.name}: {done.returncode} {done.stdout} {done.stderr}")
        return done.stdout


class NatLab:
    """A laboratory, there while its `with` block lasts. `sites` names them with their NAT; each has `hosts` PCs (with Nat.NONE one)."""

    def __init__(
        self,
        sites: Mapping[str, Nat],
        *,
        hosts: int = 1,
        open_ports: Sequence[int] = (8470, 8471),
        delay_s: Mapping[str, float] | None = None,
    ) -> None:
        self._wanted = dict(sites)
        self._count = hosts
        self._open_ports = open_ports
        self._delay_s = dict(delay_s or {})
        self._stack = contextlib.ExitStack()
        self._inside: list[str] = []
        self.sites: dict[str, list[Host]] = {}
        self.routers: dict[str, Host] = {}
        """Of sites with a NAT."""

    def __enter__(self) -> NatLab:
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    # ---- building

    def _build(self) -> None:
        if os.geteuid() != 0:
            outer = self._hold(["unshare", "--user", "--map-root-user", "--net", "--mount"])
            self._inside = [
                "nsenter",
                "--preserve-credentials",
                f"--user=/proc/{outer.pid}/ns/user",
                f"--mount=/proc/{outer.pid}/ns/mnt",
            ]
        self.core = self._namespace("core", _GATEWAY)
        self.core.run("ip", "addr", "add", f"{_GATEWAY}/32", "dev", "lo")
        self._forward(self.core)
        self.server = self._public("server", 1)
        self._firewall(self.server)
        for number, (name, nat) in enumerate(self._wanted.items(), start=2):
            self.sites[name] = [self._public(name, number)] if nat is Nat.NONE else self._site(name, number, nat)

    def _hold(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Run something that lives as long as we do; it says when it is there."""
        words = [*command, "setpriv", "--pdeathsig", "KILL", "sh", "-c", "echo; exec sleep 100000"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._stack.callback(_end, process)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"no namespaces here: {command}")
        return process

    def _namespace(self, name: str, address: str) -> Host:
        host = Host(name, address, self._hold([*self._inside, "unshare", "--net"]), self._inside)
        host.run("ip", "link", "set", "lo", "up")
        return host

    def _public(self, name: str, number: int) -> Host:
        """Add a host with a public address."""
        host = self._namespace(name, f"9.9.1.{number}")
        delay_s = self._delay_s.get(name, 0.0)
        link = f"to-{name}"[:15]
        if delay_s:
            self._delayed_link(host, link, delay_s)
        else:
            self.core.run("ip", "link", "add", link, "type", "veth", "peer", "name", "ext", "netns", str(host.holder.pid))
        # By netlink: the ioctl for the length of the queue is for root of the whole machine only.
        size = ("mtu", str(_TUN_MTU), "txqueuelen", str(_TUN_QUEUE)) if delay_s else ()
        for where, device in ((self.core, link), (host, "ext")):
            where.run("ip", "link", "set", device, "up", *size)
        host.run("ip", "addr", "add", f"{host.address}/32", "dev", "ext")
        host.run("ip", "route", "add", _GATEWAY, "dev", "ext")
        host.run("ip", "route", "add", "default", "via", _GATEWAY, "dev", "ext")
        self.core.run("ip", "route", "add", f"{host.address}/32", "dev", link)
        return host

    def _site(self, name: str, number: int, nat: Nat) -> list[Host]:
        router = self.routers[name] = self._public(name, number)
        self._forward(router)
        router.run("ip", "link", "add", "lan", "type", "bridge")
        router.run("ip", "addr", "add", "192.168.1.1/24", "dev", "lan")
        router.run("ip", "link", "set", "lan", "up")
        _nft(router, _nat_rules(nat))
        return [self._private(f"{name}{index}", router, index) for index in range(self._count)]

    def _private(self, name: str, router: Host, index: int) -> Host:
        host = self._namespace(name, f"192.168.1.{10 + index}")
        port = f"p{index}"
        router.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.holder.pid))
        router.run("ip", "link", "set", port, "master", "lan", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "route", "add", "default", "via", "192.168.1.1")
        return host

    def _forward(self, host: Host) -> None:
        host.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")

    def _firewall(self, host: Host) -> None:
        ports = ", ".join(map(str, self._open_ports))
        _nft(
            host,
            "table ip lab {\n chain input {\n type filter hook input priority 0; policy drop\n"
            ' iifname "lo" accept\n ct state established,related accept\n icmp type echo-request accept\n'
            f" tcp dport {{ {ports} }} accept\n }}\n }}\n",
        )

    def _delayed_link(self, host: Host, link: str, delay_s: float) -> None:
        """Join core and host by two TUN devices, with a process between them that holds packets back for half of `delay_s` each way."""
        command = [
            *self._inside,
            sys.executable,
            "-m",
            __name__,
            str(self.core.holder.pid),
            link,
            str(host.holder.pid),
            str(delay_s / 2),
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stack.callback(_end, process)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("no TUN devices here: is there a /dev/net/tun?")

    # ---- disturbing

    def cut(self, host: Host) -> None:
        """Take a public host or a router off the net, without a word to those it talks to."""
        self.core.run("ip", "route", "replace", "blackhole", f"{host.address}/32")

    def heal(self, host: Host) -> None:
        """Put it on the net again."""
        self.core.run("ip", "route", "replace", f"{host.address}/32", "dev", f"to-{host.name}"[:15])


def _nat_rules(nat: Nat) -> str:
    refusal = "reject with tcp reset" if nat is Nat.REJECTING else "drop"
    words = nat.value.partition(",")[0]
    return (
        "table ip lab {\n"
        f' chain nat {{\n type nat hook postrouting priority 100\n oifname "ext" {words}\n }}\n'
        " chain forward {\n type filter hook forward priority 0; policy drop\n"
        ' iifname "lan" accept\n ct state established,related accept\n }\n'
        f' chain input {{\n type filter hook input priority 0\n iifname "ext" ct state new meta l4proto tcp {refusal}\n'
        ' iifname "ext" ct state new drop\n }\n }\n'
    )


def _nft(host: Host, rules: str) -> None:
    host.run("nft", "-f", "-", input=rules)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


# ---- the process between two TUN devices


def _delay(first: int, second: int, hold_s: float) -> None:
    """Carry packets between two TUN devices, each `hold_s` late, until stdin ends."""
    held: dict[int, deque[tuple[float, bytes]]] = {first: deque(), second: deque()}
    other = {first: second, second: first}
    with selectors.DefaultSelector() as selector:
        for source in (first, second, 0):
            selector.register(source, selectors.EVENT_READ)
        while True:
            due = min((queue[0][0] for queue in held.values() if queue), default=None)
            wait_s = None if due is None else max(0.0, due - time.monotonic())
            for key, _ in selector.select(wait_s):
                if key.fd == 0:
                    return
                for packet in _packets(key.fd):
                    held[other[key.fd]].append((time.monotonic() + hold_s, packet))
            now = time.monotonic()
            for target, queue in held.items():
                while queue and queue[0][0] <= now:
                    with contextlib.suppress(OSError):  # as a full link would lose it
                        os.write(target, queue.popleft()[1])


def _packets(device: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            yield os.read(device, 1 << 16)


def _tun(pid: int, name: str) -> int:
    """Make a TUN device in the network namespace of a process, and come back."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as ours, open(f"/proc/{pid}/ns/net") as theirs:
        if libc.setns(theirs.fileno(), _NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_PACKET_INFORMATION))
        libc.setns(ours.fileno(), _NEWNET)
    return device


def _main() -> None:
    core, link, host, hold_s = sys.argv[1:]
    devices = _tun(int(core), link), _tun(int(host), "ext")
    print(flush=True)
    _delay(*devices, float(hold_s))


if __name__ == "__main__":
    _main()

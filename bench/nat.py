"""Which path a stream takes between two sites, for every pair of NATs: the table of docs/overlay.md.

For each pair a laboratory (testing/natlab.py) with a firewalled server and hub, a program that offers an echo service at one site and one that
connects at the other; then streams one after the other. Reported: the path of the first and of the last stream, and how long set-up
took with it. The last figure counts the pairs that could not be connected at all.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent))
from overlay import Bench
from report import Figure, arguments, median_of, publish

from deskgrid.testing.natlab import Nat, NatLab

_PORT = 9000
_NATS = (Nat.NONE, Nat.MASQUERADE, Nat.REJECTING, Nat.RANDOM, Nat.FULLY_RANDOM)


class Pair(Struct, frozen=True):
    """What was found between two sites: paths in the order of the streams, and the set-up times of the later ones."""

    paths: tuple[str, ...]
    setup_ms: float


def measure(far: Nat, near: Nat, streams: int) -> Pair:
    """Connect from `near` to `far` and return what happened."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deskgrid-bench-")))
        lab = stack.enter_context(NatLab({"far": far, "near": near}))
        bench = Bench(folder, lab, stack)
        bench.start_grid()
        bench.start_echo()
        bench.deskgrid(bench.far, "offer", "echo", "7000")
        bench.deskgrid(bench.near, "connect", "echo.user", "--listen", str(_PORT))
        log = folder / f"{bench.started}.log"
        found = [bench.ping("127.0.0.1", _PORT, 1, 1) for _ in range(streams)]
        begun = [json.loads(line) for line in log.read_text().splitlines() if "stream_begins" in line]
        return Pair(tuple(line["path"] for line in begun), median_of([ping.setup_p95_s * 1000 for ping in found[1:]]))


def main() -> None:
    """Measure every pair and print the table."""
    options = arguments(__doc__)
    nats = _NATS[:2] if options.quick else _NATS
    failed = 0
    print("| offers behind | connects behind | first stream | later streams | set-up, ms |\n| --- | --- | --- | --- | --- |")
    for far in nats:
        for near in nats:
            try:
                pair = measure(far, near, 4)
                print(f"| {far} | {near} | {pair.paths[0]} | {pair.paths[-1]} | {pair.setup_ms:.0f} |", flush=True)
            except (RuntimeError, IndexError) as error:
                failed += 1
                print(f"| {far} | {near} | failed: {str(error)[-80:]} | | |", flush=True)
    publish("nat", [Figure("pairs that cannot be connected", failed, "pairs", None, None, 0)], options)


if __name__ == "__main__":
    main()

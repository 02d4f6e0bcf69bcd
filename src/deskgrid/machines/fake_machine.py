"""The process of a fake machine; run as a program by fake.py, with nothing but the standard library.

Arguments: the machine's folder and its token (which is there only to be found). It plays `plan.json` and leaves the traces
that QEMU and an agent leave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

GREETING = b'{"QMP": {}}\n'


def main(workdir: Path) -> int:
    """Play the plan; return the exit status of the process."""
    plan: dict[str, Any] = json.loads((workdir / "plan.json").read_bytes())
    if plan["refuses"]:
        print("the fake machine was told not to start", file=sys.stderr)
        return 1
    _append(workdir / plan["journal"], GREETING)
    if plan["never_boots"]:
        _append(workdir / plan["console"], b"fake: no bootable device\n")
        _sleep_for_ever()
    time.sleep(plan["boot_s"])
    _append(workdir / plan["channel"], b"! booted\n! context-started\n")
    _append(workdir / plan["channel"], (workdir / plan["output"]).read_bytes())
    _work(workdir, plan)
    # The scratch disk with the result takes the empty one's place: a machine killed before has no result.
    (workdir / plan["finished"]).replace(workdir / plan["scratch"])
    _append(workdir / plan["channel"], b"! context-exited %d\n" % plan["exit_code"])
    _append(workdir / plan["journal"], plan["power_off"].encode())
    return 0


def _work(workdir: Path, plan: dict[str, Any]) -> None:
    if plan["tick_s"]:
        while True:
            _append(workdir / plan["channel"], b"1 tick\n")
            time.sleep(plan["tick_s"])
    if plan["hangs"]:
        _sleep_for_ever()
    time.sleep(plan["duration_s"])
    if plan["io_error"]:
        _append(workdir / plan["journal"], plan["full"].encode())
        _sleep_for_ever()
    if plan["crashes"]:
        os.abort()
    if plan["reboots"]:
        _append(workdir / plan["journal"], plan["reset"].encode())
        sys.exit(0)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""The script that runs the commands of a TES task, one after the other, and what is read of them in what it printed.

Rules:

1. It is a POSIX shell's, and uses `mkdir`, `cp`, `ln`, `env`, `tail`, `wc` and `date` of the machine it runs in.
2. Whatever a task says is a word in quotes: nothing of it is read by the shell.
3. /scratch, /tmp and /context at the beginning of a word are put in by variables, for without a sandbox they have other names
   (machines/process_sandbox.py), there as in a job's own command.
4. What it tells stands in lines that begin with the task's mark, in both streams:

       MARK begin N PAST @SECONDS     command N begins
       MARK end N PAST                it has ended
       MARK output N BYTES            (stderr only) file N of the outputs is there

   PAST has CODE@BEGUN-ENDED for each command that has ended: whoever reads the last line only knows all of it. Between begin and end is
   what the command printed; of what it printed to a file, the end.

The reading side believes none of it: a command can print such lines, too, and deceives its own submitter then.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from msgspec import Struct

from deskgrid.model.tes import TesExecutor

__all__ = ["TAIL_BYTES", "Ended", "Plan", "Staged", "Wanted", "ended_of", "printed_by", "quote", "script_of", "sizes_of"]

TAIL_BYTES = 8192
"""Of what a command printed, that is told."""
_PLACES = ("/scratch", "/tmp", "/context")  # noqa: S108 the machine's own


class Staged(Struct, frozen=True):
    """An input: a file below /context that is to be at `path`."""

    source: str
    path: str
    linked: bool
    """It can be large, and is not copied."""


class Wanted(Struct, frozen=True):
    """An output."""

    path: str
    name: str
    """Where it is among the results: its path below /scratch, or all of it if it is elsewhere."""
    folder: bool = False
    some: bool = False
    """It has wildcards: whatever matches."""

    @property
    def moved(self) -> bool:
        """Whether it has to be copied to where results are."""
        return self.path != f"/scratch/{self.name}" and self.path != "/scratch"


class Plan(Struct, frozen=True, kw_only=True):
    """A task, checked, with all paths in their normal form."""

    mark: str
    executors: tuple[TesExecutor, ...]
    inputs: tuple[Staged, ...] = ()
    outputs: tuple[Wanted, ...] = ()
    volumes: tuple[str, ...] = ()


class Ended(Struct, frozen=True):
    """How a command went; None: not known, or not yet. Times are seconds since 1970 by the clock of the machine."""

    exit_code: int | None = None
    begun_at: int | None = None
    ended_at: int | None = None


# ---- writing


def script_of(plan: Plan) -> str:
    """Return the text of context.sh."""
    lines = [*_head(plan), *_staging(plan), *_keeping(plan)]
    for number, executor in enumerate(plan.executors):
        lines += _running(number, executor)
    return "\n".join([*lines, "keep || exit 1", ""])


def quote(word: str) -> str:
    """Return a word as the shell reads it, with the machine's places put in."""
    for place in _PLACES:
        if word == place or word.startswith(f"{place}/"):
            rest = word.removeprefix(place)
            return f'"${{DESKGRID_{place[1:].upper()}:-{place}}}"' + (shlex.quote(rest) if rest else "")
    return shlex.quote(word)


def _head(plan: Plan) -> Iterator[str]:
    yield "# A GA4GH TES task, as deskgrid runs it."
    yield f"mark={shlex.quote(plan.mark)} past="
    yield """say() { printf '\\n%s %s\\n' "$mark" "$*"; printf '\\n%s %s\\n' "$mark" "$*" >&2; }"""
    yield "now() { date +%s 2>/dev/null; }"


def _staging(plan: Plan) -> Iterator[str]:
    yield "set -e"
    for volume in plan.volumes:
        yield f"mkdir -p {quote(volume)}"
    for one in plan.inputs:
        yield f"mkdir -p {quote(_parent(one.path))}"
        yield f"{'ln -s' if one.linked else 'cp'} {quote(one.source)} {quote(one.path)}"
    yield "set +e"


def _keeping(plan: Plan) -> Iterator[str]:
    yield "keep() {"
    yield "lost=0"
    for number, output in enumerate(plan.outputs):
        if not output.some:
            yield from _keep(number, output)
    yield "return $lost"
    yield "}"


def _keep(number: int, output: Wanted) -> Iterator[str]:
    path, what = quote(output.path), "folder" if output.folder else "file"
    yield f"if [ {'-d' if output.folder else '-f'} {path} ]; then :"
    if output.moved:
        target = quote(_parent(f"/scratch/{output.name}"))
        yield f"mkdir -p {target} && cp {'-R ' if output.folder else ''}{path} {target}/ || lost=1"
    if not output.folder:
        yield f"""printf '\\n%s output %s %s\\n' "$mark" {number} "$(wc -c <{path})" >&2"""
    yield f"else printf '%s\\n' {shlex.quote(f'deskgrid: there is no {what} {output.path}')} >&2; lost=1; fi"


def _running(number: int, executor: TesExecutor) -> Iterator[str]:
    workdir = executor.workdir or "/scratch"
    files = [path for path in (executor.stdout, executor.stderr) if path]
    for folder in dict.fromkeys([workdir, *(_parent(path) for path in files)]):
        yield f"mkdir -p {quote(folder)} 2>/dev/null"
    yield f'begun=$(now); say "begin {number}$past @$begun"'
    yield f"( cd {quote(workdir)} && exec {_command(executor)} ) {_redirections(executor)}"
    yield "code=$?"
    if executor.stdout:
        yield _tail(executor.stdout)
    if executor.stderr and executor.stderr != executor.stdout:
        yield f"{_tail(executor.stderr)} >&2"
    yield f'past="$past $code@$begun-$(now)"; say "end {number}$past"'
    if not executor.ignore_error:
        yield '[ "$code" -eq 0 ] || { keep; exit "$code"; }'


def _command(executor: TesExecutor) -> str:
    """Return what is executed: never a builtin of the shell. Variables are set by env: to the shell some mean something."""
    variables = [f"{name}={value}" for name, value in (executor.env or {}).items()]
    words = [quote(word) for word in executor.command]
    return " ".join([*(["env"] if variables else []), *map(_assigned, variables), *words])


def _assigned(variable: str) -> str:
    name, _, value = variable.partition("=")
    return f"{name}={quote(value)}"


def _redirections(executor: TesExecutor) -> str:
    words = [f"<{quote(executor.stdin or '/dev/null')}"]
    words += [f">{quote(executor.stdout)}"] if executor.stdout else []
    if executor.stderr:
        words.append("2>&1" if executor.stderr == executor.stdout else f"2>{quote(executor.stderr)}")
    return " ".join(words)


def _tail(path: str) -> str:
    return f"[ ! -f {quote(path)} ] || tail -c {TAIL_BYTES} {quote(path)}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


# ---- reading


def ended_of(told: bytes, mark: str, commands: int) -> list[Ended]:
    """Return how the commands went that have begun, by the last line that says it; none if there is no such line."""
    found = list(re.finditer(rb"\n%b (?:begin|end) \d{1,4}((?: [0-9@-]{1,40})*)\n" % mark.encode(), b"\n" + told))
    if not found:
        return []
    words = found[-1][1].decode().split()[:commands]
    return [_ended(word) for word in words]


def _ended(word: str) -> Ended:
    match = re.fullmatch(r"(\d{0,3})@(\d{0,10})(?:-(\d{0,10}))?", word)
    code, begun, ended = match.groups() if match else (None, None, None)
    return Ended(_number(code), _number(begun), _number(ended))


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def sizes_of(told: bytes, mark: str) -> dict[int, int]:
    """Return the bytes of the outputs that are there, by their numbers."""
    found = re.finditer(rb"\n%b output (\d{1,4}) +(\d{1,18})(?=\n)" % mark.encode(), b"\n" + told)
    return {int(one[1]): int(one[2]) for one in found}


def printed_by(told: bytes, mark: str) -> dict[int, str]:
    """Return the end of what each command printed, by their numbers; `told` may begin in the midst of it."""
    marks = list(re.finditer(rb"\n%b (begin|end) (\d{1,4})[0-9@ -]*\n" % mark.encode(), b"\n" + told))
    found = {}
    for before, after in zip([None, *marks], [*marks, None], strict=True):
        if after is not None and after[1] == b"end":
            begin = before.end() if before is not None else 0
            found[int(after[2])] = _text(told[max(begin - 1, 0) : max(after.start() - 1, 0)])
        elif after is None and before is not None and before[1] == b"begin":
            found[int(before[2])] = _text(told[before.end() - 1 :])
    return found


def _text(printed: bytes) -> str:
    return printed[-TAIL_BYTES:].decode(errors="replace")

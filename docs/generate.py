"""Write the parts of the documentation that are made from the code.

python docs/generate.py          write them
python docs/generate.py --check  exit with 1 and name what is out of date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from deskgrid import settings
from deskgrid.cli.main import app
from deskgrid.client.jobfile import spec_reference
from deskgrid.core import rights as rights_rules
from deskgrid.core.lifecycle import TRANSITIONS
from deskgrid.core.rights import ROLES, RULES, Right, Who, covers
from deskgrid.model import wire
from deskgrid.units import format_duration, format_size

DOCS = Path(__file__).parent


def lifecycle_diagram(text: str) -> str:
    """Return `text` with the diagram between its marks drawn anew from the transition table."""
    edges: dict[tuple[str, str], list[str]] = {}
    for (source, event), target in TRANSITIONS.items():
        if source is not target:
            edges.setdefault((source, target), []).append(event)
    lines = [f"    {source} --> {target}: {', '.join(events)}" for (source, target), events in edges.items()]
    diagram = "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> leased", *lines, "```"])
    head, _, rest = text.partition("<!-- lifecycle:begin -->")
    _, _, tail = rest.partition("<!-- lifecycle:end -->")
    return f"{head}<!-- lifecycle:begin -->\n{diagram}\n<!-- lifecycle:end -->{tail}"


_SETTINGS: tuple[tuple[str, str, Any, str], ...] = (
    ("Server", "server.toml", settings.ServerSettings, "DESKGRID_SERVER"),
    ("Worker", "worker.toml", settings.WorkerSettings, "DESKGRID_WORKER"),
    ("Hub", "hub.toml", settings.HubSettings, "DESKGRID_HUB"),
    ("Peer: a worker, and a user's programs", "peer.toml", settings.PeerSettings, "DESKGRID_PEER"),
)


def settings_reference() -> str:
    """Return the reference of all settings files."""
    head = (
        "# Settings\n\nGenerated from `src/deskgrid/settings.py`.\n\n"
        "Sizes and durations may be written for people: `8GiB`, `10m`. The environment wins over the file.\n"
    )
    parts = [f"\n## {title}: HOME/{file}\n\n{_settings_table(kind, prefix)}\n" for title, file, kind, prefix in _SETTINGS]
    return head + "".join(parts)


def _settings_table(kind: Any, prefix: str) -> str:
    docs = _field_docs(kind)
    rows = ["| setting | environment | default | meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(kind):
        shown = _shown(field.name, field.default)
        rows.append(f"| `{field.name}` | `{prefix}_{field.name.upper()}` | `{shown}` | {docs.get(field.name, '')} |")
    return "\n".join(rows)


def _field_docs(kind: Any) -> dict[str, str]:
    """Return the string that stands below each field in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and isinstance(following, ast.Expr):
            found[target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value:
        return format_size(value)
    if name.endswith("_s"):
        return format_duration(value)
    return ", ".join(value) if isinstance(value, tuple) else repr(value)


def api_reference() -> str:
    """Return the table of all calls."""
    rows = ["| call | does | takes | gives | who |", "| --- | --- | --- | --- | --- |"]
    for route in wire.ROUTES.values():
        roles = ", ".join(sorted(ROLES[route.name])) or "anybody"
        rows.append(
            f"| `{route.method} {route.path}` | {route.summary} | {route.request.__name__} | {route.answer.__name__} | {roles} |"
        )
    return (
        "# HTTP API\n\nGenerated from `src/deskgrid/model/wire.py` and, for GA4GH TES, `src/deskgrid/model/tes.py`. A running server has the whole, with every message, at "
        "`/openapi.json`, and as a page at `/docs`.\n\n" + "\n".join(rows) + "\n"
    )


def rights_reference() -> str:
    """Return the table of who may do what, and what tokens can be narrowed to."""
    shown = [who for who in Who if who is not Who.ANYBODY]
    rows = [
        f"| call | about | {' | '.join(shown)} | rights | audited |",
        f"|{' --- |' * (len(shown) + 4)}",
    ]
    for name, rule in RULES.items():
        marks = " | ".join(
            "anybody" if who is Who.USER and Who.ANYBODY in rule.who else "yes" if who in rule.who else "" for who in shown
        )
        audited = "yes" if rule.audited else ""
        rows.append(
            f"| `{name}` | {rule.kind} | {marks} | {'not narrowed' if rule.whole else ', '.join(sorted(rule.rights)) or 'any'} | {audited} |"
        )
    docs = _field_docs(Who)
    words = [f"- **{who}**: {docs.get(who.name, 'An admin.' if who is Who.ADMIN else 'A hub, for itself.')}" for who in Who]
    rights = [
        f"- `{right}`: {', '.join(name for name in RULES if covers(frozenset({right}), name) and RULES[name].rights)}"
        for right in Right
    ]
    return (
        "# Who may do what\n\nGenerated from the table in `src/deskgrid/core/rights.py`, from which the server and its tests work, too.\n"
        + (rights_rules.__doc__ or "").partition("Rules:")[2]
        + "\n"
        + "\n".join(words)
        + "\n\n## Calls\n\n"
        + "\n".join(rows)
        + "\n\n## Rights of a narrowed token\n\n"
        + "Calls without a right in the table are open to every token.\n\n"
        + "\n".join(rights)
        + "\n"
    )


def commands_reference() -> str:
    """Return the help of all commands."""
    text = app.generate_docs(output_format="markdown")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _rewritten(file: Path, change: Callable[[str], str]) -> str:
    return change(file.read_text(encoding="utf-8"))


def documents() -> dict[Path, str]:
    """Return every generated file with its content."""
    architecture = DOCS / "architecture.md"
    return {
        architecture: _rewritten(architecture, lifecycle_diagram),
        DOCS / "reference" / "settings.md": settings_reference(),
        DOCS / "reference" / "job-spec.md": spec_reference(),
        DOCS / "reference" / "api.md": api_reference(),
        DOCS / "reference" / "commands.md": commands_reference(),
        DOCS / "reference" / "rights.md": rights_reference(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [file for file, text in documents().items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(documents()[file], encoding="utf-8")
        print(f"{'out of date' if check else 'wrote'}: docs/{file.relative_to(DOCS)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

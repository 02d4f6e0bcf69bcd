"""The OpenAPI document and a page to read it, both made from the routes of model/wire.py."""

from __future__ import annotations

import html
import json
import re
from functools import cache
from typing import Any

import msgspec

import deskgrid
from deskgrid.core.rights import ROLES
from deskgrid.model import wire

__all__ = ["openapi_document", "openapi_json", "openapi_page"]

_REF = "#/components/schemas/{name}"


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of the API."""
    routes = list(wire.ROUTES.values())
    types = list(dict.fromkeys(kind for route in routes for kind in (route.request, route.answer) if kind is not bytes))
    schemas, components = msgspec.json.schema_components([*types, wire.ErrorAnswer], ref_template=_REF)
    schema_of = dict(zip([*types, wire.ErrorAnswer], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "deskgrid", "version": deskgrid.__version__, "description": wire.__doc__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: wire.Route[Any, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in _path_names(route)),
            *({"name": name, "in": "query", "schema": msgspec.json.schema(kind)} for name, kind in route.query.items()),
        ],
        "responses": {
            "200": {"description": "the answer", "content": _content(route.answer, schema_of)},
            "default": {"description": "an error", "content": _content(wire.ErrorAnswer, schema_of)},
        },
        "x-roles": sorted(ROLES[route.name]) or ["anybody"],
    }
    if ROLES[route.name]:
        operation["security"] = [{"token": []}]
    if route.request is not wire.Nothing:
        operation["requestBody"] = {"required": True, "content": _content(route.request, schema_of)}
    return operation


def _path_names(route: wire.Route[Any, Any]) -> list[str]:
    return re.findall(r"{(\w+)}", route.path)


def _content(kind: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:
    if kind is bytes:
        return {"application/octet-stream": {}}
    return {"application/json": {"schema": schema_of[kind]}}


@cache
def openapi_json() -> bytes:
    """Return the document as text. Made when it is first asked for: that takes longer than all else that a server does before it answers."""
    return msgspec.json.format(msgspec.json.encode(openapi_document()))


@cache
def openapi_page() -> str:
    """Return the API as one HTML page that needs nothing from elsewhere. Made when it is first asked for."""
    document = openapi_document()
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            rows.append(_row(path, method, operation))
    schemas = "".join(
        f"<details id='{html.escape(name)}'><summary>{html.escape(name)}</summary><pre>{html.escape(json.dumps(schema, indent=2))}</pre></details>"
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    return _PAGE.format(intro=html.escape(wire.__doc__ or ""), rows="".join(rows), schemas=schemas)


def _row(path: str, method: str, operation: dict[str, Any]) -> str:
    def names(content: dict[str, Any]) -> str:
        found = re.findall(r"schemas/(\w+)", json.dumps(content))
        return ", ".join(f"<a href='#{name}'>{name}</a>" for name in found) or "bytes"

    takes = names(operation["requestBody"]["content"]) if "requestBody" in operation else ""
    gives = names(operation["responses"]["200"]["content"])
    cells = [
        f"<code>{method.upper()} {html.escape(path)}</code>",
        html.escape(operation["summary"]),
        takes,
        gives,
        ", ".join(operation["x-roles"]),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>deskgrid API</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;width:100%}}td,th{{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ccc;vertical-align:top}}
pre{{background:#f4f4f4;padding:.6rem;overflow:auto}}p{{white-space:pre-wrap}}</style></head>
<body><h1>deskgrid API</h1><p>{intro}</p><p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>
<h2>Calls</h2><table><tr><th>call</th><th>does</th><th>takes</th><th>gives</th><th>who</th></tr>{rows}</table>
<h2>Messages</h2>{schemas}</body></html>
"""

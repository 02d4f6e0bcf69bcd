"""Statements that are run very often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

__all__ = ["Statement", "constant"]


def constant(text: str) -> sa.ColumnElement[str]:
    """Return a word of ours (a state's name, never input) as it stands in the SQL, so that partial indexes are found."""
    if not text.isidentifier() and text:
        raise ValueError(f"{text!r} is not a word")
    return sa.literal_column(f"'{text}'", sa.String())


class Statement:
    """A statement that is run very often: written with SQLAlchemy, compiled once per kind of database, run by its driver directly.

    That takes a tenth of the time. Parameters are `sa.bindparam`s; rows are plain tuples. Types are not converted, and a list cannot be a
    parameter.
    """

    def __init__(self, construct: sa.ClauseElement) -> None:
        self._construct = construct
        self._compiled: dict[str, tuple[str, tuple[str, ...] | None, dict[str, Any]]] = {}

    def bind(self, dialect: sa.Dialect, parameters: Mapping[str, Any]) -> tuple[str, Any]:
        """Return the SQL and its parameters as the driver of a database takes them."""
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = self._compile(dialect)
        text, order, constants = found
        values = {**constants, **parameters}
        return text, values if order is None else [values[name] for name in order]

    def _compile(self, dialect: sa.Dialect) -> tuple[str, tuple[str, ...] | None, dict[str, Any]]:
        compiled: Any = self._construct.compile(dialect=dialect)
        order = tuple(compiled.positiontup) if compiled.positional else None
        constants = {name: bound.effective_value for bound, name in compiled.bind_names.items() if not bound.required}
        return str(compiled), order, constants

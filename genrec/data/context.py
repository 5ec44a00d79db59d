"""What the ids of CONTEXT tokens stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ContextIds:
    """A run of CONTEXT ids: the values of a column, or those that a later version of the vocabulary added. The ids of
    all runs follow each other, so that adding a run renumbers nothing."""

    column: str
    values: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many ids."""
        return len(self.values)

    def to_json(self) -> dict[str, Any]:
        """What context_from_json reads."""
        return {"column": self.column, "values": list(self.values)}


def context_from_json(value: dict[str, Any]) -> ContextIds:
    """The run that to_json wrote; KeyError or TypeError if it is none."""
    return ContextIds(value["column"], tuple(value["values"]))

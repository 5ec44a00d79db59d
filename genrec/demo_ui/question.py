"""What the page asks for, checked: whatever comes over HTTP is a Question or a sentence that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from genrec.generation import RecommenderConfig

LIMITS: dict[str, tuple[int, int]] = {"beams": (1, 500), "alpha": (0, 100), "top_k": (1, 100)}
LONGEST = 1000  # items of a typed history
TYPES: dict[str, tuple[type, ...]] = {
    "user": (str,),
    "items": (list,),
    "hide_last": (bool,),
    "beams": (int,),
    "alpha": (int, float),
    "mode": (str,),
    "top_k": (int,),
    "include_seen": (bool,),
}


@dataclass(frozen=True)
class Question:
    """Whose next items, and how they are to be found."""

    user: str | None  # of the log; None where the history is typed
    items: tuple[str, ...]  # item ids of a typed history, oldest first
    hide_last: bool  # do not show the model the last event of the user
    settings: RecommenderConfig


def read_question(body: Any, defaults: RecommenderConfig) -> Question:
    """The question in a JSON value; ValueError says what is wrong with it."""
    if not isinstance(body, dict):
        raise ValueError("the body is not a JSON object; expected one with user or items")
    for name, value in body.items():
        _check_type(name, value)
        _check_range(name, value)
    user, items = body.get("user"), body.get("items")
    if (user is None) == (items is None):
        raise ValueError("expected either user or items, and not both")
    if user is None:
        _check_items(body["items"])
    return Question(user, tuple(items or ()), body.get("hide_last", False), _settings(body, defaults))


def _check_type(name: str, value: Any) -> None:
    if name not in TYPES:
        raise ValueError(f"unknown key {name!r}; expected some of {', '.join(TYPES)}")
    expected = TYPES[name]
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):  # a bool is an int
        raise ValueError(f"{name} is {value!r:.80}; expected a value of type {expected[-1].__name__}")


def _check_range(name: str, value: Any) -> None:
    if name in LIMITS:
        low, high = LIMITS[name]
        if not low <= value <= high:  # NaN is in no range
            raise ValueError(f"{name} is {value}; expected {low} to {high}")


def _check_items(items: list[Any]) -> None:
    if not 1 <= len(items) <= LONGEST:
        raise ValueError(f"items holds {len(items)} items; expected 1 to {LONGEST}")
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"items holds {item!r:.80}; expected item ids, which are strings")


def _settings(body: Mapping[str, Any], defaults: RecommenderConfig) -> RecommenderConfig:
    chosen = {name: body[name] for name in ("beams", "alpha", "mode", "top_k") if name in body}
    return replace(defaults, exclude_seen=not body.get("include_seen", not defaults.exclude_seen), **chosen)

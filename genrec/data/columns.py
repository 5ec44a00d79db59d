"""Which column of a log or item file means what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The first name that a file has wins. Case, spaces and underscores do not matter.
USUAL_NAMES = {
    "user": ("user_id", "user", "uid", "reviewer_id", "customer_id", "visitor_id"),
    "item": ("item_id", "item", "movie_id", "parent_asin", "asin", "product_id", "book_id", "track_id", "song_id")
    + ("video_id", "article_id", "news_id", "business_id", "sku", "isbn"),
    "rating": ("rating", "overall", "stars", "score"),
    "time": ("timestamp", "time", "unix_review_time", "unix_time", "event_time", "ts"),
    "title": ("title", "name", "item_name", "movie_title", "product_title", "product_name"),
}


def choose_column(role: str, given: str | None, columns: Sequence[str], path: Path) -> str | None:
    """The column of `columns` that plays `role`: the given one, else one with a usual name, else None.

    Raises ValueError if the given column does not exist. An empty name means "none".
    """
    if given == "":
        return None
    if given is not None:
        return require_column(role, given, columns, path)
    plain = {_plain(column): column for column in reversed(columns)}
    return next((plain[_plain(name)] for name in USUAL_NAMES[role] if _plain(name) in plain), None)


def require_column(role: str, given: str | None, columns: Sequence[str], path: Path) -> str:
    """As choose_column, but a column there must be; ValueError lists what the file has."""
    if given:
        if given in columns:
            return given
        raise ValueError(f"{path} has no column {given!r} for {role}; its columns are {_listed(columns)}")
    found = choose_column(role, None, columns, path)
    if found is None:
        raise ValueError(
            f"{path}: cannot tell which column is the {role}; pass --{role} with one of {_listed(columns)}"
        )
    return found


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns[:30])) + (", …" if len(columns) > 30 else "")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())

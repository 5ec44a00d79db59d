"""Recommend items to a user of the log, or after a history you type.

genrec recommend --model runs/demo/model --user 42
genrec recommend --model runs/demo/model --history '["Toy Story (1995)", "Heat (1995)"]'
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from genrec.data.sequences import load_sequences, take_users
from genrec.data.vocabulary import Vocabulary, encode_events, load_vocabulary
from genrec.generation import Recommender
from genrec.generation.storage import load_run
from genrec.interfaces import Catalogue, EventSequences


@dataclass(frozen=True)
class Config:
    model: Path
    """directory written by genrec train, or the model's inside it"""
    user: str | None = None
    """id of a user of the log, whose whole history is read"""
    history: list[str] | None = None
    """item ids or exact titles, oldest first, instead of a user"""
    features: Path | None = None
    """directory written by genrec features; the one the model was trained on unless told otherwise"""
    top_k: int = 10
    """how many items to show"""
    include_seen: bool = False
    """also recommend what the user has already had"""
    json: bool = False
    """print one JSON object instead of tables"""


def run(config: Config) -> None:
    """Print the history and what comes next."""
    if (config.user is None) == (config.history is None):
        raise ValueError("expected either --user or --history, and not both")
    if config.top_k < 1:
        raise ValueError(f"top_k is {config.top_k}; expected 1 or more")
    trained = load_run(config.model, config.features)
    catalogue = trained.catalogue
    history = (
        typed_history(config.history, catalogue, load_vocabulary(trained.features))
        if config.history is not None
        else user_history(config.user, trained.features)
    )
    recommender = Recommender(trained.model, replace(trained.settings, exclude_seen=not config.include_seen))
    ranked, scores = recommender.rank_scored(history, min(config.top_k, catalogue.size))
    rows = [(int(item), float(score)) for item, score in zip(ranked[0], scores[0], strict=True) if item > 0]
    if config.json:
        items = [{"item_id": catalogue.item_ids[i], "title": catalogue.titles[i], "score": score} for i, score in rows]
        print(json.dumps({"user_id": history.user_ids[0], "items": items}, ensure_ascii=False))
        return
    console = Console(markup=False, emoji=False)  # a title may look like a tag
    console.print(_table(f"history of {history.user_ids[0]}, the last 10", [
        (_stars(rating), catalogue.titles[item] or "(not in the vocabulary)")
        for item, rating in zip(history.item_ids[-10:], history.ratings[-10:], strict=True)
    ]))  # fmt: skip
    console.print(_table("recommended", [(f"{score:.2f}", catalogue.titles[item]) for item, score in rows]))


def user_history(user: str | None, features: Path) -> EventSequences:
    """All events of one user of the log."""
    sequences = load_sequences(features)
    found = np.flatnonzero(sequences.user_ids == user)
    if len(found) == 0:
        some = ", ".join(sequences.user_ids[:5])
        raise ValueError(
            f"user {user!r} is not in {features}; expected one of its {len(sequences)} users, such as {some}"
        )
    return take_users(sequences, found)


def typed_history(names: list[str], catalogue: Catalogue, vocabulary: Vocabulary) -> EventSequences:
    """A history of items named by id or by exact title."""
    if not names:
        raise ValueError("history is empty; expected at least one item id or title")
    titles = {title: index for index, title in enumerate(catalogue.titles) if index}
    ids = {item_id: index for index, item_id in enumerate(catalogue.item_ids) if index}
    if unknown := [name for name in names if name not in ids and name not in titles]:
        raise ValueError(f"history: {unknown[0]!r} is neither an item id nor a title of the catalogue")
    items = np.array([ids.get(name) or titles[name] for name in names], np.int32)
    return encode_events(vocabulary, np.array(["you"], np.object_), np.array([0, len(items)]), items)


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _stars(rating: float) -> str:
    return "" if np.isnan(rating) else f"{rating:g} ★"

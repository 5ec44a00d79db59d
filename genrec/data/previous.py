"""The vocabulary that a new one extends: every id keeps its meaning, what is new gets ids behind them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from genrec.data.catalogue import load_catalogue, vocabulary_hash
from genrec.data.config import FeaturesConfig
from genrec.data.context import SESSION_EDGES, ContextIds
from genrec.data.readers import LogColumns
from genrec.data.vocabulary import Vocabulary, load_vocabulary


def context_without_ids(config: FeaturesConfig, columns: LogColumns) -> list[ContextIds]:
    """The CONTEXT tokens that an event gets, before their values are numbered and their edges known."""
    tokens = [ContextIds(column) for column in columns.context]
    if config.hash_buckets:
        tokens.append(ContextIds("item", kind="hash", buckets=config.hash_buckets))
    if columns.weight:
        tokens.append(ContextIds(columns.weight, kind="weight"))
    if config.session_gap:
        tokens.append(ContextIds("time", kind="session", edges=SESSION_EDGES, gap=config.session_gap))
    return tokens


@dataclass(frozen=True)
class Previous:
    """What `genrec features` wrote before."""

    vocabulary: Vocabulary
    hash: str
    items: pa.Table  # item, title, index, in the order of index

    def ids_of(self, column: str) -> dict[str, int]:
        """The CONTEXT ids of a column's values."""
        ids: dict[str, int] = {}
        first = 1
        for run in self.vocabulary.context:
            if run.kind == "values" and run.column == column:
                ids |= {value: first + place for place, value in enumerate(run.values)}
            first += run.size
        return ids

    def check(self, config: FeaturesConfig, columns: LogColumns, directory: Path) -> None:
        """ValueError unless events have the tokens that they had."""
        kinds = (
            ("actions", bool(self.vocabulary.action_names), columns.action is not None),
            ("times", bool(self.vocabulary.gap_edges), columns.time is not None),
        )
        for name, before, now in kinds:
            if before != now:
                with_or_without = "without" if now else "with"
                raise ValueError(f"extend: {directory} was made {with_or_without} {name}; expected the same columns")
        context = [run.token for run in self.vocabulary.context_tokens]
        wanted = [run.token for run in context_without_ids(config, columns)]
        if context != wanted:
            raise ValueError(
                f"extend: {directory} was made with the context tokens {context}; expected the same, not {wanted}"
            )


def load_previous(directory: Path) -> Previous:
    """The vocabulary in `directory`.

    Raises FileNotFoundError or ValueError if there is none, or its files are of two runs.
    """
    catalogue, vocabulary = load_catalogue(directory), load_vocabulary(directory)
    known_by = vocabulary_hash(catalogue, vocabulary)
    if vocabulary.hash not in ("", known_by) or vocabulary.items != catalogue.size:
        raise ValueError(f"{directory} has items.parquet and vocabulary.json of two runs; run genrec features again")
    items = pa.table(
        {
            "item": pa.array(catalogue.item_ids[1:], pa.string()),
            "title": pa.array(catalogue.titles[1:], pa.string()),
            "index": np.arange(1, catalogue.size + 1, dtype=np.int32),
        }
    )
    return Previous(vocabulary, known_by, items)


def nothing_before() -> Previous:
    """The vocabulary without ids, which every first one extends."""
    kinds = [("item", pa.string()), ("title", pa.string()), ("index", pa.int32())]
    return Previous(Vocabulary(0, (), (), (), (), 1, version=0), "", pa.schema(kinds).empty_table())

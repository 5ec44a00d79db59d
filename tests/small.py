"""Small semantic ids, event sequences, models and runs, for the tests of the model and of everything above it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from genrec.data.build import build_features
from genrec.data.catalogue import load_catalogue, save_semantic_ids
from genrec.data.config import FeaturesConfig
from genrec.data.transitions import strongest_transitions
from genrec.interfaces import EventSequences, SemanticIds, TokenType
from genrec.models.ugt import UGT, ModelVocabulary, UGTConfig

MOVIELENS = Path(__file__).parents[1] / "data" / "ml-latest-small"
TYPE_SIZES = {TokenType.ACTION: 6, TokenType.TIME: 5, TokenType.CONTEXT: 4}
TINY_RUN = {  # of genrec train: two epochs of each stage, a second in all
    "model.d_model": 16, "model.d_ffn": 24, "model.d_expert": 12, "model.max_events": 10, "model.rel_bias_size": 8,
    "model.transitions": 4,
    "pretrain.epochs": 2, "pretrain.batch_tokens": 60, "pretrain.optimizer.warmup_steps": 2,
    "finetune.epochs": 2, "finetune.batch_tokens": 60, "finetune.optimizer.warmup_steps": 2,
    "align.epochs": 2, "align.batch_tokens": 60, "align.beams": 8, "align.optimizer.warmup_steps": 2,
    "recommender.beams": 8, "log_every": 1, "checkpoint_every": 2,
    "threads": 1, "precision": "float32", "device": "cpu",
}  # fmt: skip
ALL_TYPES = ("item", "action", "time", "context")


def semantic_ids(items: int, sizes: Sequence[int], seed: int = 0) -> SemanticIds:
    """Distinct random codes for items 1 … items."""
    chosen = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:items]
    codes = np.stack(np.unravel_index(chosen, sizes), axis=1).astype(np.int64)
    return SemanticIds(np.concatenate([np.zeros((1, len(sizes)), np.int64), codes]), tuple(sizes))


def sequences(
    users: Sequence[Sequence[int]],
    ratings: Sequence[Sequence[float]] | None = None,
    types: Sequence[str] = ("item",),
    seed: int = 0,
) -> EventSequences:
    """One event per item, with a token of every type in `types`; ids of the other types are random."""
    rng = np.random.default_rng(seed)
    token_ids, type_ids, positions, cu_tokens = [], [], [], [0]
    for user in users:
        for position, item in enumerate(user):
            for name in types:
                kind = TokenType[name.upper()]
                token_ids.append(item if kind == TokenType.ITEM else int(rng.integers(TYPE_SIZES[kind])))
                type_ids.append(kind)
                positions.append(position)
        cu_tokens.append(len(token_ids))
    items = [item for user in users for item in user]
    said = [np.nan] * len(items) if ratings is None else [rating for user in ratings for rating in user]
    return EventSequences(
        user_ids=np.array([f"u{number}" for number in range(len(users))], np.object_),
        cu_tokens=np.array(cu_tokens, np.int64),
        token_ids=np.array(token_ids, np.int32),
        type_ids=np.array(type_ids, np.int8),
        positions=np.array(positions, np.int32),
        cu_events=np.cumsum([0, *map(len, users)]).astype(np.int64),
        item_ids=np.array(items, np.int32),
        ratings=np.array(said, np.float32),
        timestamps=np.zeros(len(items), np.int64),
    )


def with_times(sequences: EventSequences, times: Sequence[int]) -> EventSequences:
    """The same events at these times, in unix seconds."""
    return replace(sequences, timestamps=np.array(times, np.int64))


def random_users(users: int, items: int, longest: int, seed: int = 0, least: int = 1) -> list[list[int]]:
    """Histories of items 1 … items, of `least` … `longest` events."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, items + 1, rng.integers(least, longest + 1)).tolist() for _ in range(users)]


def config(**settings: object) -> UGTConfig:
    return UGTConfig(**{"d_model": 16, "d_ffn": 24, "d_expert": 12, "max_events": 12, "rel_bias_size": 6, **settings})  # type: ignore[arg-type]


def model(items: int = 30, sizes: Sequence[int] = (4, 4, 4), seed: int = 0, **settings: object) -> UGT:
    """In evaluation mode, every parameter random, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(seed)
    ids = semantic_ids(items, sizes, seed)
    vocabulary = ModelVocabulary(items, ids.codebook_sizes, (items + 1, *TYPE_SIZES.values()))
    ugt = UGT(config(**settings), vocabulary, torch.from_numpy(ids.codes))
    with torch.no_grad():
        for parameter in ugt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if ugt.config.transitions:
        ugt.remember(
            strongest_transitions([sequences(random_users(40, items, 20, seed))], items, ugt.config.transitions)
        )
    return ugt.eval()


def write_inputs(directory: Path, users: int = 20, events: int = 16) -> tuple[Path, Path]:
    """Features and semantic ids of a slice of the shipped MovieLens log → their directories.

    The slice is each of the first `users` users' first `events` ratings of the 80 films they rated most.
    """
    rows = [row for row in _rows("ratings.csv") if int(row["userId"]) <= users]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["movieId"]] = counts.get(row["movieId"], 0) + 1
    films = set(sorted(counts, key=lambda film: (-counts[film], film))[:80])
    kept: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["movieId"] in films and len(kept.setdefault(row["userId"], [])) < events:
            kept[row["userId"]].append(row)
    _write(directory / "ratings.csv", [row for user in kept.values() for row in user])
    _write(directory / "movies.csv", [row for row in _rows("movies.csv") if row["movieId"] in films])
    features, ids = directory / "features", directory / "tokenizer"
    build_features(
        FeaturesConfig(
            directory / "ratings.csv", features, items=directory / "movies.csv",
            text_dim=4, cooccurrence_dim=4, threads=1,
        )
    )  # fmt: skip
    ids.mkdir()
    catalogue = load_catalogue(features)
    save_semantic_ids(ids, catalogue, semantic_ids(catalogue.size, (8, 8, 8)))
    return features, ids


def _rows(name: str) -> list[dict[str, str]]:
    with open(MOVIELENS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

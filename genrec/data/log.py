"""The log as tables of an engine: ordered, counted, numbered and cut. The one definition of what the features are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from genrec.data.buckets import quantile_edges
from genrec.data.config import FeaturesConfig
from genrec.data.context import ContextIds
from genrec.data.engine import Engine
from genrec.data.previous import Previous, context_without_ids
from genrec.data.readers import LogColumns
from genrec.data.split import PARTS, ByTime, time_text
from genrec.data.vocabulary import GAP_EDGES, Vocabulary

_PLACES_PER_BUCKET = 20  # bits
_TRAINING = "(SELECT * FROM log WHERE trains) AS training"


@dataclass(frozen=True)
class LogCounts:
    """What became of the log."""

    users: int  # kept
    dropped_users: int  # had fewer than min_events
    dropped_events: int  # theirs
    events: int  # kept, after the cut to max_events
    cut_events: int  # older than the last max_events before the split's


def order_log(engine: Engine, config: FeaturesConfig, columns: LogColumns) -> LogCounts:
    """From `parsed` make `log` (user number, user_id, item, rating, weight, time, action, context_0 …, n, kept,
    trains): n
    counts a user's events from 0 in the order of time and then of the files; time in seconds; kept tells what
    max_events leaves, trains what neither validation nor test holds; user_id only with the first event that is kept.
    Users are numbered in the order in which the files first mention them. `parsed` is dropped.

    Raises ValueError if no event can be used or no user has min_events.
    """
    split, seconds = config.cuts(), f"time // {_ticks_per_second(engine)}"
    later, trains = "false", f"n < events - {config.holdout}"
    if isinstance(split, ByTime):
        if columns.time is None:
            raise ValueError(f"split is time, but {config.events_name} has no column of times; pass --time")
        later, trains = f"{seconds} >= {split.valid_from}", f"{seconds} < {split.valid_from}"
    if config.session_gap and columns.time is None:
        raise ValueError(
            f"session_gap is {config.session_gap}, but {config.events_name} has no column of times; pass --time"
        )
    engine.create(
        "all_users",
        f"""
        SELECT user, count(*) AS events, count(*) FILTER (WHERE {later}) AS later, min(place) AS place
        FROM parsed WHERE problem IS NULL GROUP BY user""",
    )
    counts = _count_users(engine, config)
    # Numbered within buckets of places, so that no machine has to sort all users.
    engine.create(
        "users",
        f"""
        WITH usual AS (
            SELECT user, events, later, place, place >> {_PLACES_PER_BUCKET} AS bucket FROM all_users
            WHERE events >= {config.min_events}),
        sizes AS (SELECT bucket, count(*) AS size FROM usual GROUP BY bucket),
        buckets AS (SELECT bucket, CAST(sum(size) OVER (ORDER BY bucket) AS BIGINT) - size AS before FROM sizes)
        SELECT user, events, later, before + row_number() OVER (PARTITION BY bucket ORDER BY place) - 1 AS number
        FROM usual JOIN buckets USING (bucket)""",
    )
    names = ["action", "weight", *(f"context_{i}" for i in range(len(columns.context)))]
    others = "".join(f", {name}" for name in names)
    engine.create(
        "log",
        f"""
        WITH numbered AS (
            SELECT u.number, u.events, u.later, p.* FROM parsed p JOIN users u USING (user) WHERE p.problem IS NULL),
        ordered AS (
            SELECT *, CAST(row_number() OVER (PARTITION BY number ORDER BY time, place) - 1 AS BIGINT) AS n
            FROM numbered)
        SELECT number AS user, item, rating, {seconds} AS time{others}, n, {trains} AS trains,
            n >= events - later - {config.max_events} AS kept,
            CASE WHEN n = greatest(events - later - {config.max_events}, 0) THEN user END AS user_id
        FROM ordered""",
    )
    engine.drop("parsed", "all_users", "users")
    return counts


def count_split(engine: Engine, split: ByTime) -> dict[str, int]:
    """How many events of `log` train, and how many users have one to predict for validation and for the test.

    Raises ValueError if there are none.
    """
    found = _one_row(
        engine,
        f"""
        WITH spans AS (
            SELECT count(*) FILTER (WHERE trains) AS train,
                count(*) FILTER (WHERE NOT trains AND time < {split.test_from}) AS valid,
                count(*) FILTER (WHERE time >= {split.test_from}) AS test, min(time) AS time FROM log GROUP BY user)
        SELECT CAST(sum(train) AS BIGINT) AS training_events, min(time) AS time,
            count(*) FILTER (WHERE train > 0 AND valid > 0) AS valid_users,
            count(*) FILTER (WHERE train + valid > 0 AND test > 0) AS test_users FROM spans""",
    )
    first = found.pop("time")
    if not found["training_events"]:
        raise ValueError(
            f"valid_from is {time_text(split.valid_from)}, but the first event is at {time_text(first)}; expected "
            "events before it, to train on"
        )
    for part in PARTS:
        if not found[f"{part}_users"]:
            raise ValueError(split.nobody(part))
    return found


def build_vocabulary(engine: Engine, config: FeaturesConfig, columns: LogColumns, previous: Previous) -> Vocabulary:
    """Count `log` and make the tables `items` (item, index, seen, count), `actions` and `context_values_0` … (value,
    id).

    Items are numbered by falling count of the events that train, then by id; actions and context values by falling
    count, then by name. min_count holds in the whole log, with split time in the events that train. With
    include_unseen, items of table `described_items` that are nowhere in these events follow. Ids of `previous` stay,
    whatever the log says of them, and numbers go on behind them.
    """
    size, before = _number_items(engine, config, previous), previous.vocabulary
    names = before.action_names
    if columns.action:
        old = {name: number for number, name in enumerate(names, start=1)}
        names += _number_values(engine, config, "actions", "action", old, 1 + len(names))
    ratings, gaps = before.rating_edges, before.gap_edges
    if not before.version:
        ratings = () if names else _edges(engine, _counted(config), "rating", config.rating_buckets)
        gaps = GAP_EDGES if columns.time else ()
    return Vocabulary(
        items=size,
        action_names=names,
        rating_edges=ratings,
        gap_edges=gaps,
        context=_number_context(engine, config, columns, previous),
        min_count=config.min_count,
        version=before.version + 1,
        extends=previous.hash or None,
    )


def kept_events(config: FeaturesConfig, vocabulary: Vocabulary) -> str:
    """SQL for the last max_events of every user in `log`: part, user, n, user_id (with the first of them only), rating,
    time, item, action, context_0 … as ids, and as far as the vocabulary needs them unknown_item and weight."""
    joins = "LEFT JOIN items i ON l.item = i.item"
    ids = "coalesce(i.index, 0) AS item"
    if vocabulary.action_names:
        joins += " LEFT JOIN actions a ON l.action = a.value"
        ids += ", coalesce(a.id, 0) AS action"
    if any(run.kind == "hash" for run in vocabulary.context):
        ids += ", CASE WHEN i.index IS NULL THEN l.item END AS unknown_item"
    if any(run.kind == "weight" for run in vocabulary.context):
        ids += ", l.weight"
    for k in range(len(vocabulary.context_columns)):
        joins += f" LEFT JOIN context_values_{k} c{k} ON l.context_{k} = c{k}.value"
        ids += f", coalesce(c{k}.id, 0) AS context_{k}"
    return f"""
        SELECT CAST(l.user // {config.rows_per_file} AS INTEGER) AS part,
            l.user, l.n, l.user_id, l.rating, l.time, {ids}
        FROM log l {joins}
        WHERE l.kept"""


def count_pairs(engine: Engine, config: FeaturesConfig) -> dict[str, NDArray[Any]]:
    """How much two different known items stand within `window` events that train: a < b, weight, which sums
    lcm(1 … window) / distance, a whole number, so that its sum is exact in any order. Whole histories count, also what
    max_events cuts. Rows are ordered. Of more than max_pairs the heaviest are kept, of equal ones all or none; those
    that weigh most always are."""
    whole = lcm(*range(1, config.window + 1))
    before = ", ".join(
        f"{{'item': lag(item, {k}) OVER (PARTITION BY user ORDER BY n), 'weight': {whole // k}}}"
        for k in range(1, config.window + 1)
    )
    engine.create(
        "pairs",
        f"""
        WITH known AS (
            SELECT l.user, l.n, i.index AS item FROM log l LEFT JOIN items i ON l.item = i.item
            WHERE l.trains),
        lagged AS (SELECT item, [{before}] AS others FROM known),
        met AS (SELECT item, unnest(others) AS other FROM lagged)
        SELECT least(item, other.item) AS a, greatest(item, other.item) AS b,
            CAST(sum(other.weight) AS BIGINT) AS weight
        FROM met WHERE item <> other.item GROUP BY least(item, other.item), greatest(item, other.item)""",
    )
    lightest = _one_row(
        engine,
        f"""
        WITH sizes AS (SELECT weight, count(*) AS size FROM pairs GROUP BY weight),
        sums AS (SELECT weight, CAST(sum(size) OVER (ORDER BY weight DESC) AS BIGINT) AS as_heavy FROM sizes)
        SELECT coalesce(min(weight) FILTER (WHERE as_heavy <= {config.max_pairs}), max(weight), 0) AS weight
        FROM sums""",
    )["weight"]
    pairs = engine.fetch(f"SELECT a, b, weight FROM pairs WHERE weight >= {lightest} ORDER BY a, b")
    engine.drop("pairs")
    return {name: pairs[name].to_numpy() for name in ("a", "b", "weight")}


def _count_users(engine: Engine, config: FeaturesConfig) -> LogCounts:
    kept, dropped = f"events >= {config.min_events}", f"events < {config.min_events}"
    found = _one_row(
        engine,
        f"""
        SELECT count(*) FILTER (WHERE {kept}) AS users, count(*) FILTER (WHERE {dropped}) AS dropped,
            CAST(coalesce(sum(events) FILTER (WHERE {kept}), 0) AS BIGINT) AS events,
            CAST(coalesce(sum(events) FILTER (WHERE {dropped}), 0) AS BIGINT) AS dropped_events,
            CAST(coalesce(sum(least(events - later, {config.max_events}) + later) FILTER (WHERE {kept}), 0) AS BIGINT)
                AS cut,
            coalesce(max(events), 0) AS longest
        FROM all_users""",
    )
    if not found["longest"]:
        raise ValueError(f"{config.events_name} has no usable events; expected at least one record after its header")
    if not found["users"]:
        raise ValueError(
            f"no user has min_events = {config.min_events} events; the longest history has {found['longest']}"
        )
    return LogCounts(
        users=found["users"],
        dropped_users=found["dropped"],
        dropped_events=found["dropped_events"],
        events=found["cut"],
        cut_events=found["events"] - found["cut"],
    )


def _ticks_per_second(engine: Engine) -> int:
    """Times are seconds, milliseconds, micro- or nanoseconds; the largest tells, up to the year 5138."""
    bounds = _one_row(engine, "SELECT min(time) AS least, max(time) AS most FROM parsed WHERE problem IS NULL")
    largest = max(abs(bounds["least"] or 0), abs(bounds["most"] or 0))
    return next((ticks for ticks in (1, 10**3, 10**6) if largest < 10**11 * ticks), 10**9)


def _counted(config: FeaturesConfig) -> str:
    """The events that say what there is: with split time only those that train."""
    return _TRAINING if config.split == "time" else "log"


def _edges(engine: Engine, log: str, column: str, most: int) -> tuple[float, ...]:
    found = engine.fetch(f"""
        SELECT {column}, count(*) AS count FROM {log} WHERE {column} IS NOT NULL GROUP BY {column} ORDER BY {column}""")
    values = found[column].to_numpy().astype(np.float32)
    return quantile_edges(values, found["count"].to_numpy(), most) if len(values) else ()


def _number_items(engine: Engine, config: FeaturesConfig, previous: Previous) -> int:
    """Make `items`; how many there are."""
    unseen = "SELECT item, 0 AS seen, 0 AS count FROM described_items ANTI JOIN item_counts USING (item) UNION ALL"
    engine.put("old_items", previous.items.select(["item", "index"]))
    engine.create(
        "item_counts",
        f"""
        SELECT item, count(*) AS seen, count(*) FILTER (WHERE trains) AS count FROM {_counted(config)} GROUP BY item""",
    )
    engine.create(
        "items",
        f"""
        WITH wanted AS (
            {unseen if config.include_unseen else ""}
            SELECT item, seen, count FROM item_counts WHERE seen >= {config.min_count}),
        added AS (SELECT item, seen, count FROM wanted ANTI JOIN old_items USING (item))
        SELECT o.item, coalesce(c.seen, 0) AS seen, coalesce(c.count, 0) AS count, o.index
        FROM old_items o LEFT JOIN item_counts c ON o.item = c.item
        UNION ALL
        SELECT item, seen, count, CAST(
            row_number() OVER (ORDER BY count DESC, item) + {previous.vocabulary.items} AS INTEGER) AS index
        FROM added""",
    )
    engine.drop("item_counts", "old_items")
    size = _one_row(engine, "SELECT count(*) AS items FROM items")["items"]
    if not size:
        raise ValueError(f"no item has min_count = {config.min_count} events; lower min_count")
    return size


def _number_context(
    engine: Engine, config: FeaturesConfig, columns: LogColumns, previous: Previous
) -> tuple[ContextIds, ...]:
    runs = list(previous.vocabulary.context)
    for i, column in enumerate(columns.context):
        first = 1 + sum(run.size for run in runs)
        values = _number_values(engine, config, f"context_values_{i}", f"context_{i}", previous.ids_of(column), first)
        if values or not previous.vocabulary.version:
            runs.append(ContextIds(column, values))
    if previous.vocabulary.version:
        return tuple(runs)
    for run in context_without_ids(config, columns)[len(columns.context) :]:
        if run.kind == "weight":
            run = replace(run, edges=_edges(engine, _TRAINING, "weight", config.weight_buckets))
        runs.append(run)
    return tuple(runs)


def _number_values(
    engine: Engine, config: FeaturesConfig, table: str, column: str, old: dict[str, int], first: int
) -> tuple[str, ...]:
    """Make `table` (value, id) of `old` and of the other values that reach min_count, which get ids from `first` on and
    are returned in their order."""
    ids = pa.array(old.values(), pa.int32())
    engine.put(f"old_{table}", pa.table({"value": pa.array(old, pa.string()), "id": ids}))
    engine.create(
        table,
        f"""
        WITH counted AS (
            SELECT {column} AS value, count(*) AS count FROM {_counted(config)} WHERE {column} IS NOT NULL
            GROUP BY {column} HAVING count(*) >= {config.min_count}),
        added AS (SELECT value, count FROM counted ANTI JOIN old_{table} USING (value))
        SELECT value, id FROM old_{table} UNION ALL
        SELECT value, CAST(row_number() OVER (ORDER BY count DESC, value) + {first - 1} AS INTEGER) AS id
        FROM added""",
    )
    return tuple(engine.fetch(f"SELECT value FROM {table} WHERE id >= {first} ORDER BY id")["value"].to_pylist())


def _one_row(engine: Engine, query: str) -> dict[str, Any]:
    """The only row of a query that always has one."""
    return engine.fetch(query).to_pylist()[0]

"""The log inside DuckDB: ordered, counted, cut, and read back as arrays in bounded pieces."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from genrec.data.config import FeaturesConfig
from genrec.data.readers import LogColumns, one_row
from genrec.data.vocabulary import GAP_EDGES, Vocabulary, encode_events, rating_edges
from genrec.interfaces import EventSequences


@dataclass(frozen=True)
class LogCounts:
    """What became of the log."""

    users: int  # kept
    dropped_users: int  # had fewer than min_events
    dropped_events: int  # theirs
    events: int  # kept, after the cut to max_events
    cut_events: int  # older than the last max_events


def order_log(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig) -> LogCounts:
    """From `events` make `users` (user, number, events) and `log` (user number, n, back, …): n counts a user's events
    from 0 in the order of time and then of the file, back counts from the end, 1 is the last. Users are numbered in the
    order in which the file first mentions them. `events` is dropped.

    Raises ValueError if no user has min_events.
    """
    connection.execute(
        "CREATE TABLE all_users AS SELECT user, count(*) AS events, min(line) AS line FROM events GROUP BY user"
    )
    connection.execute(f"""
        CREATE TABLE users AS SELECT user, row_number() OVER (ORDER BY line) - 1 AS number, events
        FROM all_users WHERE events >= {config.min_events}""")
    unit = _ticks_per_second(connection)
    connection.execute(f"""
        CREATE TABLE log AS
        SELECT u.number AS user, e.* EXCLUDE (user, line) REPLACE (e.time // {unit} AS time),
            row_number() OVER (PARTITION BY u.number ORDER BY e.time, e.line) - 1 AS n, u.events - n AS back
        FROM events e JOIN users u USING (user)""")
    connection.execute("DROP TABLE events")
    dropped_users, dropped_events, longest = one_row(
        connection,
        f"""
        SELECT count(*), coalesce(sum(events), 0)::BIGINT, (SELECT max(events) FROM all_users)
        FROM all_users WHERE events < {config.min_events}""",
    )
    users, events, kept = one_row(
        connection,
        f"""
        SELECT count(*), coalesce(sum(events), 0)::BIGINT, coalesce(sum(least(events, {config.max_events})), 0)::BIGINT
        FROM users""",
    )
    if not users:
        raise ValueError(f"no user has min_events = {config.min_events} events; the longest history has {longest}")
    return LogCounts(users, dropped_users, dropped_events, events=kept, cut_events=events - kept)


def build_vocabulary(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, columns: LogColumns) -> Vocabulary:
    """Count `log` and make the tables `items` (item, index, count), `actions` and `context_values_0` … (value, id).

    Items are numbered by falling count of the events outside the holdout, then by id; actions and context values by
    falling count, then by name.
    """
    unseen = "UNION ALL SELECT item, 0, 0 FROM item_file ANTI JOIN log USING (item)" if config.include_unseen else ""
    connection.execute(f"""
        CREATE TABLE items AS
        WITH counted AS (
            SELECT item, count(*) AS seen, count(*) FILTER (back > {config.holdout}) AS count FROM log GROUP BY item
            HAVING seen >= {config.min_count} {unseen})
        SELECT item, count, row_number() OVER (ORDER BY count DESC, item)::INTEGER AS index FROM counted""")
    size = one_row(connection, "SELECT count(*) FROM items")[0]
    if not size:
        raise ValueError(f"no item has min_count = {config.min_count} events; lower min_count")
    names = _number_values(connection, "actions", "action", config.min_count) if columns.action else ()
    context = []
    first = 1
    for i, column in enumerate(columns.context):
        values = _number_values(connection, f"context_values_{i}", f"context_{i}", config.min_count, first)
        context.append((column, values))
        first += len(values)
    ratings = (
        {}
        if names
        else connection.execute(
            "SELECT rating, count(*) AS count FROM log WHERE rating IS NOT NULL GROUP BY rating ORDER BY rating"
        ).fetchnumpy()
    )
    return Vocabulary(
        items=size,
        action_names=names,
        rating_edges=rating_edges(ratings["rating"], ratings["count"], config.rating_buckets) if ratings else (),
        gap_edges=GAP_EDGES if columns.time else (),
        context=tuple(context),
        min_count=config.min_count,
    )


def cut_log(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig, vocabulary: Vocabulary) -> None:
    """Make `kept`: the last max_events of every user, items, actions and context values as ids, in user order."""
    joins = "LEFT JOIN items i ON l.item = i.item"
    ids = "coalesce(i.index, 0) AS item"
    if vocabulary.action_names:
        joins += " LEFT JOIN actions a ON l.action = a.value"
        ids += ", coalesce(a.id, 0) AS action"
    for k in range(len(vocabulary.context)):
        joins += f" LEFT JOIN context_values_{k} c{k} ON l.context_{k} = c{k}.value"
        ids += f", coalesce(c{k}.id, 0) AS context_{k}"
    connection.execute(f"""
        CREATE TABLE kept AS SELECT l.user, l.n, l.rating, l.time, {ids} FROM log l {joins}
        WHERE l.back <= {config.max_events} ORDER BY l.user, l.n""")


def read_users(connection: duckdb.DuckDBPyConnection, vocabulary: Vocabulary, first: int, end: int) -> EventSequences:
    """Sequences of the users numbered first … end − 1 out of `kept`."""
    rows = connection.execute(
        f"SELECT * FROM kept WHERE user >= {first} AND user < {end} ORDER BY user, n"
    ).fetchnumpy()
    users = connection.execute(
        f"SELECT user FROM users WHERE number >= {first} AND number < {end} ORDER BY number"
    ).fetchall()
    per_user = np.bincount(rows["user"] - first, minlength=end - first)
    return encode_events(
        vocabulary,
        user_ids=np.array([user for (user,) in users], dtype=np.object_),
        cu_events=np.concatenate([[0], np.cumsum(per_user)]).astype(np.int64),
        item_ids=rows["item"].astype(np.int32),
        ratings=np.ma.filled(rows["rating"].astype(np.float32), np.nan),
        timestamps=np.ma.filled(rows["time"].astype(np.int64), 0) if vocabulary.gap_edges else None,
        actions=rows["action"] if vocabulary.action_names else None,
        context=[rows[f"context_{k}"] for k in range(len(vocabulary.context))],
    )


def count_pairs(connection: duckdb.DuckDBPyConnection, config: FeaturesConfig) -> dict[str, NDArray[np.int64]]:
    """How often two different known items stand `distance` ≤ window events apart outside the holdout: arrays a < b,
    distance, count, in this order. Whole histories count, also what max_events cuts."""
    lags = ", ".join(f"lag(item, {k}) OVER (PARTITION BY user ORDER BY n)" for k in range(1, config.window + 1))
    return connection.execute(f"""
        WITH known AS (SELECT user, n, i.index AS item FROM log l LEFT JOIN items i ON l.item = i.item
            WHERE back > {config.holdout}),
        lagged AS (SELECT item, [{lags}] AS before FROM known),
        pairs AS (SELECT item, unnest(before) AS other, generate_subscripts(before, 1) AS distance FROM lagged)
        SELECT least(item, other) AS a, greatest(item, other) AS b, distance, count(*) AS count FROM pairs
        WHERE item <> other GROUP BY ALL ORDER BY a, b, distance""").fetchnumpy()


def _ticks_per_second(connection: duckdb.DuckDBPyConnection) -> int:
    """Times are seconds, milliseconds, micro- or nanoseconds; the largest tells, up to the year 5138."""
    largest = one_row(connection, "SELECT coalesce(max(abs(time::HUGEINT)), 0) FROM events")[0]
    return next((ticks for ticks in (1, 10**3, 10**6) if largest < 10**11 * ticks), 10**9)


def _number_values(
    connection: duckdb.DuckDBPyConnection, table: str, column: str, min_count: int, first: int = 1
) -> tuple[str, ...]:
    connection.execute(f"""
        CREATE TABLE {table} AS
        SELECT value, (row_number() OVER (ORDER BY count DESC, value) + {first - 1})::INTEGER AS id
        FROM (SELECT {column} AS value, count(*) AS count FROM log WHERE value IS NOT NULL GROUP BY value)
        WHERE count >= {min_count}""")
    return tuple(value for (value,) in connection.execute(f"SELECT value FROM {table} ORDER BY id").fetchall())

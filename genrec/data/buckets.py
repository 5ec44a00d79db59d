"""Numbers as ids: how many lower bounds of buckets are ≤ the number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantile_edges(values: NDArray[np.float32], counts: NDArray[np.int64], most: int) -> tuple[float, ...]:
    """Lower bounds of at most `most` buckets: the distinct values (ascending, with how often each occurs), or quantiles
    if there are more."""
    if len(values) > most:
        share = (np.cumsum(counts) - counts) / counts.sum()  # of what lies below each distinct one
        bucket = np.floor(share * most)
        values = values[np.concatenate([[True], bucket[1:] != bucket[:-1]])]
    return tuple(float(str(value)) for value in values)  # the shortest decimal that gives this float32 back


def value_bucket(edges: tuple[float, ...], values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Number of edges ≤ value; 0 where the value is NaN."""
    bucket = np.searchsorted(np.array(edges, np.float32), values, side="right")
    return np.where(np.isnan(values), 0, bucket).astype(np.int32)


def gap_bucket(
    edges: tuple[int, ...], timestamps: NDArray[np.int64], cu_events: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Bucket of the seconds since the user's event before; 0 for the first event."""
    gaps = np.diff(timestamps, prepend=timestamps[:1])
    bucket = np.searchsorted(np.array(edges, np.int64), gaps, side="right").astype(np.int32)
    bucket[_first_events(cu_events)] = 0
    return bucket


def place_in_session(timestamps: NDArray[np.int64], cu_events: NDArray[np.int64], gap: int) -> NDArray[np.int64]:
    """1 for the first event of a session, 2 for the next, …; a session ends where `gap` seconds or more pass."""
    starts = np.diff(timestamps, prepend=timestamps[:1]) >= gap
    starts[_first_events(cu_events)] = True
    number = np.arange(len(timestamps))
    return number - np.maximum.accumulate(np.where(starts, number, 0)) + 1


def _first_events(cu_events: NDArray[np.int64]) -> NDArray[np.int64]:
    return cu_events[:-1][np.diff(cu_events) > 0]

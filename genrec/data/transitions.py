"""How often an item came soon after another in a log: what the item head remembers, and a baseline counts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genrec.interfaces import OOV, EventSequences, Transitions

# 1/d for a successor d = 1, 2, 3 events later, as whole numbers (times 6): sums stay exact, so equal scores are equal
# whatever the order of adding.
DISTANCE_WEIGHTS = np.array([6, 3, 2])
SPARE = 16  # of a log in chunks, how many times as many successors are kept while counting as in the end


def count_transitions(sequences: EventSequences, catalogue_size: int) -> sparse.csr_matrix:
    """(N + 1, N + 1) int64, from a to b: how often b came d = 1, 2, 3 events after a, each time counted 6/d."""
    users, items = known_events(sequences)
    before, after, weight = [], [], []
    for distance, distance_weight in enumerate(DISTANCE_WEIGHTS, start=1):
        same_user = users[distance:] == users[:-distance]
        before.append(items[:-distance][same_user])
        after.append(items[distance:][same_user])
        weight.append(np.full(same_user.sum(), distance_weight))
    pairs = (np.concatenate(before), np.concatenate(after))
    shape = (catalogue_size + 1, catalogue_size + 1)
    return sparse.csr_matrix((np.concatenate(weight), pairs), shape=shape)


def strongest_transitions(chunks: Iterable[EventSequences], catalogue_size: int, k: int) -> Transitions:
    """The k successors b of every item a with the largest weights count(a → b) / sqrt(n_b), n_b the events of b.

    count is that of `count_transitions`, in units of 1. A log of one chunk is counted exactly; of a longer one, the
    16 k most frequent successors of every item are carried from chunk to chunk.
    """
    counts = sparse.csr_matrix((catalogue_size + 1, catalogue_size + 1), dtype=np.int64)
    events = np.zeros(catalogue_size + 1, np.int64)
    for number, sequences in enumerate(chunks):
        if number > 0:
            counts = _largest(counts, SPARE * k).tocsr()
        counts = counts + count_transitions(sequences, catalogue_size)
        events += np.bincount(sequences.item_ids, minlength=catalogue_size + 1)
    scale = sparse.diags(1 / (DISTANCE_WEIGHTS[0] * np.sqrt(np.maximum(events, 1))))
    kept = _largest((counts @ scale).tocsr(), k)
    table = Transitions(np.zeros((catalogue_size + 1, k), np.int32), np.zeros((catalogue_size + 1, k), np.float32))
    place = number_within(kept.row)
    table.items[kept.row, place], table.weights[kept.row, place] = kept.col, kept.data
    return table


def known_events(sequences: EventSequences) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(user number, item index) of every event whose item is in the vocabulary."""
    users = np.repeat(np.arange(len(sequences)), np.diff(sequences.cu_events))
    known = sequences.item_ids != OOV
    return users[known], sequences.item_ids[known].astype(np.int64)


def number_within(groups: NDArray) -> NDArray[np.int64]:
    """0, 1, 2, … within each run of equal values."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _largest(matrix: sparse.csr_matrix, k: int) -> sparse.coo_matrix:
    """The k largest entries of every row, largest first, of equal ones those in the first columns."""
    entries = matrix.tocoo()
    order = np.lexsort((entries.col, -entries.data, entries.row))
    order = order[number_within(entries.row[order]) < k]
    return sparse.coo_matrix((entries.data[order], (entries.row[order], entries.col[order])), shape=matrix.shape)

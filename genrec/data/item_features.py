"""Item features: what the text says beside what is consumed close together, each half with rows of length 1."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def item_features(
    texts: Sequence[str],
    pairs: dict[str, NDArray[Any]] | None,
    text_dim: int = 128,
    cooccurrence_dim: int = 128,
    text_encoder: str = "tfidf",
    seed: int = 0,
) -> NDArray[np.float32]:
    """(N + 1, text_dim + cooccurrence_dim) features of items 1 … N, row 0 zero.

    texts (N,) of items 1 … N; pairs: a, b, weight as `count_pairs` gives them, None if they are not wanted. Where one
    source has nothing to say about any item, the other takes all dimensions. An item with nothing to say in a half is
    zero there.
    Raises ValueError if neither source has anything.
    """
    dim = text_dim + cooccurrence_dim
    words = _encode(texts, text_encoder) if text_dim else None
    together = _ppmi(pairs, len(texts)) if cooccurrence_dim and pairs is not None and len(pairs["a"]) else None
    if words is None and together is None:
        raise ValueError(
            "items have no text and no two of them are consumed close together; give an item file with text"
        )
    if words is None or together is None:
        text_dim, cooccurrence_dim = (0, dim) if words is None else (dim, 0)
    halves = []
    importlib.import_module("sklearn.utils.extmath")  # it brings a BLAS, and only those that are there are limited
    with threadpool_limits(limits=1):  # BLAS sums in another order on another number of threads
        if words is not None:
            left, singular = _truncated_svd(words, text_dim, seed)
            halves.append(_unit_rows(left * singular, text_dim))
        if together is not None:
            left, singular = _truncated_svd(together, cooccurrence_dim, seed)
            halves.append(_unit_rows(left * np.sqrt(singular), cooccurrence_dim))
    features = np.concatenate(halves, axis=1).astype(np.float32)
    return np.concatenate([np.zeros((1, dim), np.float32), features])


def _encode(texts: Sequence[str], encoder: str) -> sparse.csr_matrix | NDArray[np.float64] | None:
    """One row per text, None if there is no word in any of them."""
    if not any(text.strip() for text in texts):
        return None
    return _minilm(texts) if encoder == "minilm" else _tfidf(texts)


def _tfidf(texts: Sequence[str]) -> sparse.csr_matrix | None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    usual = {"ngram_range": (1, 2), "sublinear_tf": True, "max_features": 60_000}
    attempts = [  # a handful of items may share no word, or have only short ones
        {"min_df": 2, "stop_words": "english"},
        {"min_df": 1, "stop_words": "english"},
        {"min_df": 1, "token_pattern": r"\w+"},
    ]
    for settings in attempts:
        try:
            return TfidfVectorizer(**usual, **settings).fit_transform(texts)
        except ValueError:  # no word is left
            continue
    return None


def _minilm(texts: Sequence[str]) -> NDArray[np.float64]:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise ValueError("text_encoder minilm needs sentence-transformers; pip install 'genrec[text]'") from None
    vectors = SentenceTransformer(_MINILM).encode(list(texts), show_progress_bar=True)
    return np.asarray(vectors, dtype=np.float64)


def _ppmi(pairs: dict[str, NDArray[Any]], items: int) -> sparse.csr_matrix:
    """Positive pointwise mutual information (N, N) of pairs by their weight, in whatever unit, contexts smoothed by the
    power 0.75 (Levy, Goldberg and Dagan 2015)."""
    places = (pairs["a"] - 1, pairs["b"] - 1)
    half = sparse.csr_matrix((pairs["weight"].astype(np.float64), places), shape=(items, items))
    matrix = half + half.T
    del half, places  # there may be many pairs: the rest happens in place
    item_weight = np.asarray(matrix.sum(axis=1)).ravel()
    context_share = item_weight**0.75 / (item_weight**0.75).sum()
    by_chance = np.repeat(item_weight, np.diff(matrix.indptr))
    by_chance *= context_share[matrix.indices]
    matrix.data /= by_chance
    np.log(matrix.data, out=matrix.data)
    np.maximum(matrix.data, 0, out=matrix.data)
    matrix.eliminate_zeros()
    return matrix


def _truncated_svd(
    matrix: sparse.csr_matrix | NDArray[np.float64], dim: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Left singular vectors (N, k) and singular values (k,), k ≤ dim, without those that are zero. The sign is fixed:
    the largest entry of every left vector is positive."""
    from sklearn.utils.extmath import randomized_svd

    rank = min(dim, *matrix.shape)
    left, singular, _ = randomized_svd(matrix, rank, n_iter=4, random_state=seed)
    real = singular > 1e-6 * max(singular[0], 1e-12)  # the vectors beyond the rank are noise
    left, singular = left[:, real], singular[real]
    largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    return left * np.sign(largest), singular


def _unit_rows(rows: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Rows of length 1, padded with zeros to `dim`; rows that are (almost) zero become zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.where(lengths > 1e-6, rows / np.maximum(lengths, 1e-6), 0.0)
    return np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))

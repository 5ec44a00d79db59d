"""Item features: what the text says beside what is consumed close together, each half with rows of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def item_features(
    texts: Sequence[str],
    pairs: dict[str, NDArray[np.int64]],
    text_dim: int = 128,
    cooccurrence_dim: int = 128,
    text_encoder: str = "tfidf",
    seed: int = 0,
) -> NDArray[np.float32]:
    """(N + 1, text_dim + cooccurrence_dim) features of items 1 … N, row 0 zero.

    texts (N,) of items 1 … N; pairs: a, b, distance, count as `count_pairs` gives them. Where one source has nothing to
    say about any item, the other takes all dimensions. An item with nothing to say in a half is zero there.
    Raises ValueError if neither source has anything.
    """
    dim = text_dim + cooccurrence_dim
    has_text, has_pairs = any(text.strip() for text in texts), len(pairs["a"]) > 0
    if not (has_text and text_dim) and not (has_pairs and cooccurrence_dim):
        raise ValueError(
            "items have no text and no two of them are consumed close together; give an item file with text"
        )
    if not has_text or not has_pairs:
        text_dim, cooccurrence_dim = (dim, 0) if has_text and text_dim else (0, dim)
    halves = [np.zeros((len(texts), 0))]
    with threadpool_limits(limits=1):  # BLAS sums in another order on another number of threads
        if text_dim:
            halves.append(_text_features(texts, text_dim, text_encoder, seed))
        if cooccurrence_dim:
            halves.append(_cooccurrence_features(pairs, len(texts), cooccurrence_dim, seed))
    features = np.concatenate(halves, axis=1).astype(np.float32)
    return np.concatenate([np.zeros((1, dim), np.float32), features])


def _text_features(texts: Sequence[str], dim: int, encoder: str, seed: int) -> NDArray[np.float64]:
    matrix = _minilm(texts) if encoder == "minilm" else _tfidf(texts)
    left, singular = _truncated_svd(matrix, dim, seed)
    return _unit_rows(left * singular, dim)


def _cooccurrence_features(pairs: dict[str, NDArray[np.int64]], items: int, dim: int, seed: int) -> NDArray[np.float64]:
    left, singular = _truncated_svd(_ppmi(pairs, items), dim, seed)
    return _unit_rows(left * np.sqrt(singular), dim)


def _tfidf(texts: Sequence[str]) -> sparse.csr_matrix:
    from sklearn.feature_extraction.text import TfidfVectorizer

    for min_df in (2, 1):  # a handful of items may share no word at all
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=min_df, sublinear_tf=True, stop_words="english", max_features=60_000
        )
        try:
            return vectorizer.fit_transform(texts)
        except ValueError:  # no word is left
            continue
    return sparse.csr_matrix((len(texts), 1))


def _minilm(texts: Sequence[str]) -> NDArray[np.float64]:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise ValueError("text_encoder minilm needs sentence-transformers; pip install 'genrec[text]'") from None
    vectors = SentenceTransformer(_MINILM).encode(list(texts), show_progress_bar=True)
    return np.asarray(vectors, dtype=np.float64)


def _ppmi(pairs: dict[str, NDArray[np.int64]], items: int) -> sparse.csr_matrix:
    """Positive pointwise mutual information (N, N), pairs weighted by 1 / distance, contexts smoothed by the power 0.75
    (Levy, Goldberg and Dagan 2015)."""
    weights = pairs["count"] / pairs["distance"]
    a, b = pairs["a"] - 1, pairs["b"] - 1
    rows, columns = np.concatenate([a, b]), np.concatenate([b, a])
    matrix = sparse.csr_matrix((np.tile(weights, 2), (rows, columns)), shape=(items, items))
    total = matrix.sum()
    item_weight = np.asarray(matrix.sum(axis=1)).ravel()
    context_share = item_weight**0.75 / (item_weight**0.75).sum()
    matrix = matrix.tocoo()
    information = np.log(matrix.data / (item_weight[matrix.row] * context_share[matrix.col]))
    positive = information > 0
    kept = (information[positive], (matrix.row[positive], matrix.col[positive]))
    assert total > 0
    return sparse.csr_matrix(kept, shape=(items, items))


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

"""Item features against dense formulas, and on catalogues that are too small or too silent for them."""

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from genrec.data.item_features import _ppmi, item_features

TEXTS = ["red apple fruit", "green apple fruit", "steel hammer tool", "steel saw tool", "", "red hammer"]


def pairs(*rows):
    """(a, b, weight) with a < b, sorted."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return dict(zip(("a", "b", "weight"), columns, strict=True))


PAIRS = pairs((1, 2, 75), (1, 3, 2), (3, 4, 40), (4, 6, 10))


def test_ppmi_is_the_formula():
    weight = np.zeros((6, 6))
    for a, b, together in zip(*PAIRS.values(), strict=True):
        weight[a - 1, b - 1] += together
        weight[b - 1, a - 1] += together
    total = weight.sum()
    joint, item = weight / total, weight.sum(axis=1) / total
    context = weight.sum(axis=0) ** 0.75 / (weight.sum(axis=0) ** 0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num(np.log(joint / np.outer(item, context)), nan=0.0, neginf=0.0).clip(min=0)
    np.testing.assert_allclose(_ppmi(PAIRS, 6).toarray(), expected, rtol=1e-12)
    assert (expected > 0).sum() > 4


def test_cooccurrence_half_is_the_svd_of_ppmi():
    """With all dimensions kept, products of unscaled rows are those of U S Uᵀ, whatever signs the vectors have."""
    found = item_features([""] * 6, PAIRS, text_dim=3, cooccurrence_dim=3)[1:]
    left, singular, _ = np.linalg.svd(_ppmi(PAIRS, 6).toarray())
    rows = left * np.sqrt(singular)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    rows[4] = 0  # item 5 never co-occurs
    assert found.shape == (6, 6)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-5)


def test_halves():
    features = item_features(TEXTS, PAIRS, text_dim=4, cooccurrence_dim=6)
    assert features.shape == (7, 10)
    assert features.dtype == np.float32
    text, together = features[1:, :4], features[1:, 4:]
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), [1, 1, 1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 1, 1, 0, 1], atol=1e-6)
    assert text[0] @ text[1] > text[0] @ text[3] + 0.5
    assert not features[0].any()


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([""] * 6, PAIRS),
        (TEXTS, pairs()),
        (["?", "-", "", "", "", ""], PAIRS),
        (["one", "two", "", "", "", "six"], pairs()),
        (["A", "B", "", "", "", "6"], pairs()),
    ],
)
def test_one_source_takes_all_dimensions(texts, found):
    features = item_features(texts, found, text_dim=30, cooccurrence_dim=34)
    assert features.shape == (7, 64)
    lengths = np.linalg.norm(features[1:], axis=1)
    assert np.isin(np.round(lengths, 5), [0, 1]).all()
    assert lengths.sum() >= 3


def test_nothing_to_say_is_refused():
    with pytest.raises(ValueError, match="items have no text and no two of them are consumed close together"):
        item_features([""] * 3, pairs())
    with pytest.raises(ValueError, match="items have no text"):
        item_features(["a film"] * 3, pairs(), text_dim=0)
    with pytest.raises(ValueError, match="items have no text"):
        item_features(["?", "!", ""], pairs())


def test_same_bits_and_fixed_signs():
    one = item_features(TEXTS, PAIRS, 4, 3)
    assert one.tobytes() == item_features(TEXTS, PAIRS, 4, 3).tobytes()
    np.testing.assert_allclose(one, item_features(TEXTS, PAIRS, 4, 3, seed=1), atol=1e-5)


def test_minilm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"needs sentence-transformers; pip install 'genrec\[text\]'"):
        item_features(TEXTS, PAIRS, text_encoder="minilm")


def test_minilm_embeddings_are_reduced(monkeypatch):
    class Encoder:
        def __init__(self, name):
            assert name == "sentence-transformers/all-MiniLM-L6-v2"

        def encode(self, texts, show_progress_bar):
            letters = "abcdefghijklmnopqrstuvwxyz"
            return np.array([[text.count(letter) for letter in letters] for text in texts], np.float32)

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    features = item_features(TEXTS, pairs(), text_dim=4, cooccurrence_dim=0, text_encoder="minilm")[1:]
    assert features.shape == (6, 4)
    assert features[0] @ features[1] > features[0] @ features[3]


def test_every_blas_is_limited_from_the_first_call_on():
    """One that is loaded later would sum on all cores, and the first features would differ from the next by an ulp."""
    code = """
import numpy as np
from threadpoolctl import threadpool_info
from genrec.data import item_features as module
svd = module._truncated_svd
def watched(*arguments):
    result = svd(*arguments)
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    assert blas and {library["num_threads"] for library in blas} == {1}, blas
    return result
module._truncated_svd = watched
pairs = {"a": [1, 2], "b": [2, 3], "weight": [3, 4]}
module.item_features([""] * 3, {name: np.array(values) for name, values in pairs.items()}, 0, 2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)

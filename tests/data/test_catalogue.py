"""Items and semantic ids to disk and back, in the order of the catalogue."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.data.catalogue import (
    load_catalogue,
    load_semantic_ids,
    save_catalogue,
    save_semantic_ids,
    vocabulary_hash,
)
from genrec.data.context import ContextIds
from genrec.data.vocabulary import Vocabulary
from genrec.interfaces import Catalogue, SemanticIds


@pytest.fixture
def catalogue():
    return Catalogue(
        item_ids=np.array(["", "b", "a", "c"], np.object_),
        titles=np.array(["", "B film", "Ä film", "c"], np.object_),
        counts=np.array([0, 5, 5, 1], np.int64),
        features=np.vstack([np.zeros(4), np.arange(12).reshape(3, 4)]).astype(np.float32),
    )


@pytest.fixture
def semantic_ids():
    return SemanticIds(np.array([[0, 0], [1, 2], [1, 3], [0, 2]], np.int64), (2, 4))


def test_the_hash_tells_vocabularies_apart():
    def hash_of(*ids, actions=(), context=()):
        names, zeros = np.array(["", *ids], np.object_), np.zeros(len(ids) + 1, np.int64)
        catalogue = Catalogue(names, names, zeros, np.zeros((len(ids) + 1, 2), np.float32))
        return vocabulary_hash(catalogue, Vocabulary(len(ids), actions, (), (), context, 1))

    others = (("b", "a"), ("a",), ("a", "b", "c"), ("ab",), ("a\nb",), ("a", "b\n"))
    hashes = [hash_of(*ids) for ids in (("a", "b"), *others)]
    hashes += [hash_of("a", "b", actions=("buy",)), hash_of("a", "b", context=(ContextIds("day", ("Mon",)),))]
    assert len(set(hashes)) == len(hashes)
    assert hash_of("a", "b") == hash_of("a", "b")


def test_catalogue_round_trip(tmp_path, catalogue):
    save_catalogue(tmp_path, catalogue)
    loaded = load_catalogue(tmp_path)
    assert loaded.size == 3
    for name in ("item_ids", "titles", "counts", "features"):
        value, expected = getattr(loaded, name), getattr(catalogue, name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def test_catalogue_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the output of genrec features"):
        load_catalogue(tmp_path)
    columns = {
        "item_index": [2, 1],
        "item_id": ["a", "b"],
        "title": ["", ""],
        "count": [1, 1],
        "features": [[1.0], [1.0]],
    }
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="item_index is not 1, 2"):
        load_catalogue(tmp_path)
    pq.write_table(pa.table({"item_index": [1]}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="has no column 'count'"):
        load_catalogue(tmp_path)
    (tmp_path / "items.parquet").write_text("junk")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load_catalogue(tmp_path)


def test_semantic_ids_round_trip(tmp_path, catalogue, semantic_ids):
    save_semantic_ids(tmp_path, catalogue, semantic_ids)
    table = pq.read_table(tmp_path / "semantic_ids.parquet")
    assert table.schema.equals(pa.schema([("item_id", pa.string()), ("codes", pa.list_(pa.int32()))]))
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"codebook_sizes": [2, 4]}
    shuffled = table.take([2, 0, 1])  # files come in any order; the catalogue's counts
    pq.write_table(shuffled, tmp_path / "semantic_ids.parquet")
    loaded = load_semantic_ids(tmp_path, catalogue)
    np.testing.assert_array_equal(loaded.codes, semantic_ids.codes)
    assert loaded.codes.dtype == np.int64
    assert loaded.codebook_sizes == (2, 4)


def test_index_json(tmp_path, catalogue):
    path = tmp_path / "X.index.json"
    index = {"a": ["<a_1>", "<b_3>"], "b": ["<a_1>", "<b_20>"], "c": ["<a_0>", "<b_2>"], "unknown": ["<a_7>", "<b_0>"]}
    path.write_text(json.dumps(index))
    loaded = load_semantic_ids(path, catalogue)
    assert loaded.codes.tolist() == [[0, 0], [1, 20], [1, 3], [0, 2]]
    assert loaded.codebook_sizes == (8, 21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "has no codes for 1 of 3 items, the first is 'a'"),
        ({"a": ["<a_0>", "<b_2>"]}, "items 'a' and 'c' share the codes"),
        ({"a": ["<a_0>"]}, "item 'a' has 1 codes; expected 2"),
        ({"a": ["1", "2"]}, "expected words such as '<a_1>'"),
        ({"a": 5}, "item 'a' has 5; expected words such as"),
    ],
)
def test_index_json_refusals(tmp_path, catalogue, change, message):
    index = {"a": ["<a_1>", "<b_3>"], "b": ["<a_1>", "<b_2>"], "c": ["<a_0>", "<b_2>"]} | change
    path = tmp_path / "X.index.json"
    path.write_text(json.dumps({item: words for item, words in index.items() if words is not None}))
    with pytest.raises(ValueError, match=message):
        load_semantic_ids(path, catalogue)


def test_semantic_id_refusals(tmp_path, catalogue, semantic_ids):
    with pytest.raises(FileNotFoundError, match="expected the output of genrec tokenize"):
        load_semantic_ids(tmp_path, catalogue)
    twins = SemanticIds(np.array([[0, 0], [1, 2], [1, 2], [0, 2]]), (2, 4))
    with pytest.raises(ValueError, match="items 'b' and 'a' share the codes"):
        save_semantic_ids(tmp_path, catalogue, twins)
    with pytest.raises(ValueError, match=r"item 'a' has code 3 in level 1; expected 0 … 2"):
        save_semantic_ids(tmp_path, catalogue, SemanticIds(semantic_ids.codes, (2, 3)))
    with pytest.raises(ValueError, match=r"codes have shape \(2, 2\); expected \(3, 2\)"):
        save_semantic_ids(tmp_path, catalogue, SemanticIds(semantic_ids.codes[:3], (2, 4)))
    save_semantic_ids(tmp_path, catalogue, semantic_ids)
    (tmp_path / "tokenizer.json").write_text('{"codebook_sizes": [2, 0]}')
    with pytest.raises(ValueError, match="expected a list of positive integers"):
        load_semantic_ids(tmp_path, catalogue)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_semantic_ids(tmp_path, catalogue)

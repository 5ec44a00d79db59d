"""The items and their semantic ids, from and to disk."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genrec.data.files import atomic_file, read_json
from genrec.data.vocabulary import Vocabulary
from genrec.interfaces import Catalogue, SemanticIds


def item_schema(feature_dim: int) -> pa.Schema:
    """Columns of items.parquet, one row per item 1 … N in the order of item_index."""
    features = pa.list_(pa.float32(), feature_dim)
    names_and_types = [("item_index", pa.int32()), ("item_id", pa.string()), ("title", pa.string())]
    return pa.schema([*names_and_types, ("count", pa.int64()), ("features", features)])


def save_catalogue(directory: Path, catalogue: Catalogue) -> None:
    """Write items.parquet into `directory`."""
    features = catalogue.features[1:]
    columns = [
        pa.array(np.arange(1, catalogue.size + 1), pa.int32()),
        pa.array(catalogue.item_ids[1:], pa.string()),
        pa.array(catalogue.titles[1:], pa.string()),
        pa.array(catalogue.counts[1:], pa.int64()),
        pa.FixedSizeListArray.from_arrays(pa.array(features.ravel(), pa.float32()), features.shape[1]),
    ]
    table = pa.Table.from_arrays(columns, schema=item_schema(features.shape[1]))
    with atomic_file(directory / "items.parquet") as path:
        pq.write_table(table, path, compression="zstd")


def vocabulary_hash(catalogue: Catalogue, vocabulary: Vocabulary) -> str:
    """sha256 of what every id means: the item ids in their order, and the values of the other token types."""
    meaning = json.dumps([catalogue.item_ids[1:].tolist(), vocabulary.meaning()], ensure_ascii=False)
    return hashlib.sha256(meaning.encode()).hexdigest()


def load_catalogue(directory: Path | str) -> Catalogue:
    """The items that `genrec features` wrote into `directory`.

    Raises FileNotFoundError if items.parquet is missing, ValueError if it is not what it should be.
    """
    path = Path(directory) / "items.parquet"
    table = read_parquet(path, "genrec features")
    missing = {"item_index", "item_id", "title", "count", "features"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}; expected the output of genrec features")
    if not np.array_equal(table["item_index"].to_numpy(), np.arange(1, len(table) + 1)):
        raise ValueError(f"{path}: item_index is not 1, 2, …, {len(table)}; run genrec features again")
    features = table["features"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return Catalogue(
        item_ids=_with_row_0(table["item_id"].to_pylist()),
        titles=_with_row_0(table["title"].to_pylist()),
        counts=np.concatenate([[0], table["count"].to_numpy()]).astype(np.int64),
        features=np.concatenate([np.zeros((1, features.shape[1]), np.float32), features.astype(np.float32)]),
    )


def save_semantic_ids(directory: Path, catalogue: Catalogue, semantic_ids: SemanticIds) -> None:
    """Write semantic_ids.parquet (item_id string, codes list<int32>) and tokenizer.json ({"codebook_sizes": […]})."""
    codes = semantic_ids.codes[1:]
    _check_codes(codes, semantic_ids.codebook_sizes, catalogue.item_ids[1:], directory)
    offsets = pa.array(np.arange(len(codes) + 1) * codes.shape[1], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(codes.ravel(), pa.int32()))
    table = pa.table({"item_id": pa.array(catalogue.item_ids[1:], pa.string()), "codes": lists})
    with atomic_file(directory / "semantic_ids.parquet") as path:
        pq.write_table(table, path, compression="zstd")
    with atomic_file(directory / "tokenizer.json") as path:
        path.write_text(json.dumps({"codebook_sizes": list(semantic_ids.codebook_sizes)}) + "\n")


def load_semantic_ids(path: Path | str, catalogue: Catalogue) -> SemanticIds:
    """Semantic ids in the order of `catalogue`, from the directory that `genrec tokenize` wrote or from an
    X.index.json (item → ["<a_1>", "<b_2>", …]; codebook sizes are then the largest code + 1). Items that the catalogue
    does not have are ignored.

    Raises ValueError if an item has no codes, two items share theirs, or a code lies outside its codebook.
    """
    path = Path(path)
    codes_of, sizes = _read_index_json(path) if path.name.endswith(".json") else _read_codes(path)
    items = catalogue.item_ids[1:]
    missing = [item for item in items if item not in codes_of]
    if missing:
        raise ValueError(f"{path} has no codes for {len(missing)} of {len(items)} items, the first is {missing[0]!r}")
    levels = len(sizes)
    ragged = next((item for item in items if len(codes_of[item]) != levels), None)
    if ragged is not None:
        raise ValueError(f"{path}: item {ragged!r} has {len(codes_of[ragged])} codes; expected {levels}")
    codes = np.array([codes_of[item] for item in items], dtype=np.int64).reshape(-1, levels)
    _check_codes(codes, sizes, items, path)
    return SemanticIds(np.concatenate([np.zeros((1, levels), np.int64), codes]), sizes)


def _read_codes(directory: Path) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    table = read_parquet(directory / "semantic_ids.parquet", "genrec tokenize")
    missing = {"item_id", "codes"} - set(table.column_names)
    if missing:
        raise ValueError(f"{directory / 'semantic_ids.parquet'} has no column {sorted(missing)[0]!r}")
    sizes = read_json(directory / "tokenizer.json", "genrec tokenize").get("codebook_sizes")
    if not isinstance(sizes, list) or not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"{directory / 'tokenizer.json'}: codebook_sizes is {sizes!r}; expected a list of positive integers"
        )
    return dict(zip(table["item_id"].to_pylist(), table["codes"].to_pylist(), strict=True)), tuple(sizes)


def _read_index_json(path: Path) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    codes_of = {}
    for item, words in read_json(path, "genrec tokenize").items():
        matches = [re.fullmatch(r"<[a-z]+_(\d+)>", str(word)) for word in words] if isinstance(words, list) else []
        if not matches or None in matches:
            raise ValueError(f"{path}: item {item!r} has {words!r}; expected words such as '<a_1>'")
        codes_of[item] = [int(match[1]) for match in matches if match]
    if not codes_of:
        raise ValueError(f"{path} is empty; expected item → ['<a_1>', …]")
    levels = max(map(len, codes_of.values()))
    sizes = (max(codes[level] for codes in codes_of.values() if len(codes) > level) + 1 for level in range(levels))
    return codes_of, tuple(sizes)


def _check_codes(codes: NDArray[np.int64], sizes: tuple[int, ...], items: NDArray[np.object_], where: Path) -> None:
    """Codes (N, levels) lie in their codebooks and no two rows are equal."""
    if codes.shape != (len(items), len(sizes)):
        raise ValueError(f"{where}: codes have shape {codes.shape}; expected {(len(items), len(sizes))}")
    outside = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
    if len(outside):
        row, level = outside[0]
        raise ValueError(
            f"{where}: item {items[row]!r} has code {codes[row, level]} in level {level}; "
            f"expected 0 … {sizes[level] - 1}"
        )
    _, first, row_of = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[row_of.ravel()] != np.arange(len(codes)))
    if len(repeated):
        row = repeated[0]
        twin = first[row_of.ravel()[row]]
        raise ValueError(
            f"{where}: items {items[twin]!r} and {items[row]!r} share the codes {codes[row].tolist()}; "
            "expected different codes for every item"
        )


def read_parquet(path: Path, writer: str) -> pa.Table:
    """The whole table; FileNotFoundError or ValueError names the file and the command that writes it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the output of {writer}")
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a readable Parquet file; run {writer} again") from None


def _with_row_0(values: list[str]) -> NDArray[np.object_]:
    return np.array(["", *values], dtype=np.object_)

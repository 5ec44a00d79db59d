"""genrec tokenize from the command line, on features of real films."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genrec.cli import main
from genrec.data.catalogue import load_catalogue, load_semantic_ids, save_catalogue
from genrec.data.item_features import item_features
from genrec.interfaces import Catalogue
from genrec.models.rqvae import RQVAEConfig, load_rqvae

MOVIES = Path(__file__).parents[2] / "data" / "ml-latest-small" / "movies.csv"
NO_PAIRS = {name: np.zeros(0, np.int64) for name in ("a", "b", "distance", "count")}
QUICK = ["--codebook_sizes", "[16,16,16]", "--hidden_sizes", "[]", "--epochs", "2"]


@pytest.fixture(scope="module")
def films():
    """700 real films as a catalogue with 32 features."""
    with open(MOVIES, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:700]
    texts = [f"{row['title']} {row['genres'].replace('|', ' ')}" for row in rows]
    features = item_features(texts, NO_PAIRS, text_dim=32, cooccurrence_dim=0)
    return catalogue([row["movieId"] for row in rows], features)


def catalogue(item_ids, features):
    names = np.array(["", *item_ids], dtype=object)
    return Catalogue(names, names, np.zeros(len(names), np.int64), features.astype(np.float32))


def part(films, rows):
    """The catalogue of these rows, 0-based, of `films`."""
    rows = np.array(rows)
    features = np.concatenate([np.zeros((1, films.features.shape[1])), films.features[1:][rows]])
    return catalogue(films.item_ids[1:][rows], features)


def tokenize(directory, films, out, *arguments):
    save_catalogue(directory, films)
    return main(["tokenize", "--features", str(directory), "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def first(films, tmp_path_factory):
    """The tokenizer directory of the first 600 films."""
    directory = tmp_path_factory.mktemp("first")
    assert tokenize(directory / "features", part(films, range(600)), directory / "tokenizer", *QUICK) == 0
    return directory / "tokenizer"


def ids_of(directory):
    table = pq.read_table(directory / "semantic_ids.parquet")
    return dict(zip(table["item_id"].to_pylist(), map(tuple, table["codes"].to_pylist()), strict=True))


def test_a_tokenizer_directory(first, films):
    items = part(films, range(600))
    ids = load_semantic_ids(first, items)
    assert ids.codebook_sizes == (16, 16, 16)
    assert len(np.unique(ids.codes[1:], axis=0)) == 600
    assert np.array_equal(load_semantic_ids(first / "index.json", items).codes, ids.codes)
    summary = json.loads((first / "tokenizer.json").read_text())
    assert summary["items"] == 600
    assert min(summary["quality"]["usage"]) > 0.95
    model = load_rqvae(first / "rqvae.safetensors", RQVAEConfig.from_json(summary["model"]))
    assert model.config.hidden_sizes == ()
    assert len((first / "metrics.jsonl").read_text().splitlines()) == 3
    assert (first / "tensorboard").is_dir()


def test_what_is_printed(films, tmp_path, capsys):
    assert tokenize(tmp_path / "features", part(films, range(100)), tmp_path / "out", *QUICK) == 0
    printed = capsys.readouterr()
    for word in ("level", "used", "perplexity", "items sharing an id", "moved", "mean squared error"):
        assert word in printed.out
    assert "larger than" not in printed.err


def test_the_same_input_gives_the_same_bytes(first, films, tmp_path):
    assert tokenize(tmp_path / "features", part(films, range(600)), tmp_path / "out", *QUICK) == 0
    for name in ("semantic_ids.parquet", "index.json", "tokenizer.json", "rqvae.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes(), name


def test_the_configs_that_are_shipped(films, tmp_path):
    for name in ("movielens", "amazon"):
        config = Path(__file__).parents[2] / "configs" / name / "tokenize.yaml"
        save_catalogue(tmp_path / "features", part(films, range(600)))
        places = ["--features", str(tmp_path / "features"), "--out", str(tmp_path / name), "--epochs", "0"]
        assert main(["tokenize", "--config", str(config), *places]) == 0
        assert load_semantic_ids(tmp_path / name, part(films, range(600))).codebook_sizes == (256, 256, 256)


def test_new_items_leave_old_ids_alone(first, films, tmp_path):
    shuffled = part(films, np.random.default_rng(0).permutation(700))
    assert tokenize(tmp_path / "features", shuffled, tmp_path / "out", "--add_to", str(first)) == 0
    before, after = ids_of(first), ids_of(tmp_path / "out")
    assert len(after) == 700 == len(set(after.values()))
    assert all(after[item] == codes for item, codes in before.items())
    assert len(load_semantic_ids(tmp_path / "out", shuffled).codes) == 701
    assert (tmp_path / "out" / "rqvae.safetensors").read_bytes() == (first / "rqvae.safetensors").read_bytes()
    summary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert (summary["items"], summary["added"]["items"]) == (700, 100)


def test_nothing_new_changes_nothing(first, films, tmp_path):
    assert tokenize(tmp_path / "features", part(films, range(600)), tmp_path / "out", "--add_to", str(first)) == 0
    assert ids_of(tmp_path / "out") == ids_of(first)


def test_ids_of_items_that_left_stay_reserved(first, films, tmp_path):
    assert tokenize(tmp_path / "features", part(films, range(300, 700)), tmp_path / "out", "--add_to", str(first)) == 0
    after = ids_of(tmp_path / "out")
    assert len(after) == 700 == len(set(after.values()))
    assert ids_of(first).items() <= after.items()


def test_features_made_anew_are_turned_back(first, films, tmp_path):
    """A refitted SVD turns the feature space; new items must land where the unturned features would have put them."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))
    turned = catalogue(films.item_ids[1:], films.features @ rotation)
    assert tokenize(tmp_path / "f1", films, tmp_path / "plain", "--add_to", str(first)) == 0
    assert tokenize(tmp_path / "f2", turned, tmp_path / "turned", "--add_to", str(first)) == 0
    plain, after = ids_of(tmp_path / "plain"), ids_of(tmp_path / "turned")
    assert ids_of(first).items() <= after.items()
    new = films.item_ids[601:].tolist()
    assert np.mean([plain[item][0] == after[item][0] for item in new]) > 0.9


def test_features_that_have_nothing_to_do_with_the_ids(first, films, tmp_path, capsys):
    noise = catalogue(films.item_ids[1:], np.random.default_rng(0).normal(size=films.features.shape))
    assert tokenize(tmp_path / "f1", noise, tmp_path / "out", "--add_to", str(first)) == 2
    assert "do not fit the ids" in capsys.readouterr().err
    strangers = part(films, range(600, 700))
    assert tokenize(tmp_path / "f2", strangers, tmp_path / "out", "--add_to", str(first)) == 2
    assert "none of the items that have ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_large_codebooks_are_warned_about(films, tmp_path, capsys):
    sizes = ["--codebook_sizes", "[8,64]", "--hidden_sizes", "[8]", "--epochs", "1", "--warmup_epochs", "1"]
    assert tokenize(tmp_path / "features", part(films, range(60)), tmp_path / "out", *sizes) == 0
    error = capsys.readouterr().err
    assert "codebooks of [8, 64] codes are larger than 60 items can fill" in error


def refusal(capsys, code, expected_code=2):
    """The one sentence a failed run leaves on stderr."""
    assert code == expected_code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_features_that_are_not_numbers(films, tmp_path, capsys):
    broken = part(films, range(60))
    broken.features[8, 3] = np.nan
    code = tokenize(tmp_path / "features", broken, tmp_path / "out", *QUICK)
    message = refusal(capsys, code)
    assert f"features of 1 of 60 items are NaN or infinite, the first is item {broken.item_ids[8]!r}" in message
    assert not (tmp_path / "out").exists()


def test_codebooks_that_are_too_small(films, tmp_path, capsys):
    code = tokenize(tmp_path / "features", films, tmp_path / "out", "--codebook_sizes", "[4,4]")
    assert "700 items do not fit into the 16 ids of codebook_sizes [4, 4]" in refusal(capsys, code)


def test_places_that_are_wrong(first, films, tmp_path, capsys):
    code = main(["tokenize", "--features", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert "items.parquet does not exist" in refusal(capsys, code)
    code = tokenize(tmp_path / "features", films, first, *QUICK)
    assert "already exists; pass --overwrite true" in refusal(capsys, code)
    code = tokenize(tmp_path / "features", films, tmp_path / "out", "--add_to", str(tmp_path / "features"))
    assert "tokenizer.json does not exist" in refusal(capsys, code)
    (tmp_path / "features" / "tokenizer.json").write_text('{"codebook_sizes": [4]}')
    code = tokenize(tmp_path / "features", films, tmp_path / "out", "--add_to", str(tmp_path / "features"))
    assert "does not describe a model" in refusal(capsys, code)
    (tmp_path / "features" / "tokenizer.json").write_text("{")
    code = tokenize(tmp_path / "features", films, tmp_path / "out", "--add_to", str(tmp_path / "features"))
    assert "features/tokenizer.json does not describe a model" in refusal(capsys, code)


def test_the_features_are_not_overwritten(films, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "features"):
        code = tokenize(tmp_path / "features", films, out, "--overwrite", "true", *QUICK)
        assert "holds the input" in refusal(capsys, code)
    assert load_catalogue(tmp_path / "features").size == films.size


def test_a_tokenizer_is_extended_in_place(first, films, tmp_path):
    shutil.copytree(first, tmp_path / "tokenizer")
    arguments = ("--add_to", str(tmp_path / "tokenizer"), "--overwrite", "true")
    assert tokenize(tmp_path / "features", films, tmp_path / "tokenizer", *arguments) == 0
    assert len(ids_of(tmp_path / "tokenizer")) == films.size


def test_the_damaged_ids_of_a_tokenizer_are_named(first, films, tmp_path, capsys):
    shutil.copytree(first, tmp_path / "old")
    (tmp_path / "old" / "semantic_ids.parquet").write_text("x")
    code = tokenize(tmp_path / "features", films, tmp_path / "out", "--add_to", str(tmp_path / "old"))
    assert "semantic_ids.parquet is not a readable Parquet file; run genrec tokenize again" in refusal(capsys, code)


def test_features_of_another_width(first, films, tmp_path, capsys):
    narrow = catalogue(films.item_ids[1:], films.features[:, :16])
    code = tokenize(tmp_path / "features", narrow, tmp_path / "out", "--add_to", str(first))
    assert "expected (items, 32)" in refusal(capsys, code)


def test_a_catalogue_comes_back_as_it_was(films, tmp_path):
    save_catalogue(tmp_path, films)
    assert np.array_equal(load_catalogue(tmp_path).features, films.features)

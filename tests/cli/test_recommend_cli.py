"""genrec recommend as a user types it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.cli import main
from genrec.data.catalogue import load_catalogue
from genrec.data.sequences import load_sequences, take_users
from genrec.generation import Recommender
from genrec.generation.storage import load_model


@pytest.fixture
def recommend(trained, capsys):
    """recommend(arguments …) → what was printed."""

    def run(*arguments, model=trained / "model"):
        assert main(["recommend", "--model", str(model), *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def catalogue(trained):
    return load_catalogue(trained / "features")


def test_a_user_of_the_log(recommend, trained, catalogue):
    answer = json.loads(recommend("--user", "3", "--json", "true", "--top_k", "6"))
    assert answer["user_id"] == "3"
    sequences = load_sequences(trained / "features")
    user = take_users(sequences, np.flatnonzero(sequences.user_ids == "3"))
    items, scores = Recommender(*load_model(trained / "model")).rank_scored(user, 6)
    assert [row["item_id"] for row in answer["items"]] == catalogue.item_ids[items[0]].tolist()
    assert [row["title"] for row in answer["items"]] == catalogue.titles[items[0]].tolist()
    assert [row["score"] for row in answer["items"]] == pytest.approx(scores[0].tolist())
    assert not {row["item_id"] for row in answer["items"]} & set(catalogue.item_ids[user.item_ids])


def test_tables_show_titles(recommend, trained, catalogue):
    text = recommend("--user", "3", "--top_k", "3")
    answer = json.loads(recommend("--user", "3", "--top_k", "3", "--json", "true"))
    assert "history of 3, the last 10" in text
    assert "★" in text
    for row in answer["items"]:
        assert row["title"][:20] in text


def test_titles_and_ids_name_the_same_history(recommend, catalogue):
    titles, ids = catalogue.titles[[5, 9, 2]].tolist(), catalogue.item_ids[[5, 9, 2]].tolist()
    by_title = json.loads(recommend("--history", json.dumps(titles), "--json", "true"))
    by_id = json.loads(recommend("--history", json.dumps(ids), "--json", "true"))
    assert by_title == by_id
    assert by_title["user_id"] == "you"
    assert len(by_title["items"]) == 10
    assert not set(ids) & {row["item_id"] for row in by_title["items"]}
    other = json.loads(recommend("--history", json.dumps(titles[::-1]), "--json", "true"))
    assert other["items"] != by_title["items"], "the order of a history matters"
    assert titles[0] in recommend("--history", json.dumps(titles))


def test_seen_items_on_request(recommend, catalogue):
    everything = ["--top_k", "1000", "--json", "true", "--history", json.dumps(catalogue.titles[[1, 2]].tolist())]
    ids = {row["item_id"] for row in json.loads(recommend(*everything))["items"]}
    assert ids == set(catalogue.item_ids[3:])
    ids = {row["item_id"] for row in json.loads(recommend(*everything, "--include_seen", "true"))["items"]}
    assert ids == set(catalogue.item_ids[1:])


def test_titles_that_look_like_markup(recommend, trained, tmp_path):
    for name in ("features", "tokenizer", "model"):
        shutil.copytree(trained / name, tmp_path / name)
    path = tmp_path / "features" / "items.parquet"
    table = pq.read_table(path)
    titles = pa.array([f"[/red] :smile: [{n}]" for n in range(len(table))])
    pq.write_table(table.set_column(table.schema.get_field_index("title"), "title", titles), path)
    text = recommend("--user", "3", "--features", str(tmp_path / "features"))
    assert text.count("[/red] :smile: [") == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user", "nobody"], ("user 'nobody' is not in", "expected one of its", "such as 2, 3, 4")),
        (["--user", "007"], ("user '007'",)),
        (["--history", '["No Such Film (1900)"]'], ("'No Such Film (1900)' is neither an item id nor a title",)),
        (["--history", "[]"], ("history is empty; expected at least one",)),
        ([], ("expected either --user or --history, and not both",)),
        (["--user", "1", "--history", '["x"]'], ("expected either --user or --history, and not both",)),
        (["--user", "1", "--top_k", "0"], ("top_k is 0; expected 1 or more",)),
        (["--user", "1", "--features", "nowhere"], ("nowhere",)),
        (["--user", "1", "--modl", "x"], ("--modl",)),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(trained, refused, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(["recommend", "--model", str(trained / "model"), *arguments], 2, *words)

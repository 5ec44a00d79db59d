"""genrec evaluate as a user types it."""

import itertools
import json
import shutil

import numpy as np
import pytest

from genrec.cli import main
from genrec.data.sequences import load_sequences
from genrec.evaluation.comparison import compare, summary
from genrec.generation.storage import load_model

RANKERS = {"ugt", "ugt_beam", "ugt_item_head", "popularity", "transition"}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    assert main(["evaluate", "--model", str(trained / "model"), "--out", str(out), "--title", "A <small> run"]) == 0
    return out


def test_metrics(evaluated, trained):
    record = json.loads((evaluated / "metrics.json").read_text())
    assert set(record["test"]) == RANKERS == set(record["test_liked"])
    for values in record["test"].values():
        assert set(values) >= {f"{kind}@{k}" for kind in ("recall", "ndcg") for k in (5, 10, 20)}
        assert all(0 <= value <= 1 for value in values.values())
        assert values["valid_item_rate"] == 1.0
        assert values["recall@5"] <= values["recall@10"] <= values["recall@20"]
    model, settings = load_model(trained / "model")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["alpha"], record["beams"]) == (settings.alpha, settings.beams)
    expected = summary(compare(model, settings, load_sequences(trained / "features"), 2, 4.0))
    assert {key: record[key] for key in expected} == json.loads(json.dumps(expected))


def test_report_is_one_page_about_this_run(evaluated):
    page = (evaluated / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "A &lt;small&gt; run" in page
    for words in ("Pretrain", "Finetune", "Align", "Router load", "item head weight", "is recommended"):
        assert words in page
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page.replace("http://www.w3.org", "")


def test_table_and_paths_are_printed(trained, tmp_path, capsys):
    out = tmp_path / "with [red] in it"
    assert main(["evaluate", "--model", str(trained / "model"), "--out", str(out), "--examples", "0"]) == 0
    text = capsys.readouterr().out
    assert "ndcg@10" in text
    assert f"metrics → {out / 'metrics.json'}   page → {out / 'report.html'}" in text


def test_same_run_same_bytes(trained, evaluated, tmp_path):
    assert (
        main(["evaluate", "--model", str(trained / "model"), "--out", str(tmp_path), "--title", "A <small> run"]) == 0
    )
    for name in ("metrics.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


def test_out_is_beside_the_model_by_default(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "run" / "model")
    assert main(["evaluate", "--model", str(tmp_path / "run" / "model"), "--examples", "1"]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_refit_is_compared_with_baselines_that_know_as_much(trained, evaluated, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(path.read_text().replace('"held_out": 2', '"held_out": 1'))
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--out", str(tmp_path)]) == 0
    one, two = (json.loads((out / "metrics.json").read_text())["test"] for out in (tmp_path, evaluated))
    assert one["ugt"] == two["ugt"]
    assert one["transition"] != two["transition"]


def test_a_model_is_measured_by_the_split_of_its_training(trained, tmp_path):
    """The same weights, said to have been split by time."""
    shutil.copytree(trained / "model", tmp_path / "model")
    sequences = load_sequences(trained / "features")
    begin, end = (int(np.quantile(sequences.timestamps, share)) for share in (0.6, 0.8))
    path = tmp_path / "model" / "model.json"
    by_time = f'"split": "time", "valid_from": {begin}, "test_from": {end}'
    path.write_text(path.read_text().replace('"split": "leave_one_out"', by_time))
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--out", str(tmp_path)]) == 0
    events = [sequences.timestamps[a:b] for a, b in itertools.pairwise(sequences.cu_events)]
    expected = sum((times < end).any() and (times >= end).any() for times in events)
    assert json.loads((tmp_path / "metrics.json").read_text())["users"]["test"] == expected


def test_missing_and_damaged_inputs(trained, tmp_path, refused):
    refused(["evaluate", "--model", str(tmp_path)], 2, "model.json does not exist")
    refused(["evaluate", "--model", str(trained / "model"), "--features", str(tmp_path)], 2, str(tmp_path))
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 50)
    refused(["evaluate", "--model", str(tmp_path / "model")], 2, "model.safetensors does not hold the weights")


def test_features_of_another_catalogue(trained, tmp_path, refused):
    log = tmp_path / "log.csv"
    log.write_text(
        "user,item,time\n" + "".join(f"u{u},{item},{t}\n" for u in range(3) for t, item in enumerate("abcd"))
    )
    other = tmp_path / "features"
    assert (
        main(["features", "--events", str(log), "--out", str(other), "--text_dim", "2", "--cooccurrence_dim", "2"]) == 0
    )
    refused(
        ["evaluate", "--model", str(trained / "model"), "--features", str(other)],
        2,
        "has 4 items, the model was trained on",
    )

"""examples/quality.py: which commands make a row, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

from examples import quality

TEST = {"recall@5": 0.1, "ndcg@5": 0.05, "recall@10": 0.2, "ndcg@10": 0.0625}


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run; each leaves what the next one looks for."""
    calls = []

    def run(command, *arguments):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        calls.append((command, given))
        if command == "evaluate":
            parts = dict.fromkeys(("ugt", "ugt_item_head", "ugt_beam"), TEST)
            results = {"test": parts, "alpha": 8.0, "parameters": 1234}
            (given["--model"].parent / "metrics.json").write_text(json.dumps(results))
            return
        given["--out"].mkdir(parents=True, exist_ok=True)
        stages = {"pretrain": {"seconds": 90.0}, "align": {"seconds": 30.0}}
        (given["--out"] / "model.json").write_text(json.dumps({"stages": stages}))

    monkeypatch.setattr(quality, "genrec", run)
    return calls


def test_a_refit_makes_the_first_run_once(commands, tmp_path):
    settings = tmp_path / "features", tmp_path, 3, "[4,4]", ["--threads", "1"]
    rows = quality.on_test(quality.ugt(*settings, refit=True))
    assert rows[""] == {**TEST, "alpha": 8.0, "parameters": 1234, "minutes": 2.0}
    assert rows[", beam alone"] == {**TEST, "parameters": 1234, "minutes": 2.0}
    assert [command for command, _ in commands] == ["tokenize", "train", "train", "evaluate"]
    first, refit = commands[1][1], commands[2][1]
    assert "--refit" not in first
    assert refit["--refit"] == first["--out"]
    assert all(given["--seed"] == "3" for _, given in commands[:3])
    assert commands[0][1]["--codebook_sizes"] == "[4,4]"
    assert first["--threads"] == refit["--threads"] == "1"
    assert first["--resume"] == refit["--resume"] == "true"
    assert quality.ugt(*settings, refit=False) == first["--out"]
    assert [command for command, _ in commands[4:]] == ["train"], (
        "which finds its run finished, with the same arguments"
    )


def test_a_row_on_validation_is_what_the_last_stage_was_chosen_by(trained):
    row = quality.on_validation(trained / "model")
    record = json.loads((trained / "model" / "model.json").read_text())["stages"]["align"]
    assert row["ndcg@10"] <= row["recall@10"] <= 1
    lines = [json.loads(line) for line in (trained / "model" / "metrics.jsonl").read_text().splitlines()]
    logged = [x for x in lines if (x["stage"], x["step"]) == ("align", record["best_step"])]
    assert row["recall@10"] in [x.get("valid_recall@10") for x in logged]
    assert row["parameters"] > 0


def test_files_of_a_data_set_are_found(tmp_path):
    with pytest.raises(SystemExit, match="neither"):
        quality.input_files(tmp_path)
    for name in ("X.inter.json", "X.item.json"):
        (tmp_path / name).touch()
    assert [path.name for path in quality.input_files(tmp_path)] == ["X.inter.json", "X.item.json"]
    for name in ("sequences.txt", "items.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in quality.input_files(tmp_path)] == ["sequences.txt", "items.jsonl"]


def test_the_table_is_over_seeds(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    keys = {
        "dataset": "beauty",
        "model": "ugt",
        "fitted on": "train",
        "ranked": "test",
        "alpha": 8.0,
        "parameters": 1234,
        "minutes": 2.0,
    }
    for seed, recall in enumerate((0.1, 0.2, 0.3)):
        quality.append(path, {**keys, "seed": seed, **TEST, "recall@10": recall})
    quality.append(path, {**keys, "model": "popularity", "seed": 0, **TEST, "alpha": "", "parameters": 0})
    quality.append(path, {**keys, "seed": 2, **TEST, "recall@10": 0.6})  # once more
    quality.append(path, {**keys, "fitted on": "train + validation", "seed": 0, **TEST})
    tables = quality.tables(path)
    train, refit = (tables["beauty", "test", fitted_on] for fitted_on in ("train", "train + validation"))
    lines = train.splitlines()
    assert len(lines) == 4
    assert lines[2] == "| ugt | 3 | .1000 ± .0000 | .0500 ± .0000 | .3000 ± .2646 | .0625 ± .0000 | 1,234 | 2 |"
    assert lines[3] == "| popularity | 1 | .1000 | .0500 | .2000 | .0625 | – | 2 |"
    assert len(refit.splitlines()) == 3


def test_the_document_has_the_tables_of_its_rows():
    docs = Path(quality.__file__).parents[1] / "docs"
    text = (docs / "quality.md").read_text(encoding="utf-8")
    tables = quality.tables(docs / "quality.csv")
    assert tables
    for group, table in tables.items():
        assert table in text, f"docs/quality.md does not have the table of {group}; see examples/quality.py --table"


@pytest.mark.parametrize("name", ["popularity", "transition", "sasrec"])
def test_baselines_make_rows(name, tmp_path):
    features, _ = small.write_inputs(tmp_path)
    rows = quality.baseline(name, features, seed=0, refit=False, epochs=1)
    assert list(rows) == ["", ", with transitions"][: 2 if name == "sasrec" else 1]
    for row in rows.values():
        assert all(0 <= row[key] <= 1 for key in quality.METRICS)
        assert (row["parameters"] > 0) == (name == "sasrec")

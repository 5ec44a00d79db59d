"""One row of the tables of docs/quality.md: fit one model on one data set with one seed, test it once.

python examples/quality.py --data amazon-beauty-2014 --model ugt --seed 0
python examples/quality.py --data amazon-beauty-2014 --model ugt --seed 0 --refit
python examples/quality.py --data amazon-beauty-2014 --validate --name "6 layers" --model.encoder_layers 6
python examples/quality.py --table runs/quality/rows.csv

--data is a folder of your own with sequences.txt and items.jsonl, or X.inter.json and X.item.json. Rows are appended to
--csv; --table prints them as Markdown, mean ± standard deviation over the seeds, as docs/quality.md has those of
docs/quality.csv. Arguments that are not listed below go to genrec train. What is finished under a --name is not done
again, and refused if it was done with other arguments.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import yaml

from genrec.data.catalogue import load_catalogue
from genrec.data.sequences import leave_out, load_sequences, take_users
from genrec.evaluation.baselines import Popularity, Transition
from genrec.evaluation.metrics import evaluate
from genrec.evaluation.sasrec import SASRec, SASRecConfig
from genrec.generation.storage import load_model
from genrec.interfaces import EventSequences, Ranker

CONFIGS = Path(__file__).parents[1] / "configs/amazon"
MODELS = ("popularity", "transition", "sasrec", "ugt")
HISTORY = yaml.safe_load((CONFIGS.parent / "ugt/small.yaml").read_text())["max_events"]  # that SASRec reads, too
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
KEYS = ("dataset", "ranked", "fitted on", "model", "seed")
COLUMNS = (*KEYS, *METRICS, "alpha", "parameters", "minutes")
TITLES = ("model", "seeds", "R@5", "N@5", "R@10", "N@10", "parameters", "minutes")
Row = dict[str, str | float | int]


def genrec(command: str, *arguments: str | Path) -> None:
    """Run `genrec COMMAND …` in a process of its own, with configs/amazon/COMMAND.yaml where there is one."""
    config = CONFIGS / f"{command}.yaml"
    given = ["--config", config] if config.exists() else []
    subprocess.run([sys.executable, "-m", "genrec", command, *given, *arguments], check=True)


def input_files(data: Path) -> tuple[Path, Path]:
    """The event log and the item file of a folder."""
    for events, items in (("sequences.txt", "items.jsonl"), ("*.inter.json", "*.item.json")):
        found = [*data.glob(events)], [*data.glob(items)]
        if all(len(paths) == 1 for paths in found):
            return found[0][0], found[1][0]
    raise SystemExit(f"{data} has neither sequences.txt and items.jsonl nor one X.inter.json and X.item.json")


def prepare(data: Path, work: Path) -> Path:
    """The features of a data set, made once for all its rows."""
    features = work / "features"
    if not features.exists():
        events, items = input_files(data)
        genrec("features", "--events", events, "--items", items, "--out", features)
    return features


def ugt(features: Path, run: Path, seed: int, codebooks: str | None, more: list[str], refit: bool) -> Path:
    """Ids and three stages of training, what is missing of them; a refit repeats the run on more events."""
    ids, first = run / f"ids{codebooks or ''}", run / "train" / "model"
    if not ids.exists():
        sizes = ["--codebook_sizes", codebooks] if codebooks else []
        genrec("tokenize", "--features", features, "--out", ids, "--seed", str(seed), *sizes)
    common = ["--features", features, "--semantic_ids", ids, "--seed", str(seed), "--resume", "true", *more]
    genrec("train", *common, "--out", first)
    if not refit:
        return first
    model = run / "refit" / "model"
    genrec("train", *common, "--refit", first, "--out", model)
    return model


def on_test(model: Path) -> dict[str, Row]:
    """The rows of a model on the test events: all of it, and each of its two opinions alone, without transitions."""
    genrec("evaluate", "--model", model)
    results = json.loads((model.parent / "metrics.json").read_text())
    facts: Row = {"parameters": results["parameters"], "minutes": minutes(model)}
    rows: dict[str, Row] = {
        part: {**{key: results["test"][name][key] for key in METRICS}, **facts}
        for part, name in (("", "ugt"), (", item head alone", "ugt_item_head"), (", beam alone", "ugt_beam"))
    }
    rows[""]["alpha"] = results["alpha"]
    return rows


def on_validation(model: Path) -> Row:
    """The row of a model on the validation events: what its last stage was chosen by. Test events are not looked at."""
    name, stage = list(json.loads((model / "model.json").read_text())["stages"].items())[-1]
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    best = [x for x in lines if x["stage"] == name and x["step"] == stage["best_step"] and "valid_ndcg@10" in x][-1]
    metrics = {key: best[f"valid_{key}"] for key in METRICS}
    parameters = sum(tensor.numel() for tensor in load_model(model)[0].parameters())
    return {**metrics, "parameters": parameters, "minutes": minutes(model)}


def minutes(model: Path) -> float:
    """How long the stages of a run took."""
    stages = json.loads((model / "model.json").read_text())["stages"]
    return round(sum(stage["seconds"] for stage in stages.values()) / 60, 1)


def baseline(name: str, features: Path, seed: int, refit: bool, epochs: int | None) -> dict[str, Row]:
    """Fit a baseline on the events that a UGT would be trained on, and test it on the same users; SASRec also with the
    memory of transitions that a UGT has."""
    sequences, size = load_sequences(features), load_catalogue(features).size
    events = leave_out(sequences, 1 if refit else 2)[0]
    histories, targets = leave_out(sequences, 1)
    able = np.flatnonzero(np.diff(histories.cu_events) > 0)
    began = time.monotonic()
    ranker = _fit(name, events, size, seed, epochs)
    facts: Row = {"parameters": 0, "minutes": round((time.monotonic() - began) / 60, 1)}
    if isinstance(ranker, SASRec):
        facts["parameters"] = sum(p.numel() for p in ranker.parameters())

    def tested() -> Row:
        metrics = evaluate(ranker, take_users(histories, able), targets[able], size, name=name).metrics
        return {**{key: metrics[key] for key in METRICS}, **facts}

    rows = {"": tested()}
    if isinstance(ranker, SASRec):
        ranker.memory = Transition.fit(events, size)
        rows[", with transitions"] = tested()
    return rows


def _fit(name: str, events: EventSequences, size: int, seed: int, epochs: int | None) -> Ranker:
    if name == "popularity":
        return Popularity.fit(events, size)
    if name == "transition":
        return Transition.fit(events, size)
    config = SASRecConfig(seed=seed, max_events=HISTORY, epochs=epochs or SASRecConfig.epochs)
    return SASRec.fit(events, size, config)


def append(path: Path, row: Row) -> None:
    """Add a line to a CSV, with a header if it is the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def tables(path: Path) -> dict[tuple[str, ...], str]:
    """The rows of a CSV as Markdown: by data set, ranked and fitted on, a line for every model; a later row of a model
    and seed stands in place of an earlier one."""
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            *group, model, seed = (row[key] for key in KEYS)
            groups.setdefault(tuple(group), {}).setdefault(model, {})[seed] = row
    return {group: _table(models) for group, models in groups.items()}


def _table(models: dict[str, dict[str, dict[str, str]]]) -> str:
    lines = [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
    for model, seeds in models.items():
        rows = list(seeds.values())
        metrics = [_spread([float(row[key]) for row in rows]) for key in METRICS]
        parameters, minutes = int(rows[0]["parameters"]), [float(row["minutes"]) for row in rows if row["minutes"]]
        size, time_taken = f"{parameters:,}" if parameters else "–", f"{mean(minutes):.0f}" if minutes else "–"
        cells = (model, str(len(rows)), *metrics, size, time_taken)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    """.0542 ± .0012: the mean, and the standard deviation over seeds where there are several."""
    text = f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
    return text.replace("0.", ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--model", choices=MODELS, default="ugt")
    parser.add_argument("--seed", type=int, default=0, help="of ids, weights, batches and dropout")
    parser.add_argument("--refit", action="store_true", help="fit on train + validation events")
    parser.add_argument("--validate", action="store_true", help="rank the validation events, not the test events")
    parser.add_argument("--name", help="of a UGT with other settings: its row and its folder")
    parser.add_argument("--codebooks", help="sizes of the codebooks, as in [64,64,64]")
    parser.add_argument("--epochs", type=int, help="of SASRec, in place of its default")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where features and weights go")
    parser.add_argument("--csv", type=Path, default=Path("runs/quality/rows.csv"), help="the row is appended here")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print these rows as Markdown and do nothing else")
    arguments, more = parser.parse_known_args()
    if arguments.table:
        for group, text in tables(arguments.table).items():
            print(f"{', '.join(group)}\n\n{text}\n")
        return
    of_ugt = more or arguments.name or arguments.codebooks or arguments.validate
    if arguments.data is None or (of_ugt and arguments.model != "ugt"):
        parser.error("--data or --table is missing" if arguments.data is None else "only a ugt takes more arguments")
    if arguments.validate and arguments.refit:
        parser.error("--refit trains on the validation events; expected it without --validate")
    work = arguments.work / arguments.data.resolve().name
    features = prepare(arguments.data, work)
    name = arguments.name or arguments.model
    if arguments.model == "ugt":
        run = work / name.replace(" ", "-") / f"seed-{arguments.seed}"
        model = ugt(features, run, arguments.seed, arguments.codebooks, more, arguments.refit)
        rows = {"": on_validation(model)} if arguments.validate else on_test(model)
    else:
        rows = baseline(name, features, arguments.seed, arguments.refit, arguments.epochs)
    fitted_on = "train + validation" if arguments.refit else "train"
    ranked = "validation" if arguments.validate else "test"
    for part, row in rows.items():
        keys = {"dataset": work.name, "model": name + part, "fitted on": fitted_on, "ranked": ranked}
        append(arguments.csv, keys | {"seed": arguments.seed} | row)


if __name__ == "__main__":
    main()

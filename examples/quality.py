"""One row of the tables of docs/quality.md: fit one model on one data set with one seed, test it once.

python examples/quality.py --data amazon-beauty-2014 --model ugt --seed 0
python examples/quality.py --data amazon-beauty-2014 --model ugt --seed 0 --refit
python examples/quality.py --table runs/quality/rows.csv

--data is a folder of your own with sequences.txt and items.jsonl, or X.inter.json and X.item.json. Rows are appended to
--csv; --table prints them as Markdown, mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from genrec.data.catalogue import load_catalogue
from genrec.data.sequences import leave_out, load_sequences, take_users
from genrec.evaluation.baselines import Popularity, Transition
from genrec.evaluation.metrics import evaluate
from genrec.evaluation.sasrec import SASRec, SASRecConfig
from genrec.interfaces import EventSequences, Ranker

CONFIGS = Path(__file__).parents[1] / "configs/amazon"
MODELS = ("popularity", "transition", "sasrec", "ugt")
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
KEYS = ("dataset", "model", "fitted on")
COLUMNS = (*KEYS, "seed", *METRICS, "alpha", "parameters", "minutes")
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


def ugt(features: Path, work: Path, seed: int, refit: bool, more: list[str]) -> Row:
    """Ids, three stages of training and the test; a refit repeats the run on train events, made first where missing."""
    run = work / f"seed-{seed}"
    ids, first = run / "ids", run / "train" / "model"
    if not ids.exists():
        genrec("tokenize", "--features", features, "--out", ids, "--seed", str(seed))
    common = ["--features", features, "--semantic_ids", ids, "--seed", str(seed), *more]
    if not (first / "model.json").exists():
        genrec("train", *common, "--out", first, "--resume", "true")
    model = run / "refit" / "model" if refit else first
    if not (model / "model.json").exists():
        genrec("train", *common, "--refit", first, "--out", model, "--resume", "true")
    genrec("evaluate", "--model", model)
    results = json.loads((model.parent / "metrics.json").read_text())
    seconds = sum(stage["seconds"] for stage in json.loads((model / "model.json").read_text())["stages"].values())
    return {
        **{key: results["test"]["ugt"][key] for key in METRICS},
        "alpha": results["alpha"], "parameters": results["parameters"], "minutes": round(seconds / 60, 1),
    }  # fmt: skip


def baseline(name: str, features: Path, seed: int, refit: bool, epochs: int | None) -> Row:
    """Fit a baseline on the events that a UGT would be trained on, and test it on the same users."""
    sequences, size = load_sequences(features), load_catalogue(features).size
    began = time.monotonic()
    ranker = _fit(name, leave_out(sequences, 1 if refit else 2)[0], size, seed, epochs)
    minutes = (time.monotonic() - began) / 60
    histories, targets = leave_out(sequences, 1)
    able = np.flatnonzero(np.diff(histories.cu_events) > 0)
    metrics = evaluate(ranker, take_users(histories, able), targets[able], size, name=name).metrics
    parameters = sum(p.numel() for p in ranker.parameters()) if isinstance(ranker, torch.nn.Module) else 0
    return {**{key: metrics[key] for key in METRICS}, "parameters": parameters, "minutes": round(minutes, 1)}


def _fit(name: str, events: EventSequences, size: int, seed: int, epochs: int | None) -> Ranker:
    if name == "popularity":
        return Popularity.fit(events, size)
    if name == "transition":
        return Transition.fit(events, size)
    config = SASRecConfig(seed=seed) if epochs is None else SASRecConfig(seed=seed, epochs=epochs)
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


def table(path: Path) -> str:
    """The rows of a CSV as Markdown, one line for every data set, model and fitted on."""
    groups = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[tuple(row[key] for key in KEYS)].append(row)
    titles = ("data", "model", "fitted on", "seeds", *METRICS, "α", "parameters", "minutes")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for keys, rows in groups.items():
        metrics = [_spread([float(row[key]) for row in rows]) for key in METRICS]
        alphas = ", ".join(sorted({row["alpha"].removesuffix(".0") for row in rows}))
        minutes = f"{mean(float(row['minutes']) for row in rows):.0f}"
        cells = (*keys, str(len(rows)), *metrics, alphas or "–", f"{int(rows[0]['parameters']):,}", minutes)
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
    parser.add_argument("--epochs", type=int, help="of SASRec, in place of its default")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where features and weights go")
    parser.add_argument("--csv", type=Path, default=Path("runs/quality/rows.csv"), help="the row is appended here")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print these rows as Markdown and do nothing else")
    arguments, more = parser.parse_known_args()
    if arguments.table:
        print(table(arguments.table))
        return
    if arguments.data is None or (more and arguments.model != "ugt"):
        parser.error(f"unknown arguments {more}" if more else "one of --data and --table is needed")
    work = arguments.work / arguments.data.resolve().name
    features = prepare(arguments.data, work)
    if arguments.model == "ugt":
        row = ugt(features, work, arguments.seed, arguments.refit, more)
    else:
        row = baseline(arguments.model, features, arguments.seed, arguments.refit, arguments.epochs)
    fitted_on = "train + validation" if arguments.refit else "train"
    keys = {"dataset": work.name, "model": arguments.model, "fitted on": fitted_on, "seed": arguments.seed}
    append(arguments.csv, keys | row)


if __name__ == "__main__":
    main()

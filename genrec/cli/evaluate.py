"""Measure a trained model on every user's test event, beside popularity and an item-transition counter.

genrec evaluate --model runs/demo/model

All items are ranked, items of the user's history are left out. Prints Recall and NDCG at 5, 10 and 20, writes them to
metrics.json, and draws the whole run on one page, report.html.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import genrec
from genrec.data.files import atomic_file
from genrec.data.sequences import load_sequences, take_users
from genrec.data.split import split_from_json
from genrec.evaluation.comparison import Comparison, compare, summary
from genrec.evaluation.report import NAMES, Example, ReportData, verdict, write_report
from genrec.generation import Recommender
from genrec.generation.storage import load_catalogue_of, load_model, read_model_json, trained_on
from genrec.interfaces import Catalogue, EventSequences
from genrec.training.log import read_metrics


@dataclass(frozen=True)
class Config:
    model: Path
    """directory written by genrec train"""
    out: Path | None = None
    """directory for metrics.json and report.html; the one that holds the model's directory unless told otherwise"""
    features: Path | None = None
    """directory written by genrec features; the one the model was trained on unless told otherwise"""
    examples: int = 3
    """users shown in the report"""
    liked_from: float = 4.0
    """ratings from here on count as liked in test_liked"""
    title: str = "genrec run"
    """heading of the report"""


def run(config: Config) -> None:
    """Print the table; write metrics.json and report.html."""
    model, recommender = load_model(config.model)
    record = read_model_json(config.model)
    if "data" not in record or "stages" not in record:
        raise ValueError(f"{config.model / 'model.json'} was not written by genrec train; expected a finished run")
    features = config.features or trained_on(config.model)
    sequences, catalogue = load_sequences(features), load_catalogue_of(config.model, features)
    comparison = compare(
        model, recommender, sequences, record["data"]["held_out"], config.liked_from, split_from_json(record["data"])
    )
    out = config.out or config.model.parent
    results = summary(comparison) | {"alpha": recommender.alpha, "beams": recommender.beams}
    results["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with atomic_file(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    examples = _examples(Recommender(model, recommender), comparison, sequences, catalogue, config.examples)
    log = _logs(config.model, Path(record["data"]["semantic_ids"]))
    page = ReportData(
        title=config.title,
        metrics=comparison.metrics(),
        users=len(comparison.targets),
        intervals=comparison.intervals(),
        log=log,
        examples=examples,
        facts=_facts(record, sequences, catalogue, results["parameters"]),
    )
    write_report(out / "report.html", page)
    console = Console()
    console.print(metrics_table(comparison))
    console.print(verdict(page.metrics, page.intervals))
    print(f"metrics → {out / 'metrics.json'}   page → {out / 'report.html'}")  # rich would break or colour the paths


def metrics_table(comparison: Comparison) -> Table:
    """Recall and NDCG of every ranker, the best of a column in bold."""
    table = Table(title=f"test, {len(comparison.targets):,} users", title_justify="left")
    keys = [f"{kind}@{k}" for k in (5, 10, 20) for kind in ("recall", "ndcg")]
    table.add_column("")
    for key in keys:
        table.add_column(key, justify="right")
    metrics = comparison.metrics()
    best = {key: max(values[key] for values in metrics.values()) for key in keys}
    for name, values in metrics.items():
        cells = [f"[bold]{values[key]:.4f}[/]" if values[key] == best[key] else f"{values[key]:.4f}" for key in keys]
        table.add_row(NAMES.get(name, name), *cells)
    return table


def _examples(
    recommender: Recommender, comparison: Comparison, sequences: EventSequences, catalogue: Catalogue, count: int
) -> list[Example]:
    """Users spread evenly over the file, so that nobody picked the lucky ones."""
    users = np.linspace(0, len(comparison.targets) - 1, num=min(count, len(comparison.targets)), dtype=int)
    histories = comparison.histories
    ranked, scores = recommender.rank_scored(take_users(histories, users), 10)
    examples = []
    for row, user in enumerate(users):
        events = slice(histories.cu_events[user + 1] - 10, histories.cu_events[user + 1])
        events = slice(max(events.start, histories.cu_events[user]), events.stop)
        found = np.flatnonzero(ranked[row] == comparison.targets[user])
        kept = ranked[row] > 0
        examples.append(
            Example(
                user_id=histories.user_ids[user],
                history=catalogue.titles[histories.item_ids[events]].tolist(),
                ratings=histories.ratings[events].tolist(),
                recommended=catalogue.titles[ranked[row][kept]].tolist(),
                scores=scores[row][kept].tolist(),
                next_item=catalogue.titles[comparison.targets[user]],
                next_position=int(found[0]) if len(found) else None,
            )
        )
    return examples


def _logs(*directories: Path) -> list[dict]:
    paths = [directory / "metrics.jsonl" for directory in directories]
    return [row for path in paths if path.is_file() for row in read_metrics(path)]


def _facts(record: dict, sequences: EventSequences, catalogue: Catalogue, parameters: int) -> dict[str, dict[str, str]]:
    config = record["model"]
    minutes = {name: f"{stage['seconds'] / 60:.1f} min, best at step {stage['best_step']} of {stage['steps']}"
               for name, stage in record["stages"].items()}  # fmt: skip
    return {
        "Data": {
            "users": f"{len(sequences):,}", "items": f"{catalogue.size:,}", "events": f"{len(sequences.item_ids):,}",
            "tokens": f"{len(sequences.token_ids):,}",
        },
        "Model": {
            "parameters": f"{parameters:,}", "width": str(config["d_model"]),
            "layers": f"{config['encoder_layers']} encoder, {config['decoder_layers']} decoder",
            "experts": f"{config['experts']}, {config['top_k']} active",
            "codebooks": " / ".join(map(str, record["vocabulary"]["codebook_sizes"])),
            "item head weight α": str(record["recommender"]["alpha"]),
        },
        "Training": minutes,
        "Software": {"genrec": genrec.__version__, "torch": torch.__version__, "Python": platform.python_version()},
    }  # fmt: skip

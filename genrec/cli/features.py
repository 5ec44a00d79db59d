"""Turn a raw event log (and a file that describes the items) into event sequences, a vocabulary and item features.

genrec features --events ratings.csv --items movies.csv --out runs/demo/features
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from genrec.data.build import build_features
from genrec.data.config import FeaturesConfig as Config


def run(config: Config) -> None:
    """Write `config.out` and print what is in it."""
    summary = build_features(config)
    for example in summary["malformed_examples"]:
        print(f"features: skipped {example}", file=sys.stderr)
    Console().print(_table(config, summary))


def _table(config: Config, summary: dict[str, Any]) -> Table:
    table = Table(title=f"{config.out}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    by_time = ("training_events", "valid_users", "test_users")
    for name in ("users", "items", "events", *by_time, "cut_events", "dropped_users", "malformed_lines"):
        if name in summary:
            table.add_row(name.replace("_", " "), f"{summary[name]:,}")
    return table

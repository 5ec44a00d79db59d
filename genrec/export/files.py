"""What genrec export --to onnx wrote, read back and checked; without torch, which serving does without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genrec.data.files import read_json

FORMAT = "genrec-onnx"  # of recommender.json
WRITER = "genrec export --to onnx"


def read_export(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """recommender.json and items.json; FileNotFoundError or ValueError says which file is not what it should be."""
    if not (directory / "model.onnx").is_file():
        raise FileNotFoundError(f"{directory} has no model.onnx; expected the output of {WRITER}")
    about, items = (read_json(directory / name, WRITER) for name in ("recommender.json", "items.json"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{directory / 'recommender.json'} has format {about.get('format')!r}; expected {FORMAT!r}")
    for key in ("inputs", "outputs", "top_k", "max_events", "items"):
        if key not in about:
            raise ValueError(f"{directory / 'recommender.json'} has no {key!r}; run genrec export again")
    for key in ("item_ids", "titles"):
        if len(items.get(key, ())) != about["items"]:
            found = len(items.get(key, ()))
            raise ValueError(f"{directory / 'items.json'} has {found} {key}; expected {about['items']}, one an item")
    return about, items

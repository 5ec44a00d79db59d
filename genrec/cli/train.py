"""Train a UGT on event sequences and semantic ids: pretrain, finetune, align.

genrec train --config configs/movielens/train.yaml
genrec train --config configs/movielens/train.yaml --out runs/wide --model configs/ugt/small.yaml --pretrain.epochs 4

Writes model.safetensors, model.json, metrics.jsonl and tensorboard/ into --out. A killed run goes on with --resume true
and gives the same losses as one that was never stopped.
"""

from __future__ import annotations

import os

from genrec.training.config import TrainConfig as Config
from genrec.training.run import train


def run(config: Config) -> None:
    """Run the training and say where it went."""
    model = train(config)
    parameters = sum(p.numel() for p in model.parameters())
    if os.environ.get("RANK", "0") == "0":
        print(f"trained {parameters:,} parameters → {config.out}")

"""Everything `genrec train` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal

from genrec.generation.recommender import RecommenderConfig
from genrec.models.ugt.config import UGTConfig

STAGES = ("pretrain", "finetune", "align")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-3
    """learning rate at the end of the warm-up"""
    warmup_steps: int = 100
    """steps over which the learning rate rises from zero"""
    final_lr: float = 0.05
    """learning rate at the last step, as a share of lr"""
    weight_decay: float = 0.01
    """decoupled weight decay of matrices and embeddings, not of biases and the gains of norms"""
    clip_norm: float = 1.0
    """gradients longer than this are shortened to it"""


@dataclass(frozen=True)
class PretrainConfig:
    """Next-item ids over all positions of every history."""

    epochs: float = 12
    """passes over the data"""
    batch_tokens: int = 4096
    """most tokens of histories in a micro-batch"""
    item_weight: float = 1.0
    """weight of the item head's cross-entropy beside the three code losses"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """optimizer of this stage"""


@dataclass(frozen=True)
class FinetuneConfig:
    """The same loss, on what users valued and on their last events only."""

    epochs: float = 2
    """passes over the data"""
    batch_tokens: int = 4096
    """most tokens of histories in a micro-batch"""
    item_weight: float = 1.0
    """weight of the item head's cross-entropy beside the three code losses"""
    liked_from: float = 4.0
    """ratings from here on count as valued; events without a rating always do"""
    last_targets: int = 10
    """how many of a user's last events are predicted"""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4, warmup_steps=10))
    """optimizer of this stage"""


@dataclass(frozen=True)
class AlignConfig:
    """Direct preference optimisation of the model's own beams, anchored by the next-item loss."""

    epochs: float = 1
    """passes over the data"""
    batch_tokens: int = 2048
    """most tokens of histories in a micro-batch; every history has one chosen item and `negatives` rejected ones"""
    item_weight: float = 1.0
    """weight of the item head's cross-entropy in the anchor"""
    liked_from: float = 4.0
    """ratings from here on make the chosen item; events without a rating always do"""
    disliked_to: float = 2.0
    """beam results rated so low by the user are rejected before any other"""
    last_targets: int = 20
    """the chosen item is one of this many last events of a user"""
    beams: int = 20
    """width of the beam search that proposes the rejected items"""
    negatives: int = 3
    """rejected items per chosen one"""
    beta: float = 0.1
    """how far the model may move from the reference: lower is farther"""
    weight: float = 0.2
    """weight of the preference loss beside the anchor"""
    max_recall_loss: float = 0.1
    """stop when recall@10 on the validation events falls by more than this share of what it was before"""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-4, warmup_steps=10))
    """optimizer of this stage"""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun or deepspeed start share the work, and in which precision."""

    parallel: Literal["ddp", "fsdp", "zero-1", "zero-2", "zero-3"] = "ddp"
    """ddp: a copy of everything on every rank; fsdp: PyTorch's FSDP2; zero-…: a stage of DeepSpeed's ZeRO"""
    micro_batches: int = 1
    """of a step over all ranks, a multiple of their number; where a rank has several it accumulates their gradients"""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of products; auto: bfloat16 where the processor computes in it. float16 scales losses dynamically"""
    recompute: bool = False
    """keep no activations inside layers but compute them again for the gradients: less memory, a third more time"""
    compile: bool = False
    """compile the layers with torch.compile, one program for all shapes"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ParallelConfig):
    """From event sequences and semantic ids to the weights of a UGT."""

    features: Path
    """directory written by genrec features"""
    semantic_ids: Path
    """directory written by genrec tokenize"""
    out: Path
    """directory of this run: weights, checkpoints, metrics"""
    model: UGTConfig = field(default_factory=UGTConfig)
    """size of the model, see configs/ugt/"""
    stages: tuple[str, ...] = STAGES
    """which stages to run, in this order"""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """stage 1"""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """stage 2"""
    align: AlignConfig = field(default_factory=AlignConfig)
    """stage 3"""
    recommender: RecommenderConfig = field(default_factory=RecommenderConfig)
    """how validation recommends; alpha is then chosen among alphas"""
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """candidates for alpha, compared on the validation events at the end"""
    valid_users: int = 2000
    """users that are validated on; all of them where there are fewer"""
    alpha_users: int = 20000
    """users on whose validation events alpha is chosen; all of them where there are fewer"""
    validate_every: float = 1
    """epochs between validations"""
    checkpoint_every: int = 200
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    refit: Path | None = None
    """a finished run of the same configuration: train as many steps as it chose, on train + validation events"""
    resume: bool = False
    """go on from the newest whole checkpoint in out"""
    overwrite: bool = False
    """start anew where out already holds a run"""
    chunk_events: int = 5_000_000
    """events that are in memory at a time, and shuffled among each other; the next as many are read meanwhile"""
    seed: int = 0
    """seed of weights, batches and dropout"""
    threads: int = 0
    """CPU threads; 0 takes all cores"""
    device: str = "auto"
    """cpu, cuda, or auto"""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"stages has {unknown[0]!r}; expected names among {', '.join(STAGES)}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both true; expected at most one of them")
        if not self.alphas:
            raise ValueError("alphas is empty; expected at least one candidate")
        for name, least in _LEAST.items():
            value = attrgetter(name)(self)
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")


_LEAST = {
    "valid_users": 1,
    "alpha_users": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "micro_batches": 1,
    "chunk_events": 1,
    "threads": 0,
    "recommender.beams": 1,
}
_LEAST |= {f"{stage}.epochs": 0 for stage in STAGES} | {f"{stage}.batch_tokens": 1 for stage in STAGES}
_LEAST |= {"finetune.last_targets": 1, "align.last_targets": 1, "align.beams": 1, "align.negatives": 1}
_LEAST |= {"align.max_recall_loss": 0}

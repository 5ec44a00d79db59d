"""What training and serving a UGT take: exact counts, at the shares of a machine's peak that the benchmark measured.

python examples/scaling.py --users 1e8 --items 1e7 --gpus 8 --model configs/ugt/base.yaml

Prints Markdown tables, which docs/scaling.md derives. A multiply-add is two FLOPs; k, M, G … are powers of 1000.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentError, auto_cli, set_parsing_settings

from genrec.models.rqvae import RQVAEConfig
from genrec.models.ugt import UGT, ModelVocabulary, UGTConfig
from genrec.models.ugt.losses import CHUNK_ELEMENTS, CHUNK_ROWS

ROOT = Path(__file__).parents[1]
PAPER, TOKENIZER = UGTConfig(**yaml.safe_load((ROOT / "configs/ugt/paper.yaml").read_text())), RQVAEConfig()
WEIGHT, TRAINED, MOMENTS = 2, 4, 8  # bytes of a weight or activation in products; in training, of a parameter or its
# gradient, and of its two Adam moments: autocast leaves all of them in float32
BACKWARD = {"linear": 2.0, "experts": 2.0, "attention": 2.5}  # FLOPs of a backward pass per FLOP of the forward one
LOGIT, VECTOR, SCORE = 54, 12, 52  # bytes moved beside products: by linear_cross_entropy for a target and an item, and
# for a chunk of targets and a number of the item vectors; by Recommender for a request and an item
LOG_EVENT, LOG_USER = 3 * 9 + 16, 24  # bytes in EventSequences: an event of three tokens; a user, the id not counted
# Cases of the benchmark, by operator. None measures linear layers alone: they are taken to do as well as experts.
CASES = {"linear": "experts ", "experts": "experts ", "attention": "histories of up to ", "nearest": "residual codes "}
STEP, SERVED = "training step, 2922 tokens", "32 requests, 50 beams"
# What bench/ runs end to end: its model, codes, items; tokens, rows a level and keys of a step; the mean history
DEMO, DEMO_STEP, DEMO_EVENTS = (UGTConfig(), (64, 64, 64), 3650), (2922, [1730] * 3, [24.86, 29.44]), 46
HEADS = {"beam alone": 0, "item head": 1}  # whether every item is scored

Codes = tuple[int, ...]  # codes per level
Flops = dict[tuple[str, str], float]  # (part of the model, operator that computes it) → FLOPs of a forward pass
Table = Iterator[tuple[str | float, ...]]  # the header with [units], then line after line


@dataclass(frozen=True)
class Device:
    """A processor at its best. Assumed, not measured: the published figures of an H200 SXM."""

    matmul_flops: float = 989e12
    """FLOP/s of dense matrix products in bfloat16"""
    copy_bytes: float = 4.8e12
    """bytes read and written per second"""
    link_bytes: float = 450e9
    """bytes/s to the other GPUs, and as many from them: NVLink; a network of 400 Gbit/s has 50e9"""


@dataclass(frozen=True)
class Assumptions:
    """Everything the tables are computed from."""

    users: float | tuple[float, ...] = (1e6, 1e8, 1e9)
    """how many users there are: a number, or several for a line each"""
    items: float = 1e7
    """items of the catalogue"""
    gpus: int = 8
    """ranks over which ZeRO-2 shards gradients and optimizer states"""
    model: UGTConfig = PAPER
    """sizes of the model, or a file of configs/ugt/"""
    tokenizer: RQVAEConfig = TOKENIZER
    """sizes of the RQ-VAE that gives the items their codes"""
    events_per_user: int = 200
    """events in a user's log, each a target once an epoch"""
    negatives: int = 8192
    """items that a sampled softmax would go over"""
    beams: int = 50
    """width of the beam search"""
    batch: int = 128
    """requests answered together"""
    requests_per_day: float = 5.0
    """requests of a user"""
    peak_factor: float = 3.0
    """requests in the busiest second over those in the mean one"""
    device: Device = Device()
    """the processor to plan for"""
    results: Path = ROOT / "bench/results/cpu-zen3/2026-11-23.csv"
    """of pytest bench --benchmark --bench-csv: the device is taken to reach the shares of peak that this machine did"""

    def __post_init__(self) -> None:
        for name, value in {**vars(self), **{f"device.{k}": v for k, v in asdict(self.device).items()}}.items():
            for number in (value or (0,)) if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not 0 < number < math.inf:
                    raise ValueError(f"{name} is {number:g}; expected a positive number")
        if self.items > (ids := math.prod(self.tokenizer.codebook_sizes)):
            raise ValueError(f"items is {self.items:g}; expected at most {ids:g}, the ids of tokenizer.codebook_sizes")


@cache
def parameters(config: UGTConfig, codes: Codes, items: float) -> Counter[str]:
    """Numbers learned by item, code, … embeddings, encoder, decoder and experts, counted on a UGT without memory."""
    vocabulary = ModelVocabulary(int(items), codes, (int(items) + 1, 64, 64, 64))
    with torch.device("meta"):
        model = UGT(config, vocabulary, torch.zeros(0, len(codes), dtype=torch.int64))
    count: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        count["experts" if ".moe.w_" in name else name.replace(".", "_").split("_")[0]] += parameter.numel()
    return count


def work(m: UGTConfig, codes: Codes, items: float, tokens: float, rows: list[int], keys: list[float]) -> Flops:
    """Forward pass of encoder tokens that see keys[0] tokens each, of rows[l] decoder rows of level l that see keys[1]
    tokens each, and of the item head for every row of level 0."""
    d, deep, layers = m.d_model, m.encoder_layers, m.decoder_layers
    return {
        ("encoder: projections", "linear"): tokens * deep * 8 * d * d,
        ("encoder: attention", "attention"): tokens * deep * 4 * d * keys[0],
        ("encoder: feed-forward", "linear"): tokens * deep * 4 * d * m.d_ffn,
        ("decoder: keys and values of the token", "linear"): tokens * layers * 4 * d * d,
        ("decoder: self-attention, projections", "linear"): sum(rows) * layers * 8 * d * d,
        ("decoder: self-attention", "attention"): sum(n * (level + 1) for level, n in enumerate(rows)) * layers * 4 * d,
        ("decoder: cross-attention, projections", "linear"): sum(rows) * layers * 4 * d * d,
        ("decoder: cross-attention", "attention"): sum(rows) * layers * 4 * d * keys[1],
        ("decoder: router", "linear"): sum(rows) * layers * 2 * d * m.experts,
        ("decoder: active experts", "experts"): sum(rows) * layers * 6 * d * m.d_expert * m.top_k,
        ("code logits", "linear"): sum(n * size for n, size in zip(rows, codes, strict=True)) * 2 * d,
        ("item head", "linear"): rows[0] * 2 * d * items,
    }


def event(a: Assumptions, items: float) -> Flops:
    """An event read and predicted, with an item head over so many items: the mean of a history."""
    codes, types = a.tokenizer.codebook_sizes, len(a.model.types)
    tokens = types * min(a.events_per_user, a.model.max_events)
    return work(a.model, codes, items, types, [1] * len(codes), [(tokens + 1) / 2, (tokens + types) / 2])


def request(m: UGTConfig, codes: Codes, items: float, events: float, beams: int) -> Flops:
    """A request: the encoder, a decoder row for the start and one for every beam of the later levels."""
    tokens = events * len(m.types)
    return work(m, codes, items, tokens, widths(codes, beams), [(tokens + 1) / 2, tokens])


def widths(codes: Codes, beams: int) -> list[int]:
    """Decoder rows of a request at every level."""
    return [min(beams, math.prod(codes[:level])) for level in range(len(codes))]


def kept(m: UGTConfig) -> tuple[int, int, int, int]:
    """Numbers that the backward pass needs of a token, in a layer and beside them, and of a decoder row likewise."""
    d = m.d_model
    return 10 * d + 3 * m.d_ffn, (3 + 2 * m.decoder_layers) * d, 15 * d + m.experts + 2 * m.top_k, 3 * d


@cache
def measured(path: Path) -> dict[str, dict[str, float]]:
    """Case of the benchmark → what its columns say of genrec."""
    columns = ("seconds", "flops", "matmul_rate", "copy_rate")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.DictReader(file) if line["contender"] == "genrec"]
        cases = {line["case"]: {name: float(line[name] or "nan") for name in columns} for line in lines}
        return cases | {case: cases[case] for case in (STEP, SERVED)}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"results is {path}; expected a table of the benchmark ({error!r})") from None


def share(a: Assumptions, operator: str, backward: bool) -> float:
    """FLOP/s of an operator over those of the machine's matrix product, all its cases taken together."""
    name = CASES[operator]
    cases = [x for case, x in measured(a.results).items() if name in case and backward == ("with backward" in case)]
    if not cases:
        raise ValueError(f"results is {a.results}; expected cases of {name.strip()!r} in it")
    return sum(x["flops"] for x in cases) / sum(x["seconds"] * x["matmul_rate"] for x in cases)


def compute(a: Assumptions, flops: Flops, backward: bool, rate: float) -> float:
    """Seconds where the matrix product has this rate and the operators reach the measured shares of it."""
    cost = {operator: (1 + backward * more) / share(a, operator, backward) for operator, more in BACKWARD.items()}
    return sum(cost[operator] * n for (_, operator), n in flops.items()) / rate


def event_seconds(a: Assumptions, items: float, slower: float = 1.0) -> float:
    """Training on an event: its products, and what linear_cross_entropy moves between them."""
    chunk = max(CHUNK_ROWS, CHUNK_ELEMENTS // max(1, int(items)))
    moved = (LOGIT + VECTOR * a.model.d_model / chunk) * items
    return slower * compute(a, event(a, items), True, a.device.matmul_flops) + moved / a.device.copy_bytes


def slowness(a: Assumptions, case: str) -> float:
    """Measured over predicted seconds of a training step or of requests: what the products do not account for."""
    x, users = measured(a.results)[case], 1
    flops = work(*DEMO, *DEMO_STEP)
    if case != STEP:
        users, beams = int(case.split()[0]), int(case.split()[2])
        flops = request(*DEMO, DEMO_EVENTS, beams)
    return x["seconds"] / (users * compute(a, flops, case == STEP, x["matmul_rate"]))


def shares(a: Assumptions) -> Table:
    """How close to its matrix product the operators of the measured machine come."""
    yield "of the matrix product's FLOP/s", "forward", "with backward"
    for operator in BACKWARD:
        yield operator, f"{share(a, operator, False):.2f}", f"{share(a, operator, True):.2f}"


def validation(a: Assumptions) -> Table:
    """Predictions where they can be checked."""
    yield "on the measured machine", "predicted [s]", "measured [s]", "predicted / measured"
    for case, x in measured(a.results).items():
        if case == STEP or case.endswith("beams"):
            yield case, x["seconds"] / slowness(a, case), x["seconds"], f"{1 / slowness(a, case):.2f}"


def memory(a: Assumptions) -> Table:
    """Under ZeRO-2 a rank has all weights, and its shards of the gradients and the optimizer's states."""
    count, n = parameters(a.model, a.tokenizer.codebook_sizes, a.items), a.gpus
    yield "of a rank", "numbers", "weights [B]", "gradients [B]", "Adam [B]"
    for part, x in {**count, "all": count.total()}.items():
        yield part, f"{x:,}", TRAINED * x, TRAINED * x / n, MOMENTS * x / n
    own = (a.items + 1) * a.model.d_model
    yield "full softmax: item vectors, their gradient", f"{own:,.0f}", *2 * [(TRAINED + WEIGHT) * own], ""


def sharding(a: Assumptions) -> Table:
    """What each way of sharing the work leaves on a rank."""
    count, n = parameters(a.model, a.tokenizer.codebook_sizes, a.items).total(), a.gpus
    yield "--parallel", "weights [B]", "gradients [B]", "Adam [B]", "together [B]"
    ways = {"ddp": (1, 1, 1), "zero-1": (1, 1, n), "zero-2": (1, n, n), "zero-3, fsdp": (n, n, n)}
    for name, shares in ways.items():
        parts = [size * count / share for size, share in zip((TRAINED, TRAINED, MOMENTS), shares, strict=True)]
        yield name, *parts, sum(parts)


def activations(a: Assumptions) -> Table:
    """What the forward pass keeps for the backward pass."""
    m, inputs, levels = a.model, 2 * a.model.d_model, len(a.tokenizer.codebook_sizes)
    layer, token, row, rest = kept(m)
    target = levels * rest + 2 * sum(a.tokenizer.codebook_sizes)  # log-probabilities are float32
    every = m.encoder_layers * layer + token, levels * m.decoder_layers * row + target
    fewer = m.encoder_layers * inputs + layer + token, levels * (m.decoder_layers * inputs + row) + target
    yield "activations", "of a token [B]", "of a target [B]"
    yield "all kept", *(WEIGHT * x for x in every)
    yield "layers computed again from their inputs", *(WEIGHT * x for x in fewer)


def training(a: Assumptions) -> Table:
    """What an event costs."""
    yield "an event", "forward [FLOP]", "with backward [FLOP]"
    for (part, operator), x in event(a, a.items).items():
        yield part, x, x * (1 + BACKWARD[operator])
    yield f"item head, {a.negatives:,} sampled", 2 * a.model.d_model * a.negatives, 6 * a.model.d_model * a.negatives


def traffic(a: Assumptions) -> Table:
    """Gradients reduced and scattered, then weights gathered: a rank sends n - 1 of n shards, twice."""
    count, n = parameters(a.model, a.tokenizer.codebook_sizes, a.items), a.gpus
    yield "in ZeRO-2", "an event [s]", "sent in a step [B]", "sending [s]", "events that take as long"
    apart = count.total() - count["item"]
    for way, items, x in ("all, full softmax", a.items, count.total()), ("item apart, sampled", a.negatives, apart):
        sent, once = 2 * TRAINED * x * (n - 1) / n, event_seconds(a, items)
        yield way, once, sent, sent / a.device.link_bytes, sent / a.device.link_bytes / once


def catalogue(a: Assumptions) -> Table:
    """What the items take beside the model."""
    codes, width, machine = a.tokenizer.codebook_sizes, a.tokenizer.code_dim, measured(a.results)[STEP]
    nodes = [min(a.items, math.prod(codes[:level])) for level in range(len(codes) + 1)]
    search = 2 * a.items * width * sum(codes)
    yield "all items", "memory [B]", "work [FLOP]", "on the measured machine [s]"
    yield "features", 4 * a.items * a.tokenizer.input_dim, "", ""
    seconds = search / (machine["matmul_rate"] * share(a, "nearest", False))
    yield "codebooks with moving averages; nearest codes", 4 * (2 * width + 1) * sum(codes), search, seconds
    yield "trie, at most", 8 * (2 * sum(nodes[:-1]) + sum(nodes[1:]) + 3 * a.items + 2), "", ""
    yield f"semantic ids, {math.prod(codes) / a.items:,.0f} to choose from", 8 * a.items * len(codes), "", ""


def serve(a: Assumptions, scores: int, batch: int, device: Device) -> tuple[float, float, float, float]:
    """FLOPs and bytes of a request, its seconds by the operators' shares, and made slower as measured end to end."""
    m, codes, events = a.model, a.tokenizer.codebook_sizes, min(a.events_per_user, a.model.max_events)
    count, rows = parameters(m, codes, a.items), widths(codes, a.beams)
    vectors, (layer, token, row, rest) = WEIGHT * count["item"], kept(m)
    numbers = events * len(m.types) * (m.encoder_layers * layer + token) + sum(rows) * (m.decoder_layers * row + rest)
    logits = sum(n * size for n, size in zip(rows, codes, strict=True))
    # during the products: weights once a batch, activations out and in; beside them: what is there for every item
    during = (WEIGHT * count.total() - vectors * (1 - scores)) / batch + 2 * (WEIGHT * numbers + 4 * logits)
    beside = scores * SCORE * a.items
    flops = request(m, codes, scores * a.items, events, a.beams)
    once, copy = compute(a, flops, False, device.matmul_flops), device.copy_bytes
    fast, slow = (max(x, during / copy) + beside / copy for x in (once, slowness(a, SERVED) * once))
    return sum(flops.values()), during + beside, fast, slow


def serving(a: Assumptions) -> Table:
    """Requests per second of the device, and of the machine that was measured."""
    yield "a request", "batch", "work [FLOP]", "moved [B]", "requests/s", "slowed", "measured machine, slowed"
    machine = measured(a.results)[STEP]
    cpu = Device(machine["matmul_rate"], machine["copy_rate"] * WEIGHT / 4)  # float32: twice the bytes
    for head, scores in HEADS.items():
        for batch in sorted({1, 16, a.batch}):
            flops, moved, fast, slow = serve(a, scores, batch, a.device)
            yield head, f"{batch}", flops, moved, 1 / fast, 1 / slow, 1 / serve(a, scores, batch, cpu)[3]


def everybody(a: Assumptions) -> Table:
    """Log, epochs and requests of all users; times are made slower as measured end to end."""
    yield "users", "log", "GPU-days an epoch", "sampled", "requests/s", *(f"GPUs, {head}" for head in HEADS)
    days = [event_seconds(a, x, slowness(a, STEP)) / 86_400 for x in (a.items, a.negatives)]
    for users in a.users if isinstance(a.users, tuple) else (a.users,):
        events, asked = users * a.events_per_user, users * a.requests_per_day * a.peak_factor / 86_400
        gpus = (f"{math.ceil(asked * serve(a, scores, a.batch, a.device)[3]):,}" for scores in HEADS.values())
        log = si(LOG_USER * users + LOG_EVENT * events, "B")
        yield f"{users:,.0f}", log, *(f"{events * x:,.3g}" for x in days), asked, *gpus


def si(x: float, unit: str = "") -> str:
    """Three digits, a prefix and the unit: 10.2 GB. Without a unit what is small stays as it is."""
    power = 0 if x == 0 else min(5, max(-3 if unit else 0, math.floor(math.log10(float(f"{x:.2e}")) / 3)))
    return f"{x / 1000.0**power:.3g} {'nµm kMGTP'[power + 3].strip()}{unit}".strip()


def markdown(table: Table) -> str:
    """A Markdown table; numbers get the [unit] in the header of their column."""
    header, *lines = table
    names, _, units = zip(*(str(name).partition(" [") for name in header), strict=True)
    cells = (
        [x if isinstance(x, str) else si(x, unit[:-1]) for x, unit in zip(line, units, strict=True)] for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])


TABLES = (shares, validation, memory, sharding, activations, training, traffic, catalogue, serving, everybody)

if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        assumptions = auto_cli(Assumptions, as_positional=False, exit_on_error=False, allow_abbrev=False)
        print("\n\n".join(markdown(table(assumptions)) for table in TABLES))
    except (ArgumentError, ValueError) as error:
        sys.exit(f"scaling.py: error: {' '.join(str(error).split())}")

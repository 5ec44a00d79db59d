"""Beam search over the trie of the catalogue: three unrolled steps, every result an item that exists."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genrec.generation.trie import Trie, take
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT, Memory
from genrec.models.ugt.decoder import KeyValue

Normalize = Literal["children", "level"]
WIDE = 32  # from so many times as many codes as children on, reading the children's rows beats one product with all


def beam_search(
    model: UGT,
    memory: Memory,
    start: Tensor,
    trie: Trie,
    beams: int,
    excluded: Tensor | None = None,
    normalize: Normalize = "children",
) -> tuple[Tensor, Tensor]:
    """The likeliest items of B requests.

    memory: encoder keys and values of the requests; start (B, D): the decoder's first row; excluded (B, X) int64: items
    that must not come back, 0 for none → items (B, W) int64 and log-probabilities (B, W) float32, falling; W ≤ beams.
    Where fewer items can be reached the rest has item 0 and log-probability -inf.

    normalize: "children" takes the probability of a code over the codes that lead on to an item, so the probabilities
    of all items sum to 1; "level" over all codes of the level, as in training, so some is left to ids of no item.
    """
    nodes = torch.zeros_like(start[:, :1], dtype=torch.int64)
    scores = torch.zeros_like(start[:, :1], dtype=torch.float32)
    past: list[list[KeyValue]] = [[] for _ in memory.layers]
    x = start.unsqueeze(1)
    with span("beam search", requests=start.shape[0], beams=beams):
        for level in range(trie.levels):
            hidden, present = model.step(x, level, memory, past)
            children, codes, alive = trie.expand(level, nodes)
            total = scores.unsqueeze(-1) + child_log_probs(model, level, hidden, codes, alive, normalize)
            if level == trie.levels - 1 and excluded is not None:
                total = total + trie.exclude(nodes, excluded)
            width = min(beams, nodes.shape[1] * trie.max_children[level], trie.nodes[level])
            scores, best = total.flatten(1).topk(width)
            nodes = children.flatten(1).gather(1, best)
            if level < trie.levels - 1:
                x = model.decoder_input(level + 1, codes.flatten(1).gather(1, best))
                parents = best // trie.max_children[level]
                past = [_follow(earlier, new, parents) for earlier, new in zip(past, present, strict=True)]
    return take(trie.items, nodes).masked_fill(scores.isneginf(), 0), scores


def child_log_probs(
    model: UGT, level: int, hidden: Tensor, codes: Tensor, alive: Tensor, normalize: Normalize
) -> Tensor:
    """hidden (B, W, D), codes and alive (B, W, C) as Trie.expand gives them → (B, W, C) float32, -inf where there is no
    child; normalize as in beam_search."""
    if normalize == "level":
        logits = model.code_logits(level, hidden).float().log_softmax(-1).gather(-1, codes)
        return logits.masked_fill(~alive, -math.inf)
    if codes.shape[-1] * WIDE < model.vocabulary.codebook_sizes[level]:
        logits = model.some_code_logits(level, hidden, codes).float()
    else:
        logits = model.code_logits(level, hidden).float().gather(-1, codes)
    return logits.masked_fill(~alive, -math.inf).log_softmax(-1)


def _follow(earlier: list[KeyValue], new: KeyValue, parents: Tensor) -> list[KeyValue]:
    """Keys and values of the levels so far, in the order of the new beams; those of level 0 are common to all."""
    if not earlier:
        return [new]
    index = parents[:, :, None, None]
    own = [tuple(t.gather(1, index.expand(-1, -1, *t.shape[2:])) for t in kv) for kv in [*earlier[1:], new]]
    return [earlier[0], *own]  # type: ignore[list-item]

"""Beam search over the trie of the catalogue: three unrolled steps, every result an item that exists."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genrec.generation.trie import Trie
from genrec.kernels.ranges import span
from genrec.models.ugt import UGT, Memory
from genrec.models.ugt.decoder import KeyValue


def beam_search(
    model: UGT, memory: Memory, start: Tensor, trie: Trie, beams: int, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest items of B requests.

    memory: encoder keys and values of the requests; start (B, D): the decoder's first row; forbidden (B, N + 1) bool:
    items that must not come back → items (B, W) int64 and log-probabilities (B, W) float32, falling; W ≤ beams. Where
    fewer items can be reached the rest has item 0 and log-probability -inf. The probability of a code is normalised
    over the codes that lead on to an item.
    """
    batch = len(start)
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=start.device)
    scores = torch.zeros(batch, 1, device=start.device)
    past: list[list[KeyValue]] = [[] for _ in memory.layers]
    x = start.unsqueeze(1)
    with span("beam search", requests=batch, beams=beams):
        for level in range(trie.levels):
            hidden, present = model.step(x, level, memory, past)
            children, codes, alive = trie.expand(level, nodes)
            logits = model.code_logits(level, hidden).float().gather(-1, codes)
            steps = logits.masked_fill(~alive, -math.inf).log_softmax(-1)
            total = (scores.unsqueeze(-1) + steps).masked_fill(~alive, -math.inf).flatten(1)
            if level == trie.levels - 1:
                return _best_items(total, trie.items[children].flatten(1), beams, forbidden)
            scores, best = total.topk(min(beams, total.shape[1]))
            nodes = children.flatten(1).gather(1, best)
            x = model.decoder_input(level + 1, codes.flatten(1).gather(1, best))
            parents = best // trie.max_children[level]
            past = [_follow(earlier, new, parents) for earlier, new in zip(past, present, strict=True)]
    raise AssertionError("a trie has at least one level")


def _best_items(total: Tensor, items: Tensor, beams: int, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
    if forbidden is not None:
        total = total.masked_fill(forbidden.gather(1, items), -math.inf)
    scores, best = total.topk(min(beams, total.shape[1]))
    return items.gather(1, best).masked_fill(scores.isneginf(), 0), scores


def _follow(earlier: list[KeyValue], new: KeyValue, parents: Tensor) -> list[KeyValue]:
    """Keys and values of the levels so far, in the order of the new beams; those of level 0 are common to all."""
    if not earlier:
        return [new]
    index = parents[:, :, None, None]
    own = [tuple(t.gather(1, index.expand(-1, -1, *t.shape[2:])) for t in kv) for kv in [*earlier[1:], new]]
    return [earlier[0], *own]  # type: ignore[list-item]

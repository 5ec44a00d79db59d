"""Why an item came up: the probability of each code of its semantic id, and what the item head says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genrec.generation import Recommender
from genrec.generation.beam_search import child_log_probs
from genrec.generation.requests import Request
from genrec.models.ugt.decoder import KeyValue


class Explanation(NamedTuple):
    """What the model says of R items after one history."""

    codes: Tensor  # (R, levels) log-probability of each code after the codes before it, float32
    item_head: Tensor  # (R,) log-probability over the whole catalogue, float32


@torch.inference_mode()
def explain(recommender: Recommender, request: Request, items: Tensor) -> Explanation:
    """Of the items (R,) after the one history in `request`. The sum over an item's codes is what a beam search that
    reaches the item gives it; one that was cut short on the way has the same sum."""
    model, trie, normalize = recommender.model, recommender.trie, recommender.config.normalize
    tokens = recommender.tokens(request.history, request.fields)
    encoded = model.encode(tokens, recommender.item_vectors)
    users = model.users(encoded, tokens)
    memory = model.memory(encoded, tokens)
    item_head = recommender.item_head(users, tokens)[0, items]

    paths = model.codes[items].unsqueeze(0)  # (1, R, levels)
    nodes = torch.zeros_like(paths[..., 0])
    x = model.first_row(users, tokens).unsqueeze(1)
    past: list[list[KeyValue]] = [[] for _ in memory.layers]
    log_probs = []
    for level in range(model.levels):
        hidden, present = model.step(x, level, memory, past)
        children, codes, alive = trie.expand(level, nodes)
        found = child_log_probs(model, level, hidden.expand(1, len(items), -1), codes, alive, normalize)
        child = ((codes == paths[..., level, None]) & alive).int().argmax(-1, keepdim=True)
        log_probs.append(found.gather(-1, child)[0, :, 0])
        nodes = children.gather(-1, child).squeeze(-1)
        past = [[*earlier, new] for earlier, new in zip(past, present, strict=True)]
        if level + 1 < model.levels:
            x = model.decoder_input(level + 1, paths[..., level])
    return Explanation(torch.stack(log_probs, -1), item_head)

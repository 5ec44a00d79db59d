"""The two losses that the three stages are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.models.ugt import UGT, TargetBatch, TokenBatch

Values = dict[str, Tensor]


def next_item_loss(model: UGT, tokens: TokenBatch, targets: TargetBatch, item_weight: float) -> tuple[Tensor, Values]:
    """Cross-entropy of the codes of every target, summed over the levels, plus item_weight times that of the item head.

    Both are averaged over the targets; one pass over the histories serves all of them.
    """
    vectors = model.item_vectors()
    encoded = model.encode(tokens, vectors)
    return anchored_loss(model, encoded, model.decode(encoded, tokens, targets), targets, vectors, item_weight)


def anchored_loss(
    model: UGT, encoded: Tensor, hidden: Tensor, targets: TargetBatch, item_vectors: Tensor, item_weight: float
) -> tuple[Tensor, Values]:
    """The same from encoded (T, D) and hidden (M, levels, D), for a caller that needs them too."""
    loss_ids = model.code_losses(hidden, targets.items).mean(0).sum()
    loss_items = model.item_loss(encoded[targets.last_tokens], item_vectors, targets.items)
    loss = loss_ids + item_weight * loss_items
    return loss, {"loss": loss.detach(), "loss_ids": loss_ids.detach(), "loss_items": loss_items.detach()}


def preference_loss(policy: Tensor, reference: Tensor, exists: Tensor, beta: float) -> tuple[Tensor, Values]:
    """Softmax DPO (Chen et al. 2024, "On Softmax Direct Preference Optimization for Recommendation"); with one rejected
    item it is DPO (Rafailov et al. 2023).

    policy, reference (B, 1 + R): log-probabilities of the chosen item and of R rejected ones; exists (B, R) bool: which
    rejected items there are. Rows without any are left out of the mean.
    """
    gain = policy - reference
    margins = (beta * (gain[:, 1:] - gain[:, :1])).masked_fill(~exists, -torch.inf)
    rows = exists.any(1)
    if not bool(rows.any()):
        return policy.sum() * 0.0, {}
    loss = -F.logsigmoid(-margins[rows].logsumexp(1)).mean()
    won = ((gain[:, :1] > gain[:, 1:]) & exists).sum() / exists.sum()
    return loss, {"loss_preference": loss.detach(), "preference_accuracy": won}

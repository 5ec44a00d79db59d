"""The two losses that the three stages are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.models.ugt import UGT, TargetBatch, TokenBatch

Values = dict[str, Tensor]


def next_item_loss(
    model: UGT, tokens: TokenBatch, targets: TargetBatch, item_weight: float, share: float | None = None
) -> tuple[Tensor, Values]:
    """Cross-entropy of the codes of every target, summed over the levels, plus item_weight times that of the item head.

    Summed over the targets with weight `share` each: their mean unless told otherwise. One pass over the histories
    serves all of them.
    """
    vectors = model.item_vectors()
    encoded = model.encode(tokens, vectors)
    return anchored_loss(model, encoded, model.decode(encoded, tokens, targets), targets, vectors, item_weight, share)


def anchored_loss(
    model: UGT,
    encoded: Tensor,
    hidden: Tensor,
    targets: TargetBatch,
    item_vectors: Tensor,
    item_weight: float,
    share: float | None = None,
) -> tuple[Tensor, Values]:
    """The same from encoded (T, D) and hidden (M, levels, D), for a caller that needs them too."""
    weight = 1.0 if share is None else share * len(targets.items)
    loss_ids = model.code_losses(hidden, targets.items).mean(0).sum() * weight
    loss_items = model.item_loss(encoded[targets.last_tokens], item_vectors, targets.items) * weight
    loss = loss_ids + item_weight * loss_items
    return loss, {"loss": loss.detach(), "loss_ids": loss_ids.detach(), "loss_items": loss_items.detach()}


def preference_loss(gain: Tensor, alike: Tensor, exists: Tensor, beta: float, share: float) -> tuple[Tensor, Values]:
    """Softmax DPO (Chen et al. 2024, "On Softmax Direct Preference Optimization for Recommendation"); with one rejected
    item it is DPO (Rafailov et al. 2023). Levels at which two items still share their codes say nothing and are left
    out of the comparison, so that they have no gradient.

    gain (B, 1 + R, levels): log-probabilities of the chosen item and of R rejected ones, minus the reference's;
    alike (B, R, levels) bool: where the rejected item's codes so far are the chosen one's; exists (B, R) bool: which
    rejected items there are. Rows are summed with weight `share`; rows without a rejected item count as 0.
    """
    margins = (gain[:, :1] - gain[:, 1:]).masked_fill(alike, 0).sum(2)  # how much better chosen has become
    pull = (-beta * margins).masked_fill(~exists, -torch.inf)
    rows = exists.any(1)
    losses = -F.logsigmoid(-torch.where(rows[:, None], pull, 0).logsumexp(1))
    loss = losses.masked_fill(~rows, 0).sum() * share
    pairs = exists.sum(1).clamp(min=1)
    won = ((margins > 0) & exists).sum(1) / pairs
    reward = (beta * margins).masked_fill(~exists, 0).sum(1) / pairs
    values = {"loss_preference": loss, "preference_accuracy": won.sum() * share, "reward": reward.sum() * share}
    return loss, {name: value.detach() for name, value in values.items()}

"""Stage 3: what the user liked against what the model itself would have shown instead.

On-policy softmax DPO: the rejected items come from the current model's own beams, the reference is the model as the
stage began, and the next-item loss on the chosen item keeps the model where it was good.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrec.data.sequences import ragged_ranges
from genrec.generation.beam_search import beam_search
from genrec.generation.trie import Trie
from genrec.interfaces import EventSequences, SemanticIds
from genrec.models.ugt import UGT, TargetBatch, TokenBatch
from genrec.training.batches import EpochOrder, TrainingSet, Windows, last_positions, liked_events
from genrec.training.config import AlignConfig
from genrec.training.objectives import anchored_loss, preference_loss
from genrec.training.validation import SELECT_BY_LIKED


class Align:
    """See genrec.training.stages.Stage; `model` is both the start and, frozen in a copy, the reference."""

    name = "align"
    select_by = SELECT_BY_LIKED

    def __init__(self, config: AlignConfig, model: UGT, sequences: EventSequences, seed: int) -> None:
        self.config, self.seed = config, seed
        self.sequences, self.liked = sequences, liked_events(sequences, config.liked_from)
        self.disliked = sequences.ratings <= config.disliked_to
        windows = last_positions(sequences.cu_events, model.config.max_events, config.last_targets)
        self.data = TrainingSet(sequences, windows, self.liked, model.config)
        self.order = EpochOrder(self.data.windows, config.batch_size, seed)
        self.epochs, self.optimizer, self.steps_per_epoch = config.epochs, config.optimizer, self.order.steps
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        semantic_ids = SemanticIds(model.codes.cpu().numpy(), model.vocabulary.codebook_sizes)
        self.trie = Trie(semantic_ids).to(model.codes.device)

    def loss(self, model: UGT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model.eval()  # policy and reference are compared without dropout
        windows = self._one_liked_target(self.order[step], step)
        tokens, chosen = self.data.batch(windows, model.codes.device)
        rejected = self._rejected(model, tokens, windows)
        pairs = _pairs(chosen, rejected)
        vectors = model.item_vectors()
        encoded = model.encode(tokens, vectors)
        hidden = model.decode(encoded, tokens, pairs)
        policy = -model.code_losses(hidden, pairs.items).sum(1).view(len(rejected), -1)
        with torch.no_grad():
            seen = self.reference.encode(tokens, self.reference.item_vectors())
            reference = -self.reference.code_losses(self.reference.decode(seen, tokens, pairs), pairs.items).sum(1)
        preference, values = preference_loss(policy, reference.view_as(policy), rejected > 0, self.config.beta)
        first = hidden.view(*policy.shape, *hidden.shape[1:])[:, 0]  # the rows of the chosen items
        anchor, anchor_values = anchored_loss(model, encoded, first, chosen, vectors, self.config.item_weight)
        loss = anchor + self.config.weight * preference
        return loss, {**anchor_values, **values, "loss": loss.detach()}

    def _one_liked_target(self, windows: Windows, step: int) -> Windows:
        """Every window cut to one of its liked events, drawn by (seed, step), as its only target."""
        rng = np.random.default_rng([self.seed, step])
        chosen = np.array([
            rng.choice(np.flatnonzero(self.data.wanted[first:end]) + first)
            for first, end in zip(windows.first_target, windows.end, strict=True)
        ])  # fmt: skip
        return Windows(windows.begin, chosen, chosen + 1)

    @torch.no_grad()
    def _rejected(self, model: UGT, tokens: TokenBatch, windows: Windows) -> Tensor:
        """(B, negatives) items of the model's own beams that the user did not like, and has not had before: those rated
        badly later on first, then the likeliest; 0 where the beams hold too few."""
        users = np.searchsorted(self.sequences.cu_events, windows.first_target, side="right") - 1
        begins = self.sequences.cu_events[users]
        events, cu_events = ragged_ranges(begins, self.sequences.cu_events[users + 1] - begins)
        owner = np.repeat(np.arange(len(users)), np.diff(cu_events))
        had = events < windows.first_target[owner]

        def items(kept: NDArray[np.bool_]) -> Tensor:
            """(B, X) the items of the events kept, 0 where a user has no more."""
            counts = np.bincount(owner[kept], minlength=len(users))
            rows = np.zeros((len(users), max(1, counts.max())), np.int64)
            rows[np.arange(rows.shape[1]) < counts[:, None]] = self.sequences.item_ids[events[kept]]
            return torch.from_numpy(rows).to(model.codes.device)

        requests = tokens.padded()
        encoded = model.encode(requests, model.item_vectors())
        start, memory = model.first_row(model.users(encoded, requests), requests), model.memory(encoded, requests)
        beams, _ = beam_search(model, memory, start, self.trie, self.config.beams, items(had | self.liked[events]))
        disliked = (beams[..., None] == items(self.disliked[events])[:, None]).any(-1) & (beams > 0)
        order = disliked.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return beams.gather(1, order)[:, : self.config.negatives]


def _pairs(chosen: TargetBatch, rejected: Tensor) -> TargetBatch:
    """The chosen item and its rejected ones (B, R), side by side, as the targets of one decoder pass.

    A missing rejected item is replaced by the chosen one, which preference_loss leaves out.
    """
    items = torch.cat([chosen.items[:, None], torch.where(rejected > 0, rejected, chosen.items[:, None])], 1)
    return TargetBatch(
        items.flatten(),
        chosen.last_tokens.repeat_interleave(items.shape[1]),
        chosen.cu_seqlens * items.shape[1],
        chosen.max_seqlen * items.shape[1],
    )

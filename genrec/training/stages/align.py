"""Stage 3: what the user liked against what the model itself would have shown instead.

On-policy softmax DPO: the rejected items come from the current model's own beams, the reference is the model as the
stage began, and the next-item loss on the chosen item keeps the model where it was good. Codes with which chosen and
rejected both begin pull neither way (as in RAD-DPO): only what tells the two apart is learned.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrec.data.sequences import ragged_ranges
from genrec.generation.beam_search import beam_search
from genrec.generation.trie import Trie
from genrec.interfaces import EventSequences, SemanticIds
from genrec.models.ugt import UGT, TargetBatch, UGTConfig
from genrec.training.batches import TrainingSet, Windows, last_positions, liked_events
from genrec.training.config import AlignConfig
from genrec.training.loader import Loader, LoaderOf
from genrec.training.objectives import anchored_loss, preference_loss
from genrec.training.stages import Batch
from genrec.training.validation import SELECT_BY_LIKED


@dataclass(frozen=True)
class Candidates(Batch):
    """Histories with one liked target each, and what may not or should be rejected."""

    kept: Tensor  # (B, X) items the user has had or liked, 0 where there are no more
    disliked: Tensor  # (B, Y) items the user rated badly, 0 where there are no more


@dataclass(frozen=True)
class Pairs(Batch):
    """Chosen and rejected items side by side, R rejected ones to each chosen one."""

    pairs: TargetBatch  # B · (1 + R) targets of one decoder pass
    exists: Tensor  # (B, R) bool, which rejected items there are
    alike: Tensor  # (B, R, levels) bool, where the codes so far are the chosen item's
    reference: Tensor  # (B, 1 + R, levels) log-probabilities under the model as the stage began


class AlignSet(TrainingSet):
    """Windows of users with what they liked and disliked."""

    def __init__(self, sequences: EventSequences, config: AlignConfig, model: UGTConfig) -> None:
        self.liked = liked_events(sequences, config.liked_from)
        self.disliked = sequences.ratings <= config.disliked_to
        windows = last_positions(sequences.cu_events, model.max_events, config.last_targets)
        super().__init__(sequences, windows, self.liked, model)

    def one_liked_target(self, windows: Windows, rng: np.random.Generator) -> Windows:
        """Every window cut to one of its liked events as its only target."""
        chosen = np.array([
            rng.choice(np.flatnonzero(self.wanted[first:end]) + first)
            for first, end in zip(windows.first_target, windows.end, strict=True)
        ])  # fmt: skip
        return Windows(windows.begin, chosen, chosen + 1)

    def candidates(self, windows: Windows) -> Candidates:
        """The batch of windows with one target each."""
        cu_events = self.sequences.cu_events
        users = np.searchsorted(cu_events, windows.first_target, side="right") - 1
        events, cu_listed = ragged_ranges(cu_events[users], cu_events[users + 1] - cu_events[users])
        owner = np.repeat(np.arange(len(users)), np.diff(cu_listed))
        had = events < windows.first_target[owner]

        def items(listed: NDArray[np.bool_]) -> Tensor:
            counts = np.bincount(owner[listed], minlength=len(users))
            rows = np.zeros((len(users), max(1, counts.max())), np.int64)
            rows[np.arange(rows.shape[1]) < counts[:, None]] = self.sequences.item_ids[events[listed]]
            return torch.from_numpy(rows)

        kept, disliked = items(had | self.liked[events]), items(self.disliked[events])
        return Candidates(*self.batch(windows), kept, disliked)


class Align:
    """See genrec.training.stages.Stage; `model` is both the start and, frozen in a copy, the reference."""

    name = "align"
    select_by = SELECT_BY_LIKED
    on_policy = True

    def __init__(self, config: AlignConfig, model: UGT, loader: LoaderOf) -> None:
        self.config, self.epochs, self.optimizer = config, config.epochs, config.optimizer
        self.max_recall_loss = config.max_recall_loss
        self.loader: Loader[AlignSet] = loader(
            lambda sequences: AlignSet(sequences, config, model.config), config.batch_tokens
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        semantic_ids = SemanticIds(model.codes.cpu().numpy(), model.vocabulary.codebook_sizes)
        self.trie = Trie(semantic_ids).to(model.codes.device)

    def load(self, step: int, micro: int) -> Candidates:
        data, windows = self.loader[step, micro]
        return data.candidates(data.one_liked_target(windows, np.random.default_rng([self.loader.seed, step, micro])))

    @torch.no_grad()
    def prepare(self, model: UGT, batch: Candidates) -> Pairs:
        model.eval()
        rejected = self.rejected(model, batch)
        pairs = _pairs(batch.targets, rejected)
        seen = self.reference.encode(batch.tokens, self.reference.item_vectors())
        hidden = self.reference.decode(seen, batch.tokens, pairs)
        reference = -self.reference.code_losses(hidden, pairs.items)
        codes = model.codes[pairs.items].view(len(rejected), -1, model.levels)
        alike = (codes[:, 1:] == codes[:, :1]).cummin(2).values
        return Pairs(batch.tokens, batch.targets, pairs, rejected > 0, alike, reference.view(*codes.shape))

    def loss(self, model: UGT, batch: Pairs, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = model.item_vectors()
        encoded = model.encode(batch.tokens, vectors)
        hidden = model.decode(encoded, batch.tokens, batch.pairs)
        policy = -model.code_losses(hidden, batch.pairs.items).view_as(batch.reference)
        preference, values = preference_loss(
            policy - batch.reference, batch.alike, batch.exists, self.config.beta, share
        )
        first = hidden.view(*batch.reference.shape[:2], *hidden.shape[1:])[:, 0]  # the rows of the chosen items
        anchor, anchor_values = anchored_loss(
            model, encoded, first, batch.targets, vectors, self.config.item_weight, share
        )
        loss = anchor + self.config.weight * preference
        return loss, {**anchor_values, **values, "loss": loss.detach()}

    @torch.no_grad()
    def rejected(self, model: UGT, batch: Candidates) -> Tensor:
        """(B, negatives) items of the model's own beams that the user did not like, and has not had before: those rated
        badly later on first, then the likeliest; 0 where the beams hold too few."""
        requests = batch.tokens.padded()
        encoded = model.encode(requests, model.item_vectors())
        start, memory = model.first_row(model.users(encoded, requests), requests), model.memory(encoded, requests)
        beams, _ = beam_search(model, memory, start, self.trie, self.config.beams, batch.kept)
        disliked = (beams[..., None] == batch.disliked[:, None]).any(-1) & (beams > 0)
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

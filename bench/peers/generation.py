"""Generation as recommenders on semantic ids do it, TIGER and its descendants: a T5 of Hugging Face and its `generate`,
held to the catalogue."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.peers import installed
from genrec.data.sequences import last_events
from genrec.interfaces import EventSequences
from genrec.models.ugt import UGT

START = 0  # the decoder's first token and the padding; the codes of all levels follow, one token each


def t5_of(ugt: UGT) -> T5 | None:
    """None where transformers is not installed."""
    transformers = installed("transformers", "transformers")
    return T5(transformers, ugt) if transformers else None


class T5:
    """A T5 of a UGT's size, over the same catalogue, with random weights.

    Fair: its layers, width and heads are the UGT's, its feed-forward layers do as much work in the encoder and less in
    the decoder. It reads one vector an event as the UGT does, though it is usually given a token for every code of
    every item; its vocabulary is the codes alone, and it computes no item head.
    """

    def __init__(self, transformers: ModuleType, ugt: UGT) -> None:
        config, self.sizes, self.codes = ugt.config, ugt.vocabulary.codebook_sizes, ugt.codes[1:]
        self.max_events = config.max_events
        self.item_embedding = nn.Embedding(ugt.vocabulary.items + 1, config.d_model)
        self.model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=1 + sum(self.sizes), d_model=config.d_model, d_kv=config.d_model // config.heads,
                num_heads=config.heads, d_ff=config.d_ffn, num_layers=config.encoder_layers,
                num_decoder_layers=config.decoder_layers, pad_token_id=START, decoder_start_token_id=START,
                eos_token_id=None,
            )
        ).eval()  # fmt: skip
        self.first_tokens = torch.tensor([1, *self.sizes[:-1]]).cumsum(0)  # of every level
        self.tokens = (self.codes + self.first_tokens).tolist()
        self.item_of = {tuple(tokens): item for item, tokens in enumerate(self.tokens, 1)}

    def answers(self, requests: EventSequences, beams: int, top_k: int) -> dict[str, Callable[[], NDArray[np.int64]]]:
        """Calls that give (U, top_k) items."""
        allowed, masked = self._prefix_function(), self._mask_lookup()
        return {
            "T5 generate": lambda: self._answer(requests, beams, top_k, prefix_allowed_tokens_fn=allowed),
            "T5, masks": lambda: self._answer(requests, beams, top_k, logits_processor=[masked]),
        }

    @torch.inference_mode()
    def _answer(self, requests: EventSequences, beams: int, top_k: int, **constraint: object) -> NDArray[np.int64]:
        """Fair: keys and values are cached, no gradients recorded, no token generated beyond the last code."""
        items, real = _padded(last_events(requests, self.max_events))
        tokens = self.model.generate(
            inputs_embeds=self.item_embedding(items), attention_mask=real, num_beams=beams,
            num_return_sequences=top_k, min_new_tokens=len(self.sizes), max_new_tokens=len(self.sizes),
            do_sample=False, use_cache=True, **constraint,
        )  # fmt: skip
        found = [self.item_of[tuple(row)] for row in tokens[:, 1:].tolist()]
        return np.array(found).reshape(len(requests), top_k)

    def _prefix_function(self) -> Callable[[int, Tensor], list[int]]:
        """Fair: what `generate` documents and open recommenders use; one look into a dict for every beam."""
        following: dict[tuple[int, ...], set[int]] = {}
        for tokens in self.tokens:
            for level, token in enumerate(tokens):
                following.setdefault(tuple(tokens[:level]), set()).add(token)
        allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}
        return lambda _, sentence: allowed[tuple(sentence.tolist()[1:])]

    def _mask_lookup(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Fair: all beams at once, one row of a table each; only a small catalogue has a table for every prefix."""
        tables, prefix = [], torch.zeros(len(self.codes), dtype=torch.int64)
        for level, size in enumerate(self.sizes):
            table = torch.full((math.prod(self.sizes[:level]), 1 + sum(self.sizes)), -math.inf)
            table[prefix, self.codes[:, level] + self.first_tokens[level]] = 0
            tables.append(table)
            prefix = prefix * size + self.codes[:, level]

        def masked(sentences: Tensor, scores: Tensor) -> Tensor:
            prefix = torch.zeros(len(sentences), dtype=torch.int64)
            codes = (sentences[:, 1:] - self.first_tokens[: sentences.shape[1] - 1]).unbind(1)
            for size, code in zip(self.sizes, codes, strict=False):
                prefix = prefix * size + code
            return scores + tables[len(codes)][prefix]

        return masked


def _padded(histories: EventSequences) -> tuple[Tensor, Tensor]:
    """Item indices (U, L), L the longest history's, and where they are real."""
    lengths = np.diff(histories.cu_events)
    real = np.arange(lengths.max()) < lengths[:, None]
    items = np.zeros(real.shape, np.int64)
    items[real] = histories.item_ids
    return torch.from_numpy(items), torch.from_numpy(real)

"""UGT, the unified generative transformer: event tokens in, codes of the next item out, an item head beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.interfaces import TokenType, Transitions
from genrec.kernels.ranges import span
from genrec.models.ugt.batch import PaddedTokens, TargetBatch, TokenBatch
from genrec.models.ugt.config import ModelVocabulary, UGTConfig
from genrec.models.ugt.decoder import Decoder, KeyValue, Memory
from genrec.models.ugt.encoder import Encoder
from genrec.models.ugt.layers import Dropout, module_list
from genrec.models.ugt.losses import linear_cross_entropy

INITIAL_STD = 0.05  # of every embedding
TRANSITION_SCALE = 10.0  # of counts inside the logarithm: above it an item gains by the log of its count


class UGT(nn.Module):
    """One table of code embeddings serves everywhere: an item is read as the sum of its codes and of a vector of its
    own, the decoder reads codes from the same rows, and code and item logits are products with the same rows."""

    codes: Tensor
    transition_items: Tensor
    transition_weights: Tensor

    def __init__(self, config: UGTConfig, vocabulary: ModelVocabulary, codes: Tensor) -> None:
        """codes (N + 1, levels) int64: the semantic ids of the catalogue, row 0 (out of vocabulary) is not read."""
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        d_model, levels = config.d_model, len(vocabulary.codebook_sizes)
        self.register_buffer("codes", codes)
        if config.transitions:
            remembered = (vocabulary.items + 1, config.transitions)
            self.register_buffer("transition_items", torch.zeros(remembered, dtype=torch.int32))
            self.register_buffer("transition_weights", torch.zeros(remembered))
        self.item_embedding = nn.Embedding(vocabulary.items + 1, d_model)
        self.code_embeddings = module_list(nn.Embedding(size, d_model) for size in vocabulary.codebook_sizes)
        others = [t for t in config.types if t != TokenType.ITEM]
        self.token_embeddings = module_list(nn.Embedding(vocabulary.type_sizes[t], d_model) for t in others)
        self.type_embedding = nn.Embedding(len(TokenType), d_model)
        self.position_embedding = nn.Embedding(config.max_events + 1, d_model)
        self.level_embedding = nn.Embedding(levels, d_model)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, levels)
        self.code_bias = nn.ParameterList(torch.zeros(size) for size in vocabulary.codebook_sizes)
        self.item_bias = nn.Parameter(torch.zeros(vocabulary.items + 1))
        self.dropout = Dropout(config.dropout)

    @torch.no_grad()
    def place_items(self, features: Tensor) -> None:
        """Start the items' own vectors from their features (N + 1, F): the first d_model principal axes, scaled to the
        spread that other embeddings start with. Items alike in text or in company then start out near each other."""
        own = self.item_embedding.weight
        centred = features[1:] - features[1:].mean(0)
        axes = torch.linalg.svd(centred.T @ centred)[0][:, : own.shape[1]]
        placed = centred @ axes
        own[1:, : placed.shape[1]] = placed * (INITIAL_STD / placed.std().clamp(min=1e-8))

    @torch.no_grad()
    def remember(self, transitions: Transitions) -> None:
        """Keep what came after each item in the training log: tables (N + 1, config.transitions) of
        genrec.data.transitions; RuntimeError for other shapes."""
        self.transition_items.copy_(torch.from_numpy(transitions.items))
        self.transition_weights.copy_(torch.from_numpy(transitions.weights))

    @property
    def levels(self) -> int:
        """Codes per item."""
        return len(self.code_embeddings)

    def item_vectors(self) -> Tensor:
        """(N + 1, D): every item as its own vector plus its code embeddings; row 0, out of vocabulary, has no codes."""
        own = self.item_embedding.weight
        codes = sum(table(self.codes[1:, level]) for level, table in enumerate(self.code_embeddings))
        return torch.cat([own[:1], own[1:] + codes])

    def encode(self, tokens: TokenBatch | PaddedTokens, item_vectors: Tensor) -> Tensor:
        """Event tokens, packed (T,) or padded (B, S) → states (…, D); item_vectors is what `item_vectors()` returns,
        computed once per step."""
        x = self._embed_tokens(self._hide_tokens(tokens.token_ids), tokens.type_ids, item_vectors)
        x = x + self.type_embedding(tokens.type_ids) + self.position_embedding(tokens.positions)
        sequences = tokens.cu_seqlens.shape[0] - 1 if isinstance(tokens, TokenBatch) else tokens.lengths.shape[0]
        with span("encoder", x=x, sequences=sequences):
            return self.encoder(self.dropout(x), tokens)

    def _hide_tokens(self, token_ids: Tensor) -> Tensor:
        """While training, a share of the ids replaced by 0, which is what an unknown id is in every token type."""
        if not self.training or self.config.token_dropout == 0:
            return token_ids
        return token_ids * (torch.rand(token_ids.shape, device=token_ids.device) >= self.config.token_dropout)

    def _embed_tokens(self, token_ids: Tensor, type_ids: Tensor, item_vectors: Tensor) -> Tensor:
        if len(self.token_embeddings) == 0:
            return F.embedding(token_ids, item_vectors)
        tables = [item_vectors, *(table.weight for table in self.token_embeddings)]
        first_row = torch.zeros(len(TokenType), dtype=torch.int64, device=token_ids.device)
        row = 0
        for token_type, table in zip(self.config.types, tables, strict=True):
            first_row[token_type] = row
            row += len(table)
        return F.embedding(first_row[type_ids] + token_ids, torch.cat(tables))

    def item_logits(self, users: Tensor, item_vectors: Tensor) -> Tensor:
        """The item head: user vectors (M, D) → (M, N + 1)."""
        return F.linear(users, item_vectors, self.item_bias)

    def some_item_logits(self, users: Tensor, item_vectors: Tensor, items: Tensor) -> Tensor:
        """Of these items alone: users (B, D), items (B, C) → (B, C)."""
        logits = (F.embedding(items, item_vectors) @ users.unsqueeze(-1)).squeeze(-1)
        return logits + F.embedding(items, self.item_bias.unsqueeze(-1)).squeeze(-1)

    def transition_logits(self, last_items: Tensor, items: Tensor | None = None) -> Tensor:
        """What the log says of the items that come next, to be added to the logits of the item head.

        Args:
            last_items: (B, R) int64, the user's last items, the latest first; 0 where there is none.
            items: (B, C) int64, those that are asked for; the whole catalogue without.

        Returns:
            (B, C) or (B, N + 1) float32: log(1 + 10 Σ_r weight(last_r → item) / r), 0 for what never came after them;
            the weights are those of genrec.data.transitions. AttributeError where the model remembers none.
        """
        rank = torch.arange(1, last_items.shape[1] + 1, device=last_items.device)
        after = F.embedding(last_items, self.transition_items).long()  # (B, R, K)
        weights = F.embedding(last_items, self.transition_weights).float() / rank[:, None]
        if items is not None:
            found = items.unsqueeze(-1) == after.flatten(1).unsqueeze(1)
            return torch.log1p(TRANSITION_SCALE * (found * weights.flatten(1).unsqueeze(1)).sum(-1))
        sums = weights.new_zeros(weights.shape[0], self.vocabulary.items + 1)
        for index, weight in zip(after.unbind(1), weights.unbind(1), strict=True):  # TensorRT's scatter cannot add
            sums.scatter_(1, index, sums.gather(1, index) + weight)
        return torch.log1p(TRANSITION_SCALE * sums)

    def item_loss(self, users: Tensor, item_vectors: Tensor, items: Tensor) -> Tensor:
        """Mean cross-entropy of the item head for user vectors (M, D) and the items that came next (M,)."""
        with span("item loss", users=users, items=item_vectors):
            return linear_cross_entropy(users, item_vectors, self.item_bias, items)

    def memory(self, encoded: Tensor, tokens: PaddedTokens) -> Memory:
        """What the decoder reads of encoded (B, S, D), once per request."""
        return self.decoder.memory(encoded, tokens.lengths)

    def users(self, encoded: Tensor, tokens: PaddedTokens) -> Tensor:
        """User vectors (B, D): of encoded (B, S, D) the state of every request's last token."""
        return encoded.gather(1, tokens.last[..., None].expand(-1, -1, encoded.shape[-1])).squeeze(1)

    def first_row(self, users: Tensor, tokens: PaddedTokens) -> Tensor:
        """The decoder's first row for what follows these histories (B, D)."""
        return self.decoder_start(users, tokens.positions.gather(1, tokens.last).squeeze(1) + 1)

    def decoder_start(self, users: Tensor, next_positions: Tensor) -> Tensor:
        """The decoder's first row: user vectors (M, D) and the position of the event to come (M,) → (M, D)."""
        return users + self.level_embedding.weight[0] + self.position_embedding(next_positions)

    def decoder_input(self, level: int, codes: Tensor) -> Tensor:
        """The row of level ≥ 1 that follows these codes (…) of the level before → (…, D)."""
        return self.code_embeddings[level - 1](codes) + self.level_embedding.weight[level]

    def decode(self, encoded: Tensor, tokens: TokenBatch, targets: TargetBatch) -> Tensor:
        """Teacher-forced rows of every target, encoded (T, D) → hidden (M, levels, D); row l predicts code l."""
        codes = self.codes[targets.items]
        start = self.decoder_start(encoded[targets.last_tokens], tokens.positions[targets.last_tokens] + 1)
        rows = [start, *(self.decoder_input(level, codes[:, level - 1]) for level in range(1, self.levels))]
        x = self.dropout(torch.stack(rows, 1))
        with span("decoder", x=x):
            return self.decoder(x, encoded, tokens, targets)

    def step(self, x: Tensor, level: int, memory: Memory, past: list[list[KeyValue]]) -> tuple[Tensor, list[KeyValue]]:
        """One level of every beam, see Decoder.step."""
        with span("decoder", x=x, level=level):
            return self.decoder.step(x, level, memory, past)

    def code_logits(self, level: int, hidden: Tensor) -> Tensor:
        """hidden (…, D) of that level → (…, codebook_sizes[level])."""
        return F.linear(hidden, self.code_embeddings[level].weight, self.code_bias[level])

    def some_code_logits(self, level: int, hidden: Tensor, codes: Tensor) -> Tensor:
        """Of these codes alone: hidden (B, W, D), codes (B, W, C) → (B, W, C). Reads C rows of the codebook a beam."""
        weight, bias = self.code_embeddings[level].weight, self.code_bias[level]
        logits = (F.embedding(codes, weight) @ hidden.unsqueeze(-1)).squeeze(-1)
        return logits + F.embedding(codes, bias.unsqueeze(-1)).squeeze(-1)

    def code_losses(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Negative log-likelihood of the codes of items (M,) under hidden (M, levels, D) → (M, levels) float32."""
        codes = self.codes[items]
        with span("code losses", hidden=hidden):
            losses = [
                F.cross_entropy(self.code_logits(level, hidden[:, level]).float(), codes[:, level], reduction="none")
                for level in range(self.levels)
            ]
            return torch.stack(losses, 1)

    def recompute_activations(self) -> None:
        """Keep no activations of the layers but their inputs; gradients compute the others once more."""
        self.encoder.recompute = self.decoder.recompute = True

    def compile_layers(self) -> None:
        """Compile the training passes of the layers with torch.compile, each for any shape."""
        for layer in (*self.encoder.layers, *self.decoder.layers):
            layer.compile(dynamic=True)

    @torch.no_grad()
    def balance_router(self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda load: load) -> Tensor:
        """Move every layer's selection bias against its load; call once after each optimizer step.

        Returns the share of the rows since the last call that every expert got, (E,), averaged over the layers.
        """
        loads = sum_over_ranks(torch.stack([layer.moe.load for layer in self.decoder.layers]))
        for layer, load in zip(self.decoder.layers, loads, strict=True):
            layer.moe.balance(load)
        return (loads / loads.sum(1, keepdim=True)).mean(0)

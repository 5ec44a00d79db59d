"""The decoder: one row per code of an item; self-attention over the codes so far, cross-attention on the encoder, MoE.

Training runs all levels of all targets at once (`forward`), generation one level of all beams at a time (`step`). Both
are the same function, because every row divides by the number of keys it may see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genrec.models.ugt.batch import TargetBatch, TokenBatch
from genrec.models.ugt.config import UGTConfig
from genrec.models.ugt.layers import Dropout, GroupLayerNorm, MixtureOfExperts, ReluAttention, module_list, run_layer

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of B encoded requests, computed once and shared by all beams."""

    layers: list[KeyValue]  # per decoder layer, k and v (B, H, S, D / H)
    lengths: Tensor  # (B,) int64, how many of the S tokens are there


@dataclass(frozen=True)
class TargetRows:
    """Which row of M · levels belongs to which level, sequence and past, in training."""

    levels: int
    group_ids: Tensor  # (M · levels,) int64, the level
    cu_rows: Tensor  # (B + 1,) int32, rows of every sequence
    longest: int  # most rows of one sequence
    key_limit: Tensor  # (M · levels,) int64, how many states of its sequence a row may see


class DecoderLayer(nn.Module):
    """Self-attention over the codes so far, cross-attention on the history, mixture of experts; norms per level."""

    def __init__(self, config: UGTConfig, levels: int) -> None:
        super().__init__()
        self.self_norm = GroupLayerNorm(config.d_model, levels)
        self.self_attention = ReluAttention(config.d_model, config.heads, None)
        self.cross_norm = GroupLayerNorm(config.d_model, levels)
        self.cross_attention = ReluAttention(config.d_model, config.heads, config.rel_bias_size)
        self.moe_norm = GroupLayerNorm(config.d_model, levels)
        self.moe = MixtureOfExperts(config.d_model, config.d_expert, config.experts, config.top_k)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, update: Tensor, residual: Tensor | None, encoded: Tensor, tokens: TokenBatch, rows: TargetRows
    ) -> tuple[Tensor, Tensor]:
        """All levels of M targets: update (M · levels, D), not yet added to residual, encoded (T, D) → that pair one
        layer on."""
        hidden, residual = self.self_norm(update, rows.group_ids, residual)
        update = self.dropout(self.self_attention.levels(hidden.unflatten(0, (-1, rows.levels))).flatten(0, 1))
        hidden, residual = self.cross_norm(update, rows.group_ids, residual)
        cross = self.cross_attention.targets(hidden, encoded, tokens, rows.cu_rows, rows.longest, rows.key_limit)
        hidden, residual = self.moe_norm(self.dropout(cross), rows.group_ids, residual)
        return self.dropout(self.moe(hidden)), residual

    def past_and_present(self, hidden: Tensor, past: list[KeyValue]) -> tuple[Tensor, KeyValue]:
        """Self-attention of one new level of every beam, hidden (B, W, D), on the levels before it.

        past: k and v of every earlier level, (B, 1, H, D / H) where common to all beams, else (B, W, H, D / H). A row
        has one key a level, so this is products and sums: ReLU attention has no softmax denominator to wait for.
        """
        attention = self.self_attention
        q, present = (
            attention.queries(hidden) * (hidden.shape[-1] // attention.heads) ** -0.5,
            attention.keys_values(hidden),
        )
        levels = [*past, present]
        out = sum((q * k).sum(-1, keepdim=True).relu() * v for k, v in levels) / len(levels)
        return attention.output(out.flatten(2)), present


class Decoder(nn.Module):
    """Rows of codes → hidden states, of all levels at once or of one level of every beam."""

    def __init__(self, config: UGTConfig, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.layers = module_list(DecoderLayer(config, levels) for _ in range(config.decoder_layers))
        self.norm = GroupLayerNorm(config.d_model, levels)
        self.recompute = False  # trade activations for time, see run_layer

    def forward(self, x: Tensor, encoded: Tensor, tokens: TokenBatch, targets: TargetBatch) -> Tensor:
        """All levels of M targets at once: x (M, levels, D), encoded (T, D) → (M, levels, D)."""
        shape, levels = x.shape, self.levels
        first_tokens = tokens.cu_seqlens[:-1].repeat_interleave(
            targets.cu_seqlens.diff(), output_size=len(targets.items)
        )
        rows = TargetRows(
            levels,
            group_ids=torch.arange(levels, device=x.device).expand(shape[:2]).flatten(),
            cu_rows=targets.cu_seqlens * levels,
            longest=targets.max_seqlen * levels,
            key_limit=(targets.last_tokens + 1 - first_tokens).repeat_interleave(levels),
        )
        update, residual = x.flatten(0, 1), None
        for layer in self.layers:
            update, residual = run_layer(layer, self.recompute, update, residual, encoded, tokens, rows)
        return self.norm(update, rows.group_ids, residual)[0].view(shape)

    def memory(self, encoded: Tensor, lengths: Tensor) -> Memory:
        """Keys and values of encoded (B, S, D) for every decoder layer; lengths (B,) as in PaddedTokens."""
        layers = [layer.cross_attention.keys_values(encoded) for layer in self.layers]
        return Memory([(k.transpose(1, 2), v.transpose(1, 2)) for k, v in layers], lengths)

    def step(self, x: Tensor, level: int, memory: Memory, past: list[list[KeyValue]]) -> tuple[Tensor, list[KeyValue]]:
        """One level of every beam: x (B, W, D), past[layer][earlier level] → hidden (B, W, D), this level's k and v."""
        group_ids = torch.full(x.shape[:2], level, device=x.device)
        update, residual, new = x, None, []
        for layer, key_value, earlier in zip(self.layers, memory.layers, past, strict=True):
            hidden, residual = layer.self_norm(update, group_ids, residual)
            update, present = layer.past_and_present(hidden, earlier)
            hidden, residual = layer.cross_norm(update, group_ids, residual)
            update = layer.cross_attention.beams(hidden, key_value, memory.lengths)
            hidden, residual = layer.moe_norm(update, group_ids, residual)
            update = layer.moe(hidden.flatten(0, 1)).view(x.shape)
            new.append(present)
        return self.norm(update, group_ids, residual)[0], new

"""The decoder: one row per code of an item; self-attention over the codes so far, cross-attention on the encoder, MoE.

Training runs all levels of all targets at once (`forward`), generation one level of all beams at a time (`step`). Both
are the same function, because every row divides by the number of keys it may see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genrec.kernels import relu_attention
from genrec.models.ugt.config import UGTConfig
from genrec.models.ugt.layers import Dropout, GroupLayerNorm, MixtureOfExperts, ReluAttention, module_list

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of B encoded histories, computed once and shared by all targets and beams of a request."""

    layers: list[KeyValue]  # per decoder layer, k and v (T, H, D / H)
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int


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

    def past_and_present(self, hidden: Tensor, past: list[KeyValue]) -> tuple[Tensor, KeyValue]:
        """Self-attention of one new level of every beam, hidden (B, W, D), on the levels before it.

        past[0] is (B, 1, H, D / H), common to all beams of a request and never copied; the others are (B, W, H, D / H).
        ReLU attention needs no softmax denominator, so the shared and the own keys are simply added.
        """
        attention, visible = self.self_attention, float(len(past) + 1)
        q, present = attention.queries(hidden), attention.keys_values(hidden)
        own = [*past[1:], present] if past else [present]
        k, v = (torch.stack(t, 3).flatten(0, 1) for t in zip(*own, strict=True))  # (B·W, H, own, D / H)
        out = relu_attention(q.flatten(0, 1).unsqueeze(2), k, v, normalizer=visible).squeeze(2).view_as(q)
        if past:
            k, v = (t.transpose(1, 2) for t in past[0])
            out = out + relu_attention(q.transpose(1, 2), k, v, normalizer=visible).transpose(1, 2)
        return attention.output(out.flatten(2)), present


class Decoder(nn.Module):
    """Rows of codes → hidden states, of all levels at once or of one level of every beam."""

    def __init__(self, config: UGTConfig, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.layers = module_list(DecoderLayer(config, levels) for _ in range(config.decoder_layers))
        self.norm = GroupLayerNorm(config.d_model, levels)

    def memory(self, encoded: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Memory:
        """Keys and values of encoded (T, D) for every decoder layer."""
        layers = [layer.cross_attention.keys_values(encoded) for layer in self.layers]
        return Memory(layers, cu_seqlens, max_seqlen)

    def forward(self, x: Tensor, memory: Memory, key_limit: Tensor, cu_targets: Tensor, max_targets: int) -> Tensor:
        """All levels of M targets at once.

        x (M, levels, D); key_limit (M,): how many encoder tokens of its sequence a target may see; cu_targets (B + 1,)
        offsets of the targets of a sequence → (M, levels, D).
        """
        shape, levels = x.shape, self.levels
        group_ids = torch.arange(levels, device=x.device).expand(shape[:2]).flatten()
        limit, cu_rows = key_limit.repeat_interleave(levels), cu_targets * levels
        update, residual = x.flatten(0, 1), None
        for layer, key_value in zip(self.layers, memory.layers, strict=True):
            hidden, residual = layer.self_norm(update, group_ids, residual)
            update = layer.dropout(layer.self_attention.levels(hidden.view(shape)).flatten(0, 1))
            hidden, residual = layer.cross_norm(update, group_ids, residual)
            update = layer.dropout(
                layer.cross_attention.memory(
                    hidden, key_value, cu_rows, memory.cu_seqlens, max_targets * levels, memory.max_seqlen, limit
                )
            )
            hidden, residual = layer.moe_norm(update, group_ids, residual)
            update = layer.dropout(layer.moe(hidden))
        return self.norm(update, group_ids, residual)[0].view(shape)

    def step(self, x: Tensor, level: int, memory: Memory, past: list[list[KeyValue]]) -> tuple[Tensor, list[KeyValue]]:
        """One level of every beam: x (B, W, D), past[layer][earlier level] → hidden (B, W, D), this level's k and v."""
        batch, beams, d_model = x.shape
        group_ids = torch.full((batch * beams,), level, device=x.device)
        cu_rows = torch.arange(0, batch * beams + 1, beams, device=x.device, dtype=torch.int32)
        key_limit = memory.cu_seqlens.diff().repeat_interleave(beams, output_size=batch * beams)
        update, residual, new = x.flatten(0, 1), None, []
        for layer, key_value, earlier in zip(self.layers, memory.layers, past, strict=True):
            hidden, residual = layer.self_norm(update, group_ids, residual)
            update, present = layer.past_and_present(hidden.view(x.shape), earlier)
            hidden, residual = layer.cross_norm(update.view(-1, d_model), group_ids, residual)
            update = layer.cross_attention.memory(
                hidden, key_value, cu_rows, memory.cu_seqlens, beams, memory.max_seqlen, key_limit
            )
            hidden, residual = layer.moe_norm(update, group_ids, residual)
            update = layer.moe(hidden)
            new.append(present)
        return self.norm(update, group_ids, residual)[0].view(x.shape), new

"""The parts that encoder and decoder share; every one of them is a thin wrapper over an operator of genrec.kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genrec.kernels import group_layer_norm, moe_experts, moe_route, relu_attention, relu_attention_varlen
from genrec.models.ugt.batch import PaddedTokens, TokenBatch

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """nn.ModuleList that remembers, for the type checker, what it holds."""
    return cast(Sequence[M], nn.ModuleList(modules))


def run_layer(layer: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """layer(*inputs); with `recompute` its activations are not kept but computed once more for the gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class Dropout(nn.Module):
    """nn.Dropout, which on a CPU draws one element after the other on one thread and took a sixth of a training step.
    Sixteen random bits an element do; four elements share a draw."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.dropped = round(p * 2**16)  # of 2¹⁶ values

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; while training, a share p of it 0 and the rest scaled by 1 / (1 - p)."""
        if not self.training or self.dropped == 0:
            return x
        if x.device.type != "cpu" or self.dropped == 2**16 or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - self.dropped))


class GroupLayerNorm(nn.Module):
    """Layer norm with one affine per group of tokens, fused with the residual sum before it."""

    def __init__(self, d_model: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, d_model))
        self.bias = nn.Parameter(torch.zeros(groups, d_model))

    def forward(self, update: Tensor, group_ids: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """update (T, D), group_ids (T,), residual (T, D) or None → (normalised, residual + update), both (T, D)."""
        if residual is None:
            return group_layer_norm(update, group_ids, self.weight, self.bias), update
        return group_layer_norm(update, group_ids, self.weight, self.bias, residual=residual)


class ReluAttention(nn.Module):
    """Multi-head ReLU-aggregated attention; each row averages over the keys it may see.

    There is no norm between the aggregation and the output projection: with one, quality falls behind softmax.
    """

    def __init__(self, d_model: int, heads: int, rel_bias_size: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model)
        self.rel_bias = nn.Parameter(torch.zeros(heads, rel_bias_size)) if rel_bias_size else None

    def queries(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, H, D / H)."""
        return self.query(x).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (…, D) → k and v, each (…, H, D / H)."""
        k, v = self.key_value(x).chunk(2, -1)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def history(self, x: Tensor, tokens: TokenBatch | PaddedTokens) -> Tensor:
        """Causal self-attention: x (T, D) of packed tokens, (B, S, D) of padded ones → the same shape."""
        q, (k, v) = self.queries(x), self.keys_values(x)
        if isinstance(tokens, PaddedTokens):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = relu_attention(q, k, v, causal=True, rel_bias=self.rel_bias, normalizer="visible").transpose(1, 2)
        else:
            cu_seqlens, longest = tokens.cu_seqlens, tokens.max_seqlen
            out = relu_attention_varlen(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest,
                causal=True, rel_bias=self.rel_bias, normalizer="visible",
            )  # fmt: skip
        return self.output(out.flatten(-2))

    def targets(
        self, x: Tensor, encoded: Tensor, tokens: TokenBatch, cu_queries: Tensor, max_queries: int, key_limit: Tensor
    ) -> Tensor:
        """Cross-attention of training: row i of x (Tq, D) sees the first key_limit[i] states of its sequence among
        encoded (T, D) → (Tq, D)."""
        out = relu_attention_varlen(
            self.queries(x), *self.keys_values(encoded), cu_queries, tokens.cu_seqlens, max_queries, tokens.max_seqlen,
            key_limit=key_limit, rel_bias=self.rel_bias, normalizer="visible",
        )  # fmt: skip
        return self.output(out.flatten(1))

    def beams(self, x: Tensor, memory: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
        """Cross-attention of generation: x (B, W, D) sees the first lengths[b] keys of (B, H, S, D / H) → (B, W, D)."""
        limit = lengths[:, None].expand(x.shape[:2])
        out = relu_attention(
            self.queries(x).transpose(1, 2), *memory,
            key_limit=limit, rel_bias=self.rel_bias, normalizer="visible",
        )  # fmt: skip
        return self.output(out.transpose(1, 2).flatten(2))

    def levels(self, x: Tensor) -> Tensor:
        """Causal self-attention over the codes of one item: x (M, levels, D) → (M, levels, D)."""
        k, v = (t.transpose(1, 2) for t in self.keys_values(x))
        out = relu_attention(self.queries(x).transpose(1, 2), k, v, causal=True, normalizer="visible")
        return self.output(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The encoder's dense feed-forward layer."""

    def __init__(self, d_model: int, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) → (T, D)."""
        return self.down(self.dropout(F.gelu(self.up(x))))


class MixtureOfExperts(nn.Module):
    """Dropless top-k SwiGLU experts, balanced without a loss term: a bias on the selection rises for idle experts and
    falls for busy ones after every step (Wang et al. 2024, "Auxiliary-loss-free load balancing")."""

    router_bias: Tensor
    load: Tensor  # (E,) int64, rows per expert since the last balance

    def __init__(self, d_model: int, d_expert: int, experts: int, top_k: int, bias_rate: float = 1e-3) -> None:
        super().__init__()
        self.top_k, self.bias_rate = top_k, bias_rate
        self.router_weight = nn.Parameter(torch.randn(experts, d_model) * d_model**-0.5)
        self.w_gate_up = nn.Parameter(torch.randn(experts, 2 * d_expert, d_model) * d_model**-0.5)
        self.w_down = nn.Parameter(torch.randn(experts, d_model, d_expert) * d_expert**-0.5)
        self.register_buffer("router_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) → (T, D)."""
        logits = F.linear(x, self.router_weight)
        weights, indices = moe_route(logits, self.top_k, bias=self.router_bias)
        if torch.is_grad_enabled():  # a training step; twice where it is recomputed, which no share of it notices
            self.load.index_add_(0, indices.flatten(), self.load.new_ones(()).expand(indices.numel()))
        return moe_experts(x, weights, indices, self.w_gate_up, self.w_down)

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the selection bias one step against load (E,), the rows that each expert got since the last call."""
        load = load.to(self.router_bias.dtype)
        self.router_bias.add_(self.bias_rate * (load.mean() - load).sign())
        self.load.zero_()

"""One call of an operator on random data of a given size, forward and, if wanted, backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from genrec import kernels

Name = Literal["relu_attention", "relu_attention_varlen", "group_layer_norm", "moe_route", "moe_experts", "rq_nearest"]


@dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """Which operator, and how large."""

    name: Name = "relu_attention_varlen"
    """the operator"""
    batch: int = 32
    """attention: sequences"""
    length: int = 256
    """attention: tokens of every sequence"""
    heads: int = 4
    """attention: heads"""
    rows: int = 2048
    """norm, experts, routing, nearest code: rows of x"""
    dim: int = 64
    """width of a head, or of a row"""
    hidden: int = 128
    """experts: width inside an expert"""
    experts: int = 16
    """experts and routing: how many"""
    top_k: int = 4
    """experts and routing: active ones"""
    groups: int = 4
    """norm: groups of tokens"""
    codebook_sizes: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    """nearest code: codes per level"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of all tensors"""
    backward: bool = True
    """also the gradients, where the operator has any for its first argument"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto"""


def operator_call(config: OperatorConfig, device: torch.device) -> Callable[[], None]:
    """What one repetition does: the operator, and the gradients of the sum of its first result."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        dtype = getattr(torch, config.dtype)
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(config.backward)

    forward, leaves = _CALLS[config.name](config, randn, device)

    def call() -> None:
        result = forward()
        if config.backward and config.name != "rq_nearest":
            torch.autograd.grad(result.sum(), leaves)

    return call


Randn = Callable[..., Tensor]
Forward = tuple[Callable[[], Tensor], list[Tensor]]


def _attention(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    q, k, v = (randn(config.batch, config.heads, config.length, config.dim) for _ in range(3))
    return lambda: kernels.relu_attention(q, k, v, causal=True), [q, k, v]


def _packed_attention(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    q, k, v = (randn(config.batch * config.length, config.heads, config.dim) for _ in range(3))
    cu = torch.arange(0, len(q) + 1, config.length, dtype=torch.int32, device=device)
    return (
        lambda: kernels.relu_attention_varlen(q, k, v, cu, cu, config.length, config.length, causal=True),
        [q, k, v],
    )


def _norm(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    x, weight, bias = randn(config.rows, config.dim), randn(config.groups, config.dim), randn(config.groups, config.dim)
    ids = torch.arange(config.rows, device=device) % config.groups
    return lambda: kernels.group_layer_norm(x, ids, weight, bias), [x, weight, bias]


def _route(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    logits = randn(config.rows, config.experts)
    return lambda: kernels.moe_route(logits, config.top_k)[0], [logits]


def _experts(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    x, logits = randn(config.rows, config.dim), randn(config.rows, config.experts)
    gate_up, down = (
        randn(config.experts, 2 * config.hidden, config.dim),
        randn(config.experts, config.dim, config.hidden),
    )
    weights, indices = kernels.moe_route(logits.detach(), config.top_k)
    return lambda: kernels.moe_experts(x, weights, indices, gate_up, down), [x, gate_up, down]


def _nearest(config: OperatorConfig, randn: Randn, device: torch.device) -> Forward:
    x, books = randn(config.rows, config.dim).detach(), [randn(size, config.dim) for size in config.codebook_sizes]
    return lambda: kernels.rq_nearest(x, books)[1], books


_CALLS: dict[str, Callable[[OperatorConfig, Randn, torch.device], Forward]] = {
    "relu_attention": _attention,
    "relu_attention_varlen": _packed_attention,
    "group_layer_norm": _norm,
    "moe_route": _route,
    "moe_experts": _experts,
    "rq_nearest": _nearest,
}

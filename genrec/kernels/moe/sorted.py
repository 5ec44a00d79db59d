"""Experts on tokens sorted by expert, one product per expert that has tokens, with explicit gradients: what runs where
no compiled kernel does.

    H = X Wguᵀ = [G, U]     A = silu(G) ⊙ U     y_t = Σ_j w_tj · (A Wdᵀ)
    B = dY Wd     dw = ⟨B, A⟩     dA = w ⊙ B     dU = dA ⊙ silu(G)     dG = dA ⊙ U ⊙ silu'(G)
    dWd = dYᵀ (w ⊙ A)     dWgu = [dG, dU]ᵀ X     dX = [dG, dU] Wgu
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class Assignment:
    """The T · k (token, slot) pairs in the order of their experts."""

    def __init__(self, indices: Tensor, experts: int) -> None:
        flat = indices.flatten().long()
        self.order = flat.argsort(stable=True)  # (T·k,) pair at each sorted row
        self.token = self.order // indices.shape[1] if indices.shape[1] else self.order
        self.shape = indices.shape
        self.counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(
            0, flat, torch.ones_like(flat)
        )

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Every expert that has rows, with its rows."""
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def unsort(self, rows: Tensor) -> Tensor:
        """(T·k, …) sorted rows → (T, k, …)"""
        return torch.empty_like(rows).index_copy_(0, self.order, rows).view(*self.shape, *rows.shape[1:])


def forward(x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """(T, D), (T, k), (T, k), (E, 2F, D), (E, D, F) → (T, D)"""
    pairs = Assignment(indices, len(w_gate_up))
    rows = x.index_select(0, pairs.token)
    out = torch.empty_like(rows)
    for expert, block in pairs.blocks():
        gate, up = (rows[block] @ w_gate_up[expert].T).chunk(2, 1)
        torch.mm(F.silu(gate).mul_(up), w_down[expert].T, out=out[block])
    return torch.einsum("tk,tkd->td", weights, pairs.unsort(out).to(weights.dtype)).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, indices: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_gate_up and w_down."""
    pairs = Assignment(indices, len(w_gate_up))
    rows, grad_out = x.index_select(0, pairs.token), grad.index_select(0, pairs.token)
    weight = weights.flatten().index_select(0, pairs.order)[:, None]
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    grad_gate_up, grad_down = (w.new_zeros(w.shape) for w in (w_gate_up, w_down))  # contiguous, as the fake says
    for expert, block in pairs.blocks():
        gate, up = (rows[block] @ w_gate_up[expert].T).chunk(2, 1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        hidden = silu * up
        grad_hidden = grad_out[block] @ w_down[expert]
        grad_weight[block] = (grad_hidden.to(weight.dtype) * hidden).sum(1, keepdim=True)
        w = weight[block].to(x.dtype)
        torch.mm(grad_out[block].T, hidden * w, out=grad_down[expert])
        grad_hidden *= w
        grad_gate = grad_hidden * up * (sigmoid + silu * (1 - sigmoid))
        both = torch.cat([grad_gate, grad_hidden * silu], 1)
        torch.mm(both.T, rows[block], out=grad_gate_up[expert])
        torch.mm(both, w_gate_up[expert], out=grad_rows[block])
    grad_x = pairs.unsort(grad_rows).sum(1, dtype=weights.dtype).to(x.dtype)
    return grad_x, pairs.unsort(grad_weight)[..., 0], grad_gate_up, grad_down

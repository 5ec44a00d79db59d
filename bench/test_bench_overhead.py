"""What a call costs where next to nothing is to be computed: every operator beside an ATen operator that takes as many
tensors, without and with gradients recorded. They compute different things."""

import pytest
import torch
import torch.nn.functional as F

from genrec.kernels import group_layer_norm, moe_experts, moe_route, relu_attention, relu_attention_varlen, rq_nearest

TOKENS, DIM = 4, 8


def calls(randn, recorded):
    x, q = (randn(TOKENS, DIM).requires_grad_(recorded) for _ in range(2))
    heads, packed, cu = q.view(1, 1, TOKENS, DIM), q.view(TOKENS, 1, DIM), torch.tensor([0, TOKENS])
    ids, weight, bias = torch.zeros(TOKENS, dtype=torch.int64), randn(1, DIM), randn(1, DIM)
    gate_up, down, codebook = randn(DIM, 2 * DIM, DIM), randn(DIM, DIM, DIM), randn(DIM, DIM).requires_grad_(recorded)
    weights, indices = moe_route(x.detach(), 2)
    scale, shift, matrix = weight[0], bias[0], down[0]

    def attention():
        return F.scaled_dot_product_attention(heads, heads, heads)

    return {
        "relu_attention": (lambda: relu_attention(heads, heads, heads), attention),
        "relu_attention_varlen": (
            lambda: relu_attention_varlen(packed, packed, packed, cu, cu, TOKENS, TOKENS), attention
        ),
        "group_layer_norm": (
            lambda: group_layer_norm(x, ids, weight, bias), lambda: F.layer_norm(x, (DIM,), scale, shift)
        ),
        "moe_route": (lambda: moe_route(x, 2), lambda: x.softmax(1).topk(2)),
        "moe_experts": (lambda: moe_experts(x, weights, indices, gate_up, down), lambda: F.linear(x, matrix)),
        "rq_nearest": (lambda: rq_nearest(x.detach(), [codebook]), lambda: torch.cdist(x, codebook)),
    }  # fmt: skip


OPERATORS = ["relu_attention", "relu_attention_varlen", "group_layer_norm", "moe_route", "moe_experts", "rq_nearest"]


class Empty(torch.autograd.Function):
    """What no operator with a gradient in Python can be cheaper than."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_autograd_function(race, randn):
    x = randn(TOKENS, DIM).requires_grad_()
    race(
        "an empty autograd function, nothing of genrec",
        {"genrec": lambda: Empty.apply(x), "ATen": lambda: x.detach()},
        tolerance=None,
    )


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_smallest_call(race, randn, operator, recorded):
    ours, aten = calls(randn, recorded)[operator]

    def first(function):
        def call():
            result = function()
            return (result if isinstance(result, torch.Tensor) else result[0]).detach()

        return call

    contenders = {"genrec": first(ours), "ATen": first(aten)}
    race(f"smallest {operator}{', gradients recorded' * recorded}", contenders, tolerance=None)

"""A mixture of experts against the ways to write it in PyTorch: the definition, a loop of matrix products over tokens
sorted by expert, eager and compiled, and torch's grouped product."""

import pytest
import torch
import torch.nn.functional as F

from genrec.kernels import moe_experts, moe_ffn, moe_route
from genrec.kernels.moe import reference

EXPERTS, TOP_K = 16, 4


def by_expert(indices):
    """The order of the (token, slot) pairs by expert, their tokens, and how many every expert has."""
    order = indices.flatten().argsort(stable=True)
    return order, order // indices.shape[1], torch.bincount(indices.flatten(), minlength=EXPERTS)


def weighted_sum(weights, out, order):
    position = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    return torch.bmm(weights[:, None], out.index_select(0, position).view(*weights.shape, -1))[:, 0]


def sorted_loop(x, weights, indices, w_gate_up, w_down):
    order, token, counts = by_expert(indices)
    rows, out = x.index_select(0, token).split(counts.tolist()), []
    for row, gate_up, down in zip(rows, w_gate_up.unbind(), w_down.unbind(), strict=True):
        if len(row):
            gate, up = (row @ gate_up.T).chunk(2, 1)
            out.append((F.silu(gate) * up) @ down.T)
    return weighted_sum(weights, torch.cat(out), order)


def grouped_product(x, weights, indices, w_gate_up, w_down):
    order, token, counts = by_expert(indices)
    offsets = counts.cumsum(0).int()
    gate, up = torch._grouped_mm(x.index_select(0, token), w_gate_up.mT, offs=offsets).chunk(2, 1)
    return weighted_sum(weights, torch._grouped_mm(F.silu(gate) * up, w_down.mT, offs=offsets), order)


compiled_loop = torch.compile(sorted_loop, dynamic=False)
FORMS = {
    "genrec": moe_experts,
    "definition": reference.moe_experts,
    "sorted_loop": sorted_loop,
    "compiled_loop": compiled_loop,
    "grouped_product": grouped_product,
}
SHAPES = [
    (1, 256, 512),
    (32, 64, 128),
    (32, 256, 512),
    (2048, 64, 128),
    (2048, 256, 512),
    (2048, 512, 1024),
    (8192, 256, 512),
]


@pytest.fixture
def inputs(randn, tokens, d, f):
    weights, indices = reference.moe_route(randn(tokens, EXPERTS), TOP_K)
    return randn(tokens, d), weights, indices, randn(EXPERTS, 2 * f, d) / d**0.5, randn(EXPERTS, d, f) / f**0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "d", "f"), SHAPES)
def test_forward(benchmark, inputs, form, tokens, d, f):
    benchmark.group = f"experts forward, {tokens} tokens of {d}, {EXPERTS} experts of {f}, top {TOP_K}"
    with torch.no_grad():
        torch.testing.assert_close(FORMS[form](*inputs), reference.moe_experts(*inputs), rtol=1e-3, atol=1e-4)
        benchmark(FORMS[form], *inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "d", "f"), SHAPES)
def test_forward_and_backward(benchmark, randn, inputs, form, tokens, d, f):
    benchmark.group = f"experts forward and backward, {tokens} tokens of {d}, {EXPERTS} experts of {f}, top {TOP_K}"
    x, weights, indices, gate_up, down = inputs
    leaves = [tensor.requires_grad_() for tensor in (x, weights, gate_up, down)]
    grad = randn(tokens, d)

    def step(function):
        return torch.autograd.grad(function(x, weights, indices, gate_up, down), leaves, grad)

    for ours, truth in zip(step(FORMS[form]), step(reference.moe_experts), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)
    benchmark(step, FORMS[form])


def plain_route(logits, k):
    kept, indices = logits.softmax(1).topk(k)
    return kept / kept.sum(1, keepdim=True), indices.int()


@pytest.mark.parametrize("form", [moe_route, plain_route], ids=["genrec", "softmax_topk"])
@pytest.mark.parametrize("tokens", [1, 32, 2048, 8192])
def test_route(benchmark, randn, form, tokens):
    benchmark.group = f"routing, {tokens} tokens, top {TOP_K} of {EXPERTS}"
    logits = randn(tokens, EXPERTS)
    torch.testing.assert_close(form(logits, TOP_K)[0], reference.moe_route(logits, TOP_K)[0])
    benchmark(form, logits, TOP_K)


@pytest.mark.parametrize("form", ["moe_ffn", "linear"])
def test_smallest_call(benchmark, randn, form):
    """What a call costs where nothing is to be computed, beside one linear layer of ATen."""
    benchmark.group = "one token of 8, the smallest call"
    x, router, gate_up, down = randn(1, 8), randn(EXPERTS, 8), randn(EXPERTS, 16, 8), randn(EXPERTS, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            moe_ffn(x, router, gate_up, down, TOP_K),
            reference.moe_experts(x, *reference.moe_route(x @ router.T, TOP_K), gate_up, down),
        )
        if form == "linear":
            benchmark(F.linear, x, router)
        else:
            benchmark(moe_ffn, x, router, gate_up, down, TOP_K)

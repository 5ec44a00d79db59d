"""Every operator once, forwards and backwards, at awkward sizes: few enough for compute-sanitizer (`make gpu`)."""

import pytest
import torch
from op_contract import DEVICE, assert_measured

from genrec.kernels import group_layer_norm, moe_experts, moe_route, relu_attention, relu_attention_varlen, rq_nearest
from genrec.kernels.group_layer_norm import reference as norm
from genrec.kernels.moe import reference as moe
from genrec.kernels.relu_attention import reference as attention
from genrec.kernels.rq_nearest import reference as rq

pytestmark = pytest.mark.usefixtures("triton_kernels")


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def test_relu_attention():
    limit = torch.tensor([[0, 3, 21, 50, 7]], device=DEVICE).expand(2, 5)
    assert_measured(
        lambda q, k, v, b: relu_attention(q, k, v, key_limit=limit, rel_bias=b, normalizer="visible"),
        lambda q, k, v, b: attention.relu_attention(q, k, v, key_limit=limit, rel_bias=b, normalizer="visible"),
        [randn(2, 2, 5, 24), randn(2, 2, 37, 24), randn(2, 2, 37, 20), randn(2, 9)],
        torch.float16,
    )


def test_relu_attention_varlen():
    cu = torch.tensor([0, 20, 20, 37], device=DEVICE)
    assert_measured(
        lambda q, k, v: relu_attention_varlen(q, k, v, cu, cu, 20, 20, causal=True),
        lambda q, k, v: attention.relu_attention_varlen(q, k, v, cu, cu, causal=True),
        [randn(40, 2, 33), randn(40, 2, 33), randn(40, 2, 17)],  # three slack rows
        torch.bfloat16,
    )


def test_group_layer_norm():
    ids = torch.arange(37, device=DEVICE) % 3
    assert_measured(
        lambda x, r, w, b: group_layer_norm(x, ids, w, b, residual=r),
        lambda x, r, w, b: norm.group_layer_norm(x, ids, w, b, residual=r),
        [randn(37, 45), randn(37, 45), randn(3, 45), randn(3, 45)],
        torch.float32,
    )


def test_moe():
    logits = randn(19, 5)
    indices = moe_route(logits, 2)[1]
    assert_measured(lambda x: moe_route(x, 2)[0], lambda x: moe.moe_route(x, 2)[0], [logits], torch.float32)
    assert_measured(
        lambda x, w, gate_up, down: moe_experts(x, w, indices, gate_up, down),
        lambda x, w, gate_up, down: moe.moe_experts(x, w, indices, gate_up, down),
        [randn(19, 24), randn(19, 2), randn(5, 36, 24), randn(5, 24, 18)],
        torch.float32,
    )


def test_rq_nearest():
    x, books = randn(37, 20), [randn(33, 20), randn(50, 20)]
    codes, quantized = rq_nearest(x, books)
    assert torch.equal(codes, rq.rq_nearest(x.double(), [book.double() for book in books])[0])
    leaves = [book.clone().requires_grad_() for book in books]
    ours, truth = (torch.autograd.grad(f(x, leaves)[1].square().sum(), leaves) for f in (rq_nearest, rq.rq_nearest))
    for gradient, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(quantized, sum(book[codes[:, level]] for level, book in enumerate(books)))

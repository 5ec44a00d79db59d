"""Elements past 2³¹: every input lies in memory so that its last row starts behind the 2³¹-th element, while each
stride and each index fits in 32 bits. The memory is address space only: pages that nobody touches cost nothing."""

import mmap

import pytest
import torch
from torch import Tensor

from genrec.kernels import group_layer_norm, moe_experts, moe_route, relu_attention, relu_attention_varlen, rq_nearest

PAST = 2**31
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on


def far(x: Tensor) -> Tensor:
    """The same values with rows (dimension 0) so wide apart that the last one starts past the 2³¹-th element."""
    rows = x.shape[0]
    inner = x[0].numel()
    stride = max(inner, -(-PAST // (rows - 1)) + 1)
    assert stride < PAST
    total = stride * (rows - 1) + inner
    if x.device.type == "cpu":
        room = mmap.mmap(-1, total * x.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        memory = torch.frombuffer(room, dtype=x.dtype)
    else:
        memory = torch.empty(total, dtype=x.dtype, device=x.device)
    view = memory.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    return view.copy_(x)


def dense_attention(q, k, v):
    return relu_attention(q, k, v, causal=True)


def packed_attention(q, k, v):
    cu = torch.tensor([0, 1, 3], device=q.device)
    return relu_attention_varlen(q, k, v, cu, cu, 2, 2, causal=True)


def norm(x, residual):
    ids = torch.tensor([0, 1, 0], device=x.device)
    weight, bias = torch.linspace(1, 2, 10, device=x.device).view(2, 5), torch.zeros(2, 5, device=x.device)
    return group_layer_norm(x, ids, weight, bias, residual=residual)[0]


def experts(x, w_gate_up, w_down):
    indices = torch.tensor([[0, 2], [2, 1], [1, 0]], device=x.device)
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]], device=x.device)
    return moe_experts(x, weights, indices, w_gate_up, w_down)


def route(logits):
    return moe_route(logits, 2)[0]


def nearest(x, codebook):
    codes, quantized = rq_nearest(x, [codebook])
    return quantized + codes


CASES = {
    dense_attention: [(3, 2, 3, 4)] * 3,
    packed_attention: [(3, 2, 4)] * 3,
    norm: [(3, 5)] * 2,
    experts: [(3, 4), (3, 6, 4), (3, 4, 3)],
    route: [(3, 4)],
    nearest: [(3, 5), (3, 5)],
}


def results(operator, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = operator(*leaves)
    needed = [x for x in leaves if operator is not nearest or x is leaves[1]]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), needed)]


def check(operator, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for position in range(len(CASES[operator])):
        inputs = [torch.randn(shape, generator=generator).to(device) for shape in CASES[operator]]
        expected = results(operator, inputs)
        inputs[position] = far(inputs[position])
        for ours, near in zip(results(operator, inputs), expected, strict=True):
            torch.testing.assert_close(ours, near)


@pytest.mark.parametrize("operator", CASES, ids=lambda f: f.__name__)
def test_past_the_31st_bit(operator, device):
    check(operator, device)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("operator", CASES, ids=lambda f: f.__name__)
def test_past_the_31st_bit_in_triton(operator, device):
    check(operator, device)

"""Packed histories as in training: relu_attention_varlen against the same sequences one after the other."""

import pytest
import torch

from genrec.kernels import relu_attention_varlen
from genrec.kernels.relu_attention import reference


def genrec(q, k, v, bias, cu, longest):
    return relu_attention_varlen(q, k, v, cu, cu, longest, longest, causal=True, rel_bias=bias)


def one_by_one(q, k, v, bias, cu, longest):
    return reference.relu_attention_varlen(q, k, v, cu, cu, causal=True, rel_bias=bias)


@pytest.mark.parametrize("attention", [genrec, one_by_one], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [8, 128])
def test_forward_and_backward(benchmark, randn, attention, batch):
    lengths = torch.randint(1, 51, (batch,), generator=torch.Generator().manual_seed(0))
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = int(cu[-1])
    inputs = [x.requires_grad_() for x in (*(randn(tokens, 4, 32) for _ in range(3)), randn(4, 64))]
    benchmark.group = f"relu_attention_varlen forward and backward, {batch} histories of up to 50, 4 heads of 32"
    torch.testing.assert_close(attention(*inputs, cu, 50), one_by_one(*inputs, cu, 50), rtol=1e-4, atol=1e-5)

    def step():
        torch.autograd.grad(attention(*inputs, cu, 50).sum(), inputs)

    benchmark(step)

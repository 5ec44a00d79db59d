"""Group layer norm, forward and backward: against layer_norm without affine and a gathered affine."""

import pytest
import torch
import torch.nn.functional as F

from genrec.kernels import group_layer_norm


def genrec(x, weight, bias, ids):
    return group_layer_norm(x, ids, weight, bias)


def gathered_affine(x, weight, bias, ids):
    return F.layer_norm(x, x.shape[-1:]) * weight[ids] + bias[ids]


@pytest.mark.parametrize("norm", [genrec, gathered_affine], ids=lambda f: f.__name__)
@pytest.mark.parametrize("d", [64, 256])
def test_forward_and_backward(benchmark, randn, norm, d):
    inputs = [x.requires_grad_() for x in (randn(8192, d), randn(4, d), randn(4, d))]
    ids = torch.randint(0, 4, (8192,), generator=torch.Generator().manual_seed(0))
    benchmark.group = f"group_layer_norm forward and backward, 8192 tokens of {d}, 4 groups"
    torch.testing.assert_close(norm(*inputs, ids), gathered_affine(*inputs, ids), rtol=1e-4, atol=1e-4)

    def step():
        torch.autograd.grad(norm(*inputs, ids).sum(), inputs)

    benchmark(step)

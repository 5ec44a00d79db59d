"""Nearest code of one level: rq_nearest against what one writes in PyTorch."""

import pytest
import torch

from genrec.kernels import rq_nearest


def genrec(x, codebook):
    return rq_nearest(x, [codebook])[0][:, 0]


def addmm_argmin(x, codebook):
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def cdist_argmin(x, codebook):
    return torch.cdist(x, codebook).argmin(1)


@pytest.mark.parametrize("search", [genrec, addmm_argmin, cdist_argmin], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [64, 2048])
@pytest.mark.parametrize("k", [1024, 4096, 16384])
def test_nearest(benchmark, randn, search, n, k):
    x, codebook = randn(n, 256), randn(k, 256)
    benchmark.group = f"rq_nearest {n}×256 in {k} codes, float32"
    chosen = (x.double() - codebook.double()[search(x, codebook)]).square().sum(1)
    truth = torch.cdist(x.double(), codebook.double()).square().amin(1)
    assert (chosen - truth).max() < 1e-3  # of about 400
    benchmark(search, x, codebook)

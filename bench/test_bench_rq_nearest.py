"""The nearest code, of one level and of three, against what one writes in PyTorch, eager and compiled, and against the
libraries people take for it.

FLOPs are those of the inner products, 2 · N · K · D for each level; bytes those of x, the codebooks and the result.
"""

import pytest
import torch

from bench.peers.rq_nearest import addmm, residual, searches
from bench.sizes import sizes
from genrec.kernels import rq_nearest

DIM = 256


def distance(x, quantized):
    return (x.double() - quantized.double()).square().sum(1)


@pytest.mark.parametrize("n", sizes([64], [1, 2048], [131072]))
@pytest.mark.parametrize("k", sizes([1024], [4096, 16384]))
def test_nearest(race, compiled, randn, n, k):
    x, codebook = randn(n, DIM, dtype=torch.float32), randn(k, DIM, dtype=torch.float32)
    forms = searches() | compiled("addmm, compiled", addmm)
    contenders = {"genrec": lambda: rq_nearest(x, [codebook])[0][:, 0]}
    contenders |= {name: (lambda search=search: search(x, codebook)) for name, search in forms.items()}
    race(
        f"nearest of {k} codes, {n}×{DIM}", contenders, flops=2 * n * k * DIM, bytes=x.nbytes + codebook.nbytes + 8 * n,
        goal=2.0, along=(f"nearest code of {n} rows", "codes", k),
        measure=lambda codes: distance(x, codebook[codes]),
    )  # fmt: skip


@pytest.mark.parametrize("n", sizes([64], [2048]))
@pytest.mark.parametrize("levels", sizes([[256, 256, 256]], [[1024, 4096, 16384]]), ids=str)
def test_residual(race, compiled, randn, n, levels):
    x = randn(n, DIM, dtype=torch.float32)
    codebooks = [randn(k, DIM, dtype=torch.float32) / (level + 1) for level, k in enumerate(levels)]
    contenders = {"genrec": lambda: rq_nearest(x, codebooks)}
    forms = {name: residual(search) for name, search in searches().items()}
    forms |= compiled("addmm, compiled", residual(addmm))
    contenders |= {name: (lambda form=form: form(x, codebooks)) for name, form in forms.items()}
    race(
        f"residual codes of {levels}, {n}×{DIM}", contenders, flops=2 * n * sum(levels) * DIM,
        bytes=2 * x.nbytes + sum(book.nbytes for book in codebooks), goal=2.0,
        measure=lambda result: distance(x, result[1]),
    )  # fmt: skip

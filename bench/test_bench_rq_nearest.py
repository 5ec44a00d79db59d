"""The nearest code, of one level and of three, against what one writes in PyTorch, eager and compiled, and against the
libraries people take for it.

FLOPs are those of the inner products, 2 · N · K · D for each level.
"""

import pytest
import torch

from bench.sizes import sizes
from genrec.kernels import rq_nearest

DIM = 256


def addmm_argmin(x, codebook):
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def in_chunks(x, codebook, rows=256):
    """The same with distances that stay in cache."""
    norms = codebook.square().sum(1)
    return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(rows)])


def cdist_argmin(x, codebook):
    return torch.cdist(x, codebook).argmin(1)


def residual(search):
    """All levels with the search of one."""

    def levels(x, codebooks):
        codes, rest = [], x
        for codebook in codebooks:
            codes.append(search(rest, codebook))
            rest = rest - codebook[codes[-1]]
        return torch.stack(codes, 1), x - rest

    return levels


SEARCHES = {"addmm": addmm_argmin, "addmm in chunks": in_chunks, "cdist": cdist_argmin}


def libraries():
    """Searches of the packages that are installed here."""
    found = {}
    try:
        from sklearn.metrics import pairwise_distances_argmin

        found["scikit-learn"] = lambda x, c: torch.from_numpy(pairwise_distances_argmin(x.numpy(), c.numpy()))
    except ImportError:
        pass
    try:
        import faiss

        found["faiss"] = lambda x, c: torch.from_numpy(faiss.knn(x.numpy(), c.numpy(), 1)[1][:, 0])
    except ImportError:
        pass
    return found


def distance(x, quantized):
    return (x.double() - quantized.double()).square().sum(1)


@pytest.mark.parametrize("n", sizes([64], [1, 2048], [131072]))
@pytest.mark.parametrize("k", sizes([1024], [4096, 16384]))
def test_nearest(race, compiled, randn, n, k):
    x, codebook = randn(n, DIM), randn(k, DIM)
    searches = SEARCHES | libraries() | compiled("addmm, compiled", addmm_argmin)
    contenders = {"genrec": lambda: rq_nearest(x, [codebook])[0][:, 0]}
    contenders |= {name: (lambda search=search: search(x, codebook)) for name, search in searches.items()}
    race(
        f"nearest of {k} codes, {n}×{DIM}", contenders, flops=2 * n * k * DIM, bytes=codebook.nbytes, goal=2.0,
        measure=lambda codes: distance(x, codebook[codes]),
    )  # fmt: skip


@pytest.mark.parametrize("n", sizes([64], [2048]))
@pytest.mark.parametrize("levels", sizes([[256, 256, 256]], [[1024, 4096, 16384]]), ids=str)
def test_residual(race, compiled, randn, n, levels):
    x, codebooks = randn(n, DIM), [randn(k, DIM) / (level + 1) for level, k in enumerate(levels)]
    contenders = {"genrec": lambda: rq_nearest(x, codebooks)}
    forms = {name: residual(search) for name, search in (SEARCHES | libraries()).items()}
    forms |= compiled("addmm, compiled", residual(addmm_argmin))
    contenders |= {name: (lambda form=form: form(x, codebooks)) for name, form in forms.items()}
    race(
        f"residual codes of {levels}, {n}×{DIM}", contenders, flops=2 * n * sum(levels) * DIM, goal=2.0,
        measure=lambda result: distance(x, result[1]),
    )  # fmt: skip

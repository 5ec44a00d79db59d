"""What takes the time of `genrec tokenize` on a large catalogue: k-means for the codebooks, which on 100,000 items is
half of it, and a code of every level for every item, anew after every epoch."""

import numpy as np
import pytest
import torch

from bench.peers.tokenizer import assigners, learners
from bench.sizes import sizes
from genrec.kernels import rq_nearest
from genrec.models.rqvae import RQVAE, RQVAEConfig
from genrec.models.semantic_ids import sum_of_codes

DIM = 256
CODES = sizes([(1000, [256, 256, 256])], [(100_000, [256, 256, 256])], [(100_000, [1024, 4096, 16384])])
CODEBOOKS = sizes([(1000, [16, 16, 16])], [(10_000, [256])], [(100_000, [256])])


def catalogue(items):
    """Features as embeddings have them: clusters within clusters, of uneven size, ever fewer along the later axes."""
    rng = np.random.default_rng(0)
    x = 0.5 * rng.standard_normal((items, DIM), np.float32)
    for clusters, spread in ((items // 2000 + 1, 1.0), (items // 50 + 1, 0.7)):
        share = np.arange(1.0, clusters + 1) ** -0.7
        centres = np.float32(spread) * rng.standard_normal((clusters, DIM), np.float32)
        x += centres[rng.choice(clusters, items, p=share / share.sum())]
    return torch.from_numpy(x / np.sqrt(np.arange(1, DIM + 1, dtype=np.float32)))


def some_codebooks(x, levels):
    """Of every level, random rows of what the levels before leave over."""
    codebooks, rest, generator = [], x, torch.Generator().manual_seed(0)
    for size in levels:
        codebooks.append(rest[torch.randperm(len(rest), generator=generator)[:size]])
        rest = rest - rq_nearest(rest, codebooks[-1:])[1]
    return codebooks


def distance(x, codes, codebooks):
    return (x - sum_of_codes(codes.numpy(), codebooks)).square().sum(1)


@pytest.mark.parametrize(("items", "levels"), CODES, ids=str)
def test_codes(race, items, levels):
    """Two codes may be as near as each other but for the rounding, and lead to others: every item's first distance is
    compared, and the mean of the last."""
    x = catalogue(items)
    codebooks = some_codebooks(x, levels)
    contenders = {"genrec": lambda: rq_nearest(x, codebooks)[0]} | assigners(x, codebooks)
    race(
        f"codes of {levels}, {items} items", contenders, flops=2 * items * sum(levels) * DIM, goal=2.0,
        measure=lambda codes: [distance(x, codes[:, :1], codebooks[:1]), distance(x, codes, codebooks).mean()],
    )  # fmt: skip


@pytest.mark.parametrize(("items", "levels"), CODEBOOKS, ids=str)
def test_codebooks(race, items, levels):
    """No two ways to seed k-means end alike: what the codebooks leave of the features may differ by an eighth."""
    x = catalogue(items)
    model = RQVAE(RQVAEConfig(DIM, hidden_sizes=(), codebook_sizes=tuple(levels)))

    def learn():
        model.init_codebooks(x, torch.Generator().manual_seed(0))
        return model.codebooks

    def left_over(codebooks):
        return (x - rq_nearest(x, codebooks)[1]).square().sum()

    contenders = {"genrec": learn} | learners(x, levels)
    expected = left_over(contenders["mini-batches"]())

    def assert_as_good(codebooks):
        assert abs(left_over(codebooks) / expected - 1) < 1 / 8

    race(f"codebooks of {levels}, {items} items", contenders, tolerance=None, measure=assert_as_good)

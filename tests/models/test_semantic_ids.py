"""Semantic ids: one to one whatever the latents, cheapest where that can be checked by trying everything."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrec.kernels import rq_nearest
from genrec.models.semantic_ids import assign_new, code_tokens, resolve_collisions, sum_of_codes


@st.composite
def problems(draw, fill=1.0):
    """(latents, codebooks): few distinct points, so that collisions and full prefixes are the rule."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = draw(st.integers(0, int(math.prod(sizes) * fill)))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    codebooks = [
        torch.randint(-4, 5, (size, 2), generator=generator).float() / (1 + level) for level, size in enumerate(sizes)
    ]
    spread = draw(st.sampled_from([1, 3, 9]))
    latents = torch.randint(-spread, spread + 1, (count, 2), generator=generator).float()
    return latents, codebooks


def nearest(latents, codebooks):
    return rq_nearest(latents, codebooks)[0].numpy()


def is_one_to_one(codes):
    return len(np.unique(codes, axis=0)) == len(codes)


def in_range(codes, codebooks):
    return bool(((codes >= 0) & (codes < [len(codebook) for codebook in codebooks])).all())


@given(problems())
@settings(max_examples=80)
def test_ids_are_unique_and_in_range_even_when_every_id_is_taken(problem):
    latents, codebooks = problem
    resolution = resolve_collisions(latents, codebooks)
    assert resolution.codes.shape == (len(latents), len(codebooks))
    assert resolution.codes.dtype == np.int64
    assert is_one_to_one(resolution.codes)
    assert in_range(resolution.codes, codebooks)


@given(problems())
@settings(max_examples=60)
def test_what_is_unique_already_stays(problem):
    latents, codebooks = problem
    codes = nearest(latents, codebooks)
    resolution = resolve_collisions(latents, codebooks)
    holders = [tuple(row) for row in codes.tolist()]
    alone = [holders.count(row) == 1 for row in holders]
    assert np.array_equal(resolution.codes[alone], codes[alone])
    assert resolution.colliding == len(latents) - sum(alone)
    assert resolution.moved == sum((resolution.codes != codes).any(1))


@given(problems())
@settings(max_examples=60)
def test_a_prefix_is_left_only_when_it_is_full(problem):
    latents, codebooks = problem
    codes = nearest(latents, codebooks)
    resolution = resolve_collisions(latents, codebooks)
    wanted = [tuple(row) for row in codes[:, :-1].tolist()]
    got = [tuple(row) for row in resolution.codes[:, :-1].tolist()]
    left = {before for before, after in zip(wanted, got, strict=True) if before != after}
    assert all(got.count(prefix) == len(codebooks[-1]) for prefix in left)
    overflow = sum(max(0, wanted.count(prefix) - len(codebooks[-1])) for prefix in set(wanted))
    assert resolution.spilled == overflow


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60)
def test_colliding_items_are_matched_at_least_cost(seed, items, codes):
    """All items collide under one prefix: no way to give out the codes, or to choose who gets one, is cheaper."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = [torch.arange(5.0)[:, None] * torch.tensor([50.0, 0.0]), torch.randn(codes, 2, generator=generator)]
    codebooks[1][0] = 0  # the nearest of all latents below
    latents = torch.randn(items, 2, generator=generator) * 1e-3
    resolution = resolve_collisions(latents, codebooks)
    assume((nearest(latents, codebooks) == 0).all())  # no other code came closer
    stay = resolution.codes[:, 0] == 0
    distances = (latents[:, None] - codebooks[1][None]).double().square().sum(-1).numpy()
    cheapest = min(
        sum(distances[row, code] for row, code in zip(rows, order, strict=True))
        for rows in itertools.combinations(range(items), min(items, codes))
        for order in itertools.permutations(range(codes), len(rows))
    )
    got = distances[stay, resolution.codes[stay, 1]].sum()
    assert stay.sum() == min(items, codes)
    assert got == pytest.approx(cheapest, rel=1e-6)


@given(problems(fill=0.6), st.integers(0, 2**16))
@settings(max_examples=60)
def test_new_items_never_change_old_ones(problem, seed):
    latents, codebooks = problem
    old = resolve_collisions(latents, codebooks).codes
    kept = old.copy()
    room = math.prod(len(codebook) for codebook in codebooks) - len(old)
    new = torch.randn(room, 2, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    added = assign_new(new, codebooks, old)
    assert np.array_equal(old, kept)
    assert is_one_to_one(np.concatenate([old, added.codes]))
    assert in_range(added.codes, codebooks)
    again = assign_new(new, codebooks, old)
    assert np.array_equal(again.codes, added.codes)


@given(problems(fill=0.7), st.integers(0, 2**16))
@settings(max_examples=60)
def test_a_new_item_gets_the_nearest_free_code(problem, seed):
    """One new item against a search over every prefix in the order that the documentation promises."""
    latents, codebooks = problem
    assume(len(latents) < math.prod(len(codebook) for codebook in codebooks))
    old = resolve_collisions(latents, codebooks).codes
    new = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed))
    got = assign_new(new, codebooks, old).codes[0].tolist()

    taken = {tuple(row) for row in old.tolist()}
    ids = itertools.product(*(range(len(codebook)) for codebook in codebooks))

    def distances_on_the_way(codes):
        residual, way = new[0].double(), []
        for level, code in enumerate(codes):
            residual = residual - codebooks[level][code].double()
            way.append((round(residual.square().sum().item(), 9), code))
        return way

    assert got == list(min((codes for codes in ids if codes not in taken), key=distances_on_the_way))


def test_errors_are_mean_squares():
    latents = torch.tensor([[0.0], [0.0], [1.0]])
    codebooks = [torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.5]])]
    resolution = resolve_collisions(latents, codebooks)
    assert sorted(resolution.codes.tolist()) == [[0, 0], [0, 1], [1, 0]]
    assert (resolution.colliding, resolution.moved, resolution.spilled) == (2, 1, 0)
    assert (resolution.error_before, resolution.error_after) == (0.0, pytest.approx(0.25 / 3))
    assert "codes" not in resolution.report()


def test_the_worst_fitting_items_leave_a_full_prefix():
    codebooks = [torch.tensor([[0.0, 0.0], [10.0, 0.0], [-30.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])]
    latents = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.1, 0.0]])
    resolution = resolve_collisions(latents, codebooks)
    assert resolution.codes[1].tolist() == [1, 0]
    assert sorted(resolution.codes[[0, 2]].tolist()) == [[0, 0], [0, 1]]
    assert resolution.spilled == 1


def test_many_alike_items_fill_the_catalogue():
    generator = torch.Generator().manual_seed(0)
    codebooks = [torch.randn(8, 4, generator=generator) for _ in range(3)]
    codes = resolve_collisions(torch.zeros(512, 4), codebooks).codes
    assert is_one_to_one(codes)


def test_sum_of_codes():
    codebooks = [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0], [30.0]])]
    assert sum_of_codes(np.array([[1, 2], [0, 0]]), codebooks).tolist() == [[32.0], [11.0]]


def test_tokens_of_an_id():
    assert code_tokens([12, 0, 250]) == ["<a_12>", "<b_0>", "<c_250>"]


def test_more_items_than_ids():
    codebooks = [torch.zeros(2, 1), torch.zeros(3, 1)]
    with pytest.raises(ValueError, match=r"7 items do not fit into the 6 ids of codebook_sizes \[2, 3\]"):
        resolve_collisions(torch.zeros(7, 1), codebooks)
    with pytest.raises(ValueError, match="7 items do not fit"):
        assign_new(torch.zeros(5, 1), codebooks, np.array([[0, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ([[0, 0, 0]], r"shape \(1, 3\); expected \(items, 2\)"),
        ([[0, 3]], "outside codebooks"),
        ([[0, 1], [0, 1]], "more than once"),
    ],
)
def test_taken_ids_that_cannot_be(taken, message):
    with pytest.raises(ValueError, match=message):
        assign_new(torch.zeros(1, 1), [torch.zeros(2, 1), torch.zeros(3, 1)], np.array(taken))

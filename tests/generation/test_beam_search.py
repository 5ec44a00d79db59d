"""Beam search against scoring every item of the catalogue."""

import math

import pytest
import small
import torch

from genrec.generation.beam_search import beam_search
from genrec.generation.requests import token_batch
from genrec.generation.trie import Trie
from genrec.interfaces import SemanticIds
from genrec.models.ugt import TargetBatch

USERS = [[3, 7, 7, 1, 9], [5], [2, 4, 6, 8, 10, 12, 14, 16], [11, 0, 13]]
SHAPES = [
    {"items": 20, "sizes": (25,)},
    {"items": 30, "sizes": (6, 9), "decoder_layers": 2},
    {"items": 30, "sizes": (4, 4, 4), "decoder_layers": 2, "experts": 5, "top_k": 3},
    {"items": 25, "sizes": (3, 3, 3, 3), "heads": 4, "token_types": small.ALL_TYPES},
]


def search(model, users, beams, excluded=None, normalize="children"):
    tokens = token_batch(small.sequences(users, types=small.ALL_TYPES), model.config).padded()
    encoded = model.encode(tokens, model.item_vectors())
    start = model.first_row(model.users(encoded, tokens), tokens)
    return beam_search(model, model.memory(encoded, tokens), start, trie_of(model), beams, excluded, normalize)


def trie_of(model):
    return Trie(SemanticIds(model.codes.numpy(), model.vocabulary.codebook_sizes))


def brute_force(model, users, normalize="children"):
    """(B, N + 1) log-probability of every item: teacher-forced, each code against its siblings, or against its level;
    -inf for item 0."""
    codes = [tuple(row) for row in model.codes[1:].tolist()]
    tokens = token_batch(small.sequences(users, types=small.ALL_TYPES), model.config)
    encoded = model.encode(tokens, model.item_vectors())
    items = torch.arange(1, len(codes) + 1)
    scores = torch.full((len(users), len(codes) + 1), -math.inf, dtype=torch.float64)
    for user in range(len(users)):
        cu = torch.zeros(len(users) + 1, dtype=torch.int32)
        cu[user + 1 :] = len(items)
        last = (tokens.cu_seqlens[user + 1].long() - 1).expand(len(items))
        hidden = model.decode(encoded, tokens, TargetBatch(items, last, cu, len(items)))
        for item, code in enumerate(codes, start=1):
            total = 0.0
            for level in range(model.levels):
                rivals = sorted({other[level] for other in codes if other[:level] == code[:level]})
                logits = model.code_logits(level, hidden[item - 1, level]).double()
                total += float(
                    logits[code[level]] - logits[slice(None) if normalize == "level" else rivals].logsumexp(0)
                )
            scores[user, item] = total
    return scores


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("normalize", ["children", "level"])
@pytest.mark.parametrize("shape", SHAPES)
def test_wide_beams_are_brute_force(shape, normalize):
    model = small.model(**shape).double()
    count = shape["items"]
    items, scores = search(model, USERS, beams=count + 5, normalize=normalize)
    truth = brute_force(model, USERS, normalize)
    assert items.shape == scores.shape == (len(USERS), count), "wider than the catalogue"
    assert torch.equal(items.sort(1).values, torch.arange(1, count + 1).expand(len(USERS), -1))
    assert (scores.diff(dim=1) <= 0).all()
    torch.testing.assert_close(scores.double(), truth.gather(1, items), atol=1e-5, rtol=1e-5)
    if normalize == "children":
        torch.testing.assert_close(truth.exp().sum(1), torch.ones(len(USERS), dtype=torch.float64))
    else:
        assert (truth.exp().sum(1) < 0.99).all(), "codes that no item has keep their share"


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("beams", [1, 3, 8])
def test_narrow_beams_return_distinct_items_with_their_own_scores(shape, beams):
    model = small.model(**shape)
    items, scores = search(model, USERS, beams)
    assert items.shape[1] <= beams
    truth = brute_force(model, USERS)
    for row, found in enumerate(items):
        kept = found[found > 0]
        assert len(kept) == len(set(kept.tolist())) > 0
        torch.testing.assert_close(scores[row, : len(kept)].double(), truth[row, kept], atol=1e-4, rtol=1e-4)
    assert (scores.diff(dim=1)[:, : int((items > 0).sum(1).min()) - 1] <= 0).all()
    assert torch.equal(items == 0, scores == -math.inf)


def test_narrow_beams_keep_the_best_prefixes():
    """Two levels, two beams: the oracle is the definition of beam search, in plain Python."""
    model = small.model(items=30, sizes=(6, 9)).double()
    items, _ = search(model, USERS, beams=2)
    truth = brute_force(model, USERS).exp()
    for user in range(len(USERS)):
        prefix = torch.zeros(6, dtype=torch.float64).index_add(0, model.codes[1:, 0], truth[user, 1:])
        kept = prefix.topk(2).indices.tolist()
        allowed = [item for item in range(1, 31) if model.codes[item, 0] in kept]
        best = sorted(allowed, key=lambda item: -float(truth[user, item]))[:2]
        assert items[user].tolist() == best


@pytest.mark.parametrize("beams", [4, 40])
def test_forbidden_items_never_come_back(beams):
    model = small.model(items=30)
    torch.manual_seed(3)
    excluded = torch.randint(31, (len(USERS), 40))
    excluded[2, :30] = torch.arange(1, 31)  # everything
    items, scores = search(model, USERS, beams, excluded)
    for user, found in enumerate(items):
        assert not torch.isin(found[found > 0], excluded[user]).any()
    assert (items[2] == 0).all()
    assert (scores[2] == -math.inf).all()
    if beams == 40:
        for user in (0, 1, 3):
            expected = [item for item in range(1, 31) if item not in excluded[user]]
            assert sorted(items[user][items[user] > 0].tolist()) == expected


def test_requests_do_not_affect_each_other():
    model = small.model(items=30, decoder_layers=2)
    together_items, together_scores = search(model, USERS, 6)
    for user, history in enumerate(USERS):
        items, scores = search(model, [history], 6)
        assert torch.equal(items[0], together_items[user])
        torch.testing.assert_close(scores[0], together_scores[user])

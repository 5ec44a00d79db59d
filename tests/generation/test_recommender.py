"""Recommender: which items come back, and in which order."""

import dataclasses

import numpy as np
import pytest
import small
import torch

from genrec.generation import Recommender, RecommenderConfig
from genrec.interfaces import TokenType
from genrec.models.ugt import TokenBatch

ITEMS = 30
USERS = [[3, 7, 7, 1, 9], [], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26], [11, 0, 13], [0], [5]]
MODES = ("mixed", "rerank", "beam", "items")


@pytest.fixture(scope="module")
def model():
    return small.model(ITEMS, token_types=("item", "action"), transitions=6)


def log_of(users):
    return small.sequences(users, types=("item", "action", "time"))  # the model does not read times


def rank(model, top_k=10, users=USERS, batch_size=128, **settings):
    return Recommender(model, RecommenderConfig(**settings), batch_size).rank_scored(log_of(users), top_k)


def item_log_probs(model):
    """(U, N + 1) of the item head: token by token, each user alone and cut to what the model reads."""
    rows, log = torch.full((len(USERS), ITEMS + 1), -torch.inf), log_of(USERS)
    with torch.no_grad():
        vectors = model.item_vectors()
        for user, history in enumerate(USERS):
            skipped = max(0, len(history) - model.config.max_events)
            tokens = [
                (int(log.token_ids[row]), int(log.type_ids[row]), int(log.positions[row]) - skipped)
                for row in range(log.cu_tokens[user], log.cu_tokens[user + 1])
                if log.type_ids[row] != TokenType.TIME and log.positions[row] >= skipped
            ]
            if tokens:
                ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
                encoded = model.encode(TokenBatch(*torch.tensor(tokens).T, ends, len(tokens)), vectors)
                logits = vectors @ encoded[-1] + model.item_bias + remembered(model, history)
                rows[user] = logits.log_softmax(0)
    return rows


def remembered(model, history):
    """(N + 1,) what came after the last five items, item by item."""
    sums = torch.zeros(ITEMS + 1)
    for rank, item in enumerate(history[::-1][:5], start=1):
        for after, weight in zip(model.transition_items[item], model.transition_weights[item], strict=True):
            sums[after] += weight / rank
    return (1 + 10 * sums).log()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 5, 50])
def test_only_unseen_real_items_each_once(model, mode, beams):
    items, scores = rank(model, mode=mode, beams=beams)
    for user, history in enumerate(USERS):
        found = items[user][items[user] > 0]
        assert len(set(found)) == len(found)
        assert not set(found) & set(history)
        assert found.max(initial=0) <= ITEMS
        assert np.array_equal(items[user] > 0, scores[user] > -np.inf)
        assert np.array_equal(items[user][: len(found)], found), "an item after a gap"
        assert (np.diff(scores[user][: len(found)]) <= 0).all()
    assert (items[1] == 0).all(), "a user without events"
    assert (items[[0, 2, 3, 4, 5], 0] > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_seen_items_come_back_on_request_but_never_item_0(model, mode):
    items, scores = rank(model, top_k=ITEMS + 3, mode=mode, exclude_seen=False)
    for user in (0, 2, 3, 4, 5):
        assert sorted(items[user][:ITEMS]) == list(range(1, ITEMS + 1))
        assert (items[user][ITEMS:] == 0).all()
        assert (scores[user][ITEMS:] == -np.inf).all()


@pytest.mark.parametrize("mode", MODES)
def test_fewer_items_than_top_k_are_padded(model, mode):
    items, scores = rank(model, top_k=40, mode=mode)
    for user in (0, 2, 3, 4, 5):
        left = ITEMS - len(set(USERS[user]) - {0})
        assert (items[user] > 0).sum() == left
        assert (items[user][left:] == 0).all()
        assert (scores[user][left:] == -np.inf).all()


def test_items_mode_is_the_item_head(model):
    items, scores = rank(model, mode="items", exclude_seen=False)
    expected = item_log_probs(model)
    expected[:, 0] = -torch.inf
    best = expected.topk(10)
    for user in (0, 2, 3, 4, 5):
        assert items[user].tolist() == best.indices[user].tolist()
        np.testing.assert_allclose(scores[user], best.values[user], rtol=1e-4, atol=1e-4)


def test_mixed_score_is_beam_plus_alpha_items(model):
    beam_items, beam_scores = rank(model, top_k=ITEMS, mode="beam", beams=ITEMS, exclude_seen=False)
    log_probs = item_log_probs(model).numpy()
    items, scores = rank(model, top_k=ITEMS, mode="mixed", beams=ITEMS, exclude_seen=False, alpha=1.5)
    for user in (0, 2, 3, 4, 5):
        total = {
            item: score + 1.5 * log_probs[user, item]
            for item, score in zip(beam_items[user], beam_scores[user], strict=True)
        }
        np.testing.assert_allclose(scores[user], [total[item] for item in items[user]], rtol=1e-4, atol=1e-4)
        assert scores[user, 0] == pytest.approx(max(total.values()), rel=1e-4)


def test_alpha_leads_from_beam_to_items(model):
    beam, _ = rank(model, mode="beam", beams=ITEMS)
    no_weight, _ = rank(model, mode="mixed", beams=ITEMS, alpha=0.0)
    heads, _ = rank(model, mode="items")
    all_weight, _ = rank(model, mode="mixed", beams=ITEMS, alpha=1e6)
    assert np.array_equal(beam, no_weight)
    assert np.array_equal(heads, all_weight)
    assert not np.array_equal(beam, heads)


def test_items_outside_the_beam_are_scored_as_its_last(model):
    """A beam of 10: the eleventh item is granted the tenth's log-probability."""
    beam_items, beam_scores = rank(model, top_k=10, mode="beam", beams=10, exclude_seen=False)
    log_probs = item_log_probs(model).numpy()
    items, scores = rank(model, top_k=10, mode="mixed", beams=10, exclude_seen=False, alpha=2.0)
    for user in (0, 2, 3, 4, 5):
        inside = dict(zip(beam_items[user].tolist(), beam_scores[user].tolist(), strict=True))
        last = min(score for item, score in inside.items() if item > 0)
        total = [inside.get(item, last) + 2.0 * log_probs[user, item] for item in range(1, ITEMS + 1)]
        np.testing.assert_allclose(scores[user], sorted(total, reverse=True)[:10], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores[user], [total[item - 1] for item in items[user]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_do_not_matter(model, mode, batch_size):
    items, scores = rank(model, mode=mode)
    other_items, other_scores = rank(model, mode=mode, batch_size=batch_size)
    assert np.array_equal(items, other_items)
    np.testing.assert_allclose(scores, other_scores, rtol=1e-5, atol=1e-5)


def test_only_the_last_events_are_read_but_all_are_seen(model):
    long = USERS[2]
    assert len(long) == model.config.max_events + 1
    log = small.sequences([long], types=("item", "action"))
    changed = dataclasses.replace(log, token_ids=log.token_ids.copy(), item_ids=log.item_ids.copy())
    changed.token_ids[0] = changed.item_ids[0] = 29
    recommender = Recommender(model, RecommenderConfig(mode="items"))
    items, scores = recommender.rank_scored(log, ITEMS)
    other_items, other_scores = recommender.rank_scored(changed, ITEMS)
    assert long[0] not in items
    assert 29 not in other_items
    common = set(items[0]) & set(other_items[0]) - {0}
    score_of = dict(zip(items[0], scores[0], strict=True))
    assert all(score_of[i] == s for i, s in zip(other_items[0], other_scores[0], strict=True) if i in common)


def test_nobody_and_nothing():
    model = small.model(ITEMS)
    assert rank(model, users=[])[0].shape == (0, 10)
    items, scores = rank(model, users=[[], []])
    assert (items == 0).all()
    assert (scores == -np.inf).all()


def test_history_of_the_whole_catalogue():
    model = small.model(8, sizes=(2, 2, 2))
    items, scores = rank(model, users=[list(range(1, 9)), [1]], mode="mixed")
    assert (items[0] == 0).all()
    assert (scores[0] == -np.inf).all()
    assert sorted(items[1][items[1] > 0]) == list(range(2, 9))


def test_ranking_leaves_the_model_in_evaluation_mode_and_untouched(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    rank(model)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rerank_scores_the_beam_alone(model):
    """Both opinions of the beam's items; the item head's log-probability is taken over them."""
    beam_items, beam_scores = rank(model, top_k=8, mode="beam", beams=8)
    log_probs = item_log_probs(model).numpy()
    items, scores = rank(model, top_k=8, mode="rerank", beams=8, alpha=1.5)
    for user in (0, 2, 3, 4, 5):
        head = log_probs[user, beam_items[user]].astype(np.float64)
        total = beam_scores[user] + 1.5 * (head - np.log(np.exp(head).sum()))
        order = np.argsort(-total)
        assert items[user].tolist() == beam_items[user][order].tolist()
        np.testing.assert_allclose(scores[user], total[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["mixed", "rerank", "items"])
def test_transitions_can_be_left_out(model, mode):
    forgetful = small.model(ITEMS, token_types=("item", "action"))
    forgetful.load_state_dict(model.state_dict(), strict=False)
    expected, scores = rank(forgetful, mode=mode)
    left_out, left_out_scores = rank(model, mode=mode, transition_weight=0.0)
    assert np.array_equal(left_out, expected)
    np.testing.assert_array_equal(left_out_scores, scores)
    assert not np.array_equal(rank(model, mode=mode)[1], scores)


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_stand_anywhere(mode):
    """Zeros before, between and behind the events, in every field, and rows of nothing else."""
    model = small.model(ITEMS, token_types=small.ALL_TYPES, transitions=6)
    recommender = Recommender(model, RecommenderConfig(mode=mode, beams=7, top_k=9))
    generator = torch.Generator().manual_seed(1)
    sizes = (ITEMS + 1, *small.TYPE_SIZES.values())
    events = [torch.randint(1, size, (3, 20), generator=generator) for size in sizes]
    with torch.inference_mode():
        items, scores = recommender(*events)
        place = torch.rand(3, 31, generator=generator).argsort(1)[:, :20].sort(1).values
        spread = [torch.zeros(3, 31, dtype=torch.int64).scatter(1, place, event) for event in events]
        spread = [torch.cat([rows, torch.zeros_like(rows[:1])]) for rows in spread]
        others, other_scores = recommender(*spread)
    assert torch.equal(others[:3], items)
    torch.testing.assert_close(other_scores[:3], scores)
    assert (others[3] == 0).all()
    assert other_scores[3].isneginf().all()


@pytest.mark.parametrize("mode", MODES)
def test_unknown_items_are_events_of_item_0(model, mode):
    recommender = Recommender(model, RecommenderConfig(mode=mode, beams=7))
    request = recommender.request(log_of([[3, 0, 7, 0]]))
    assert request.history.tolist() == [[3, -1, 7, -1]]
    other = request.history.clone()
    other[0, 1], other[0, 3] = ITEMS + 1, 2**40
    with torch.inference_mode():
        expected, expected_scores = recommender(*request[:1], *request.fields)
        items, scores = recommender(other, *request.fields)
    assert torch.equal(items, expected)
    assert torch.equal(scores, expected_scores)
    ranked, ranked_scores = recommender.rank_scored(log_of([[3, 0, 7, 0]]), 10)
    assert np.array_equal(ranked, expected.numpy())
    np.testing.assert_array_equal(ranked_scores, expected_scores.numpy())


@pytest.mark.parametrize("mode", ["mixed", "rerank", "beam"])
def test_beams_from_10_to_512(mode):
    """Beams as wide as the catalogue and wider find what scoring every item finds."""
    model = small.model(400, (8, 8, 8))
    results = {beams: rank(model, mode=mode, beams=beams, alpha=0.5) for beams in (10, 400, 512)}
    assert np.array_equal(results[400][0], results[512][0])
    np.testing.assert_allclose(results[400][1], results[512][1], rtol=1e-5, atol=1e-5)
    assert not np.array_equal(results[10][0], results[400][0])


@pytest.mark.parametrize(("setting", "value"), [("beams", 0), ("top_k", 0), ("mode", "best"), ("normalize", "all")])
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}; expected "):
        RecommenderConfig(**{setting: value})

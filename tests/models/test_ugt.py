"""UGT: what must be the same whichever way it is computed, and what it must not know."""

from pathlib import Path

import numpy as np
import pytest
import small
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from genrec.generation.requests import token_batch
from genrec.interfaces import TokenType
from genrec.models.ugt import UGT, ModelVocabulary, TargetBatch, UGTConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "ugt"
USERS = [[3, 7, 7, 1, 9], [5], [2, 4, 6, 8, 10, 12, 14, 16], [11, 0, 13]]
SHAPES = [
    {"sizes": (30,), "encoder_layers": 1, "experts": 1, "top_k": 1},
    {"sizes": (6, 6), "decoder_layers": 2, "experts": 3, "top_k": 1, "heads": 4},
    {"sizes": (4, 4, 4), "decoder_layers": 3, "experts": 4, "top_k": 4},
    {"sizes": (3, 3, 3, 3), "decoder_layers": 1, "experts": 5, "top_k": 2, "token_types": small.ALL_TYPES},
]


def batch(model, users, seed=0):
    return token_batch(small.sequences(users, types=small.ALL_TYPES, seed=seed), model.config)


def targets_of(tokens, sequence, ends, items):
    """One sequence's targets, each predicted from the tokens before row `end` of that sequence."""
    start = int(tokens.cu_seqlens[sequence])
    counts = torch.zeros(len(tokens.cu_seqlens), dtype=torch.int32)
    counts[sequence + 1] = len(ends)
    last = torch.tensor([start + end - 1 for end in ends])
    return TargetBatch(torch.tensor(items), last, counts.cumsum(0).int(), len(ends))


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_forcing_equals_step_by_step(shape):
    model = small.model(**shape).double()
    tokens = batch(model, USERS)
    per_event = len(model.config.types)
    vectors = model.item_vectors()
    encoded = model.encode(tokens, vectors)
    for sequence, user in enumerate(USERS):
        alone = batch_of_one(tokens, sequence).padded()
        memory = model.memory(model.encode(alone, vectors), alone)
        for item in (1, 17):
            hidden = model.decode(encoded, tokens, targets_of(tokens, sequence, [len(user) * per_event], [item]))
            x = model.decoder_start(encoded[tokens.cu_seqlens[sequence + 1] - 1], torch.tensor(len(user)))
            x, past = x.view(1, 1, -1), [[] for _ in memory.layers]
            for level, code in enumerate(model.codes[item]):
                step, present = model.step(x, level, memory, past)
                expected = F.log_softmax(model.code_logits(level, hidden[0, level]), -1)
                torch.testing.assert_close(F.log_softmax(model.code_logits(level, step[0, 0]), -1), expected)
                past = [[*earlier, new] for earlier, new in zip(past, present, strict=True)]
                if level + 1 < model.levels:
                    x = model.decoder_input(level + 1, code).view(1, 1, -1)


def batch_of_one(tokens, sequence):
    rows = slice(*tokens.cu_seqlens[sequence : sequence + 2].tolist())
    length = rows.stop - rows.start
    return type(tokens)(
        tokens.token_ids[rows], tokens.type_ids[rows], tokens.positions[rows],
        torch.tensor([0, length], dtype=torch.int32), length,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_histories_are_encoded_as_packed_ones(shape):
    """Whatever stands behind a history."""
    model = small.model(**shape).double()
    tokens, vectors = batch(model, USERS), model.item_vectors()
    packed, padded = model.encode(tokens, vectors), tokens.padded()
    real = torch.arange(padded.token_ids.shape[1]) < padded.lengths[:, None]
    torch.testing.assert_close(model.encode(padded, vectors)[real], packed)
    padded.token_ids[~real] = 7
    torch.testing.assert_close(model.encode(padded, vectors)[real], packed)


@pytest.mark.parametrize("types", [("item",), small.ALL_TYPES])
def test_encoder_sees_only_the_past(types):
    model = small.model(token_types=types, encoder_layers=3).double()
    before, after = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 6]
    per_event = len(types)
    first, second = (model.encode(batch(model, [user, [7, 8]]), model.item_vectors()) for user in (before, after))
    changed = (first - second).abs().amax(1) > 0
    assert not changed[: 4 * per_event].any()
    assert changed[4 * per_event]
    assert changed[5 * per_event : 6 * per_event].all()
    assert not changed[6 * per_event :].any(), "another user's history changed a state"


@pytest.mark.parametrize("shape", SHAPES)
def test_users_are_encoded_as_if_alone(shape):
    model = small.model(**shape)
    tokens = batch(model, USERS)
    together = model.encode(tokens, model.item_vectors())
    for sequence in range(len(USERS)):
        alone = model.encode(batch_of_one(tokens, sequence), model.item_vectors())
        part = together[tokens.cu_seqlens[sequence] : tokens.cu_seqlens[sequence + 1]]
        torch.testing.assert_close(part, alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_position_in_one_pass_equals_truncated_histories(shape):
    """Targets at all positions of all users, decoded at once, against each alone from the history cut before it."""
    model = small.model(**shape).double()
    users = [user for user in USERS if len(user) > 1]
    log = small.sequences(users, types=small.ALL_TYPES)
    tokens, per_event = token_batch(log, model.config), len(model.config.types)
    items = [[max(item, 1) for item in user[1:]] for user in users]
    starts = tokens.cu_seqlens[:-1].tolist()
    last = [start + n * per_event - 1 for start, user in zip(starts, users, strict=True) for n in range(1, len(user))]
    targets = TargetBatch(
        torch.tensor([item for user in items for item in user]), torch.tensor(last),
        torch.tensor(np.cumsum([0, *map(len, items)]), dtype=torch.int32), max(map(len, items)),
    )  # fmt: skip
    vectors = model.item_vectors()
    encoded = model.encode(tokens, vectors)
    together = model.decode(encoded, tokens, targets)
    row = 0
    for sequence, user in enumerate(users):
        whole = batch_of_one(tokens, sequence)
        for n in range(1, len(user)):
            cut = n * per_event
            alone = type(tokens)(
                whole.token_ids[:cut], whole.type_ids[:cut], whole.positions[:cut],
                torch.tensor([0, cut], dtype=torch.int32), cut,
            )  # fmt: skip
            target = targets_of(alone, 0, [cut], [items[sequence][n - 1]])
            torch.testing.assert_close(model.decode(model.encode(alone, vectors), alone, target)[0], together[row])
            row += 1
    assert row == len(together)


def test_item_vectors_are_own_vector_plus_codes():
    model = small.model()
    vectors = model.item_vectors()
    assert torch.equal(vectors[0], model.item_embedding.weight[0]), "the out-of-vocabulary item has no codes"
    for item in range(1, 31):
        expected = model.item_embedding.weight[item].clone()
        for level, code in enumerate(model.codes[item].tolist()):
            expected = expected + model.code_embeddings[level].weight[code]
        torch.testing.assert_close(vectors[item], expected)


@pytest.mark.parametrize("width", [40, 5])
def test_items_start_where_their_features_place_them(width):
    """On the principal axes, however numpy finds them: inner products do not depend on the signs of the axes."""
    model = small.model(30)
    before = model.item_embedding.weight.detach().clone()
    features = np.random.default_rng(0).standard_normal((31, width)).astype(np.float32) * np.linspace(3, 1, width)
    model.place_items(torch.from_numpy(features).float())
    placed = model.item_embedding.weight.detach()[:, :width].numpy()
    centred = features[1:] - features[1:].mean(0)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(width, 16)
    products = (left[:, :kept] * strength[:kept] ** 2) @ left[:, :kept].T
    expected = products / np.square((left * strength)[:, :kept]).mean() * np.square(placed[1:]).mean()
    np.testing.assert_allclose(placed[1:] @ placed[1:].T, expected, atol=1e-3 * expected.max())
    assert placed[1:].std() == pytest.approx(0.05, rel=0.01)
    assert torch.equal(model.item_embedding.weight[0], before[0])
    assert torch.equal(model.item_embedding.weight[:, width:], before[:, width:])


class Passthrough(nn.Module):
    def forward(self, x, tokens):
        return x


@pytest.mark.parametrize("types", [("item",), ("time", "item"), ("item", "action", "time"), small.ALL_TYPES])
def test_tokens_of_every_type_get_their_own_row(types):
    model = small.model(token_types=types)
    model.encoder = Passthrough()
    tokens, vectors = batch(model, USERS), model.item_vectors()
    embedded = model.encode(tokens, vectors)
    others = [kind.name.lower() for kind in model.config.types if kind != TokenType.ITEM]
    tables = dict(zip(others, model.token_embeddings, strict=True))
    assert sorted(set(tokens.type_ids.tolist())) == sorted(TokenType[name.upper()] for name in types)
    for row, (token, kind, position) in enumerate(
        zip(tokens.token_ids, tokens.type_ids, tokens.positions, strict=True)
    ):
        name = TokenType(int(kind)).name.lower()
        own = vectors[token] if name == "item" else tables[name].weight[token]
        expected = own + model.type_embedding.weight[kind] + model.position_embedding.weight[position]
        torch.testing.assert_close(embedded[row], expected)


def test_code_losses_are_negative_log_softmax():
    model = small.model()
    hidden, items = torch.randn(5, 3, 16), torch.tensor([1, 2, 30, 2, 9])
    losses = model.code_losses(hidden, items)
    for row, item in enumerate(items):
        for level in range(3):
            table, bias = model.code_embeddings[level].weight, model.code_bias[level]
            logits = (table @ hidden[row, level] + bias).double()
            expected = logits.exp().sum().log() - logits[model.codes[item, level]]
            torch.testing.assert_close(losses[row, level].double(), expected, atol=1e-5, rtol=1e-5)


def test_item_loss_is_cross_entropy_over_all_items():
    model = small.model()
    users, items = torch.randn(6, 16), torch.tensor([1, 2, 30, 2, 9, 4])
    vectors = model.item_vectors()
    expected = F.cross_entropy(users @ vectors.T + model.item_bias, items)
    torch.testing.assert_close(model.item_loss(users, vectors, items), expected)
    torch.testing.assert_close(model.item_logits(users, vectors), users @ vectors.T + model.item_bias)


def test_evaluation_has_no_dropout_and_training_has():
    model = small.model(dropout=0.5)
    tokens, vectors = batch(model, USERS), model.item_vectors()
    assert torch.equal(model.encode(tokens, vectors), model.encode(tokens, vectors))
    model.train()
    assert not torch.equal(model.encode(tokens, vectors), model.encode(tokens, vectors))


@pytest.mark.parametrize("types", [("item",), ("item", "action")])
def test_token_dropout_reads_some_tokens_as_unknown_in_training(types):
    model = small.model(dropout=0.0, token_dropout=0.3, token_types=types)
    tokens, vectors = batch(model, [[*range(1, 7)]] * 40), model.item_vectors()
    hidden = model._hide_tokens(tokens.token_ids)
    assert torch.equal(hidden, tokens.token_ids)
    assert torch.equal(model.encode(tokens, vectors), model.encode(tokens, vectors))
    model.train()
    hidden = model._hide_tokens(tokens.token_ids)
    kept = hidden == tokens.token_ids
    assert not hidden[~kept].any()
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.1)
    assert not torch.equal(model.encode(tokens, vectors), model.encode(tokens, vectors))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_model": 15}, "model.d_model is 15; expected a multiple of model.heads (2)"),
        ({"heads": 0}, "model.heads is 0; expected 1 or more"),
        ({"d_model": 0}, "model.d_model is 0; expected 1 or more"),
        ({"encoder_layers": 0}, "model.encoder_layers is 0; expected 1 or more"),
        ({"max_events": -3}, "model.max_events is -3; expected 1 or more"),
        ({"experts": 2, "top_k": 3}, "model.top_k is 3; expected 1 to model.experts (2)"),
        ({"top_k": 0}, "model.top_k is 0"),
        ({"token_types": ("item", "mood")}, "model.token_types has 'mood'; expected names among item, action"),
        ({"token_types": ("action",)}, "expected 'item' and others, each once"),
        ({"token_types": ("item", "action", "action")}, "expected 'item' and others, each once"),
        ({"dropout": 1.0}, "model.dropout is 1.0; expected at least 0 and below 1"),
        ({"dropout": -0.1}, "model.dropout is -0.1"),
        ({"token_dropout": 1.0}, "model.token_dropout is 1.0; expected at least 0 and below 1"),
    ],
)
def test_config_errors_are_one_sentence(settings, words):
    with pytest.raises(ValueError) as error:
        UGTConfig(**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tiny", "base", "paper"])
def test_shipped_sizes_build(name):
    config = UGTConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    if name == "paper":
        assert (config.encoder_layers, config.experts, config.top_k) == (12, 16, 4)
    vocabulary = ModelVocabulary(1_000_000, (1024, 4096, 16384), (1_000_001, 11, 16, 1))
    with torch.device("meta"):
        model = UGT(config, vocabulary, torch.zeros(1_000_001, 3, dtype=torch.int64))
    assert len(model.encoder.layers) == config.encoder_layers
    assert model.item_vectors().shape == (1_000_001, config.d_model)
    parameters = sum(p.numel() for p in model.parameters()) - 1_000_001 * (config.d_model + 1)
    assert parameters > {"tiny": 1e6, "base": 1e7, "paper": 1e8}[name] / 2

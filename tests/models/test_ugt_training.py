"""UGT learns, and its router spreads the work."""

import small
import torch
from torch.nn import functional as F

from genrec.generation.requests import token_batch
from genrec.models.ugt import TargetBatch
from genrec.models.ugt.layers import MixtureOfExperts
from genrec.training.objectives import next_item_loss


def moe(experts=6, top_k=2, **settings):
    torch.manual_seed(0)
    return MixtureOfExperts(8, 5, experts, top_k, **settings)


def selected(layer, x):
    """(experts,) how many rows each expert got, from the definition of the selection."""
    scores = F.linear(x, layer.router_weight).softmax(1) + layer.router_bias
    return torch.bincount(scores.topk(layer.top_k, dim=1).indices.flatten(), minlength=len(layer.router_bias))


def test_experts_are_mixed_as_defined():
    layer, x = moe(), torch.randn(7, 8)
    with torch.no_grad():
        layer.router_bias.copy_(torch.randn(6) * 0.1)
        out = layer(x)
        for row in range(7):
            probabilities = F.linear(x[row], layer.router_weight).softmax(0)
            best = (probabilities + layer.router_bias).topk(2).indices
            expected = torch.zeros(8)
            for expert in best:
                gate, up = (layer.w_gate_up[expert] @ x[row]).chunk(2)
                weight = probabilities[expert] / probabilities[best].sum()
                expected += weight * (layer.w_down[expert] @ (F.silu(gate) * up))
            torch.testing.assert_close(out[row], expected)


def test_load_counts_the_rows_of_each_expert_since_the_last_balance():
    layer, parts = moe(), [torch.randn(50, 8), torch.randn(7, 8)]
    for x in parts:
        layer(x)
    assert torch.equal(layer.load, sum(selected(layer, x) for x in parts))
    with torch.no_grad():
        layer(torch.randn(3, 8))
    assert layer.load.sum() == 2 * 57, "only training steps count"
    layer.balance(layer.load)
    assert not layer.load.any()


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    layer, x = moe(), torch.randn(64, 8) + 2
    layer(x)
    load = layer.load.clone()
    layer.balance(load)
    torch.testing.assert_close(layer.router_bias, layer.bias_rate * (load.float().mean() - load).sign())
    assert layer.router_bias[load.argmax()] < 0 < layer.router_bias[load.argmin()]


def test_balancing_makes_a_skewed_router_fairer():
    layer, x = moe(experts=4, top_k=1, bias_rate=0.01), torch.randn(400, 8)
    with torch.no_grad():
        layer.router_weight[0] += 0.3 * x.mean(0) + 0.5
        x += 1  # expert 0 is every row's favourite
    layer(x)
    first = layer.load.max() / 400
    assert first > 0.8
    for _ in range(150):
        layer.balance(layer.load)
        layer(x)
    assert layer.load.max() / 400 < 0.5 < first
    assert layer.load.min() / 400 > 0.05


def test_model_reports_and_balances_every_layer():
    model = small.model(decoder_layers=2, experts=4)
    tokens, targets = one_batch(model)
    next_item_loss(model, tokens, targets, 1.0)
    loads = [layer.moe.load.clone() for layer in model.decoder.layers]
    shares = [load / load.sum() for load in loads]
    torch.testing.assert_close(model.balance_router(), (shares[0] + shares[1]) / 2)
    for layer, share in zip(model.decoder.layers, shares, strict=True):
        torch.testing.assert_close(layer.moe.router_bias, layer.moe.bias_rate * (0.25 - share).sign())


def test_recomputed_activations_give_the_same_gradients():
    """Also with dropout, whose draws must be the same the second time."""
    gradients = []
    for recompute in (False, True):
        model = small.model(decoder_layers=2, dropout=0.3).train()
        if recompute:
            model.recompute_activations()
        torch.manual_seed(5)
        loss, _ = next_item_loss(model, *one_batch(model), 1.0)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        shares = model.balance_router()
        assert abs(float(shares.sum()) - 1) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def one_batch(model):
    """Three histories, each predicting its last two items."""
    users = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]
    tokens = token_batch(small.sequences([user[:-1] for user in users]), model.config)
    ends = tokens.cu_seqlens[1:].tolist()
    last = torch.tensor([row for end in ends for row in (end - 2, end - 1)])
    items = torch.tensor([item for user in users for item in user[-2:]])
    return tokens, TargetBatch(items, last, torch.tensor([0, 2, 4, 6], dtype=torch.int32), 2)


def test_loss_is_its_parts():
    model = small.model()
    tokens, targets = one_batch(model)
    loss, values = next_item_loss(model, tokens, targets, item_weight=0.25)
    torch.testing.assert_close(loss.detach(), values["loss_ids"] + 0.25 * values["loss_items"])
    vectors = model.item_vectors()
    encoded = model.encode(tokens, vectors)
    hidden = model.decode(encoded, tokens, targets)
    ids = sum(
        F.cross_entropy(model.code_logits(level, hidden[:, level]), model.codes[targets.items, level])
        for level in range(3)
    )
    items = F.cross_entropy(model.item_logits(encoded[targets.last_tokens], vectors), targets.items)
    torch.testing.assert_close(values["loss_ids"], ids.detach())
    torch.testing.assert_close(values["loss_items"], items.detach())


def test_every_parameter_that_should_learns():
    model = small.model(token_types=small.ALL_TYPES, experts=2, top_k=2)
    users = [[1, 2, 3, 4], [5, 6, 7]]
    tokens = token_batch(small.sequences(users, types=small.ALL_TYPES), model.config)
    last = tokens.cu_seqlens[1:].long() - 1
    targets = TargetBatch(torch.tensor([8, 9]), last, torch.tensor([0, 1, 2], dtype=torch.int32), 1)
    next_item_loss(model, tokens, targets, 1.0)[0].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_a_few_steps_learn_a_batch_by_heart():
    model = small.model(seed=1, dropout=0.0).train()
    tokens, targets = one_batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, _ = next_item_loss(model, tokens, targets, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.balance_router()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]

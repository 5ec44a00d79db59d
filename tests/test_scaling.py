"""examples/scaling.py counts what model, losses and recommender do, and docs/scaling.md has the tables it prints."""

import math
import re
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from examples import scaling
from examples.scaling import Assumptions
from genrec.generation.recommender import Recommender, RecommenderConfig
from genrec.generation.trie import Trie
from genrec.kernels.moe import reference as moe_reference
from genrec.kernels.relu_attention import reference as attention_reference
from genrec.models.rqvae import RQVAE, RQVAEConfig
from genrec.models.ugt import UGT, ModelVocabulary, UGTConfig, layers
from genrec.models.ugt.losses import linear_cross_entropy
from genrec.training.batches import TrainingSet, all_positions
from genrec.training.objectives import next_item_loss

ROOT = Path(__file__).parents[1]
SMALL = {"d_model": 32, "heads": 2, "d_ffn": 80, "d_expert": 24, "max_events": 12, "rel_bias_size": 8}


def training_batch(model, users, events):
    """Users with as many events each, all but their first a target."""
    histories = small.sequences(small.random_users(users, 30, events + 1, least=events + 1), types=small.ALL_TYPES)
    windows = all_positions(histories.cu_events, events)
    data = TrainingSet(histories, windows, np.ones(len(histories.item_ids), bool), model.config)
    return data.batch(data.windows)


@pytest.mark.parametrize(
    ("config", "codes", "items"),
    [
        (UGTConfig(), (64, 64, 64), 3650),
        (UGTConfig(**SMALL, token_types=small.ALL_TYPES), (5, 7), 31),
        (UGTConfig(**SMALL, encoder_layers=3, decoder_layers=2, experts=5, top_k=3), (4, 4, 4, 4), 100),
        (UGTConfig(**SMALL, experts=1, top_k=1), (40,), 40),
    ],
)
def test_parameters_are_those_of_the_model(config, codes, items):
    vocabulary = ModelVocabulary(items, codes, (items + 1, 64, 64, 64))
    model = UGT(config, vocabulary, torch.zeros(items + 1, len(codes), dtype=torch.int64))
    counted = scaling.parameters(config, codes, items)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    assert counted["item"] == (items + 1) * (config.d_model + 1)
    assert counted["code"] == sum(codes) * (config.d_model + 1)
    assert counted["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert counted["experts"] == config.decoder_layers * config.experts * 3 * config.d_model * config.d_expert
    assert counted["decoder"] + counted["experts"] == sum(p.numel() for p in model.decoder.parameters())


@pytest.mark.parametrize("name", ["tiny", "base", "paper"])
def test_parameters_by_the_formulas_of_the_document(name):
    m, codes, items = UGTConfig(**yaml.safe_load((ROOT / f"configs/ugt/{name}.yaml").read_text())), (16, 32, 64), 1000
    d, levels, bias = m.d_model, len(codes), m.heads * m.rel_bias_size
    counted = scaling.parameters(m, codes, items)
    assert counted["encoder"] == m.encoder_layers * (4 * d * d + 2 * d * m.d_ffn + m.d_ffn + 18 * d + bias) + 8 * d
    assert (
        counted["decoder"] == m.decoder_layers * (8 * d * d + (2 + m.experts + 6 * levels) * d + bias) + 2 * levels * d
    )
    assert counted["position"] == (m.max_events + 1) * d


def test_defaults_are_the_paper_model():
    assert Assumptions().model == UGTConfig(**yaml.safe_load((ROOT / "configs/ugt/paper.yaml").read_text()))


@pytest.mark.parametrize(
    ("settings", "codes"),
    [({"experts": 4, "top_k": 2}, (4, 4, 4)), ({"decoder_layers": 2, "encoder_layers": 1, "heads": 4}, (6, 6))],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
def test_flops_are_those_that_torch_counts(monkeypatch, settings, codes, backward):
    """On the operators' definitions, which compute hidden pairs, too, and keep scores for the backward pass."""
    forms = attention_reference
    monkeypatch.setattr(layers, "relu_attention", forms.relu_attention)
    monkeypatch.setattr(layers, "relu_attention_varlen", lambda *x, **y: forms.relu_attention_varlen(*x[:5], **y))
    monkeypatch.setattr(layers, "moe_experts", moe_reference.moe_experts)
    users, events, items, levels = 3, 7, 30, len(codes)
    model = small.model(items, codes, **{**SMALL, **settings})
    tokens, targets = training_batch(model, users, events)
    with FlopCounterMode(display=False) as counter:
        loss, _ = next_item_loss(model, tokens, targets, 1.0)
        if backward:
            loss.backward()
    m = model.config
    flops = scaling.work(m, codes, items + 1, users * events, [users * events] * levels, [events, events])
    hidden = users * events * (levels * levels - levels * (levels + 1) // 2) * m.decoder_layers * 4 * m.d_model
    head = flops.pop(("item head", "linear"))  # its gradients come with its loss
    assert counter.get_total_flops() == 3 * head + (3 if backward else 1) * (sum(flops.values()) + hidden)


@pytest.mark.parametrize("types", [("item",), ("item", "action", "time")])
def test_an_event_sees_the_mean_of_a_history(types):
    config = UGTConfig(**SMALL, encoder_layers=1, decoder_layers=1, token_types=types)
    a = Assumptions(model=config, events_per_user=9, items=50)
    flops = scaling.event(a, 50)
    per_event, d = len(types), config.d_model
    seen_by_tokens = sum(range(1, 9 * per_event + 1))
    seen_by_rows = 3 * sum(event * per_event for event in range(1, 10))
    assert 9 * flops["encoder: attention", "attention"] == 4 * d * seen_by_tokens
    assert 9 * flops["decoder: cross-attention", "attention"] == 4 * d * seen_by_rows
    assert flops["decoder: self-attention", "attention"] == 4 * d * (1 + 2 + 3)


def test_a_request_widens_to_its_beams():
    config = UGTConfig(**SMALL)
    for beams, rows in ((3, [1, 3, 3]), (10, [1, 4, 10]), (100, [1, 4, 24])):
        assert scaling.widths((4, 6, 5), beams) == rows
        request = scaling.request(config, (4, 6, 5), 0, 8, beams)
        logits = 2 * config.d_model * (rows[0] * 4 + rows[1] * 6 + rows[2] * 5)
        assert request["code logits", "linear"] == logits


@pytest.mark.parametrize(
    ("operator", "case"),
    [("attention", "attention B8 H4 L256 D64 causal"), ("experts", "experts 2048×256, F 512")],
)
def test_backward_flops_are_counted_as_in_the_benchmark(operator, case):
    cases = scaling.measured(Assumptions().results)
    ratio = cases[f"{case} with backward"]["flops"] / cases[case]["flops"]
    assert ratio == pytest.approx(1 + scaling.BACKWARD[operator], rel=1e-3)


def test_the_demo_is_that_of_the_benchmark():
    from bench.demo_model import demo_model, histories, pretraining

    config, codes, items = scaling.DEMO
    model = demo_model()
    assert replace(model.config, dropout=config.dropout) == config
    assert (model.vocabulary.items, model.vocabulary.codebook_sizes) == (items, codes)
    batch = pretraining(histories(160), 3200).load(0, 0)
    tokens, targets = batch.tokens, batch.targets
    lengths = tokens.cu_seqlens.diff()
    starts = tokens.cu_seqlens[:-1].repeat_interleave(targets.cu_seqlens.diff())
    keys = (lengths * (lengths + 1) / 2).sum() / lengths.sum(), (targets.last_tokens + 1 - starts).double().mean()
    assert f"training step, {len(tokens.token_ids)} tokens" == scaling.STEP
    assert scaling.DEMO_STEP[:2] == (len(tokens.token_ids), [len(targets.items)] * 3)
    assert scaling.DEMO_STEP[2] == pytest.approx([float(x) for x in keys], abs=0.01)
    requests = small.random_users(32, items, 120, seed=1, least=20)
    assert np.mean([min(len(user), config.max_events) for user in requests]) == pytest.approx(
        scaling.DEMO_EVENTS, abs=1
    )


class Moved(TorchDispatchMode):
    """Counts the bytes of every tensor of `least` and more numbers that operators read or write."""

    def __init__(self, least):
        super().__init__()
        self.least, self.bytes = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        few = ("gather", "index_put_", "new_full", "scatter_add_")  # these touch little of what they are given
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not view and func.overloadpacket.__name__ not in few:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if func.overloadpacket.__name__ == "scatter":
                tensors = [out]  # of one number a row, expanded
            self.bytes += sum(x.numel() * x.element_size() for x in tensors if x.numel() >= self.least)
        return out


def test_bytes_that_are_moved_for_every_item():
    items, d, moved = 1 << 14, 96, {}
    weight, bias = torch.randn(items, d, requires_grad=True), torch.zeros(items, requires_grad=True)
    for chunks in (1, 3):
        x, targets = torch.randn(64 * chunks, d, requires_grad=True), torch.zeros(64 * chunks, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16), Moved(64 * items) as moved[chunks]:
            linear_cross_entropy(x, weight, bias, targets)
    a_chunk = (moved[3].bytes - moved[1].bytes) / 2
    products = 2 * scaling.WEIGHT * items * d  # both read the vectors
    assert a_chunk - products == scaling.LOGIT * 64 * items + scaling.VECTOR * items * d

    rows, items = 64, 4000
    model = small.model(items - 1, (20, 20, 20))
    with torch.no_grad(), Moved((items - 1) * model.config.d_model) as vectors:
        table = model.item_vectors()
    assert vectors.bytes / table.nbytes == pytest.approx(4 * model.levels + 4, rel=1e-3)

    recommender = Recommender(model, RecommenderConfig(beams=10))
    requests = small.sequences(small.random_users(rows, items - 1, 10))
    with Moved(rows * items) as moved:
        recommender.rank(requests, 10)
    assert moved.bytes == scaling.SCORE * rows * items


@pytest.mark.parametrize("settings", [{}, {"encoder_layers": 3, "decoder_layers": 2, "experts": 3, "top_k": 2}])
def test_activations_are_what_autograd_keeps(settings):
    codes = (20, 30, 40)
    model = small.model(30, codes, **{**SMALL, "d_model": 64}, **settings, dropout=0.1).train()
    tokens, targets = training_batch(model, 20, 12)
    owned = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}

    def kept(function):
        storages = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in owned and x.numel() > 20 and x.dtype != torch.int64:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            result = function()
        return sum(size for size, _ in storages.values()) / len(tokens.token_ids), result.detach().requires_grad_()

    m, levels, vectors = model.config, len(codes), model.item_vectors()
    in_encoder, encoded = kept(lambda: model.encode(tokens, vectors))
    in_decoder, hidden = kept(lambda: model.decode(encoded, tokens, targets))
    in_logits, _ = kept(lambda: model.code_losses(hidden, targets.items))
    layer, token, row, rest = scaling.kept(m)
    numbers = m.encoder_layers * layer + token + levels * (m.decoder_layers * row + rest) + sum(codes)
    assert in_encoder + in_decoder + in_logits == pytest.approx(4 * numbers, rel=0.01)


def lines(table):
    """First cell → the other cells."""
    return {line[0]: line[1:] for line in table}


def test_twice_the_ranks_halve_the_shards():
    once, twice = (lines(scaling.memory(Assumptions(gpus=gpus)))["all"] for gpus in (8, 16))
    assert twice[:2] == once[:2]
    assert twice[2:] == tuple(shard / 2 for shard in once[2:])
    assert once[1] == 4 * int(once[0].replace(",", ""))


def test_more_is_sharded_from_way_to_way():
    table = lines(scaling.sharding(Assumptions(gpus=4)))
    zero = lines(scaling.memory(Assumptions(gpus=4)))["all"]
    assert table["zero-2"][:3] == zero[1:]
    every = int(zero[0].replace(",", ""))
    together = [line[-1] / every for way, line in table.items() if way != "--parallel"]
    assert together == [4 + 4 + 8, 4 + 4 + 8 / 4, 4 + (4 + 8) / 4, (4 + 4 + 8) / 4]


def test_traffic_goes_with_what_is_not_ones_own_shard():
    sent = {n: lines(scaling.traffic(Assumptions(gpus=n)))["all, full softmax"][1] for n in (1, 2, 8)}
    assert sent[1] == 0
    assert sent[8] / sent[2] == pytest.approx((7 / 8) / (1 / 2))
    fast, slow = (
        lines(scaling.traffic(Assumptions(device=scaling.Device(link_bytes=link))))["all, full softmax"]
        for link in (4e11, 1e11)
    )
    assert slow[2:] == pytest.approx(tuple(4 * x for x in fast[2:]))


def test_the_catalogue_is_what_the_program_holds(monkeypatch):
    codes = (3, 4, 5)
    a = Assumptions(items=60, tokenizer=RQVAEConfig(codebook_sizes=codes))
    table = lines(scaling.catalogue(a))
    trie = Trie(small.semantic_ids(60, codes))  # every id is taken: at most is what it is
    assert table["trie, at most"][0] == sum(x.nbytes for x in trie.buffers())
    buffers = [x for name, x in RQVAE(a.tokenizer).named_buffers() if name not in ("mean", "scale")]
    assert table["codebooks with moving averages; nearest codes"][0] == sum(x.nbytes for x in buffers)


def test_the_log_is_that_of_event_sequences():
    users, events = 40, 25
    log = small.sequences([[1] * events] * users, types=("item", "action", "time"))
    held = sum(getattr(log, field.name).nbytes for field in fields(log))
    assert held == users * (scaling.LOG_USER + events * scaling.LOG_EVENT) + 2 * 8  # both offsets begin with a 0


def test_requests():
    a = Assumptions(items=1e6)
    alone, scored = (
        [scaling.serve(a, scores, batch, a.device) for batch in (1, 64)] for scores in scaling.HEADS.values()
    )
    for few, many in (alone, scored):
        assert few[0] == many[0]
        assert few[1] > many[1]
        assert few[2] >= many[2]
    assert alone[1][2] < scored[1][2]
    assert all(slow >= fast for way in (alone, scored) for _, _, fast, slow in way)
    once, thrice = ([line[4] for line in scaling.everybody(Assumptions(users=x))][1] for x in (1e6, 3e6))
    assert thrice == pytest.approx(3 * once)


def test_the_document_has_the_tables_of_the_script():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = [block.rstrip("\n") for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    printed = [scaling.markdown(table(Assumptions())) for table in scaling.TABLES]
    assert blocks == printed, "python examples/scaling.py prints other tables; put them into docs/scaling.md"


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0 B"), (999.6, "1 kB"), (0.0412, "41.2 mB"), (10.24e9, "10.2 GB"), (7, "7 B")]
)
def test_numbers(x, text):
    assert scaling.si(x, "B") == text
    assert scaling.si(0.5) == "0.5"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"items": 0}, "items is 0; expected a positive number"),
        ({"users": (1e6, -1)}, "users is -1; expected a positive number"),
        ({"users": ()}, "users is 0; expected a positive number"),
        ({"peak_factor": math.nan}, "peak_factor is nan; expected a positive number"),
        ({"device": scaling.Device(link_bytes=0)}, "device.link_bytes is 0; expected a positive number"),
        (
            {"tokenizer": RQVAEConfig(codebook_sizes=(4, 4))},
            "items is 1e+07; expected at most 16, the ids of tokenizer.codebook_sizes",
        ),
    ],
)
def test_bad_assumptions(settings, sentence):
    with pytest.raises(ValueError) as error:
        Assumptions(**settings)
    assert str(error.value) == sentence


def test_bad_results(tmp_path):
    path = tmp_path / "results.csv"
    header = "case,contender,seconds,flops,matmul_rate,copy_rate,more\n"
    step = "".join(f'"{case}",genrec,1,0,1e11,1e10,x\n' for case in (scaling.STEP, scaling.SERVED))
    for text in (None, "a,b\n1,2\n", header, header + step.replace(",1,", ",one,")):
        if text is not None:
            path.write_text(text)
        scaling.measured.cache_clear()
        with pytest.raises(ValueError, match=r"^results is .*results\.csv; expected a table of the benchmark"):
            scaling.measured(path)
    path.write_text(header + step)
    scaling.measured.cache_clear()
    with pytest.raises(ValueError, match=r"^results is .*; expected cases of 'experts' in it$"):
        next(table for table in list(scaling.shares(Assumptions(results=path))))
    path.write_text(header + step + "experts 1,genrec,2,1e11,1e11,1e10,x\nexperts 2,genrec,2,1e11,1e11,1e10,x\n")
    scaling.measured.cache_clear()
    assert scaling.share(Assumptions(results=path), "experts", False) == 0.5


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "scaling.py"), run_name="__main__")


def test_command_line(monkeypatch, capsys):
    run(monkeypatch, "--users", "2e6", "--items", "1e5", "--gpus", "2", "--model", str(ROOT / "configs/ugt/base.yaml"))
    out = capsys.readouterr().out
    assert "| 2,000,000 |" in out
    assert f"| item | {100_001 * 257:,} |" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "gpus is 0; expected a positive number"),
        (["--beams", "many"], '"beams"'),
        (["--model.top_k", "99"], "model.top_k is 99; expected 1 to model.experts (16)"),
        (["--gpu", "8"], "--gpu"),
    ],
)
def test_command_line_errors_are_one_sentence(monkeypatch, arguments, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert str(stop.value).startswith("scaling.py: error: ")
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)

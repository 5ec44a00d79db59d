"""ReLU attention against what one writes in PyTorch, eager and compiled, and softmax attention for scale.

FLOPs are those of the visible pairs of a row and a key: 2 products forward, 5 more backward. Bytes are those of q, k, v
and the result, backward of their gradients too.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.peers import relu_attention as peers
from bench.race import passes
from bench.sizes import sizes
from genrec.kernels import relu_attention, relu_attention_varlen


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("b", "length", "d"),
    sizes(
        [(2, 64, 32)],
        [(8, 256, 64), (4, 512, 64), (2, 1024, 64), (1, 2048, 64)],
        [(32, 256, 128), (1, 2048, 128), (1, 4096, 64), (1, 16384, 64)],
    ),
)
def test_dense(race, compiled, randn, b, length, d, causal, backward):
    heads, inputs = 4, [randn(b, 4, length, d) for _ in range(3)]
    hidden = (torch.full((length, length), -torch.inf).triu(1) if causal else torch.zeros(length, length)).to(inputs[0])

    def definition(q, k, v):
        out = peers.plain(*(x.flatten(0, 1) for x in (q, k, v)), hidden)
        return out.unflatten(0, (b, heads))

    contenders = {
        "genrec": lambda q, k, v: relu_attention(q, k, v, causal=causal),
        "eager": definition,
        **compiled("compiled", definition),
    }
    calls = passes(contenders, inputs, backward)
    pairs = b * heads * (length * (length + 1) // 2 if causal else length * length)
    kind = f"{' causal' * causal}{' with backward' * backward}"
    race(
        f"attention B{b} H{heads} L{length} D{d}{kind}", calls,
        flops=(14 if backward else 4) * d * pairs, bytes=(12 if backward else 4) * inputs[0].nbytes,
        goal=1.5 if backward else 2.0, along=(f"attention D{d}{kind}, {b * length} tokens", "sequence length", length),
    )  # fmt: skip


@pytest.mark.size("default")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_softmax_of_the_same_flops(race, randn, causal):
    """Not a peer, for it computes something else."""
    q, k, v = (randn(2, 4, 1024, 64) for _ in range(3))
    calls = {
        "genrec": lambda: relu_attention(q, k, v, causal=causal),
        "sdpa (softmax)": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    pairs = 8 * (1024 * 1025 // 2 if causal else 1024**2)
    race(f"softmax attention B2 H4 L1024 D64{' causal' * causal}", calls, flops=256 * pairs, tolerance=None)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
@pytest.mark.parametrize(
    ("batch", "longest", "limited"),
    sizes(
        [(8, 30, False), (8, 30, True)],
        [(256, 25, False), (128, 50, False), (32, 200, False), (16, 512, False), (128, 50, True)],
        [(512, 50, False), (16, 2048, False), (16, 512, True)],
    ),
)
def test_packed_histories(race, compiled, randn, batch, longest, limited, backward):
    """Histories of 1 … longest events and a learned bias by distance, as in training; peers pad them to the longest."""
    heads, d, generator = 4, 32, torch.Generator(torch.get_default_device()).manual_seed(0)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inputs = [*(randn(int(cu[-1]), heads, d) for _ in range(3)), randn(heads, 64)]
    position = torch.arange(int(cu[-1])) - cu[:-1].repeat_interleave(lengths)
    options = {"key_limit": position + 1} if limited else {"causal": True}
    most, longest, padded = longest, int(lengths.max()), peers.padded(lengths)

    def genrec(q, k, v, bias):
        return relu_attention_varlen(q, k, v, cu, cu, longest, longest, rel_bias=bias, **options)

    contenders = {"genrec": genrec, "padded": padded, **compiled("padded, compiled", padded)}
    calls = passes(contenders, inputs, backward)
    pairs = heads * int((lengths * (lengths + 1) // 2).sum())
    kind = f"{'key_limit' if limited else 'causal'}{' with backward' * backward}"
    race(
        f"{batch} histories of up to {most} H4 D32, bias, {kind}", calls,
        flops=(14 if backward else 4) * d * pairs, bytes=(12 if backward else 4) * inputs[0].nbytes, goal=3.0,
        along=(f"histories, {kind}", "longest history", most),
    )  # fmt: skip


@pytest.mark.parametrize("keys", sizes([50], [1000]))
def test_decoding(race, compiled, randn, keys):
    """30 beams of 8 requests, one step: the beams of a request are rows that share its keys."""
    q, k, v = randn(8, 4, 30, 32), randn(8, 4, keys, 32), randn(8, 4, keys, 32)
    hidden = torch.zeros(30, keys).to(q)

    def definition():
        return peers.plain(*(x.flatten(0, 1) for x in (q, k, v)), hidden).unflatten(0, (8, 4))

    calls = {"genrec": lambda: relu_attention(q, k, v), "eager": definition, **compiled("compiled", definition)}
    race(
        f"8 requests, 30 beams, {keys} keys H4 D32", calls, flops=4 * 32 * 8 * 4 * 30 * keys,
        bytes=2 * (q.nbytes + k.nbytes), goal=2.0,
    )  # fmt: skip

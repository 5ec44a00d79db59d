"""A mixture of experts against the ways to write it in PyTorch: a loop of matrix products over tokens sorted by expert,
eager and compiled, torch's grouped product, and the definition.

FLOPs are those of three D × F products for each of a token's experts, and of six more backward. Few tokens are bound by
the weights of the experts they visit, which with x and y are the bytes, and every call has others.
"""

import pytest
import torch

from bench.peers import moe as peers
from bench.race import passes
from bench.sizes import sizes
from genrec.kernels import moe_experts, moe_route
from genrec.kernels.moe import reference

EXPERTS, TOP_K = 16, 4


SHAPES = sizes(
    [(32, 64, 128)],
    [(1, 256, 512), (32, 256, 512), (256, 256, 512), (2048, 64, 128), (2048, 256, 512)],
    [(8192, 256, 512), (2048, 512, 1024), (2048, 1024, 2048)],
)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
@pytest.mark.parametrize(("tokens", "d", "f"), SHAPES)
def test_experts(race, compiled, randn, tokens, d, f, backward):
    weights, indices = reference.moe_route(randn(tokens, EXPERTS), TOP_K)
    inputs = [randn(tokens, d), weights, randn(EXPERTS, 2 * f, d) / d**0.5, randn(EXPERTS, d, f) / f**0.5]
    plain = {
        "definition": lambda x, weights, up, down, ids: reference.moe_experts(x, weights, ids, up, down),
        "sorted loop": peers.sorted_loop,
        **compiled("sorted loop, compiled", peers.sorted_loop),
        "grouped product": peers.grouped_product,
        **peers.fused(inputs[0].dtype),
    }
    forms = {"genrec": lambda x, weights, up, down: moe_experts(x, weights, indices, up, down)}
    forms |= {name: (lambda *leaves, form=form: form(*leaves, indices)) for name, form in plain.items()}
    visited = len(indices.unique()) * 3 * d * f * 4
    race(
        f"experts {tokens}×{d}, F {f}{' with backward' * backward}", passes(forms, inputs, backward, tokens <= 32),
        flops=(18 if backward else 6) * d * f * TOP_K * tokens,
        bytes=(3 if backward else 1) * (visited + 2 * inputs[0].nbytes), goal=1.5 if tokens <= 32 else 1.3,
        along=(f"experts D {d}, F {f}{' with backward' * backward}", "tokens", tokens),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", sizes([32], [1, 8192]))
def test_route(race, compiled, randn, tokens):
    logits = randn(tokens, EXPERTS, dtype=torch.float32)

    def plain():
        return peers.route(logits, TOP_K)

    contenders = {"genrec": lambda: moe_route(logits, TOP_K), "eager": plain, **compiled("compiled", plain)}
    race(f"route {tokens} tokens", contenders)

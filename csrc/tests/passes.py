"""Both passes of every operator: what test_sanitizers.py runs under kernels that watch themselves.

`python passes.py shapes` draws small sizes at random, in every dtype, and compares nothing.
`python passes.py threads OVERLAP OPERATOR…` takes sizes that are worth several threads, all operators if none is named,
and compares the bits with those of one thread. It needs kernels with threads.cpp, which says what OVERLAP is.
"""

import ctypes
import random
import sys

import torch
from op_contract import run
from torch import Tensor

from genrec.kernels import group_layer_norm, moe_experts, moe_route, relu_attention, relu_attention_varlen, rq_nearest
from genrec.kernels.library import native_library

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def dense(dtype: torch.dtype, rows: int, keys: int, dim: int, dim_v: int, reach: int, causal: bool) -> list[Tensor]:
    tensors = randn(dtype, (2, 3, rows, dim), (2, 3, keys, dim), (2, 3, keys, dim_v), (3, reach))
    limit = None if causal else torch.randint(-1, keys + 3, (2, rows))
    return flat(run(lambda q, k, v, b: relu_attention(q, k, v, causal=causal, key_limit=limit, rel_bias=b), tensors))


def varlen(dtype: torch.dtype, lengths: list[int], slack: int, dim: int, dim_v: int, reach: int) -> list[Tensor]:
    cu, tokens, longest = torch.tensor([0, *lengths]).cumsum(0), sum(lengths) + slack, max(lengths)
    tensors = randn(dtype, (tokens, 2, dim), (tokens, 2, dim), (tokens, 2, dim_v), (2, reach))
    return flat(run(lambda q, k, v, b: relu_attention_varlen(q, k, v, cu, cu, longest, longest, rel_bias=b), tensors))


def norm(dtype: torch.dtype, rows: int, dim: int, groups: int) -> list[Tensor]:
    ids = torch.randint(0, groups, (rows,))
    tensors = randn(dtype, (rows, dim), (rows, dim), (groups, dim), (groups, dim))
    plain = run(lambda x, w, b: group_layer_norm(x, ids, w, b), [tensors[0], *tensors[2:]])
    return flat(plain, run(lambda x, r, w, b: group_layer_norm(x, ids, w, b, residual=r), tensors))


def experts(dtype: torch.dtype, tokens: int, dim: int, hidden: int, count: int, slots: int) -> list[Tensor]:
    logits, *tensors = randn(dtype, (tokens, count), (tokens, dim), (count, 2 * hidden, dim), (count, dim, hidden))
    weights, indices = moe_route(logits, slots)
    routed = run(lambda x: moe_route(x, slots)[0], [logits])
    x, gate_up, down = tensors
    return flat(routed, run(lambda x, w, a, b: moe_experts(x, w, indices, a, b), [x, weights, gate_up, down]))


def nearest(dtype: torch.dtype, rows: int, dim: int, sizes: list[int]) -> list[Tensor]:
    x, *books = randn(dtype, (rows, dim), *((size, dim) for size in sizes))
    return [rq_nearest(x, books)[0], *flat(run(lambda *books: rq_nearest(x, list(books))[1], books))]


def flat(*results: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [tensor for result in results for tensors in result for tensor in tensors]


LARGE = {  # several shares of every loop
    "relu_attention": lambda dtype: dense(dtype, 200, 230, 32, 24, 90, causal=True),
    "relu_attention_varlen": lambda dtype: varlen(dtype, [400, 7, 90, 0, 1], 3, 32, 16, 90),
    "group_layer_norm": lambda dtype: norm(dtype, 3000, 96, 3),
    "moe_experts": lambda dtype: experts(dtype, 900, 40, 56, 5, 2),
    "rq_nearest": lambda dtype: nearest(dtype, 700, 24, [1000, 300]),
}


def shapes(rounds: int = 40) -> None:
    chance = random.Random(0)
    size = lambda most, least=1: chance.randint(least, most)  # noqa: E731
    for dtype in rounds * DTYPES:
        dense(dtype, size(70, 0), size(70, 0), size(40), size(40), size(90), causal=chance.random() < 0.5)
        varlen(dtype, [size(70, 0) for _ in range(size(4))], size(3, 0), size(40), size(40), size(90))
        norm(dtype, size(40, 0), size(150), size(5))
        count = size(6)
        experts(dtype, size(60, 0), size(70), size(70), count, size(count))
        nearest(dtype, size(300, 0), size(40), [size(150) for _ in range(size(3))])


def threads(overlap: int, operators: list[str]) -> None:
    kernels = ctypes.CDLL(str(native_library()))
    for name in operators or LARGE:
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for count, shared in ((1, 0), (4, overlap)):
                kernels.genrec_threads(count, shared)
                torch.manual_seed(0)
                results.append(LARGE[name](dtype))
                shares = kernels.genrec_threads(1, 0)
                assert shares == count, f"{name}: {shares} shares of the largest loop, expected {count}"
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), f"{name} is not the same on 4 threads"


if __name__ == "__main__":
    shapes() if sys.argv[1] == "shapes" else threads(int(sys.argv[2]), sys.argv[3:])
